"""The torch ops: opcheck's rules, and a folded decoder seen through by torch.compile and torch.export."""

from __future__ import annotations

import copy
import gc
import math
from collections.abc import Callable
from typing import Any

import numpy as np
import pytest
import torch
from flows import rough_decoder
from kernel_guards import guarded
from torch import Tensor, nn
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.overrides import TorchFunctionMode
from torch.utils._python_dispatch import TorchDispatchMode

from cflow_fast import FoldedDecoder
from cflow_fast.anomaly import anomaly_map
from cflow_fast.kernels import registration
from cflow_fast.kernels.torch_flow import TorchFlow

OPS = torch.ops.cflow_fast
FEATURES = torch.randn(2, 7, 3, 4, generator=torch.Generator().manual_seed(0))
ROWS = tuple(torch.randn(5, size, generator=torch.Generator().manual_seed(size)) for size in (7, 8))
"""And their condition."""


def folded(precision: str = "fp32", **options: Any) -> FoldedDecoder:
    return rough_decoder(**options).fold(precision)


def op_arguments(decoder: FoldedDecoder, features: Tensor, condition: Tensor | None = None) -> tuple[Any, ...]:
    return features, condition, decoder._tensors, *decoder._description


def log_probs(batch: int = 2) -> list[Tensor]:
    generator = torch.Generator().manual_seed(1)
    return [torch.randn(batch, *shape, generator=generator) - 1.4 for shape in ((3, 4), (2, 1))]


class Score(nn.Module):
    """A module of the kind that is exported: two decoders, one map."""

    def __init__(self) -> None:
        super().__init__()
        self.decoders = nn.ModuleList([folded(), folded(condition=0, permute_soft=True)])

    def forward(self, features: Tensor) -> tuple[Tensor, Tensor]:
        log_probs = [decoder.log_prob(features) / 7 for decoder in self.decoders]  # type: ignore[operator]
        return registration.anomaly_map(log_probs, (6, 5), [-1.0, -1.0], "torch")


@pytest.mark.parametrize("maxima", [[-1.0, -1.1], None])
@pytest.mark.parametrize("backend", ["torch", "triton"])
def test_anomaly_map_passes_opcheck(maxima: list[float] | None, backend: str) -> None:
    torch.library.opcheck(OPS.anomaly_map, (log_probs(), [5, 6], maxima, backend))


@pytest.mark.parametrize("options", [{}, {"condition": 0}, {"permute_soft": True}])
def test_flow_log_prob_passes_opcheck(options: dict[str, Any]) -> None:
    torch.library.opcheck(OPS.flow_log_prob, op_arguments(folded(**options), FEATURES))


def test_flow_log_prob_passes_opcheck_on_rows() -> None:
    condition = torch.randn(5, 8)
    torch.library.opcheck(OPS.flow_log_prob, op_arguments(folded("bf16"), torch.randn(5, 7), condition))


