"""Compiled flows on CPUs: teams of threads, chunks, tails, memory, faults, and the choice of compiled code."""

from __future__ import annotations

import ctypes
import os
import platform
import subprocess
import sys
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from compiled_code import (
    CPU,
    SOURCES,
    VARIANTS,
    assert_same_map,
    built,
    compiled,
    has_amx,
    needs_compiler,
    scales_of,
)
from flows import rough_decoder
from torch import Tensor

from cflow_fast import ops
from cflow_fast.folding import MIXING_MATRICES
from cflow_fast.kernels import cpu_library, cpu_map
from cflow_fast.kernels.anomaly_map import anomaly_map
from cflow_fast.kernels.cpu_flow import CpuFlow
from cflow_fast.kernels.cpu_library import Library, library, library_file
from cflow_fast.kernels.flow import FlowResult
from cflow_fast.kernels.torch_flow import TorchFlow
from cflow_fast.kernels.weights import FlowWeights, SoftMixing
from cflow_fast.positional import encoding_factors
from cflow_fast.precision import arithmetic

pytestmark = pytest.mark.usefixtures("stale_memory")

BOUND = {torch.float32: 3e-6, torch.bfloat16: 3e-3}
"""Of the deviation of log p / D, for decoders of few features."""
ONE_OPERAND = 0.03
"""The same in bfloat16 where a number of a soft permutation is one operand."""
MAPS = [(1, 1, 1), (2, 5, 7), (3, 16, 16), (1, 20, 33), (1, 32, 32), (5, 1, 40), (2, 8, 8)]


@pytest.fixture(params=VARIANTS)
def lib(request: pytest.FixtureRequest) -> Library:
    return built(request.param)


def weights_of(features: int, condition: int, operand: torch.dtype, **options: Any) -> FlowWeights:
    decoder = rough_decoder(features, condition=condition, **options)
    return decoder.fold("bf16" if operand == torch.bfloat16 else "fp32").weights


def with_mixing_in(weights: FlowWeights, dtype: torch.dtype) -> FlowWeights:
    """The same, the matrices of its soft permutations in another precision: two operands a number, or one."""
    matrices = {name: getattr(weights.mixing, name).to(dtype) for name in MIXING_MATRICES}
    return replace(weights, mixing=replace(weights.mixing, **matrices))  # type: ignore[type-var]


def exact(weights: FlowWeights) -> TorchFlow:
    """The same weights multiplied in float32."""
    return TorchFlow(weights, torch.float32, packed=False)


def bound_of(weights: FlowWeights, operand: torch.dtype) -> float:
    rough = isinstance(weights.mixing, SoftMixing) and weights.mixing.matrix.dtype == torch.bfloat16
    return ONE_OPERAND if rough and operand == torch.bfloat16 else BOUND[operand]


def assert_close(ours: Tensor, expected: Tensor, weights: FlowWeights, operand: torch.dtype) -> None:
    assert ours.shape == expected.shape
    assert ((ours - expected) / weights.features).abs().max() < bound_of(weights, operand)


def assert_same_rows(ours: FlowResult, expected: FlowResult, weights: FlowWeights, operand: torch.dtype) -> None:
    assert ours.u is not None
    assert expected.u is not None
    assert_close(ours.log_prob, expected.log_prob, weights, operand)
    assert_close(ours.log_det, expected.log_det, weights, operand)
    atol = (30 if operand == torch.float32 else 3) * bound_of(weights, operand)
    torch.testing.assert_close(ours.u, expected.u, rtol=0, atol=atol)


