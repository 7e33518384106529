"""The guards find planted bugs that leave every result as it should be."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import pytest
import torch
import triton
import triton.language as tl
from kernel_guards import guarded, lint
from torch import Tensor
from triton.runtime.errors import InterpreterError

import cflow_fast.kernels

SOURCES = sorted(Path(cflow_fast.kernels.__file__).parent.glob("*.py"))


@triton.jit
def copy_kernel(x_ptr, y_ptr, size, LOAD_MASKED: tl.constexpr, STORE_MASKED: tl.constexpr, STEP: tl.constexpr):
    """Programs copy 16 elements each and stand STEP apart."""
    at = tl.program_id(0) * STEP + tl.arange(0, 16)
    inside = at < size
    x = tl.load(x_ptr + at, mask=inside | (not LOAD_MASKED), other=0.0)
    tl.store(y_ptr + at, x, mask=inside | (not STORE_MASKED))


@triton.jit
def shift_kernel(x_ptr, y_ptr):
    """y[p] = x[p + 1] by program p."""
    tl.store(y_ptr + tl.program_id(0), tl.load(x_ptr + tl.program_id(0) + 1))


@triton.jit
def collapse_kernel(y_ptr):
    """Sixteen lanes, eight addresses."""
    tl.store(y_ptr + tl.arange(0, 16) // 2, tl.zeros((16,), tl.float32))


@triton.jit
def sum_kernel(x_ptr, counter_ptr, y_ptr, ORDERED: tl.constexpr):
    """Each of two programs leaves a number, the second one adds them up."""
    program = tl.program_id(0)
    tl.store(x_ptr + program, 1.0)
    arrived = tl.atomic_add(counter_ptr, 1, sem="acq_rel" if ORDERED else "relaxed")
    if arrived == 1:
        tl.store(y_ptr, tl.load(x_ptr) + tl.load(x_ptr + 1))


@triton.jit
def add_kernel(x_ptr, y_ptr, CONVERTED: tl.constexpr):
    at = tl.arange(0, 16)
    x = tl.load(x_ptr + at)
    if CONVERTED:
        x = x.to(tl.float32)
    tl.store(y_ptr + at, x + x)


def copy(
    size: int = 20, load_masked: bool = True, store_masked: bool = True, step: int = 16, programs: int = 2
) -> None:
    x, y = torch.ones(size), torch.zeros(size)
    with guarded() as guard:
        copy_kernel[(programs,)](x, y, size, load_masked, store_masked, step)
    guard.written_once(y)
    assert y.eq(1).all()


def test_correct_kernel_passes() -> None:
    copy()


@pytest.mark.parametrize("bug", [{"load_masked": False}, {"store_masked": False}])
def test_dropped_mask_is_out_of_bounds(bug: dict[str, bool]) -> None:
    with pytest.raises(InterpreterError, match="copy_kernel: 12 of 16 active lanes are out of bounds"):
        copy(**bug)  # type: ignore[arg-type]


def test_lane_between_the_elements_of_a_view_is_out_of_bounds() -> None:
    """It would read a neighbour of the same storage, which no address sanitizer sees."""
    wide = torch.zeros(16, 2)
    with pytest.raises(InterpreterError, match="8 of 16 active lanes are out of bounds"), guarded():
        copy_kernel[(1,)](wide[:, 0], torch.zeros(16), 16, True, True, 16)


def test_programs_that_overlap_are_a_double_write() -> None:
    with pytest.raises(InterpreterError, match="program 1 stores what another stored: 4 elements, program 0"):
        copy(step=12)


def test_lanes_that_collide_are_a_double_write() -> None:
    with pytest.raises(InterpreterError, match="two lanes of program 0 store to one address"), guarded():
        collapse_kernel[(1,)](torch.zeros(8))


def test_element_without_a_store_is_missed() -> None:
    with pytest.raises(AssertionError, match=r"4 elements of \(20,\) were never stored"):
        copy(programs=1)


def test_two_launches_may_write_what_one_may_not() -> None:
    x, y = torch.ones(16), torch.zeros(16)
    with guarded() as guard:
        for _ in range(2):
            copy_kernel[(1,)](x, y, 16, True, True, 16)
    guard.written_once(y)


def test_overwriting_what_another_program_reads_is_a_race() -> None:
    x, y = torch.zeros(5), torch.zeros(4)
    with guarded() as guard:
        shift_kernel[(4,)](x, y)
    guard.written_once(y)
    with (
        pytest.raises(InterpreterError, match="program 1 overwrites what another reads: 1 elements, program 0"),
        guarded(),
    ):
        shift_kernel[(4,)](x, x)


def test_reading_what_another_program_stored_is_a_race_unless_an_atomic_orders_them() -> None:
    def run(ordered: bool) -> Tensor:
        y = torch.zeros(1)
        with guarded():
            sum_kernel[(2,)](torch.zeros(2), torch.zeros(1, dtype=torch.int32), y, ordered)
        return y

    assert run(ordered=True) == 2
    with pytest.raises(InterpreterError, match="program 1 reads what another stored: 1 elements, program 0"):
        run(ordered=False)


def test_computing_with_bf16_is_refused_and_converting_it_is_not() -> None:
    x = torch.ones(16, dtype=torch.bfloat16)
    y = torch.zeros(16)
    with guarded():
        add_kernel[(1,)](x, y, CONVERTED=True)
    assert y.eq(2).all()
    with pytest.raises(InterpreterError, match="bf16 is computed with"), guarded():
        add_kernel[(1,)](x, y, CONVERTED=False)


@pytest.mark.parametrize(
    "allocate",
    [
        lambda dtype: torch.empty(3, dtype=dtype),
        lambda dtype: torch.empty_like(torch.zeros(3, dtype=dtype)),
        lambda dtype: torch.empty_strided((3,), (2,), dtype=dtype),
        lambda dtype: torch.zeros(1, dtype=dtype).new_empty(3),
    ],
)
def test_fresh_memory_is_never_plausible(allocate: Callable[[torch.dtype], Tensor]) -> None:
    with guarded():
        assert allocate(torch.float32).isnan().all()
        assert allocate(torch.bfloat16).isnan().all()
        assert allocate(torch.int32).eq(0x5BAD).all()
        assert allocate(torch.int8).ne(0).all()
        assert allocate(torch.bool).all()


def test_guards_end_with_their_block() -> None:
    before = torch.empty, Tensor.new_empty, triton.runtime.interpreter.InterpreterBuilder.create_masked_load
    with guarded():
        pass
    assert before == (torch.empty, Tensor.new_empty, triton.runtime.interpreter.InterpreterBuilder.create_masked_load)


@pytest.mark.parametrize("path", SOURCES, ids=lambda path: path.stem)
def test_kernel_sources_keep_the_rules(path: Path) -> None:
    assert lint(path.read_text(), is_lang=path.stem == "lang") == []


@pytest.mark.parametrize(
    ("line", "reason"),
    [
        ("x = tl.load(p, mask=m)", "2: a masked load says"),
        ("x = tl.load(p, m)", "2: a masked load says"),
        ("x = tl.make_block_ptr(p, s, t, o, b, r)", "2: block pointers are gone"),
        ("x = tl.advance(p, o)", "2: block pointers are gone"),
        ("x = tl.dot(a, b)", "2: products are made by lang.dot"),
        ("x = a.to(tl.bfloat16)", "2: bf16 is made by lang.operand"),
    ],
)
def test_lint_finds_what_is_forbidden(line: str, reason: str) -> None:
    (found,) = lint(f"@triton.jit\ndef kernel(p): {line}\n")
    assert found.startswith(reason)


def test_lint_passes_what_is_allowed() -> None:
    assert (
        lint("@triton.jit\ndef kernel(p): x = tl.load(p, mask=m, other=0.0) + tl.load(p) + tl.load(p, m, 0.0)\n") == []
    )
    assert lint("def launcher(p): return p.to(torch.bfloat16)\n") == []
    assert lint("@triton.jit\ndef kernel(p): x = tl.dot(a.to(tl.bfloat16), b)\n", is_lang=True) == []
