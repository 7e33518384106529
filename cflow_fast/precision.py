"""Which precision to multiply in on which hardware. Nothing else in the package asks what a processor can do."""

from __future__ import annotations

import functools
import time
from dataclasses import dataclass

import torch

PRECISIONS = ("auto", "fp64", "fp32", "tf32x3", "fp16x3", "tf32", "fp16", "bf16")
"""tf32x3 and fp16x3 are fp32's accuracy on a GPU's matrix units, by three products each; fp16 is tf32's accuracy by
operands of half the size. In fp16 every row has a scale of its own, so that nothing is too large or too small."""


@dataclass(frozen=True)
class Arithmetic:
    """What a folded decoder stores, what it multiplies in, and why when the two differ."""

    precision: str
    storage: torch.dtype
    operands: torch.dtype
    note: str = ""

    def __str__(self) -> str:
        return self.precision + (f" ({self.note})" if self.note else "")


def resolve_precision(precision: str, device: torch.device, dtype: torch.dtype = torch.float32) -> str:
    """Turn "auto" into a precision: fp64 for a float64 module, bf16 where the hardware multiplies it, else fp32."""
    if precision not in PRECISIONS:
        raise ValueError(f"precision is one of {', '.join(PRECISIONS)}, got {precision!r}")
    if precision != "auto":
        return precision
    if dtype == torch.float64:
        return "fp64"
    return "bf16" if multiplies_bf16(device) else "fp32"


def arithmetic(precision: str, device: torch.device) -> Arithmetic:
    """How a resolved precision is carried out on a device."""
    match precision:
        case "fp64":
            return Arithmetic(precision, torch.float64, torch.float64)
        case "bf16" if not multiplies_bf16(device):
            note = f"this {device.type} has no fast bf16 multiplication: weights are stored in bf16, multiplied in fp32"
            return Arithmetic(precision, torch.bfloat16, torch.float32, note)
        case "bf16":
            return Arithmetic(precision, torch.bfloat16, torch.bfloat16)
        case "tf32" | "tf32x3" | "fp16" | "fp16x3" if device.type != "cuda":
            note = f"no {precision.removesuffix('x3')} on this {device.type}: fp32"
            return Arithmetic(precision, torch.float32, torch.float32, note)
        case _:
            return Arithmetic(precision, torch.float32, torch.float32)


ENCODER_PRECISIONS = ("auto", "fp32", "fp16", "bf16")


def resolve_encoder_precision(precision: str, device: torch.device) -> str:
    """Turn "auto" into bf16 on a GPU that multiplies it, and into fp32 elsewhere."""
    if precision not in ENCODER_PRECISIONS:
        raise ValueError(f"encoder_precision is one of {', '.join(ENCODER_PRECISIONS)}, got {precision!r}")
    if precision != "auto":
        return precision
    return "bf16" if device.type == "cuda" and multiplies_bf16(device) else "fp32"


def multiplies_bf16(device: torch.device) -> bool:
    """Whether matrix products in bf16 are faster than in fp32 on a device, by what its hardware has."""
    match device.type:
        case "cuda":
            return torch.cuda.get_device_capability(device) >= (8, 0)
        case "cpu":
            return cpu_has("amx_bf16") or (cpu_has("avx512_bf16") and _vector_bf16_pays())
        case _:
            return False


BF16_PAYS = 1.3
"""How many times fp32's rate bf16 without matrix units has to reach; what is found is far from it on either side."""


@functools.cache
def _vector_bf16_pays() -> bool:
    """Whether vectors of bf16 multiply faster than vectors of fp32, which a CPU does not say: measured once."""
    best: dict[torch.dtype, float] = {}
    with torch.no_grad(), torch.autocast("cpu", enabled=False):
        for _ in range(12):
            for dtype in (torch.float32, torch.bfloat16):  # in turns, so that other work disturbs both
                a, b = torch.ones(2, 512, 512, dtype=dtype, device="cpu")
                start = time.perf_counter()
                torch.mm(a, b)
                best[dtype] = min(time.perf_counter() - start, best.get(dtype, float("inf")))
    return best[torch.float32] > BF16_PAYS * best[torch.bfloat16]


_CPU_QUERIES = {
    "amx_bf16": "_is_amx_tile_supported",
    "avx512_bf16": "_is_avx512_bf16_supported",
    "avx512": "_is_avx512_supported",
    "avx2": "_is_avx2_supported",
}


def cpu_has(feature: str) -> bool:
    """Whether this CPU has amx_bf16, avx512_bf16, avx512 or avx2, as far as PyTorch can tell; False otherwise."""
    query = getattr(torch.cpu, _CPU_QUERIES[feature], None)
    return bool(query()) if query is not None else False
