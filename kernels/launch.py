"""A kernel's launch as a value, and the scratch memory of split sums.

A launcher first builds a `Launch` by a pure function of shapes (meta tensors do) and then runs it, so that what is
compiled ahead of time, counted or tested is what is launched.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor


def cdiv(a: int, b: int) -> int:
    """a / b, rounded up. Triton's own takes microseconds outside of a kernel, and a launch needs several."""
    return -(-a // b)


def power_of_two(n: int) -> int:
    """The first that is no less than n >= 1."""
    return 1 << (n - 1).bit_length()


def early_option(early: bool) -> dict[str, bool]:
    """Of a launch that begins before the one that it waits for has ended, see `tiles`."""
    return {"launch_pdl": True} if early else {}


@dataclass(frozen=True)
class Launch:
    """kernel[grid](**args, **constexprs, **options)."""

    kernel: Any
    grid: tuple[int, ...]
    args: dict[str, Any]
    constexprs: dict[str, Any]
    options: dict[str, Any]

    def run(self) -> None:
        settle(self.kernel)
        self.kernel[self.grid](**self.args, **self.constexprs, **self.options)


_settled: set[int] = set()
"""Functions by their identity: Triton's own hash of one is what is to be settled."""


def settle(function: Any) -> None:
    """Have Triton name a kernel's binary the same whatever was launched before.

    The name on disk depends on the globals of all functions that a kernel calls, and Triton 3.6 takes note of those of
    a callee only if it has hashed it before (3.8 of all): so callees first. Otherwise processes that launch kernels in
    another order compile them again.
    """
    if id(function) in _settled:
        return
    from triton.runtime.jit import JITFunction  # there is Triton where something is launched

    _settled.add(id(function))
    if isinstance(function, JITFunction):  # not the interpreter's
        for name in function.fn.__code__.co_names:
            settle(function.fn.__globals__.get(name))
        function.cache_key  # noqa: B018  it is computed once, here


@dataclass
class Scratch:
    """Memory for the sums that the splits of a product leave, and the counters by which the last one is known.

    One belongs to one call: memory from PyTorch's allocator follows the caller's stream, so that threads and streams
    never share it. The counters are 0 before a launch and again after it.
    """

    device: torch.device
    _counters: Tensor | None = field(default=None, repr=False)

    def partials(self, elements: int) -> Tensor:
        return torch.empty(elements, dtype=torch.float32, device=self.device)

    def counters(self, tiles: int) -> Tensor:
        if self._counters is None or len(self._counters) < tiles:
            self._counters = torch.zeros(max(tiles, 1024), dtype=torch.int32, device=self.device)
        return self._counters
