"""The idioms that every Triton kernel here is written in, so that interpreted and compiled kernels agree.

Triton's interpreter multiplies bf16 by its raw bits, truncates where a card rounds to nearest, does not emulate tf32
and knows no libdevice. Here operands are rounded on their bits when interpreted, and then multiplied in fp32; what is
compiled is the plain instruction. A kernel makes its operands with `operand` or `taken`, multiplies them with `dot`,
and stores an operand as it is: its rounding is done, so that the interpreter's truncation loses nothing.

PRECISION is one of "ieee", "tf32", "tf32x3" (operands in fp32), "bf16" (operands in bf16), "fp16" and "fp16x3"
(operands in fp16, scaled: see `scaling`); sums are always fp32.
"tf32x3" and "fp16x3" take every factor as two operands, itself and what rounding left of it. Triton has such products
of tf32 too, which split the weights anew in every tile; here they are stored in two parts. Matrix units cut sums off
where an addition rounds, so that what is lost always has one sign: carried through all inputs, sums lost over 30 times
as much on a card at D = 1024. Where digits are kept, a few steps begin at zero and are added to the sum by a rounding
addition; weights make up for most of what a part still loses (`phase_weights.CUT_OFF`).
"""

# mypy: allow-untyped-defs, disable-error-code="assignment, var-annotated"
from __future__ import annotations

import triton
import triton.language as tl

INTERPRET = tl.constexpr(triton.knobs.runtime.interpret)
PRECISIONS = ("ieee", "tf32", "tf32x3", "bf16", "fp16", "fp16x3")


@triton.jit
def _round_mantissa(x, DROPPED: tl.constexpr):
    """fp32 with the last DROPPED bits of its mantissa rounded to nearest even; infinities and NaN stay."""
    bits = x.to(tl.uint32, bitcast=True)
    half: tl.constexpr = (1 << (DROPPED - 1)) - 1
    kept: tl.constexpr = 0xFFFFFFFF ^ ((1 << DROPPED) - 1)
    rounded = ((bits + half + ((bits >> DROPPED) & 1)) & kept).to(tl.float32, bitcast=True)
    return tl.where((bits & 0x7F800000) == 0x7F800000, x, rounded)


@triton.jit
def operand(x, PRECISION: tl.constexpr):
    """x as the matrix units take it. tf32 is rounded to nearest here: Triton's own conversion truncates."""
    if PRECISION == "bf16":
        if INTERPRET:
            return _round_mantissa(x.to(tl.float32), 16)
        else:
            return x.to(tl.bfloat16)
    elif PRECISION == "fp16" or PRECISION == "fp16x3":
        return x.to(tl.float16)
    elif PRECISION == "tf32":
        if INTERPRET:
            return _round_mantissa(x.to(tl.float32), 13)
        else:
            bits = tl.inline_asm_elementwise(
                "cvt.rna.tf32.f32 $0, $1;", "=r,f", [x.to(tl.float32)], tl.int32, is_pure=True, pack=1
            )
            return bits.to(tl.float32, bitcast=True)
    else:
        return x.to(tl.float32)


@triton.jit
def dot(a, b, acc, PRECISION: tl.constexpr):
    """acc + a b: operands as `operand` makes them, or weights as they are stored; acc fp32."""
    if INTERPRET:
        return tl.dot(a.to(tl.float32), b.to(tl.float32), acc, input_precision="ieee")
    elif PRECISION == "bf16" or PRECISION == "fp16" or PRECISION == "fp16x3":
        return tl.dot(a, b, acc)
    elif PRECISION == "ieee":
        return tl.dot(a, b, acc, input_precision="ieee")
    else:
        return tl.dot(a, b, acc, input_precision="tf32")


@triton.jit
def taken(x, TAKES: tl.constexpr, PRECISION: tl.constexpr):
    """x as a product takes it, by operands.TAKES but for "parts": the operand, and what is left where it is split."""
    if TAKES == "operand":
        return x, x
    elif TAKES == "rounded":
        rounded = operand(x, PRECISION)
        return rounded, rounded
    else:
        exact = x.to(tl.float32)
        large = operand(exact, "tf32")
        return large, operand(exact - large, "tf32")


