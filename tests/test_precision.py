"""Precisions are resolved by what the hardware multiplies, and what is taken is said."""

from __future__ import annotations

import pytest
import torch

from cflow_fast import precision
from cflow_fast.precision import PRECISIONS, arithmetic, cpu_has, multiplies_bf16, resolve_precision

CPU, META = torch.device("cpu"), torch.device("meta")


@pytest.fixture(params=[False, True])
def bf16(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> bool:
    monkeypatch.setattr("cflow_fast.precision.cpu_has", lambda feature: request.param and feature == "amx_bf16")
    return bool(request.param)


def test_auto_takes_bf16_only_where_it_is_multiplied(bf16: bool) -> None:
    assert multiplies_bf16(CPU) == bf16
    assert resolve_precision("auto", CPU) == ("bf16" if bf16 else "fp32")
    assert resolve_precision("auto", CPU, torch.float64) == "fp64"


def test_bf16_is_never_multiplied_where_it_is_slow(bf16: bool) -> None:
    taken = arithmetic("bf16", CPU)
    assert taken.storage == torch.bfloat16
    assert taken.operands == (torch.bfloat16 if bf16 else torch.float32)
    assert ("multiplied in fp32" in str(taken)) == (not bf16)


def test_explicit_precisions_are_kept() -> None:
    for name in PRECISIONS[1:]:
        assert resolve_precision(name, CPU) == name
        assert arithmetic(name, CPU).precision == name
    assert arithmetic("fp64", CPU).operands == torch.float64
    assert str(arithmetic("fp32", CPU)) == "fp32"
    assert str(arithmetic("tf32", CPU)) == "tf32 (no tf32 on this cpu: fp32)"
    assert str(arithmetic("tf32x3", CPU)) == "tf32x3 (no tf32 on this cpu: fp32)"
    assert str(arithmetic("fp16", CPU)) == "fp16 (no fp16 on this cpu: fp32)"
    assert str(arithmetic("fp16x3", CPU)) == "fp16x3 (no fp16 on this cpu: fp32)"


def test_gpu_stores_float32_for_everything_that_is_rounded_as_it_is_made_ready() -> None:
    for name in ("fp32", "tf32x3", "fp16x3", "tf32", "fp16"):
        taken = arithmetic(name, torch.device("cuda"))
        assert (taken.storage, taken.operands, str(taken)) == (torch.float32, torch.float32, name)


def test_device_of_unknown_abilities_has_no_bf16() -> None:
    assert not multiplies_bf16(META)
    assert "this meta has no fast bf16" in str(arithmetic("bf16", META))


def test_unknown_precision_is_refused() -> None:
    with pytest.raises(ValueError, match=r"precision is one of auto, .*, tf32, fp16, bf16, got 'int8'"):
        resolve_precision("int8", CPU)


@pytest.mark.parametrize("pays", [False, True])
def test_bf16_without_matrix_units_is_taken_where_it_is_measured_to_pay(
    pays: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    """By a clock that goes by the dtypes of the products that are timed."""
    now = 0.0

    def multiply(a: torch.Tensor, b: torch.Tensor) -> torch.Tensor:
        nonlocal now
        now += 1.0 if (a.dtype == torch.bfloat16) == pays else 2.0
        return a

    monkeypatch.setattr(precision.torch, "mm", multiply)
    monkeypatch.setattr(precision.time, "perf_counter", lambda: now)
    monkeypatch.setattr(precision, "cpu_has", lambda feature: feature == "avx512_bf16")
    precision._vector_bf16_pays.cache_clear()
    try:
        assert multiplies_bf16(CPU) == pays
        assert arithmetic("bf16", CPU).operands == (torch.bfloat16 if pays else torch.float32)
    finally:
        precision._vector_bf16_pays.cache_clear()


def test_cpu_that_has_avx512_has_avx2() -> None:
    assert cpu_has("avx2") or not cpu_has("avx512")
    assert cpu_has("avx512") or not cpu_has("avx512_bf16")


def test_feature_that_pytorch_cannot_tell_is_absent(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("cflow_fast.precision._CPU_QUERIES", {"avx512": "_no_such_query"})
    assert not cpu_has("avx512")
