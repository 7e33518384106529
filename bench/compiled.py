"""Kernels compiled for a GPU on a machine without one, and what their machine code tells.

A `Launch` carries everything that a compilation depends on. The tools that read the result come inside Triton's wheel.
The process must not run Triton's interpreter (TRITON_INTERPRET unset).
"""

from __future__ import annotations

import re
import subprocess
import tempfile
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
import triton
from triton.backends.compiler import GPUTarget
from triton.compiler import ASTSource, CompiledKernel
from triton.runtime.jit import JITFunction, mangle_type

from cflow_fast.kernels.launch import Launch

TOOLS = Path(triton.__file__).parent / "backends" / "nvidia" / "bin"
SHARED_LIMIT = {80: 163 * 1024, 90: 227 * 1024}
"""Bytes of shared memory that one program may have; a kernel over the limit compiles without an error."""
SERIALIZED = re.compile(r"C751[0-8]|wgmma.*serialized", re.IGNORECASE)
"""How ptxas says that it makes the matrix units wait for each other."""
SPILLS = ("LDL", "STL")
MATRIX = ("HGMMA", "HMMA", "FFMA")
FEWEST_FFMA = 16
"""A loop with fewer multiply-adds than that multiplies no matrices."""


@dataclass(frozen=True)
class Loop:
    """One innermost loop that multiplies matrices: instructions of one iteration, by kind."""

    instructions: int
    spills: int
    hgmma: int
    hmma: int
    ffma: int


@dataclass(frozen=True)
class Compiled:
    """Resources of one compiled kernel."""

    registers: int  # per thread
    shared: int  # bytes per program
    spills: int  # loads and stores of spilled registers anywhere in the code
    instructions: int
    loops: tuple[Loop, ...]
    serialized: bool
    unwaiting: bool = False  # begins before launches that it depends on have ended, and does not wait for them

    @property
    def loop_spills(self) -> int:
        return sum(loop.spills for loop in self.loops)

    @property
    def uses_wgmma(self) -> bool:
        return any(loop.hgmma for loop in self.loops)

    def faults(self, capability: int) -> list[str]:
        """What makes such a kernel slow or impossible to launch; empty when nothing does."""
        found = []
        if self.loop_spills:
            found.append(f"{self.loop_spills} spills inside a matrix loop")
        if self.unwaiting:
            found.append("begins early and waits for nothing")
        if self.serialized:
            found.append("wgmma serialized")
        if self.shared > SHARED_LIMIT[capability]:
            found.append(f"{self.shared} bytes of shared memory, over {SHARED_LIMIT[capability]}")
        return found


def compile_launch(launch: Launch, capability: int) -> Compiled:
    """Compile for sm_<capability>; tensors may be on the meta device."""
    kernel = _compile(launch, capability)
    usage = _tool("cuobjdump", "--dump-resource-usage", binary=kernel.asm["cubin"])
    code = _tool("nvdisasm", "-c", binary=kernel.asm["cubin"])
    registers = re.search(r"REG:(\d+)", usage)
    assert registers is not None, usage
    instructions = disassembled(code)
    return Compiled(
        registers=int(registers[1]),
        shared=kernel.metadata.shared,
        spills=sum(name in SPILLS for name, _ in instructions.code),
        instructions=len(instructions.code),
        loops=tuple(matrix_loops(instructions)),
        serialized=bool(SERIALIZED.search(_assembler_log(kernel.asm["ptx"]))),
        unwaiting=bool(launch.constexprs.get("EARLY")) and "griddepcontrol.wait" not in kernel.asm["ptx"],
    )


def _compile(launch: Launch, capability: int) -> CompiledKernel:
    function = launch.kernel
    while not isinstance(function, JITFunction):
        function = function.fn
    signature: dict[str, Any] = {}
    constants: dict[Any, Any] = dict(launch.constexprs)
    attributes: dict[tuple[int, ...], Any] = {}

    def specialised(value: Any, path: tuple[int, ...]) -> Any:
        """A value's type, as Triton's launcher specialises: on None, on 1, and on what 16 divides."""
        if isinstance(value, tuple):
            items = [specialised(item, (*path, i)) for i, item in enumerate(value)]
            return type(value)(*items) if hasattr(value, "_fields") else tuple(items)  # named, or not
        if value is None or (isinstance(value, int) and value == 1):
            constants[path] = value
            return "constexpr"
        if isinstance(value, torch.Tensor) or (isinstance(value, int) and value % 16 == 0):
            attributes[path] = [["tt.divisibility", 16]]
        return mangle_type(value)

    for position, name in enumerate(function.arg_names):
        constant = name in launch.constexprs
        signature[name] = "constexpr" if constant else specialised(launch.args[name], (position,))
    source = ASTSource(fn=function, signature=signature, constexprs=constants, attrs=attributes)
    return triton.compile(source, target=GPUTarget("cuda", capability, 32), options=launch.options)


def _tool(name: str, *arguments: str, binary: bytes) -> str:
    with tempfile.NamedTemporaryFile(suffix=".cubin") as file:
        file.write(binary)
        file.flush()
        command = [str(TOOLS / name), *arguments, file.name]
        return subprocess.run(command, capture_output=True, text=True, check=True).stdout


def _assembler_log(ptx: str) -> str:
    """What the assembler that Triton itself uses below capability 100 has to say."""
    target = re.search(r"\.target (\w+)", ptx)
    assert target is not None
    with tempfile.NamedTemporaryFile(suffix=".ptx", mode="w") as file:
        file.write(ptx)
        file.flush()
        command = [str(TOOLS / "ptxas"), "-v", f"--gpu-name={target[1]}", file.name, "-o", "/dev/null"]
        return subprocess.run(command, capture_output=True, text=True, check=True).stderr


@dataclass(frozen=True)
class Disassembly:
    code: list[tuple[str, str]]  # (operation, operands), in order
    labels: dict[str, int]  # label to the index of the instruction after it


def disassembled(listing: str) -> Disassembly:
    """nvdisasm's listing as operations ("HGMMA", "BRA", ...) with their operands, predicates left out."""
    code: list[tuple[str, str]] = []
    labels: dict[str, int] = {}
    for line in listing.splitlines():
        if label := re.match(r"\s*(\.L_\w+):", line):
            labels[label[1]] = len(code)
        elif instruction := re.match(r"\s*/\*[0-9a-f]{4,}\*/\s+(?:@!?U?P\w+\s+)?([A-Z0-9_]+)[^ ;]*\s*([^;]*);", line):
            code.append((instruction[1], instruction[2]))
    return Disassembly(code, labels)


def matrix_loops(listing: Disassembly) -> list[Loop]:
    """The innermost loops (a branch backwards with no other inside) that multiply matrices."""
    spans = []
    for index, (operation, operands) in enumerate(listing.code):
        target = re.search(r"\.L_\w+", operands) if operation == "BRA" else None
        start = listing.labels.get(target[0], index + 1) if target else index + 1
        if start < index:
            spans.append((start, index + 1))
    loops = []
    for start, stop in spans:
        if any(start <= a and b <= stop and (a, b) != (start, stop) for a, b in spans):
            continue
        names = [operation for operation, _ in listing.code[start:stop]]
        hgmma, hmma, ffma = (names.count(name) for name in MATRIX)
        if hgmma or hmma or ffma >= FEWEST_FFMA:
            loops.append(Loop(len(names), sum(map(names.count, SPILLS)), hgmma, hmma, ffma))
    return loops
