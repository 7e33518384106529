"""What a result was measured on: processor, its features, versions, and the checkout's commit."""

from __future__ import annotations

import os
import platform
import re
import subprocess
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any

import torch

import cflow_fast
from cflow_fast.precision import cpu_has

CPU_FEATURES = ("avx2", "avx512", "avx512_bf16", "amx_bf16")
PACKAGES = ("cflow-fast", "triton", "timm", "FrEIA", "anomalib", "numpy")


def describe_machine(device: torch.device) -> dict[str, Any]:
    """Processor, threads, what it can multiply, memory; for a GPU its name and compute capability too."""
    facts: dict[str, Any] = {
        "cpu": _cpu_name(),
        "cores": os.cpu_count(),
        "threads": torch.get_num_threads(),
        "features": [name for name in CPU_FEATURES if cpu_has(name)],
        "memory_bytes": _memory(),
        "system": f"{platform.system()} {platform.machine()}",
    }
    if device.type == "cuda":
        properties = torch.cuda.get_device_properties(device)
        facts |= {
            "gpu": properties.name,
            "capability": f"{properties.major}.{properties.minor}",
            "gpu_memory_bytes": properties.total_memory,
            "multiprocessors": properties.multi_processor_count,
            "cuda": torch.version.cuda,
        }
    return facts


def plain_name(processor: str) -> str:
    """Without trademarks and clock rate: Intel Xeon Processor."""
    return " ".join(re.sub(r"\((R|TM|C)\)|\s+@.*", " ", processor, flags=re.IGNORECASE).split())


def file_name(processor: str) -> str:
    """As part of a file's name: intel-xeon-processor."""
    return re.sub(r"[^a-z0-9]+", "-", plain_name(processor).lower()).strip("-") or "unknown"


def versions() -> dict[str, str]:
    """Of Python and every package that matters; one that is missing is "not installed"."""
    found = {"python": platform.python_version(), "torch": torch.__version__}
    for name in PACKAGES:
        try:
            found[name] = version(name)
        except PackageNotFoundError:
            found[name] = "not installed"
    return found


def commit() -> str:
    """The commit of the checkout that this package runs from, with "-dirty" after changes; else "unknown"."""
    root = Path(cflow_fast.__file__).resolve().parent.parent
    if not (root / ".git").exists():
        return "unknown"
    try:
        command = ["git", "-C", str(root), "describe", "--always", "--dirty", "--abbrev=40", "--exclude=*"]
        return subprocess.run(command, capture_output=True, text=True, check=True, timeout=10).stdout.strip()
    except (OSError, subprocess.SubprocessError):
        return "unknown"


def _cpu_name() -> str:
    path = Path("/proc/cpuinfo")
    lines = path.read_text().splitlines() if path.exists() else []
    names = [line.split(":", 1)[1].strip() for line in lines if line.startswith("model name")]
    return names[0] if names else platform.processor() or "unknown"


def _memory() -> int | None:
    try:
        return os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")
    except (AttributeError, ValueError, OSError):
        return None
