"""The card that kernels run on, as far as their tile shapes depend on it."""

from __future__ import annotations

import functools
from dataclasses import dataclass

import torch


@dataclass(frozen=True)
class Chip:
    capability: tuple[int, int] = (9, 0)
    multiprocessors: int = 132
    name: str = ""  # as its maker calls it; empty where nothing was asked

    @staticmethod
    def of(device: torch.device) -> Chip:
        """Where nothing can be asked, under the interpreter or for meta tensors, an H100."""
        return _asked(device.index) if device.type == "cuda" else Chip()


@functools.cache
def _asked(index: int | None) -> Chip:
    properties = torch.cuda.get_device_properties(torch.cuda.current_device() if index is None else index)
    return Chip((properties.major, properties.minor), properties.multi_processor_count, properties.name)
