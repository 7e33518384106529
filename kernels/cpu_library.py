"""Compiled code for CPUs, `cpu/`: which of its variants this CPU runs, and how it is called.

The code is compiled when the package is installed, for AVX2 and AVX-512 in float32, for AMX and AVX-512's own products
in bfloat16. Where no compiler was there, or the CPU has none of these, `library` is None and PyTorch does the work.
"""

from __future__ import annotations

import ctypes
import functools
import importlib.machinery
import math
import warnings
from pathlib import Path

import torch
from torch import Tensor

_VARIANTS = {
    (torch.float32, "AVX2"): ["_flow_avx2"],
    (torch.float32, "AVX512"): ["_flow_avx512"],
    (torch.bfloat16, "AVX512"): ["_flow_amx", "_flow_avx512_bf16"],
}
"""By what is multiplied and PyTorch's word for what the CPU has; the best first. AVX-512's products of bfloat16 are not
faster than float32's on every CPU that has them: `cflow_fast.precision` measures that before it asks for bfloat16."""

CPU = torch.device("cpu")

INTERFACE = 3
"""Counted up, here and in vectors.h, whenever the meaning of a call changes; its structures' sizes are compared."""

Address = ctypes.c_void_p
"""Of a tensor's first element; whoever passes it keeps the tensor."""


def fields(kind: type, names: str) -> list[tuple[str, type]]:
    """Of a ctypes.Structure, several of one kind."""
    return [(name, kind) for name in names.split()]


def address(tensor: Tensor | None) -> int | None:
    return None if tensor is None else tensor.data_ptr()


def check_is_here(*tensors: Tensor | None) -> None:
    """Raises RuntimeError for a tensor whose memory this code cannot read."""
    for tensor in tensors:
        if tensor is not None and tensor.device.type != "cpu":
            raise RuntimeError(f"expected tensors on the CPU, where this decoder or map is, got one on {tensor.device}")


class Decoder(ctypes.Structure):
    """`decoder` of flow.h."""

    _fields_ = (
        *fields(ctypes.c_int64, "blocks passive active hidden condition softplus hard matrices parts"),
        ("clamp", ctypes.c_double),
        ("log_scale", ctypes.c_double),
        *fields(Address, "w1 w1_condition w2_scale w2_shift b1 b2_scale b2_shift"),
        *fields(Address, "passive_by_passive passive_by_active active_by_passive active_by_active"),
        *fields(Address, "passive_offset active_offset v w output passive_output v_offset w_offset cosine sine"),
        *fields(Address, "passive_index active_index order gain gain_rest shift"),
        *fields(Address, "output_gain output_gain_rest output_shift"),
    )


class Task(ctypes.Structure):
    """`task` of flow.h."""

    _fields_ = (
        *fields(Address, "features condition"),
        *fields(ctypes.c_int64, "rows height width"),
        *fields(ctypes.c_int64, "stride_image stride_feature stride_line stride_column stride_condition"),
        *fields(Address, "by_row by_column"),
        *fields(ctypes.c_int64, "table_rows table_columns"),
        *fields(Address, "log_prob log_det u memory"),
        *fields(ctypes.c_int64, "threads chunk_panels"),
    )


class MapScale(ctypes.Structure):
    """`map_scale` of map.h."""

    _fields_ = (("log_prob", Address), *fields(ctypes.c_int64, "height width"), ("maximum", ctypes.c_float))


class MapTask(ctypes.Structure):
    """`map_task` of map.h."""

    _fields_ = (
        ("scales", ctypes.POINTER(MapScale)),
        *fields(ctypes.c_int64, "count batch height width"),
        *fields(Address, "result score memory"),
        ("threads", ctypes.c_int64),
    )


class LibraryError(RuntimeError):
    """A file that is not the library that this version of the package calls."""


class Library:
    """The compiled functions for one instruction set, and the tile that they work in."""

    def __init__(self, path: Path, operand: torch.dtype) -> None:
        """Raises LibraryError where the file is of another version or cannot be loaded."""
        structures = [Decoder, Task, *([MapScale, MapTask] if operand == torch.float32 else [])]
        try:
            self.functions = ctypes.CDLL(str(path))
            sizes = [self.functions.cflow_fast_interface(i) for i in range(len(structures) + 1)]
            self.vector, self.outputs = self.functions.cflow_fast_vector(), self.functions.cflow_fast_outputs()
            self.inputs_together = self.functions.cflow_fast_inputs_together()
            for name in ("flow", "map")[: len(structures) // 2]:
                getattr(self.functions, f"cflow_fast_{name}_memory").restype = ctypes.c_int64
        except (OSError, AttributeError) as error:
            raise LibraryError(str(error)) from error
        if sizes != [INTERFACE, *map(ctypes.sizeof, structures)]:
            raise LibraryError("it was compiled for another version")
        self.operand = operand

    def whole_groups(self, outputs: int) -> int:
        return math.ceil(outputs / self.outputs) * self.outputs

    def run(self, name: str, task: ctypes.Structure, *before: ctypes.Structure) -> None:
        """Call `cflow_fast_<name>`(*before, task) with the memory that it asks for, as task.memory."""
        arguments = [ctypes.byref(structure) for structure in (*before, task)]
        size = getattr(self.functions, f"cflow_fast_{name}_memory")(*arguments)
        memory = torch.empty(size, dtype=torch.uint8, device=CPU)
        task.memory = memory.data_ptr()
        getattr(self.functions, f"cflow_fast_{name}")(*arguments)


@functools.cache
def library(operand: torch.dtype) -> Library | None:
    """The library that multiplies such operands on this CPU; None where there is none.

    PyTorch is asked what the CPU has, so that ATEN_CPU_CAPABILITY lowers this too. A file that is there and cannot be
    used is said, once.
    """
    names = _VARIANTS.get((operand, torch.backends.cpu.get_cpu_capability()), [])
    files = [file for name in names if may_use(name) and (file := library_file(name)) is not None]
    if not hasattr(ctypes.CDLL(None), "GOMP_parallel"):  # the threads are those of PyTorch
        return None
    for file in files:
        try:
            return Library(file, operand)
        except LibraryError as error:
            warnings.warn(f"{file} is left out, PyTorch does its work: {error}; install the package anew", stacklevel=3)
    return None


def library_file(name: str) -> Path | None:
    """Where a variant lies; None where it was not compiled."""
    paths = [Path(__file__).with_name(f"{name}{suffix}") for suffix in importlib.machinery.EXTENSION_SUFFIXES]
    return next((path for path in paths if path.is_file()), None)


_UNITS = {
    "_flow_amx": ["_is_amx_tile_supported", "_init_amx"],  # the system lets a process use them that has asked
    "_flow_avx512_bf16": ["_is_avx512_bf16_supported"],
}
"""What a variant needs beside the capability: functions of torch.cpu that say so."""


def may_use(name: str) -> bool:
    """Whether the CPU has a variant's units beyond its capability, and the system lets this process use them."""
    queries = (getattr(torch.cpu, query, None) for query in _UNITS.get(name, []))
    return all(query is not None and query() for query in queries)
