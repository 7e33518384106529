"""What Triton's interpreter does not see: wild addresses, races, unwritten elements, bf16 by its raw bits.

    with guarded() as guard:
        result = launch_something()
    guard.written_once(result)

Inside, every active lane's address must be that of an element of one of the launch's tensors; no program may touch
what another one stored in the same launch, nor overwrite what another one read (programs run one after another here,
so that such a race shows in no result), unless it has taken part in an atomic operation that orders them; bf16 may be
loaded, converted and stored, not computed with; and memory that is asked for without contents holds NaN.
`lint` finds in a kernel's source what no run shows.
"""

from __future__ import annotations

import ast
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any
from unittest import mock

import numpy as np
import pytest
import torch
import triton.language as tl
from torch import Tensor
from triton.runtime import interpreter
from triton.tools.tensor_descriptor import TensorDescriptor

NOBODY, SEVERAL = -1, -2
WILD_INTEGER = 0x5BAD


class KernelError(AssertionError):
    """A kernel did what would be undefined on a card. The interpreter wraps it in an InterpreterError."""


@contextmanager
def guarded() -> Iterator[Guard]:
    """Guard every launch inside; see the module."""
    guard = Guard()
    builder = interpreter.InterpreterBuilder
    with (
        mock.patch.object(interpreter.GridExecutor, "_init_args_hst", guard.starts),
        mock.patch.object(builder, "create_masked_load", guard.checks(builder.create_masked_load, guard.load)),
        mock.patch.object(builder, "create_masked_store", guard.checks(builder.create_masked_store, guard.store)),
        mock.patch.object(builder, "create_atomic_rmw", guard.atomic(builder.create_atomic_rmw, 1, 3)),
        mock.patch.object(builder, "create_atomic_cas", guard.atomic(builder.create_atomic_cas, 0, None)),
        mock.patch.object(builder, "binary_op", _without_bf16(builder.binary_op)),
        mock.patch.object(builder, "unary_op", _without_bf16(builder.unary_op)),
        mock.patch.object(builder, "create_fma", _without_bf16(builder.create_fma)),
        mock.patch.object(builder, "create_dot", _without_bf16(builder.create_dot)),
        mock.patch.object(torch, "empty", _filled(torch.empty)),
        mock.patch.object(torch, "empty_like", _filled(torch.empty_like)),
        mock.patch.object(torch, "empty_strided", _filled(torch.empty_strided)),
        mock.patch.object(Tensor, "new_empty", _filled(Tensor.new_empty)),
    ):
        yield guard


@pytest.fixture
def guard() -> Iterator[Guard]:
    """`guarded` around a whole test."""
    with guarded() as active:
        yield active