@pytest.mark.parametrize("mixing", ["hard", "soft", "soft, one operand a number"])
@pytest.mark.parametrize(("features", "condition"), [(24, 8), (25, 0), (29, 8), (65, 0), (97, 16)])
@pytest.mark.parametrize("count", [1, 2, 5])
def test_every_division_of_the_rows_gives_the_same(
    lib: Library, count: int, features: int, condition: int, mixing: str, threads: Any
) -> None:
    """Rows from one to several chunks of every thread: teams of one, teams of all, panels that end within an image."""
    threads(count)
    weights = weights_of(features, condition, lib.operand, permute_soft=mixing != "hard")
    if "one operand" in mixing:
        weights = with_mixing_in(weights, lib.operand)
    flow, expected = CpuFlow(weights, lib), exact(weights)
    for flow.chunk_panels in (1, 3):
        for batch, height, width in MAPS:
            maps = torch.randn(batch, features, height, width)
            encoding = encoding_factors(condition, height, width) if condition else None
            ours, theirs = (each.log_prob_map(maps, encoding) for each in (flow, expected))
            assert_close(ours, theirs, weights, lib.operand)
        z, c = torch.randn(70, features), torch.randn(70, condition) if condition else None
        assert_same_rows(flow.rows(z, c, want_u=True), expected.rows(z, c, want_u=True), weights, lib.operand)
        assert flow.rows(z, c, want_u=False).u is None


@pytest.mark.parametrize("activation", ["relu", "softplus"])
def test_soft_permutations_stored_as_matrices(lib: Library, activation: str) -> None:
    """All of them, and the first half of them, as wide decoders in bf16 have it."""
    for features in (25, 1030):
        weights = weights_of(features, 8, torch.bfloat16, permute_soft=True, activation=activation)
        assert isinstance(weights.mixing, SoftMixing)
        assert weights.mixing.matrices > 0
        assert (weights.mixing.matrices < weights.blocks) == (features > 1000)
        z, c = torch.randn(40, features), torch.randn(40, 8)
        flow = CpuFlow(weights, lib)
        assert_same_rows(flow.rows(z, c, want_u=True), exact(weights).rows(z, c, want_u=True), weights, lib.operand)


@pytest.mark.parametrize("precision", ["bf16", "fp32"], ids=["matrices", "rotations"])
@pytest.mark.parametrize("features", [24, 97])
def test_two_operands_a_number_keep_its_digits(lib: Library, precision: str, features: int) -> None:
    """What is lost then is what the subnets lose, as with hard permutations, and not what mixing loses."""
    operand = torch.bfloat16
    if lib.operand != operand:
        pytest.skip("float32 needs no second operand")
    decoder = rough_decoder(features, condition=0, permute_soft=True, coupling_blocks=8)
    weights = decoder.fold(precision).weights
    weights = replace(weights, w1=weights.w1.to(operand), w2=weights.w2.to(operand))
    assert isinstance(weights.mixing, SoftMixing)
    assert (weights.mixing.matrices > 0) == (precision == "bf16")
    z = torch.randn(400, features)
    expected = exact(weights).rows(z, None, want_u=True)
    one, two = (
        CpuFlow(with_mixing_in(weights, dtype), lib).rows(z, None, want_u=True) for dtype in (operand, torch.float32)
    )
    for name in ("log_prob", "u"):
        rough, fine = ((getattr(each, name) - getattr(expected, name)).square().mean().sqrt() for each in (one, two))
        assert fine < 0.35 * rough


def test_conditions_and_features_in_any_strides(lib: Library) -> None:
    weights = weights_of(24, 8, lib.operand)
    flow = CpuFlow(weights, lib)
    z, c = torch.randn(40, 24), torch.randn(40, 8)
    expected = flow.rows(z, c, want_u=True)
    for same_c in (c.t().contiguous().t(), torch.cat([c, c], 1)[:, :8], c.double()):
        for same_z in (z.t().contiguous().t(), torch.cat([z, z], 1)[:, :24], z.double()):
            for ours, theirs in zip(flow.rows(same_z, same_c, want_u=True), expected, strict=True):
                assert torch.equal(ours, theirs)  # type: ignore[arg-type]


def test_fewer_threads_than_asked_for_do_all_of_the_work() -> None:
    built("avx2")
    code = """
import torch
from cflow_fast import FlowDecoder
features = torch.randn(1, 24, 9, 11)
decoder = FlowDecoder(24, 8, 2).fold("fp32")
torch.set_num_threads(1)
alone = decoder.log_prob(features)
torch.set_num_threads(4)
torch.testing.assert_close(decoder.log_prob(features), alone)
"""
    environment = os.environ | {"OMP_THREAD_LIMIT": "1"}
    subprocess.run([sys.executable, "-c", code], check=True, env=environment, timeout=120)


