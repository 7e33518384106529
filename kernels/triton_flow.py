"""The Triton implementation of a folded decoder: the counterpart of `torch_flow.TorchFlow`, with the same calls.

A decoder whose state fits the registers runs whole in one kernel (`whole_flow`), a wider one in `phases`.
"""

from __future__ import annotations

from collections.abc import Callable, Hashable, Iterator
from dataclasses import replace
from functools import cached_property
from typing import TypeVar, cast

import torch
from torch import Tensor

from cflow_fast.kernels.capture import finish, on_device
from cflow_fast.kernels.chip import Chip
from cflow_fast.kernels.configs import WholeFlowConfig
from cflow_fast.kernels.flow import FlowResult
from cflow_fast.kernels.merging import is_merged, merge
from cflow_fast.kernels.operands import in_one_kernel
from cflow_fast.kernels.phase_weights import PhaseWeights, sums_dtype
from cflow_fast.kernels.phases import HiddenBias, Phases
from cflow_fast.kernels.rows import Rows, loose_rows, map_rows
from cflow_fast.kernels.table_cache import TableCache
from cflow_fast.kernels.torch_flow import PositionalTables, positional_tables
from cflow_fast.kernels.tuning import select_whole_flow
from cflow_fast.kernels.weights import FlowWeights, HardMixing
from cflow_fast.kernels.whole_flow import whole_flow_map, whole_flow_rows
from cflow_fast.kernels.whole_flow_weights import WholeFlowWeights

CHUNK_ROWS = 32768
"""Rows that the phases work on at once: the widest hidden layer of WideResNet-50's decoders then has 151 MB in bf16."""

Tables = TypeVar("Tables")


class TritonFlow:
    """A folded decoder for one card and one of `lang.PRECISIONS`."""

    def __init__(self, weights: FlowWeights, precision: str) -> None:
        self.weights, self.precision = weights, precision
        self.chip = Chip.of(weights.device)
        self.tables: TableCache[object] = TableCache(weights.device)

    def log_prob_map(self, features: Tensor, encoding: tuple[Tensor, Tensor] | None) -> Tensor:
        """As TorchFlow.log_prob_map: natural log-likelihoods (B, H, W) of feature maps (B, D, H, W), float32."""
        batch, _, height, width = features.shape
        with on_device(features.device):
            config = self._whole_config(batch * height * width)
            if config is not None:
                whole = None
                if encoding is not None:
                    whole = self._tables((height, width, "whole"), encoding, self.whole.tables)
                return whole_flow_map(features, self.whole, whole, config)
            log_prob = torch.empty(batch, height, width, dtype=torch.float32, device=features.device)
            for images, lines in chunks(batch, height, width):
                rows, some = map_rows(features[images, :, lines]), log_prob[images, lines]
                bias = None
                if encoding is not None:
                    prepared = self._prepared_for(rows.count)
                    positions = self._tables((height, width, prepared.merged), encoding, prepared.positions)
                    bias = [replace(table, rows=table.rows[lines]) for table in positions]
                self._phases(rows, bias, some.view(-1), torch.empty_like(some).view(-1))
            return log_prob

    def rows(self, z: Tensor, condition: Tensor | None, want_u: bool) -> FlowResult:
        """As TorchFlow.rows: loose feature vectors (N, D) with a condition (N, C) each; u as (N, D) float32."""
        with on_device(z.device):
            config = self._whole_config(len(z), own_condition=condition is not None)
            if config is not None:
                return whole_flow_rows(z, condition, self.whole, want_u, config)
            log_prob, log_det = (torch.empty(len(z), dtype=torch.float32, device=z.device) for _ in range(2))
            u = torch.empty(z.shape, dtype=torch.float32, device=z.device) if want_u else None
            for start in range(0, len(z), CHUNK_ROWS):
                some = slice(start, start + CHUNK_ROWS)
                bias = None if condition is None else condition[some]
                phases = self._phases(loose_rows(z[some]), bias, log_prob[some], log_det[some], want_u)
                if u is not None:
                    u[some] = phases.u
            return FlowResult(log_prob, log_det, u)

    @cached_property
    def whole(self) -> WholeFlowWeights:
        prepared = WholeFlowWeights.prepare(self.weights, in_one_kernel(self.precision))
        finish(self.weights.device)
        return prepared

    @cached_property
    def prepared(self) -> PhaseWeights:
        prepared = PhaseWeights.prepare(self.weights, self.precision)
        finish(self.weights.device)
        return prepared

    @cached_property
    def merged(self) -> PhaseWeights:
        merged = merge(self.prepared)
        finish(self.weights.device)
        return merged

    def launches_often(self, rows: int, own_condition: bool) -> bool:
        """Whether so many rows run in phases, not whole in one kernel."""
        return self._whole_config(rows, own_condition) is None

    def _whole_config(self, rows: int, own_condition: bool = False) -> WholeFlowConfig | None:
        features = self.weights.features
        hard = isinstance(self.weights.mixing, HardMixing)
        return select_whole_flow(self.chip, features, rows, in_one_kernel(self.precision), own_condition, hard)

    def _phases(
        self, features: Rows, bias: HiddenBias, log_prob: Tensor, log_det: Tensor, want_u: bool = False
    ) -> Phases:
        phases = Phases(self._prepared_for(features.count), features.count, self.chip)
        for launch in phases.launches(features, bias, log_prob, log_det, want_u):
            launch.run()
        return phases

    def _prepared_for(self, rows: int) -> PhaseWeights:
        return self.merged if is_merged(self.prepared, rows, self.chip) else self.prepared

    def _tables(
        self, key: Hashable, encoding: tuple[Tensor, Tensor], lay_out: Callable[[PositionalTables], Tables]
    ) -> Tables:
        def made() -> Tables:
            tables = lay_out(positional_tables(self.weights, encoding, sums_dtype(self.precision)))
            finish(self.weights.device)
            return tables

        return cast(Tables, self.tables.get(key, made))


def chunks(batch: int, height: int, width: int) -> Iterator[tuple[slice, slice]]:
    """Images and lines of every chunk: whole images, or lines of one image where it alone is too large."""
    if not batch * height * width:
        return
    images, lines = max(1, CHUNK_ROWS // (height * width)), min(height, max(1, CHUNK_ROWS // width))
    for image in range(0, batch, images):
        for line in range(0, height, lines):
            yield slice(image, image + images), slice(line, line + lines)
