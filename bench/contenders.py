"""What a contender is, and the precisions that a device can be asked for."""

from __future__ import annotations

import importlib.util
from collections.abc import Callable, Iterable, Sequence
from contextlib import AbstractContextManager, ExitStack
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from cflow_fast.bench.measurement import HALVES, Run, matmul_precision
from cflow_fast.precision import multiplies_bf16

OURS = "cflow-fast"
PLAIN = "cflow-fast-plain"
"""The same folded weights through PyTorch's own products: what the kernels have to beat."""
ACCELERATED = "accelerated"
"""FrEIA's modules after `cflow_fast.accelerate`, called as before."""
ANOMALIB_ACCELERATED = "anomalib-accelerated"
"""anomalib's model after the same."""
AFTER_ONE_LINE = (ACCELERATED, ANOMALIB_ACCELERATED)
"""This package within somebody else's program: no rival, and not all that it can do."""
OUR_OWN = (OURS, PLAIN, *AFTER_ONE_LINE)
FLOOR = "products-alone"
"""Only PyTorch's matrix products of the folded decoders: no contender, but what none that uses them can beat."""
PRECISIONS = ("fp32", "tf32x3", "fp16x3", "tf32", "fp16", "bf16")
IN_THREE = {"tf32x3": "tf32", "fp16x3": "fp16"}
"""Precisions of three products each, and what these are made in."""


class UnavailableError(Exception):
    """A contender that cannot take part; `status` is its row's, the message the row's note."""

    def __init__(self, status: str, reason: str) -> None:
        super().__init__(reason)
        self.status = status


@dataclass(frozen=True)
class Built:
    """A contender ready to run on one case.

    `log_probs` takes feature maps [(B, D, H, W), ...] of the case's shapes to this contender's log p / D [(B, H, W),
    ...]; None for what has no likelihood. `from_images` makes a whole model's of images of the case's shape.
    """

    run: Run
    log_probs: Callable[[Sequence[Tensor]], list[Tensor]] | None = None
    model_bytes: int | None = None
    note: str = ""
    from_images: Callable[[Tensor], list[Tensor]] | None = None


@dataclass(frozen=True)
class Contender:
    """One entry of a benchmark: `build(work, precision)` makes it ready for a case's tensors.

    `packages` are the imports it needs; `reduced` says whether it has precisions below fp32.
    """

    name: str
    build: Callable[[Any, str], Built]
    packages: tuple[str, ...] = ()
    reduced: bool = True

    def check(self, precision: str, device: torch.device) -> None:
        """Raise UnavailableError unless it can be built here."""
        for package in self.packages:
            if not is_installed(package):
                raise UnavailableError("not installed", f"pip install {package}")
        if precision != "fp32" and not self.reduced:
            raise UnavailableError("not available", "it runs in fp32 only")
        by_library = self.name in (PLAIN, FLOOR)
        if precision in IN_THREE and (by_library or self.name not in OUR_OWN):
            raise UnavailableError("not available", "it does not multiply float32 in parts")
        if precision == "fp16" and by_library:
            raise UnavailableError("not available", "it has no scales, without which a state leaves the range of fp16")
        if precision not in device_precisions(device):
            raise UnavailableError("not available", f"this {device.type} does not multiply {precision}")


def is_installed(package: str) -> bool:
    return importlib.util.find_spec(package) is not None


def registry(*contenders: Contender) -> dict[str, Contender]:
    return {contender.name: contender for contender in contenders}


def device_precisions(device: torch.device) -> tuple[str, ...]:
    """Those that the device's matrix units have."""
    reduced = multiplies_bf16(device)  # from the same generation of GPUs on, tf32 too
    units = reduced and device.type == "cuda"
    has = dict.fromkeys(PRECISIONS, units) | {"fp32": True, "bf16": reduced}
    return tuple(name for name in PRECISIONS if has[name])


class eager_precision(AbstractContextManager[None]):  # noqa: N801  a context manager, named as torch names its own
    """Runs eager PyTorch in a precision: full float32, tf32 products, or autocast to bf16 or fp16."""

    def __init__(self, precision: str, device: torch.device) -> None:
        self.precision, self.device = precision, device

    def __enter__(self) -> None:
        self.stack = ExitStack()
        self.stack.enter_context(torch.no_grad())
        self.stack.enter_context(matmul_precision(self.precision))
        if self.precision in HALVES:
            self.stack.enter_context(torch.autocast(self.device.type, HALVES[self.precision]))

    def __exit__(self, *error: object) -> None:
        self.stack.close()


def module_bytes(modules: Iterable[nn.Module]) -> int:
    """Of all parameters and buffers, each counted once."""
    tensors = {
        tensor.data_ptr(): tensor.nbytes for module in modules for tensor in (*module.parameters(), *module.buffers())
    }
    return sum(tensors.values())