@pytest.mark.parametrize("backend", ["", "torch", "triton"])
@pytest.mark.parametrize("options", [{}, {"condition": 0}, {"permute_soft": True}])
def test_flow_rows_passes_opcheck(options: dict[str, Any], backend: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("CFLOW_FAST_BACKEND", backend)
    decoder, (z, c) = folded(**options), ROWS
    torch.library.opcheck(OPS.flow_rows, op_arguments(decoder, z, c if decoder.condition else None))


@pytest.mark.parametrize("batch", [0, 2])
def test_fake_results_have_the_shape_dtype_and_strides_of_real_ones(batch: int) -> None:
    for precision in ("fp32", "fp64", "bf16"):
        decoder = folded(precision)
        arguments = op_arguments(decoder, FEATURES[:batch])
        fake = registration._fake_flow_log_prob(*arguments)
        real = OPS.flow_log_prob(*arguments)
        assert (fake.shape, fake.dtype, fake.stride()) == (real.shape, real.dtype, real.stride())
        arguments = op_arguments(decoder, *(row[:batch] for row in ROWS))
        for fake, real in zip(registration._fake_flow_rows(*arguments), OPS.flow_rows(*arguments), strict=True):
            assert (fake.shape, fake.dtype, fake.stride()) == (real.shape, real.dtype, real.stride())


def test_backends_of_the_anomaly_map_agree() -> None:
    for maxima in ([-1.0, -1.1], None):
        for one, other in zip(
            *(OPS.anomaly_map(log_probs(), [5, 6], maxima, b) for b in ("torch", "triton")), strict=True
        ):
            torch.testing.assert_close(one, other, rtol=0, atol=1e-6)


def test_empty_batch_has_an_empty_map() -> None:
    for backend in ("torch", "triton"):
        result, score = OPS.anomaly_map(log_probs(0), [5, 6], None, backend)
        assert (result.shape, score.shape) == ((0, 5, 6), (0,))


@pytest.mark.parametrize("backend", ["eager", "aot_eager"])
@pytest.mark.parametrize("options", [{}, {"condition": 0}, {"permute_soft": True}])
def test_compiled_log_prob_has_no_graph_break_and_the_same_numbers(backend: str, options: dict[str, Any]) -> None:
    decoder = folded(**options)
    compiled = torch.compile(decoder.log_prob, backend=backend, fullgraph=True)
    assert torch.equal(compiled(FEATURES), decoder.log_prob(FEATURES))


def test_compiled_log_prob_takes_rows_and_other_sizes() -> None:
    decoder = folded()
    compiled = torch.compile(decoder.log_prob, backend="aot_eager", fullgraph=True, dynamic=True)
    for features in (FEATURES, FEATURES.repeat(2, 1, 2, 1)):
        assert torch.equal(compiled(features), decoder.log_prob(features))
    rows = (torch.randn(5, 7), torch.randn(5, 8))
    assert torch.equal(compiled(*rows), decoder.log_prob(*rows))


@pytest.mark.parametrize("options", [{}, {"condition": 0}, {"permute_soft": True}])
def test_compiled_call_as_freia_has_no_graph_break_and_the_same_numbers(options: dict[str, Any]) -> None:
    decoder = folded(**options)
    compiled = torch.compile(decoder, backend="aot_eager", fullgraph=True, dynamic=True)
    for z, c in (ROWS, [row.repeat(3, 1) for row in ROWS]):
        condition = [c] if decoder.condition else None
        for one, other in zip(compiled(z, condition), decoder(z, condition), strict=True):
            assert torch.equal(one, other)


@pytest.mark.parametrize("strict", [False, True])
def test_exported_call_as_freia_computes_the_same(strict: bool) -> None:
    decoder, (z, c) = folded(), ROWS
    program = torch.export.export(decoder, (z, [c]), strict=strict)
    assert [str(node.target) for node in program.graph.nodes].count("cflow_fast.flow_rows.default") == 1
    for one, other in zip(program.module()(z, [c]), decoder(z, [c]), strict=True):
        assert torch.equal(one, other)


@pytest.mark.parametrize("strict", [False, True])
def test_exported_module_computes_the_same(strict: bool) -> None:
    module = Score().eval()
    program = torch.export.export(module, (FEATURES,), strict=strict)
    targets = [str(node.target) for node in program.graph.nodes]
    assert targets.count("cflow_fast.flow_log_prob.default") == 2
    assert targets.count("cflow_fast.anomaly_map.default") == 1
    for one, other in zip(program.module()(FEATURES), module(FEATURES), strict=True):
        assert torch.equal(one, other)


def test_library_runs_triton_through_the_same_ops(monkeypatch: pytest.MonkeyPatch) -> None:
    plain, scales = folded().log_prob(FEATURES), log_probs()
    expected = anomaly_map(scales, 6)
    monkeypatch.setenv("CFLOW_FAST_BACKEND", "triton")
    decoder = folded()
    compiled = torch.compile(decoder.log_prob, backend="aot_eager", fullgraph=True)
    with guarded() as guard:
        log_prob = compiled(FEATURES)
        result = anomaly_map(scales, 6)
    assert {"whole_flow_kernel", "tail_kernel"} <= {launch.name for launch in guard.launches}
    torch.testing.assert_close(log_prob, plain, rtol=1e-5, atol=1e-5)
    torch.testing.assert_close(result, expected, rtol=0, atol=1e-6)
    assert torch.equal(log_prob, decoder.log_prob(FEATURES))
    assert anomaly_map([scale.double() for scale in scales], 6).dtype == torch.float64
    assert anomaly_map([scale.requires_grad_() for scale in scales], 6).requires_grad


def test_autocast_around_a_call_changes_nothing() -> None:
    decoder = folded()
    compiled = torch.compile(decoder.log_prob, backend="aot_eager", fullgraph=True)
    expected = decoder.log_prob(FEATURES)
    with torch.autocast("cpu", torch.bfloat16):
        assert torch.equal(decoder.log_prob(FEATURES), expected)
        assert torch.equal(compiled(FEATURES), expected)
        u, log_det = decoder(ROWS[0], [ROWS[1]])
    expected_u, expected_log_det = decoder(ROWS[0], [ROWS[1]])
    assert torch.equal(u, expected_u)
    assert torch.equal(log_det, expected_log_det)


@pytest.fixture
def prepared(monkeypatch: pytest.MonkeyPatch) -> list[TorchFlow]:
    """Flows as they are made; not kept alive by this list's owner alone."""
    made: list[Any] = []
    dispatch = registration._dispatch[0]

    def prepare(weights: Any, precision: str) -> Any:
        made.append(precision)
        return dispatch.prepare(weights, precision)

    monkeypatch.setattr(registration, "_dispatch", [registration.FlowDispatch(prepare, dispatch.encoding)])
    return made


def test_weights_are_prepared_once_for_every_way_of_calling(prepared: list[Any]) -> None:
    decoder = folded()
    compiled = torch.compile(decoder.log_prob, backend="aot_eager", fullgraph=True)
    program = torch.export.export(Holder(decoder), (FEATURES,)).module()
    for _ in range(3):
        compiled(FEATURES)
        decoder.log_prob(FEATURES)
        OPS.flow_log_prob(*op_arguments(decoder, FEATURES))
        program(FEATURES)
        decoder(ROWS[0], [ROWS[1]])
    assert len(prepared) == 1


class Holder(nn.Module):
    def __init__(self, decoder: FoldedDecoder) -> None:
        super().__init__()
        self.decoder = decoder

    def forward(self, features: Tensor) -> Tensor:
        return self.decoder.log_prob(features)


def test_weights_changed_in_place_are_prepared_anew(prepared: list[Any]) -> None:
    decoder, other = folded(), folded(seed=4)
    compiled = torch.compile(decoder.log_prob, backend="aot_eager", fullgraph=True)
    compiled(FEATURES)
    decoder.load_state_dict(other.state_dict())
    assert torch.equal(decoder.log_prob(FEATURES), other.log_prob(FEATURES))
    assert torch.equal(compiled(FEATURES), other.log_prob(FEATURES))
    assert len(prepared) == 3


def test_prepared_copies_go_with_their_decoder() -> None:
    gc.collect()
    before = len(registration._flows._flows)
    decoder = folded()
    decoder.log_prob(FEATURES)
    OPS.flow_log_prob(*op_arguments(decoder, FEATURES))
    clone = copy.deepcopy(decoder)
    clone.log_prob(FEATURES)
    assert len(registration._flows._flows) == before + 2
    del decoder, clone
    gc.collect()
    assert len(registration._flows._flows) == before


class _OnCard(Tensor):
    """A tensor that says that it lies on a card; here it lies nowhere."""

    @property
    def device(self) -> torch.device:  # type: ignore[override]
        return torch.device("cuda", 0)


def on_card(*shape: int) -> Tensor:
    return torch.empty(shape, device="meta").as_subclass(_OnCard)


class _Flow:
    """What a call asks of its flow; the answers are sums, row by row."""

    def __init__(self, often: bool) -> None:
        self.often, self.asked = often, []  # type: ignore[var-annotated]

    def launches_often(self, rows: int, own_condition: bool) -> bool:
        self.asked.append((rows, own_condition))
        return self.often


@pytest.mark.parametrize(
    ("shapes", "often", "parts"),
    [
        ([(64, 512)], True, [64]),
        ([(32, 512, 32, 32)], True, [32]),
        ([(33, 512, 32, 32)], True, [32, 1]),
        ([(3, 512, 140, 140)], True, [1, 1, 1]),
        ([(32768, 512), (32768, 128)], True, [26112, 6656]),
        ([(100000, 512), (100000, 128)], True, [26112, 26112, 26112, 21664]),
        ([(1, 512, 256, 256)], True, []),  # an image cannot be divided
        ([(0, 512)], True, []),
        ([(64, 64)], False, []),  # one launch gains nothing
    ],
)
def test_calls_of_many_launches_take_graphs_of_a_bounded_size(
    shapes: list[tuple[int, ...]], often: bool, parts: list[int], monkeypatch: pytest.MonkeyPatch
) -> None:
    flow = _Flow(often)
    prepared = registration._Prepared(flow, (None, []))  # type: ignore[arg-type]
    features, *condition = [on_card(*shape) for shape in shapes]
    own = condition[0] if condition else None
    found = prepared._parts(features, own)
    assert [len(part[0]) for part in found] == parts
    assert all(len(tensor) == len(part[0]) for part in found for tensor in part)
    assert all(sum(tensor.numel() for tensor in part) <= registration.GRAPH_ELEMENTS for part in found)
    if parts:
        assert flow.asked == [(parts[0] * math.prod(shapes[0][2:]), own is not None)]
    monkeypatch.setenv("CFLOW_FAST_GRAPHS", "0")
    assert not prepared._parts(features, own)


def test_parts_of_a_call_come_together_in_their_order(monkeypatch: pytest.MonkeyPatch) -> None:
    z, c = torch.randn(7, 3), torch.randn(7, 2)
    monkeypatch.setattr(registration, "_log_prob", lambda flow, z, c=None: z.sum(1) - (0 if c is None else c.sum(1)))
    monkeypatch.setattr(registration, "_rows", lambda flow, z, c: (z + 1, z.sum(1) - c.sum(1)))
    prepared = registration._Prepared(_Flow(True), (None, []))  # type: ignore[arg-type]
    halves = [(z[:4], c[:4]), (z[4:], c[4:])]
    monkeypatch.setattr(prepared, "_parts", lambda z, c: halves if c is not None else [(half[0],) for half in halves])
    assert torch.equal(prepared.log_prob(z, None), z.sum(1))
    assert torch.equal(prepared.log_prob(z, c), z.sum(1) - c.sum(1))
    u, log_det = prepared.rows(z, c)
    assert torch.equal(u, z + 1)
    torch.testing.assert_close(log_det, z.sum(1) - c.sum(1))


def test_other_weights_in_the_same_place_leave_nothing_of_the_old_ones(prepared: list[Any]) -> None:
    decoder, other = folded(), folded(seed=4)
    assert decoder._description != other._description, "log_scale is a number beside the tensors"
    decoder.log_prob(FEATURES)
    kept = len(registration._flows._flows)
    decoder.load_state_dict(other.state_dict())
    decoder.log_prob(FEATURES)
    assert len(registration._flows._flows) == kept
    assert len(prepared) == 2


def test_gradients_are_refused_by_every_way_of_calling() -> None:
    decoder, features = folded(), FEATURES.clone().requires_grad_()
    with pytest.raises(RuntimeError, match="a folded decoder has no gradients"):
        decoder.log_prob(features)
    compiled = torch.compile(decoder.log_prob, backend="eager", fullgraph=True)
    with pytest.raises(Exception, match="a folded decoder has no gradients"):
        compiled(features)
    with pytest.raises(RuntimeError, match="a folded decoder has no gradients"):
        OPS.flow_log_prob(*op_arguments(decoder, features)).sum().backward()
    with pytest.raises(RuntimeError, match="a folded decoder has no gradients"):
        decoder(ROWS[0].clone().requires_grad_(), [ROWS[1]])
    with pytest.raises(RuntimeError, match="a folded decoder has no gradients"):
        OPS.flow_rows(*op_arguments(decoder, ROWS[0].clone().requires_grad_(), ROWS[1]))[0].sum().backward()
    maps = [log_prob.requires_grad_() for log_prob in log_probs()]
    with pytest.raises(RuntimeError, match="the anomaly map's op has no gradients"):
        OPS.anomaly_map(maps, [3, 3], None, "torch")[0].sum().backward()


class _Listening(Tensor):
    pass


def _in_trace(x: Tensor) -> bool:
    seen: list[bool] = []
    torch.jit.trace(lambda x: (seen.append(registration._nobody_listens(x)), x + 1)[1], (x,), check_trace=False)
    return any(seen)


def _in_vmap(x: Tensor) -> bool:
    seen: list[bool] = []
    torch.func.vmap(lambda x: (seen.append(registration._nobody_listens(torch.ones(2))), x)[1])(x)
    return any(seen)


class _DispatchMode(TorchDispatchMode):
    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        return func(*args, **(kwargs or {}))


class _FunctionMode(TorchFunctionMode):
    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        return func(*args, **(kwargs or {}))


def _in_mode(mode: Any, x: Tensor) -> bool:
    with mode:
        return registration._nobody_listens(x)


LISTENERS: dict[str, Callable[[Tensor], bool]] = {
    "gradients": lambda x: registration._nobody_listens(x.requires_grad_()),
    "a subclass": lambda x: registration._nobody_listens(x.as_subclass(_Listening)),
    "one of several": lambda x: registration._nobody_listens(x, None, x.clone().requires_grad_()),
    "fake tensors": lambda x: _in_mode(FakeTensorMode(), x),
    "a dispatch mode": lambda x: _in_mode(_DispatchMode(), x),
    "a function mode": lambda x: _in_mode(_FunctionMode(), x),
    "a profiler": lambda x: _in_mode(torch.profiler.profile(), x),
    "weights with gradients": lambda x: registration._nobody_listens(x, nn.Parameter(x.clone())),
    "a trace": _in_trace,
    "vmap": _in_vmap,
}


@pytest.mark.filterwarnings("ignore:.*torch.jit")
@pytest.mark.parametrize("listener", LISTENERS)
def test_whoever_traces_or_transforms_operations_sees_these(listener: str) -> None:
    x = torch.ones(2, 3)
    assert registration._nobody_listens(x, None)
    assert not LISTENERS[listener](x)


def test_a_size_may_be_any_integers() -> None:
    expected = registration.anomaly_map(log_probs(), (8, 6), [-1.0, -1.0], "triton")
    sizes = np.array([8, 6])
    for mine, theirs in zip(registration.anomaly_map(log_probs(), sizes, [-1, -1], "triton"), expected, strict=True):
        assert torch.equal(mine, theirs)


def test_a_call_past_the_dispatcher_is_the_ops() -> None:
    decoder = folded()
    assert torch.equal(decoder.log_prob(FEATURES), OPS.flow_log_prob(*op_arguments(decoder, FEATURES)))
    z, c = ROWS
    for mine, theirs in zip(decoder(z, [c]), OPS.flow_rows(*op_arguments(decoder, z, c)), strict=True):
        assert torch.equal(mine, theirs)
    for mine, theirs in zip(
        registration.anomaly_map(log_probs(), (9, 7), None, "torch"),
        OPS.anomaly_map(log_probs(), [9, 7], None, "torch"),
        strict=True,
    ):
        assert torch.equal(mine, theirs)