@pytest.mark.skipif(not has_amx(), reason="this CPU has no AMX")
def test_amx_leaves_the_tiles_of_other_libraries_as_they_were() -> None:
    flow = CpuFlow(weights_of(64, 0, torch.bfloat16), built("amx"))
    a, b, z = torch.randn(256, 256).bfloat16(), torch.randn(256, 256).bfloat16(), torch.randn(200, 64)
    product, log_prob = a @ b, flow.rows(z, None, want_u=False).log_prob
    for _ in range(3):
        assert torch.equal(a @ b, product)
        assert torch.equal(flow.rows(z, None, want_u=False).log_prob, log_prob)


# Memory


SANITIZED = """
import ctypes, sys
from pathlib import Path
import torch
sys.path.insert(0, sys.argv[1])
import test_cpu_flow as t
import test_cpu_map as m
from cflow_fast.kernels import cpu_map
from cflow_fast.kernels.cpu_flow import CpuFlow
from cflow_fast.kernels.cpu_library import Library
from cflow_fast.positional import encoding_factors

lib = Library(Path(sys.argv[2]), t.VARIANTS[sys.argv[3]][0])
cpu_map.PIXELS_A_THREAD = 1
if sys.argv[3] == "amx":
    torch.cpu._init_amx()
for count in (1, 2, 3):
    torch.set_num_threads(count)
    for features, condition in ((24, 8), (25, 0)):
        for permute_soft in (False, True):
            kinds = [t.weights_of(features, condition, lib.operand, permute_soft=permute_soft)]
            if permute_soft and lib.operand == torch.bfloat16:
                rotations = t.weights_of(features, condition, torch.float32, permute_soft=True)
                kinds += [rotations, *(t.with_mixing_in(each, lib.operand) for each in (kinds[0], rotations))]
            for flow in (CpuFlow(weights, lib) for weights in kinds):
                for batch, height, width in t.MAPS:
                    maps = torch.randn(batch, features, height, width)
                    flow.log_prob_map(maps, encoding_factors(condition, height, width) if condition else None)
                flow.rows(torch.randn(70, features), torch.randn(70, condition) if condition else None, want_u=True)
    for height, width in m.SIZES if lib.operand == torch.float32 else ():
        cpu_map.anomaly_map(m.scales_of(2), (height, width), [0.0, 0.5], lib)
print("clean")
"""


@needs_compiler
@pytest.mark.parametrize("name", VARIANTS)
def test_no_access_is_out_of_bounds(name: str, tmp_path: Path) -> None:
    """Compiled again with the sanitizers for addresses and undefined behaviour, whose libraries come with gcc."""
    built(name)
    path = compiled(tmp_path, SOURCES / f"flow_{name}.c", name, "-g", "-O1", "-fsanitize=address,undefined")
    runtimes = [_runtime("libasan.so"), _runtime("libubsan.so")]
    if not all(map(os.path.isabs, runtimes)):
        pytest.skip("gcc has no sanitizers here")
    environment = os.environ | {"LD_PRELOAD": " ".join(runtimes), "ASAN_OPTIONS": "detect_leaks=0"}
    command = [sys.executable, "-c", SANITIZED, str(Path(__file__).parent), str(path), name]
    done = subprocess.run(command, env=environment, capture_output=True, text=True, timeout=300)
    assert done.stdout.strip() == "clean", done.stderr[-3000:]
    assert "runtime error" not in done.stderr


def _runtime(name: str) -> str:
    return subprocess.run(["gcc", f"-print-file-name={name}"], capture_output=True, text=True).stdout.strip()


# Teeth