@triton.jit
def added(acc, part):
    """acc + part, rounded to nearest, as an addition of its own: Triton would have the matrix units add."""
    if INTERPRET:
        return acc + part
    else:
        return tl.inline_asm_elementwise(
            "add.rn.f32 $0, $1, $2;", "=f,f,f", [acc, part], tl.float32, is_pure=True, pack=1
        )


@triton.jit
def add_product(
    acc, x, w_ptr, w_low_ptr, offsets, TAKES: tl.constexpr, IN_PARTS: tl.constexpr, PRECISION: tl.constexpr
):
    """acc + x W, what is small first. x: see `taken`; w_low_ptr: what rounding left of W, where every factor is in two.

    IN_PARTS also keeps products whose factor comes from registers from running into the next step: there Triton may
    write the next step's factor into registers that matrix units still read (triton-lang/triton, issue 9433).
    """
    large, small = x
    w = tl.load(w_ptr + offsets)
    part = tl.zeros(acc.shape, tl.float32) if IN_PARTS else acc
    if TAKES == "split" or TAKES == "parts":
        part = dot(small, w, part, PRECISION)
    if w_low_ptr is not None:
        part = dot(large, tl.load(w_low_ptr + offsets), part, PRECISION)
    part = dot(large, w, part, PRECISION)
    return added(acc, part) if IN_PARTS else part


@triton.jit
def power_reciprocal(x):
    """1 / x, exactly, for a power of two between 2^-126 and 2^126."""
    return (0x7F000000 - x.to(tl.int32, bitcast=True)).to(tl.float32, bitcast=True)


@triton.jit
def tanh(x, PRECISION: tl.constexpr = "ieee"):
    """2 sigmoid(2 x) - 1, and x - x^3/3 + 2 x^5/15 where that difference would lose the small values' digits.

    Beside bf16 operands the card's own tanh, right to 2^-11, is enough: one instruction instead of about twenty. Beside
    those of eleven digits it is that difference alone, right to 2^-23 of 1.
    """
    if PRECISION == "bf16" and not INTERPRET:
        return tl.inline_asm_elementwise("tanh.approx.f32 $0, $1;", "=f,f", [x], tl.float32, is_pure=True, pack=1)
    elif PRECISION == "fp16":
        return 2.0 * tl.sigmoid(2.0 * x) - 1.0
    else:
        square = x * x
        near_zero = x * (1.0 + square * (-1.0 / 3.0 + square * (2.0 / 15.0)))
        return tl.where(tl.abs(x) < 0.1, near_zero, 2.0 * tl.sigmoid(2.0 * x) - 1.0)


@triton.jit
def exp2(x):
    """2^x for results far from the smallest float32, whose care takes three instructions of four."""
    if INTERPRET:
        return tl.exp2(x)
    else:
        return tl.inline_asm_elementwise("ex2.approx.ftz.f32 $0, $1;", "=f,f", [x], tl.float32, is_pure=True, pack=1)


@triton.jit
def _log2(x):
    """log2 x for x in 1 to 2."""
    if INTERPRET:
        return tl.log2(x)
    else:
        return tl.inline_asm_elementwise("lg2.approx.ftz.f32 $0, $1;", "=f,f", [x], tl.float32, is_pure=True, pack=1)


@triton.jit
def activate(x, ACTIVATION: tl.constexpr):
    """ "relu" or "softplus" of a hidden layer in fp32; NaN stays NaN."""
    if ACTIVATION == "relu":
        return tl.maximum(x, 0.0, propagate_nan=tl.PropagateNan.ALL)
    else:
        return tl.maximum(x, 0.0) + 0.6931471805599453 * _log2(1.0 + exp2(-1.4426950408889634 * tl.abs(x)))


@triton.jit
def activated_operand(x, ACTIVATION: tl.constexpr, PRECISION: tl.constexpr):
    """operand(activate(x)); a ReLU is part of the card's conversion to bf16 and costs nothing there."""
    if ACTIVATION == "relu" and PRECISION == "bf16" and not INTERPRET:
        return tl.inline_asm_elementwise(
            "cvt.rn.relu.bf16x2.f32 $0, $2, $1;", "=r,r,r", [x], tl.bfloat16, is_pure=True, pack=2
        )
    else:
        return operand(activate(x, ACTIVATION), PRECISION)