class Guard:
    """What the launches inside `guarded` did to memory."""

    def __init__(self) -> None:
        self.launches: list[_Launch] = []

    def written_once(self, *outputs: Tensor) -> None:
        """Every element was stored by some launch, and in no launch twice."""
        for output in outputs:
            total: Any = 0
            for launch in self.launches:
                memory = launch.memory_of(output)
                if memory is None:
                    continue
                stores = memory.stores[memory.elements(output)]
                twice = int((stores > 1).sum())
                assert not twice, f"{launch.name} stored {twice} elements of {tuple(output.shape)} more than once"
                total = total + stores
            missing = int(np.sum(total == np.zeros(output.shape)))
            assert not missing, f"{missing} elements of {tuple(output.shape)} were never stored"

    @property
    def starts(self) -> Callable[..., Any]:
        original = interpreter.GridExecutor._init_args_hst

        def begin(executor: Any, args: Any, kwargs: Any) -> Any:
            host = original(executor, args, kwargs)
            self.launches.append(_Launch(executor.fn.__name__, list(_tensors((*host[0], *host[1].values())))))
            return host

        return begin

    def checks(self, original: Callable[..., Any], note: Callable[..., None]) -> Callable[..., Any]:
        """A load or store of the interpreter, looked at first; a load's mask is its first argument after pointers."""

        def checked(builder: Any, pointers: Any, *args: Any, **kwargs: Any) -> Any:
            mask = args[0] if note == self.load else args[1]
            note(_program(builder), _active(pointers, mask))
            return original(builder, pointers, *args, **kwargs)

        return checked

    def atomic(self, original: Callable[..., Any], pointer: int, mask: int | None) -> Callable[..., Any]:
        def checked(builder: Any, *args: Any) -> Any:
            launch = self.launches[-1]
            launch.locate(_active(args[pointer], None if mask is None else args[mask]))
            if "RELAXED" not in str(args[-2]):
                launch.ordered.add(_program(builder))
            return original(builder, *args)

        return checked

    def load(self, program: int, addresses: np.ndarray) -> None:
        launch = self.launches[-1]
        for memory, at in launch.locate(addresses):
            if program not in launch.ordered:
                _refuse(memory.stored_by[at], program, f"{launch.name}: program {program} reads what another stored")
            read = memory.read_by[at]
            memory.read_by[at] = np.where((read == NOBODY) | (read == program), program, SEVERAL)

    def store(self, program: int, addresses: np.ndarray) -> None:
        launch = self.launches[-1]
        for memory, at in launch.locate(addresses):
            if len(np.unique(at)) < len(at):
                raise KernelError(f"{launch.name}: two lanes of program {program} store to one address")
            if program not in launch.ordered:
                _refuse(memory.stored_by[at], program, f"{launch.name}: program {program} stores what another stored")
                _refuse(memory.read_by[at], program, f"{launch.name}: program {program} overwrites what another reads")
            memory.stored_by[at] = program
            memory.stores[at] += 1


class _Launch:
    def __init__(self, name: str, tensors: list[Tensor]) -> None:
        self.name = name
        self.tensors = tensors  # held, so that no later tensor gets their addresses
        self.ordered: set[int] = set()  # programs that an atomic operation orders after others
        memories: dict[int, _Memory] = {}
        for tensor in tensors:
            storage = tensor.untyped_storage()
            if storage.nbytes():
                memories.setdefault(storage.data_ptr(), _Memory(storage.data_ptr(), storage.nbytes())).allow(tensor)
        self.memories = [memories[base] for base in sorted(memories)]
        self.bases = np.array([memory.base for memory in self.memories], np.int64)

    def memory_of(self, tensor: Tensor) -> _Memory | None:
        base = tensor.untyped_storage().data_ptr()
        return next((memory for memory in self.memories if memory.base == base), None)

    def locate(self, addresses: np.ndarray) -> Iterator[tuple[_Memory, np.ndarray]]:
        """Addresses by the memory that they lie in, as offsets; checked as a whole before anything is yielded."""
        owner = np.searchsorted(self.bases, addresses, side="right") - 1
        found = [(self.memories[i], addresses[owner == i] - self.bases[i]) for i in np.unique(owner[owner >= 0])]
        wild = int((owner < 0).sum()) + sum(memory.wild(at) for memory, at in found)
        if wild:
            raise KernelError(f"{self.name}: {wild} of {addresses.size} active lanes are out of bounds")
        return iter(found)


class _Memory:
    """A storage, byte by byte: where an element of an argument begins, and who stored and read it."""

    def __init__(self, base: int, size: int) -> None:
        self.base, self.size = base, size
        self.allowed = np.zeros(size, bool)
        self.stores = np.zeros(size, np.int16)
        self.stored_by = np.full(size, NOBODY, np.int32)
        self.read_by = np.full(size, NOBODY, np.int32)

    def elements(self, tensor: Tensor) -> np.ndarray:
        """Where a tensor's elements begin, in the tensor's shape."""
        at = np.full(tensor.shape, tensor.storage_offset())
        for dim, (size, stride) in enumerate(zip(tensor.shape, tensor.stride(), strict=True)):
            at += (np.arange(size) * stride).reshape(-1, *[1] * (tensor.dim() - dim - 1))
        return at * tensor.element_size()

    def allow(self, tensor: Tensor) -> None:
        self.allowed[self.elements(tensor)] = True

    def wild(self, at: np.ndarray) -> int:
        beyond = at >= self.size
        return int(beyond.sum() + np.count_nonzero(~self.allowed[at[~beyond]]))


