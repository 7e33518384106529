"""How tests get at the compiled code: as it was installed, or compiled anew from sources of their own."""

from __future__ import annotations

import functools
import shutil
import subprocess
import tempfile
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from cflow_fast.kernels import cpu_flow, cpu_library
from cflow_fast.kernels.cpu_library import Library, library, library_file
from cflow_fast.precision import cpu_has

SOURCES = Path(cpu_flow.__file__).with_name("cpu")
CPU = torch.device("cpu")
AVX512 = ["-mavx512f", "-mavx512bw", "-mavx512dq", "-mavx512vl", "-mprefer-vector-width=512"]
BF16 = [*AVX512, "-mavx512bf16"]
VARIANTS: dict[str, tuple[torch.dtype, str, list[str]]] = {
    "avx2": (torch.float32, "avx2", []),
    "avx512": (torch.float32, "avx512", AVX512),
    "avx512_bf16": (torch.bfloat16, "avx512_bf16", BF16),
    "amx": (torch.bfloat16, "amx_bf16", [*BF16, "-mamx-tile", "-mamx-bf16"]),
}
EMULATED_AMX = [*BF16, "-include", str(Path(__file__).with_name("amx_emulation.h"))]
needs_compiler = pytest.mark.skipif(shutil.which("gcc") is None, reason="gcc is not installed")


def has_amx() -> bool:
    return cpu_has("amx_bf16") and cpu_library.may_use("_flow_amx")


def emulates(name: str) -> bool:
    """Whether a variant runs here by emulation only: so is the code for AMX tested on CPUs that have all but that."""
    return name == "amx" and not has_amx() and cpu_has("avx512_bf16") and shutil.which("gcc") is not None


def built(name: str) -> Library:
    """The variant as the package was installed with it; skips where it is missing or the CPU cannot run it."""
    operand, feature, _ = VARIANTS[name]
    if emulates(name):
        return Library(_emulated(name), operand)
    path = library_file(f"_flow_{name}")
    if path is None or library(torch.float32) is None or not cpu_has(feature):
        pytest.skip(f"no compiled code for {name} here")
    if not cpu_library.may_use(f"_flow_{name}"):
        pytest.skip(f"this process may not use {name}")
    return Library(path, operand)


_FOLDER = tempfile.TemporaryDirectory(prefix="cflow_fast_")


@functools.cache
def _emulated(name: str) -> Path:
    return compiled(Path(_FOLDER.name), SOURCES / f"flow_{name}.c", name, "-O3")


def compiled(folder: Path, source: Path, name: str, *options: str) -> Path:
    path = folder / f"{name}.so"
    flags = ["-shared", "-fPIC", "-fopenmp", "-fvisibility=hidden", "-mavx2", "-mfma"]
    flags += EMULATED_AMX if emulates(name) else VARIANTS[name][2]
    flags += ["-I", str(SOURCES)]
    subprocess.run(["gcc", *flags, *options, str(source), "-o", str(path)], check=True, timeout=300)
    return path


def stale_empty(*shape: int, **options: Any) -> Tensor:
    """torch.empty, but that what nobody has written is NaN in every precision."""
    tensor = torch.zeros(*shape, **options)
    tensor.view(torch.uint8).fill_(255)
    return tensor


class With:
    """A module with some of its names replaced."""

    def __init__(self, module: Any, **names: Any) -> None:
        self.__dict__.update(names, _module=module)

    def __getattr__(self, name: str) -> Any:
        return getattr(self._module, name)


def scales_of(batch: int) -> list[Tensor]:
    return [torch.randn(batch, 8, 9) - 2, torch.randn(batch, 4, 1) - 2]


def assert_same_map(ours: tuple[Tensor, Tensor], expected: tuple[Tensor, Tensor]) -> None:
    for one, other in zip(ours, expected, strict=True):
        torch.testing.assert_close(one, other, rtol=1e-5, atol=2e-6, equal_nan=True)
