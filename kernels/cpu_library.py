"""Compiled code for CPUs, `cpu/`: which of its variants this CPU runs, and how it is called.

The code is compiled when the package is installed, for AVX2 and AVX-512 in float32 and for AMX in bfloat16. Where no
compiler was there, or the CPU has none of these, `library` is None and PyTorch does the work.
"""

from __future__ import annotations

import ctypes
import functools
import importlib.machinery
import math
from pathlib import Path

import torch
from torch import Tensor

_VARIANTS = {
    (torch.float32, "AVX2"): "_flow_avx2",
    (torch.float32, "AVX512"): "_flow_avx512",
    (torch.bfloat16, "AVX512"): "_flow_amx",
}
"""By what is multiplied and PyTorch's word for what the CPU has. Bfloat16 without AMX is oneDNN's: the vector
instruction for it is slower than float32's on the CPU that it was tried on."""

Address = ctypes.c_void_p
"""Of a tensor's first element; whoever passes it keeps the tensor."""


def fields(kind: type, names: str) -> list[tuple[str, type]]:
    """Of a ctypes.Structure, several of one kind."""
    return [(name, kind) for name in names.split()]


def address(tensor: Tensor | None) -> int | None:
    return None if tensor is None else tensor.data_ptr()


class Library:
    """The compiled functions for one instruction set, and the tile that they work in."""

    def __init__(self, path: Path, operand: torch.dtype) -> None:
        self.functions = ctypes.CDLL(str(path))
        self.operand = operand
        for name in ("cflow_fast_flow_memory", *(["cflow_fast_map_memory"] if operand == torch.float32 else [])):
            getattr(self.functions, name).restype = ctypes.c_int64
        self.vector, self.outputs = int(self.functions.cflow_fast_vector()), int(self.functions.cflow_fast_outputs())
        self.inputs_together = int(self.functions.cflow_fast_inputs_together())

    def whole_groups(self, outputs: int) -> int:
        return math.ceil(outputs / self.outputs) * self.outputs

    def run(self, name: str, task: ctypes.Structure, *before: ctypes.Structure) -> None:
        """Call `cflow_fast_<name>`(*before, task) with the memory that it asks for, as task.memory."""
        arguments = [ctypes.byref(structure) for structure in (*before, task)]
        size = getattr(self.functions, f"cflow_fast_{name}_memory")(*arguments)
        memory = torch.empty(size, dtype=torch.uint8)
        task.memory = memory.data_ptr()
        getattr(self.functions, f"cflow_fast_{name}")(*arguments)


@functools.cache
def library(operand: torch.dtype) -> Library | None:
    """The library that multiplies such operands on this CPU; None where there is none.

    PyTorch is asked what the CPU has, so that ATEN_CPU_CAPABILITY lowers this too.
    """
    if not hasattr(ctypes.CDLL(None), "GOMP_parallel"):  # the threads are those of PyTorch
        return None
    name = _VARIANTS.get((operand, torch.backends.cpu.get_cpu_capability()))
    if name is None or (operand == torch.bfloat16 and not may_use_amx()):
        return None
    file = library_file(name)
    return None if file is None else Library(file, operand)


def library_file(name: str) -> Path | None:
    """Where a variant lies; None where it was not compiled."""
    paths = [Path(__file__).with_name(f"{name}{suffix}") for suffix in importlib.machinery.EXTENSION_SUFFIXES]
    return next((path for path in paths if path.is_file()), None)


def may_use_amx() -> bool:
    """Whether the CPU has it and the system lets this process use it, which has to be asked for."""
    queries = (getattr(torch.cpu, name, None) for name in ("_is_amx_tile_supported", "_init_amx"))
    return all(query is not None and query() for query in queries)
