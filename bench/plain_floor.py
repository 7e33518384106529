"""The least that the plain path of a decoder could take on a card: PyTorch's operations and the fused ones between its
products, each at the card's rates.

Counted without a card, by running the decoder on the meta device: products at the matrix rate, bytes at that of the L2
cache where they fit it and of memory elsewhere, and the time from one launch to the next. Nothing real is as fast, so
that what stays under it is faster; what does not has to be measured.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from typing import Any

import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves
from torch.utils.flop_counter import flop_registry

from cflow_fast.bench.prediction import Card
from cflow_fast.bench.specimens import META
from cflow_fast.kernels.products import FusedProducts
from cflow_fast.kernels.torch_flow import PositionalTables, TorchFlow
from cflow_fast.kernels.weights import FlowWeights

NO_LAUNCH = ("empty", "detach", "lift_fresh")
"""Of operations that return no view: those that only name memory."""


def plain_at_least(weights: FlowWeights, maps: Tensor, card: Card) -> float:
    """Seconds for weights and maps (B, D, H, W) on the meta device, tables made beforehand, in one captured graph."""
    flow = TorchFlow(weights, weights.operand_dtype, packed=False)
    height, width = maps.shape[2:]
    encoding = None
    if weights.condition:
        sides = (
            torch.empty(weights.blocks, n, weights.hidden, dtype=flow.operand_dtype, device=META)
            for n in (height, width)
        )
        tables = PositionalTables(*sides)
        flow.tables.get((height, width), lambda: tables)
        encoding = (torch.empty(0), torch.empty(0))  # not looked at
    rate = card.matrix["bf16" if flow.operand_dtype == torch.bfloat16 else "ieee"]
    with _Counted(card, rate) as counted, torch.no_grad():
        flow.products = _FusedOnMeta(weights, flow.operand_dtype, counted)
        flow.log_prob_map(maps, encoding)
    return counted.seconds


class _Counted(TorchDispatchMode):
    def __init__(self, card: Card, rate: float) -> None:
        super().__init__()
        self.card, self.rate, self.seconds = card, rate, 0.0

    def __torch_dispatch__(
        self, func: Any, types: Any, args: tuple[Any, ...] = (), kwargs: Mapping[str, Any] | None = None
    ) -> Any:
        out = func(*args, **(kwargs or {}))
        if not func.is_view and not func.overloadpacket.__name__.startswith(NO_LAUNCH):
            count = flop_registry.get(func.overloadpacket)
            flop = count(*args, **(kwargs or {}), out_val=out) if count else 0
            self.add(flop, tree_leaves((args, kwargs, out)))
        return out

    def add(self, flop: float, moved: Iterable[Any]) -> None:
        """A launch that reads or writes every one of these once."""
        size = _bytes(moved)
        bandwidth = self.card.l2 if size < self.card.l2_bytes else self.card.memory
        self.seconds += max(flop / self.rate, size / bandwidth) + self.card.launch_seconds


class _FusedOnMeta(FusedProducts):
    """Its kernels are counted in the place of running: they need memory."""

    def __init__(self, weights: FlowWeights, operand_dtype: torch.dtype, counted: _Counted) -> None:
        super().__init__(weights, operand_dtype)
        self.counted = counted

    def coupled(self, block: int, hidden: Tensor, x2: Tensor, log_det: Tensor) -> Tensor:
        s_and_t, y2 = self.product("w2", block, hidden), torch.empty(x2.shape, dtype=torch.float32, device=META)
        self.counted.add(0, (s_and_t, x2, y2))
        log_det += 0  # the sums of j join it
        return y2

    def rotated(self, v: Tensor, w: Tensor, cosine: Tensor, sine: Tensor) -> tuple[Tensor, Tensor]:
        self.counted.add(0, (v, w, v, w))
        return torch.empty_like(w), torch.empty_like(w)


def _bytes(values: Iterable[Any]) -> int:
    return sum(value.numel() * value.element_size() for value in values if isinstance(value, Tensor))
