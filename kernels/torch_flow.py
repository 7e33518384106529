"""The PyTorch implementation of a folded decoder: from feature maps or loose rows to log-likelihoods.

It lays the features out as the chosen products want them, adds up the positional tables and works through the rows
in chunks, so that the hidden layer (chunk x m) does not grow with the batch.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from cflow_fast.kernels.capture import finish
from cflow_fast.kernels.flow import FlowResult, run_flow
from cflow_fast.kernels.products import FusedProducts, MatmulProducts, OneDnnProducts
from cflow_fast.kernels.table_cache import TableCache
from cflow_fast.kernels.weights import FlowWeights

CPU_CHUNK_ROWS = 2048
"""Rows worked on at once: enough that the threads' meeting after every operation costs little."""
GPU_CHUNK_ROWS = 32768
"""There memory is the only bound: the widest hidden layer of WideResNet-50's decoders stays under 310 MB in fp32."""


@dataclass(frozen=True)
class PositionalTables:
    """w1_condition . encoding + b1 split by axis: the bias at (row, column) is rows[k, row] + columns[k, column]."""

    rows: Tensor  # (K, H, m)
    columns: Tensor  # (K, W, m), b1 included


class TorchFlow:
    """A folded decoder prepared for one device: weights as they are multiplied, packed where that is faster.

    state: see `products.precision_of`.
    fused: with Triton's kernels between the products, on a card that runs them; the state is float32 then.
    """

    def __init__(
        self,
        weights: FlowWeights,
        operand_dtype: torch.dtype,
        packed: bool,
        fused: bool = False,
        state: torch.dtype | None = None,
    ) -> None:
        self.weights = weights
        self.operand_dtype = operand_dtype
        self.products: MatmulProducts | OneDnnProducts
        if packed:
            self.products = OneDnnProducts(weights, operand_dtype, CPU_CHUNK_ROWS // 2, state)
        else:
            self.products = (FusedProducts if fused else MatmulProducts)(weights, operand_dtype, state)
        self.tables: TableCache[PositionalTables] = TableCache(weights.device)

    def log_prob_map(self, features: Tensor, encoding: tuple[Tensor, Tensor] | None) -> Tensor:
        """Natural log-likelihood of every position of feature maps (B, D, H, W), in any memory format: (B, H, W).

        encoding: the positional encoding's two factors, over rows (H, C/2) and over columns (W, C/2); None when
        the decoder has no condition.
        """
        batch, _, height, width = features.shape
        log_prob = torch.empty(batch * height * width, dtype=self.weights.state_dtype, device=features.device)
        lines = max(1, self.chunk_rows(features.device) // max(width, 1))
        tables = None if encoding is None else self._tables_for(height, width, encoding)
        for start in range(0, batch * height, lines):
            stop = min(start + lines, batch * height)
            x1, x2 = self._lines(features, start, stop)
            bias = None if tables is None else _LineBias(tables, start, stop, height, self.products.feature_dim)
            log_prob[start * width : stop * width] = run_flow(self.products, x1, x2, bias).log_prob
        return log_prob.view(batch, height, width)

    def rows(self, z: Tensor, condition: Tensor | None, want_u: bool) -> FlowResult:
        """Loose feature vectors (N, D) with a condition (N, C) each; u comes back as (N, D)."""
        chunk = self.chunk_rows(z.device)
        parts = [
            self._rows_chunk(z[i : i + chunk], None if condition is None else condition[i : i + chunk], want_u)
            for i in range(0, max(len(z), 1), chunk)
        ]
        log_prob, log_det = (torch.cat([part[i] for part in parts]) for i in (0, 1))  # type: ignore[misc]
        u = torch.cat([part.u for part in parts if part.u is not None]) if want_u else None
        return FlowResult(log_prob, log_det, u)

    def launches_often(self, rows: int, own_condition: bool) -> bool:
        return False

    def _rows_chunk(self, z: Tensor, condition: Tensor | None, want_u: bool) -> FlowResult:
        x1, x2 = self._halves(z.to(self.weights.state_dtype).t())
        bias = None
        if condition is not None:
            c = condition.to(self.weights.state_dtype)
            c = c if self.products.feature_dim == 1 else c.t()

            def bias(block: int) -> Tensor:
                return self.products.product("w1_condition", block, c)

        result = run_flow(self.products, x1, x2, bias, want_u)
        if result.u is None or self.products.feature_dim == 1:
            return result
        return result._replace(u=result.u.t())

    def _lines(self, features: Tensor, start: int, stop: int) -> tuple[Tensor, Tensor]:
        """The halves of the feature vectors of the image lines start to stop, counted through the batch."""
        height = features.shape[2]
        first, last = start // height, -(-stop // height)
        some = features[first:last].permute(1, 0, 2, 3).flatten(1, 2)[:, start - first * height : stop - first * height]
        return self._halves(some.flatten(1).to(self.weights.state_dtype))

    def _halves(self, x: Tensor) -> tuple[Tensor, Tensor]:
        """(D, N) in any strides to contiguous halves in the products' layout."""
        x = x if self.products.feature_dim == 0 else x.t()
        passive, dim = self.weights.passive, self.products.feature_dim
        return x.narrow(dim, 0, passive).contiguous(), x.narrow(dim, passive, self.weights.active).contiguous()

    def _tables_for(self, height: int, width: int, encoding: tuple[Tensor, Tensor]) -> PositionalTables:
        def made() -> PositionalTables:
            tables = positional_tables(self.weights, encoding, self.operand_dtype)
            finish(self.weights.device)
            return tables

        return self.tables.get((height, width), made)

    def chunk_rows(self, device: torch.device) -> int:
        """How many are worked on at once."""
        return CPU_CHUNK_ROWS if device.type == "cpu" else GPU_CHUNK_ROWS


def positional_tables(
    weights: FlowWeights, encoding: tuple[Tensor, Tensor], operand_dtype: torch.dtype
) -> PositionalTables:
    """Fold the encoding (rows (H, C/2), columns (W, C/2)) into every block's first layer."""
    assert weights.w1_condition is not None
    by_row, by_column = (factor.to(weights.device, weights.state_dtype) for factor in encoding)
    matrix = weights.w1_condition.to(weights.state_dtype)
    half = weights.condition // 2  # the encoding's first half of channels depends on the column, its second on the row
    columns = by_column @ matrix[:, :, :half].mT + weights.b1.unsqueeze(1)
    rows = by_row @ matrix[:, :, half:].mT
    return PositionalTables(rows.to(operand_dtype), columns.to(operand_dtype))


class _LineBias:
    """The hidden layer's bias for whole image lines: one vector per line plus one per column."""

    def __init__(self, tables: PositionalTables, start: int, stop: int, height: int, feature_dim: int) -> None:
        self.tables = tables
        self.lines = torch.arange(start, stop, device=tables.rows.device) % height
        self.feature_dim = feature_dim

    def __call__(self, block: int) -> Tensor:
        rows, columns = self.tables.rows[block][self.lines], self.tables.columns[block]
        if self.feature_dim == 1:
            return (rows.unsqueeze(1) + columns.unsqueeze(0)).flatten(0, 1)
        return (rows.t().unsqueeze(2) + columns.t().unsqueeze(1)).flatten(1)
