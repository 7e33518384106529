"""The Triton implementation of a folded decoder: the counterpart of `torch_flow.TorchFlow`, with the same calls.

A decoder whose state fits the registers runs whole in one kernel (`whole_flow`), a wider one in `phases`.
"""

from __future__ import annotations

import threading
from collections.abc import Callable, Hashable, Iterator
from dataclasses import replace
from typing import TypeVar, cast

import torch
from torch import Tensor

from cflow_fast.kernels.capture import finish, in_capture, on_device
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

Made = TypeVar("Made")


class TritonFlow:
    """A folded decoder for one card and one of `lang.PRECISIONS`."""

    def __init__(self, weights: FlowWeights, precision: str) -> None:
        self.weights, self.precision = weights, precision
        self.chip = Chip.of(weights.device)
        self.tables: TableCache[object] = TableCache(weights.device)
        self.made: dict[str, object] = {}
        self._lock = threading.RLock()

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
            size = height, width
            prepared, tables = self._prepared_for(log_prob.numel(), None if encoding is None else size), None
            if encoding is not None:
                tables = self._tables((*size, prepared.merged), encoding, prepared.positions)
            for images, lines in chunks(batch, height, width):
                rows, some = map_rows(features[images, :, lines]), log_prob[images, lines]
                bias = tables and [replace(table, rows=table.rows[lines]) for table in tables]
                _launched(Phases(prepared, rows.count, self.chip), rows, bias, some, torch.empty_like(some))
            return log_prob

    def rows(self, z: Tensor, condition: Tensor | None, want_u: bool) -> FlowResult:
        """As TorchFlow.rows: loose feature vectors (N, D) with a condition (N, C) each; u as (N, D) float32."""
        with on_device(z.device):
            config = self._whole_config(len(z), own_condition=condition is not None)
            if config is not None:
                return whole_flow_rows(z, condition, self.whole, want_u, config)
            log_prob, log_det = (torch.empty(len(z), dtype=torch.float32, device=z.device) for _ in range(2))
            u = torch.empty(z.shape, dtype=torch.float32, device=z.device) if want_u else None
            prepared = self._prepared_for(len(z))
            for start in range(0, len(z), CHUNK_ROWS):
                some = slice(start, start + CHUNK_ROWS)
                bias = None if condition is None else condition[some]
                rows = loose_rows(z[some])
                phases = Phases(prepared, rows.count, self.chip)
                _launched(phases, rows, bias, log_prob[some], log_det[some], want_u)
                if u is not None:
                    u[some] = phases.u
            return FlowResult(log_prob, log_det, u)

    @property
    def whole(self) -> WholeFlowWeights:
        return self._once("whole", lambda: WholeFlowWeights.prepare(self.weights, in_one_kernel(self.precision)))

    @property
    def prepared(self) -> PhaseWeights:
        return self._once("prepared", lambda: PhaseWeights.prepare(self.weights, self.precision))

    @property
    def merged(self) -> PhaseWeights:
        return self._once("merged", lambda: merge(self.prepared))

    def _once(self, name: str, make: Callable[[], Made]) -> Made:
        """What is made on first use. Once for all threads: a graph may have read it, and keeps nothing alive."""
        found = self.made.get(name)
        if found is None:
            with self._lock:
                found = self.made.get(name)
                if found is None:
                    found = make()
                    finish(self.weights.device)
                    self.made[name] = found
        return cast(Made, found)

    def launches_often(self, rows: int, own_condition: bool) -> bool:
        """Whether so many rows run in phases, not whole in one kernel."""
        return self._whole_config(rows, own_condition) is None

    def _whole_config(self, rows: int, own_condition: bool = False) -> WholeFlowConfig | None:
        features = self.weights.features
        hard = isinstance(self.weights.mixing, HardMixing)
        return select_whole_flow(self.chip, features, rows, in_one_kernel(self.precision), own_condition, hard)

    def _prepared_for(self, rows: int, size: tuple[int, int] | None = None) -> PhaseWeights:
        """For all rows of a call, on maps of a size that need tables or not. What merged weights there are not yet is
        not made inside a capture, where it would only be there after a replay.
        """
        if not is_merged(self.prepared, rows, self.chip):
            return self.prepared
        is_there = "merged" in self.made and (size is None or (*size, True) in self.tables)
        return self.merged if is_there or not in_capture(self.weights.device) else self.prepared

    def _tables(
        self, key: Hashable, encoding: tuple[Tensor, Tensor], lay_out: Callable[[PositionalTables], Made]
    ) -> Made:
        def make() -> Made:
            tables = lay_out(positional_tables(self.weights, encoding, sums_dtype(self.precision)))
            finish(self.weights.device)
            return tables

        return cast(Made, self.tables.get(key, make))


def _launched(
    phases: Phases, rows: Rows, bias: HiddenBias, log_prob: Tensor, log_det: Tensor, want_u: bool = False
) -> None:
    for launch in phases.launches(rows, bias, log_prob.view(-1), log_det.view(-1), want_u):
        launch.run()


def chunks(batch: int, height: int, width: int) -> Iterator[tuple[slice, slice]]:
    """Images and lines of every chunk: whole images, or lines of one image where it alone is too large."""
    if not batch * height * width:
        return
    images, lines = max(1, CHUNK_ROWS // (height * width)), min(height, max(1, CHUNK_ROWS // width))
    for image in range(0, batch, images):
        for line in range(0, height, lines):
            yield slice(image, image + images), slice(line, line + lines)