FAULTS = {
    "log_det has the wrong sign": ("sum[r] += j;", "sum[r] -= j;"),
    "s and t change places": ("WEIGHTS(d->w2_shift, block", "WEIGHTS(d->w2_scale, block"),
    "rows and columns change places": ("pick(*(const loose *)row, line)", "pick(*(const loose *)row, column)"),
    "a line is left out of the bias": ("all(row[first_line]) + ", ""),
    "b2 is missing": ("fill(&y, d->b2_shift + at)", "y = (tile){{{{0}}}}"),
    "the rotation turns the other way": (
        "a.at[o][r] * sine + b.at[o][r] * cosine",
        "b.at[o][r] * cosine - a.at[o][r] * sine",
    ),
    "a stale half": (
        "t->next_x1 = used;\n}\n\n/* The passive",
        "t->next_x1 = used;\n    t->x1 = used;\n}\n\n/* The passive",
    ),
    "the last row is left out": ("left < ROWS ? (int)left : ROWS", "left < ROWS ? (int)left - 1 : ROWS"),
    "a member's sums are forgotten": ("for (size m = 0; m < t->members; m++)", "for (size m = 0; m < 1; m++)"),
    "padded outputs leak": (
        "if (t->member) continue;\n        if (d->hard)",
        "if (t->member) continue;\n        if (0)",
    ),
    "ReLU lets negatives pass": ("a.at[o][r] = at_least(a.at[o][r], 0.0f)", "a.at[o][r] = at_least(a.at[o][r], -1.0f)"),
    "pending scales are not read": ("gain[f], rest[f], shift[f]", "1.0f, 0.0f, shift[f]"),
    "t is forgotten": ("e.high, t + (", "e.high, x.high + ("),
}


@needs_compiler
@pytest.mark.parametrize("fault", FAULTS)
def test_planted_fault_shows(fault: str, tmp_path: Path, threads: Any) -> None:
    built("avx2")
    right, wrong = FAULTS[fault]
    source = (SOURCES / "flow.h").read_text()
    assert source.count(right) >= 1, f"the code has changed: {right!r} is not in it"
    (tmp_path / "flow.c").write_text(source.replace(right, wrong) + '#include "map.h"\n#include "interface.h"\n')
    faulty = Library(compiled(tmp_path, tmp_path / "flow.c", "avx2", "-O1"), torch.float32)
    threads(2)
    assert max(_deviations(faulty)) > 10 * BOUND[torch.float32]


def test_without_a_fault_none_shows(threads: Any) -> None:
    threads(2)
    assert max(_deviations(built("avx2"))) < BOUND[torch.float32]


def _deviations(lib: Library) -> Iterator[float]:
    """Of log p / D: small maps and lines of whole vectors, teams of one and of two, both permutations."""
    for permute_soft in (False, True):
        weights = weights_of(25, 8, torch.float32, permute_soft=permute_soft)
        flow, expected = CpuFlow(weights, lib), exact(weights)
        for batch, height, width in ((1, 4, 8), (1, 5, 7), (3, 16, 16)):
            maps = torch.randn(batch, 25, height, width)
            encoding = encoding_factors(8, height, width)
            difference = flow.log_prob_map(maps, encoding) - expected.log_prob_map(maps, encoding)
            yield (difference / 25).abs().nan_to_num(1.0).max().item()


# The choice


@needs_compiler
@pytest.mark.skipif(platform.machine() != "x86_64" or platform.system() != "Linux", reason="for Linux on x86")
def test_where_there_is_a_compiler_every_variant_was_compiled() -> None:
    def knows(flags: list[str]) -> bool:
        command = ["gcc", *flags, "-E", "-x", "c", "/dev/null", "-o", "/dev/null"]
        return subprocess.run(command, capture_output=True).returncode == 0

    missing = [name for name in VARIANTS if library_file(f"_flow_{name}") is None]
    assert [name for name in missing if knows(VARIANTS[name][2])] == []


