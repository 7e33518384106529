"""Whether the tensors of a module are still those that something was made of."""

from __future__ import annotations

from operator import is_
from typing import Any

from torch import Tensor, nn


class Unchanged:
    """A module as it was: ask for `still` before using what was made of it.

    A parameter, buffer or submodule that was added, exchanged, moved or written to shows; writing to a tensor that was
    made in inference mode does not, since such tensors count no versions. Asked for at every call, for which one image
    leaves a GPU little time: so the places are looked up once.
    """

    def __init__(self, module: nn.Module) -> None:
        self.module, modules = module, list(module.modules())
        tables: list[dict[str, Any]] = [
            table for each in modules for table in (each._modules, each._parameters, each._buffers)
        ]
        self._tables, self._sizes = tables, [len(table) for table in tables]
        places = [(table.get, name, value) for table in tables for name, value in table.items()]
        self._places = [(get, name) for get, name, _ in places]
        self._values = [value for _, _, value in places]
        tensors = [value for value in self._values if isinstance(value, Tensor)]
        self._counting = [tensor for tensor in tensors if not tensor.is_inference()]
        self._versions = [tensor._version for tensor in self._counting]
        self._where = [tensor.data_ptr for tensor in tensors]
        self._addresses = [where() for where in self._where]

    def still(self, module: nn.Module) -> bool:
        """Whether it is the same module, as it was."""
        return (
            module is self.module
            and list(map(len, self._tables)) == self._sizes
            and all(map(is_, [get(name) for get, name in self._places], self._values))
            and [tensor._version for tensor in self._counting] == self._versions
            and [where() for where in self._where] == self._addresses
        )
