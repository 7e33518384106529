"""What each of the kernels' precisions makes operands of, and in how many parts a product takes them."""

from __future__ import annotations

import torch

from cflow_fast.kernels.rows import Rows


def is_scaled(precision: str) -> bool:
    """Whether operands are of fp16, which row by row are divided by a power of two."""
    return precision in ("fp16", "fp16x3")


def in_one_kernel(precision: str) -> str:
    """What a decoder that runs whole in one kernel multiplies in: tf32 has the digits of fp16 and needs no scale."""
    return "tf32" if precision == "fp16" else precision


def in_two_parts(precision: str) -> bool:
    """Whether every factor is taken as two operands."""
    return precision in ("tf32x3", "fp16x3")


TAKES = ("operand", "rounded", "split", "parts")
"""How a product takes a factor: it is an operand already; it is rounded to one; as two operands, the second one what
rounding to the first left: made as it is loaded, or lying there."""


def how_taken(precision: str, x: Rows | None = None, exact: bool = False) -> str:
    """x: what is multiplied, unless it is an operand that a kernel left; exact: a float32 state beside tf32 ones."""
    if in_two_parts(precision):
        return "parts" if is_scaled(precision) else "split"
    if is_scaled(precision):
        return "operand"
    if x is not None and x.outer:
        return "operand" if precision == "bf16" and x.tensor.dtype == torch.bfloat16 else "rounded"
    return "rounded" if exact and precision == "tf32" else "operand"


def adds_in_parts(precision: str, takes: str) -> bool:
    """Whether a product's sums are added up part by part (see `lang`): then there is a second tile beside them."""
    if is_scaled(precision):
        return in_two_parts(precision)
    return precision != "ieee" and takes != "operand"


def how_mixed(precision: str) -> str | None:
    """How a permutation's product takes its factor where that is not how every product does: in two parts, since beside
    eleven digits of everything else nothing shows in a likelihood as a state's rounding does."""
    return {"tf32": "split", "fp16": "parts"}.get(precision)