def test_compiled_code_is_taken_where_it_is_there_and_torch_where_it_is_asked_for(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    weights = weights_of(24, 8, torch.float32)
    how = arithmetic("fp32", CPU)
    there = library(torch.float32)
    assert isinstance(ops.prepare_flow(weights, how), CpuFlow if there else TorchFlow)
    assert ops.implementation(ops.prepare_flow(weights, how)) == ("compiled" if there else "torch")
    monkeypatch.setenv("CFLOW_FAST_BACKEND", "torch")
    assert ops.implementation(ops.prepare_flow(weights, how)) == "torch"
    monkeypatch.delenv("CFLOW_FAST_BACKEND")
    monkeypatch.setattr(ops, "library", lambda operand: None)
    assert ops.implementation(ops.prepare_flow(weights, how)) == "torch"


def test_the_map_is_compiled_where_the_maxima_are_given_in_float32(monkeypatch: pytest.MonkeyPatch) -> None:
    if library(torch.float32) is None:
        pytest.skip("no compiled code here")
    taken: list[int] = []
    right = cpu_map.anomaly_map
    monkeypatch.setattr(cpu_map, "anomaly_map", lambda *args: taken.append(1) or right(*args))  # type: ignore[func-returns-value]
    scales, sure = scales_of(2), [0.0, 0.5]
    expected = anomaly_map(scales, (9, 9), sure)[0]
    torch.testing.assert_close(ops.anomaly_map(scales, (9, 9), sure), expected, rtol=1e-5, atol=2e-6)
    assert len(taken) == 1
    ops.anomaly_map(scales, (9, 9), None)
    ops.anomaly_map([scale.double() for scale in scales], (9, 9), sure)
    ops.anomaly_map([scale.clone().requires_grad_() for scale in scales], (9, 9), sure).sum().backward()
    monkeypatch.setenv("CFLOW_FAST_BACKEND", "torch")
    ops.anomaly_map(scales, (9, 9), sure)
    assert len(taken) == 1


def test_float64_is_multiplied_by_torch() -> None:
    decoder = rough_decoder(24).double()
    assert ops.implementation(decoder.fold().flow) == "torch"


AMX, PAIRS = ("_is_amx_tile_supported", "_init_amx"), "_is_avx512_bf16_supported"


@pytest.mark.parametrize(
    ("operand", "capability", "units", "taken"),
    [
        (torch.float32, "AVX512", AMX, "_flow_avx512"),
        (torch.float32, "AVX512", (), "_flow_avx512"),
        (torch.float32, "AVX2", (), "_flow_avx2"),
        (torch.float32, "DEFAULT", (), None),
        (torch.bfloat16, "AVX512", AMX, "_flow_amx"),
        (torch.bfloat16, "AVX512", (*AMX, PAIRS), "_flow_amx"),
        (torch.bfloat16, "AVX512", AMX[:1], None),
        (torch.bfloat16, "AVX512", (AMX[0], PAIRS), "_flow_avx512_bf16"),
        (torch.bfloat16, "AVX512", (PAIRS,), "_flow_avx512_bf16"),
        (torch.bfloat16, "AVX512", (), None),
        (torch.bfloat16, "AVX2", (*AMX, PAIRS), None),
        (torch.float64, "AVX512", AMX, None),
    ],
)
def test_library_is_chosen_by_what_pytorch_says_the_cpu_has(
    operand: torch.dtype, capability: str, units: tuple[str, ...], taken: str | None, monkeypatch: pytest.MonkeyPatch
) -> None:
    _everything_compiled(monkeypatch, capability)
    for query in (*AMX, PAIRS):
        monkeypatch.setattr(torch.cpu, query, lambda query=query: query in units, raising=False)
    assert library.__wrapped__(operand) == taken


def test_without_the_file_or_without_openmp_there_is_no_library(monkeypatch: pytest.MonkeyPatch) -> None:
    _everything_compiled(monkeypatch, "AVX2")
    assert library.__wrapped__(torch.float32) == "_flow_avx2"
    with monkeypatch.context() as patch:
        patch.setattr(Path, "is_file", lambda path: False)
        assert library.__wrapped__(torch.float32) is None
    monkeypatch.setattr(ctypes, "CDLL", lambda name: object())
    assert library.__wrapped__(torch.float32) is None


def _everything_compiled(monkeypatch: pytest.MonkeyPatch, capability: str) -> None:
    monkeypatch.setattr(torch.backends.cpu, "get_cpu_capability", lambda: capability)
    monkeypatch.setattr(cpu_library, "Library", lambda path, operand: path.name.split(".")[0])
    monkeypatch.setattr(Path, "is_file", lambda path: path.name.startswith("_flow"))


def test_a_file_of_another_version_or_none_at_all_is_said_and_left_out(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    built("avx2")
    (tmp_path / "broken.so").write_bytes(b"no library")
    monkeypatch.setattr(cpu_library, "library_file", lambda name: tmp_path / "broken.so")
    monkeypatch.setattr(torch.backends.cpu, "get_cpu_capability", lambda: "AVX2")
    with pytest.warns(
        UserWarning, match=r"broken\.so is left out, PyTorch does its work: .*; install the package anew"
    ):
        assert library.__wrapped__(torch.float32) is None
    monkeypatch.undo()
    path = library_file("_flow_avx2")
    assert path is not None
    monkeypatch.setattr(cpu_library, "INTERFACE", 0)
    with pytest.raises(cpu_library.LibraryError, match="compiled for another version"):
        Library(path, torch.float32)
    monkeypatch.undo()

    class Longer(cpu_library.Task):
        _fields_ = (("more", ctypes.c_int64),)

    monkeypatch.setattr(cpu_library, "Task", Longer)
    with pytest.raises(cpu_library.LibraryError, match="compiled for another version"):
        Library(path, torch.float32)


@pytest.mark.parametrize("dtype", [torch.float64, torch.bfloat16])
def test_the_default_dtype_and_device_do_not_matter(dtype: torch.dtype, lib: Library) -> None:
    weights = weights_of(25, 8, lib.operand, permute_soft=True)
    z, c, scales = torch.randn(40, 25), torch.randn(40, 8), scales_of(2)
    expected = CpuFlow(weights, lib).rows(z, c, want_u=True)
    torch.set_default_dtype(dtype)
    try:
        with torch.device("meta"):
            again = CpuFlow(weights, lib).rows(z, c, want_u=True)
            if lib.operand == torch.float32:
                assert_same_map(
                    cpu_map.anomaly_map(scales, (9, 9), [0.0, 0.0], lib), anomaly_map(scales, (9, 9), [0.0, 0.0])
                )
    finally:
        torch.set_default_dtype(torch.float32)
    for ours, theirs in zip(again, expected, strict=True):
        assert torch.equal(ours, theirs)  # type: ignore[arg-type]


def test_tensors_elsewhere_are_refused(lib: Library) -> None:
    flow, z, c = CpuFlow(weights_of(24, 8, lib.operand), lib), torch.randn(4, 24), torch.randn(4, 8)
    for given in ((z.to("meta"), c), (z, c.to("meta"))):
        with pytest.raises(
            RuntimeError, match="expected tensors on the CPU, where this decoder or map is, got one on meta"
        ):
            flow.rows(*given, want_u=False)
    with pytest.raises(RuntimeError, match="got one on meta"):
        cpu_map.anomaly_map([scales_of(1)[0], scales_of(1)[1].to("meta")], (4, 4), [0.0, 0.0], lib)


def test_negated_views_are_read_as_what_they_are(lib: Library) -> None:
    flow, numbers = CpuFlow(weights_of(24, 8, lib.operand), lib), torch.randn(4, 24, dtype=torch.complex64)
    c = torch.randn(4, 8, dtype=torch.complex64).conj().imag
    z = numbers.conj().imag
    assert z.is_neg()
    assert c.is_neg()
    ours, expected = flow.rows(z, c, want_u=True), flow.rows(z.clone(), c.clone(), want_u=True)
    for one, other in zip(ours, expected, strict=True):
        assert torch.equal(one, other)  # type: ignore[arg-type]


def test_weights_without_a_condition_are_packed_without_one() -> None:
    lib = built("avx2")
    weights = replace(weights_of(24, 8, torch.float32), w1_condition=None)
    z = torch.randn(9, 24)
    ours, theirs = (flow.rows(z, None, want_u=True) for flow in (CpuFlow(weights, lib), exact(weights)))
    assert_same_rows(ours, theirs, weights, torch.float32)