def lint(source: str, is_lang: bool = False) -> list[str]:
    """What is forbidden in a kernel's source, as "line: reason"; `is_lang`: the one module that may multiply bf16."""
    functions = [node for node in ast.walk(ast.parse(source)) if isinstance(node, ast.FunctionDef) and _is_jit(node)]
    found = []
    for node in (node for function in functions for node in ast.walk(function)):
        name = ast.unparse(node.func) if isinstance(node, ast.Call) else ""
        if isinstance(node, ast.Call) and name == "tl.load":
            given = {keyword.arg for keyword in node.keywords} | set(("mask", "other")[: len(node.args) - 1])
            if "mask" in given and "other" not in given:
                found.append(f"{node.lineno}: a masked load says what the other lanes get (other=)")
        if name in ("tl.make_block_ptr", "tl.advance"):
            found.append(f"{node.lineno}: block pointers are gone from newer versions of Triton")
        if name == "tl.dot" and not is_lang:
            found.append(f"{node.lineno}: products are made by lang.dot")
        if isinstance(node, ast.Attribute) and node.attr == "bfloat16" and not is_lang:
            found.append(f"{node.lineno}: bf16 is made by lang.operand")
    return found


def _is_jit(function: ast.FunctionDef) -> bool:
    return any(ast.unparse(decorator).startswith("triton.jit") for decorator in function.decorator_list)


def _tensors(values: Any) -> Iterator[Tensor]:
    for value in values:
        if isinstance(value, tuple):
            yield from _tensors(value)
        elif isinstance(value, TensorDescriptor):
            yield value.base
        elif isinstance(value, Tensor):
            yield value


def _program(builder: Any) -> int:
    (x, y, z), (_, height, depth) = builder.grid_idx, builder.grid_dim
    return (x * height + y) * depth + z


def _active(pointers: Any, mask: Any) -> np.ndarray:
    addresses = np.atleast_1d(pointers.data).astype(np.int64)
    if mask is None:
        return addresses.ravel()
    return addresses[np.broadcast_to(mask.data, addresses.shape)]


def _refuse(by: np.ndarray, program: int, message: str) -> None:
    others = by[(by != NOBODY) & (by != program)]
    if others.size:
        who = "several others" if others[0] == SEVERAL else f"program {others[0]}"
        raise KernelError(f"{message}: {others.size} elements, {who}")


def _without_bf16(original: Callable[..., Any]) -> Callable[..., Any]:
    def checked(builder: Any, *operands: Any, **kwargs: Any) -> Any:
        for operand in operands:
            if isinstance(operand, interpreter.TensorHandle) and operand.get_element_ty() == tl.bfloat16:
                raise KernelError("bf16 is computed with: the interpreter would take its raw bits")
        return original(builder, *operands, **kwargs)

    return checked


def _filled(original: Callable[..., Tensor]) -> Callable[..., Tensor]:
    """A way of allocating memory, whose contents are then as bad as they may be."""

    def allocate(*args: Any, **kwargs: Any) -> Tensor:
        fresh = original(*args, **kwargs)
        if fresh.device.type == "meta":
            return fresh
        floating = fresh.is_floating_point() or fresh.is_complex()
        wild = (
            torch.nan if floating else WILD_INTEGER & torch.iinfo(fresh.dtype).max if fresh.dtype != torch.bool else 1
        )
        return fresh.fill_(wild)

    return allocate
