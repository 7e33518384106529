"""What was made for maps of one size, kept for the next call with that size."""

from __future__ import annotations

import threading
from collections import OrderedDict
from collections.abc import Callable, Hashable
from typing import Generic, TypeVar

import torch

from cflow_fast.kernels.capture import in_capture

MAX_TABLES = 8
"""Sizes of feature maps whose positional tables are kept; the one unused for longest is dropped first."""

Table = TypeVar("Table")


class TableCache(Generic[Table]):
    """Tables by size, safe from several threads. What a CUDA graph has read when captured stays: replays read it.

    It stays for as long as the decoder does, since nobody says when a graph is gone.
    """

    def __init__(self, device: torch.device) -> None:
        self.device = device
        self._tables: OrderedDict[Hashable, Table] = OrderedDict()
        self._captured: dict[Hashable, Table] = {}
        self._lock = threading.Lock()

    def get(self, size: Hashable, make: Callable[[], Table]) -> Table:
        """The table of that size, made if there is none."""
        with self._lock:
            if size not in self:
                self._tables[size] = make()
            if in_capture(self.device) and size in self._tables:
                self._captured[size] = self._tables.pop(size)
            if size in self._captured:
                return self._captured[size]
            self._tables.move_to_end(size)
            while len(self._tables) > MAX_TABLES:
                self._tables.popitem(last=False)
            return self._tables[size]

    def __contains__(self, size: Hashable) -> bool:
        return size in self._tables or size in self._captured

    def __len__(self) -> int:
        return len(self._tables) + len(self._captured)
