"""What is compiled beforehand is what the steps of `make gpu` launch: no binary is missing."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import pytest
import torch
from kernel_guards import guarded

from cflow_fast import parity
from cflow_fast.bench import warm
from cflow_fast.bench.cases import ENCODERS, rough_decoder
from cflow_fast.bench.planned import (
    CONDITION,
    FIRST_SIZES,
    SMALL_PRECISIONS,
    TESTED,
    TESTED_BLOCKS,
    planned_launches,
)
from cflow_fast.bench.warm import _binary_key, run_small
from cflow_fast.kernels import torch_flow, tuning
from cflow_fast.kernels.chip import Chip
from cflow_fast.kernels.launch import Launch
from cflow_fast.kernels.torch_flow import TorchFlow
from cflow_fast.kernels.triton_flow import TritonFlow
from cflow_fast.ops import KERNEL_PRECISIONS
from cflow_fast.positional import encoding_factors

Binary = tuple[tuple[object, ...], bool]
"""What tells binaries apart, and whether all pointers are aligned."""


@pytest.fixture(autouse=True)
def no_table_of_ones_own(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    monkeypatch.setenv("CFLOW_FAST_CACHE", str(tmp_path))
    tuning.forget()
    yield
    tuning.forget()


@pytest.fixture
def launched(monkeypatch: pytest.MonkeyPatch) -> set[Binary]:
    """The binaries of what is launched, which nothing runs."""
    keys: set[Binary] = set()
    monkeypatch.setattr(torch_flow, "CPU_CHUNK_ROWS", torch_flow.GPU_CHUNK_ROWS)
    monkeypatch.setattr(Launch, "run", lambda launch: keys.add((_binary_key(launch), _is_aligned(launch))))
    return keys


def _is_aligned(launch: Launch) -> bool:
    """Of a pointer that is not Triton makes another kernel. A caller's features may lie anywhere."""
    tensors = {name: value for name, value in launch.args.items() if isinstance(value, torch.Tensor)}
    own = [value for name, value in tensors.items() if name not in ("x_ptr", "x1_ptr", "x2_ptr", "features_ptr")]
    return all(tensor.data_ptr() % 16 == 0 for tensor in own)


@pytest.fixture(scope="module")
def compiled() -> set[Binary]:
    return {(_binary_key(launch), True) for launch in planned_launches(Chip())}


@pytest.mark.parametrize("permute_soft", [False, True], ids=["hard", "soft"])
@pytest.mark.parametrize("features", [*FIRST_SIZES, 41])
def test_nothing_is_left_to_compile_while_decoders_are_compared(
    features: int, permute_soft: bool, launched: set[Binary], compiled: set[Binary]
) -> None:
    """Both ways, in every precision of a card."""
    case = parity.random_case(features, permute_soft)
    encoding = encoding_factors(128, *case.features.shape[2:])
    for precision in parity.precisions(torch.device("cuda")):
        folded = case.decoder.fold("bf16" if precision == "bf16" else "fp32")
        dtype = torch.bfloat16 if precision == "bf16" else torch.float32
        for flow in (
            TritonFlow(folded.weights, KERNEL_PRECISIONS[precision]),
            TorchFlow(folded.weights, dtype, packed=False, fused=True),
        ):
            flow.log_prob_map(case.features, encoding)
    assert launched
    assert not launched - compiled


@pytest.mark.parametrize(("precision", "dtype"), [("bf16", torch.bfloat16), ("bf16", torch.float32), ("fp32", None)])
def test_nor_while_whole_models_are_timed_and_judged(
    precision: str, dtype: torch.dtype | None, launched: set[Binary], compiled: set[Binary]
) -> None:
    scales = ENCODERS["resnet18"]
    for features, side in zip(scales.channels, scales.sides(256), strict=True):
        folded = rough_decoder(features, 128, 8, permute_soft=False).fold(precision)
        maps = torch.randn(1, features, side, side, dtype=dtype).contiguous(memory_format=torch.channels_last)
        flow = TritonFlow(folded.weights, KERNEL_PRECISIONS[precision])
        flow.log_prob_map(maps, encoding_factors(128, side, side))
    assert launched
    assert not launched - compiled


@pytest.mark.parametrize("permute_soft", [False, True], ids=["hard", "soft"])
def test_nor_while_freias_modules_are_called_after_one_line(
    permute_soft: bool, launched: set[Binary], compiled: set[Binary]
) -> None:
    folded = rough_decoder(512, 128, 8, permute_soft=permute_soft).fold("bf16")
    TritonFlow(folded.weights, "bf16").rows(torch.randn(1024, 512), torch.randn(1024, 128), want_u=True)
    assert launched
    assert not launched - compiled


def test_nor_while_memory_is_checked(
    launched: set[Binary], compiled: set[Binary], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("CFLOW_FAST_BACKEND", "triton")
    run_small(torch.device("cpu"))
    assert {key[0] for key, _ in launched} == {
        *("whole_flow_kernel", "packing_kernel", "scaling_kernel"),
        *("linear_kernel", "coupling_kernel", "reduction_kernel"),
    }
    assert not launched - compiled


@pytest.mark.parametrize("permute_soft", [False, True], ids=["hard", "soft"])
def test_nor_while_decoders_are_tested(permute_soft: bool, launched: set[Binary], compiled: set[Binary]) -> None:
    (narrow, sizes), _ = TESTED
    for features in narrow:
        decoder = rough_decoder(features, CONDITION, TESTED_BLOCKS, permute_soft=permute_soft)
        for precision in SMALL_PRECISIONS:
            folded = decoder.fold(precision)
            for batch, side in sizes:
                flow = TritonFlow(folded.weights, KERNEL_PRECISIONS[precision])
                flow.log_prob_map(torch.randn(batch, features, side, side), encoding_factors(CONDITION, side, side))
    assert launched
    assert not launched - compiled


@pytest.mark.parametrize("features", warm.SMALL_FEATURES)
def test_what_is_checked_touches_nothing_but_its_memory(features: int, monkeypatch: pytest.MonkeyPatch) -> None:
    """The same decoders, in the tiles that a card launches, as far as an interpreter sees it."""
    monkeypatch.setenv("CFLOW_FAST_BACKEND", "triton")
    monkeypatch.setattr(warm, "SMALL_FEATURES", (features,))
    monkeypatch.setattr(warm, "SMALL_MAPS", warm.SMALL_MAPS[:1])
    with guarded():
        run_small(torch.device("cpu"))
