"""A wide decoder as a sequence of launches, a few per coupling block, over all rows of a chunk.

    0  kernels/packing.py    features that the first block would round, or turn for soft permutations, in every product
    A  kernels/linear.py     hidden = act(w1 x1 + bias), and v beside it where a rotation follows (in tf32 after it)
    B  kernels/coupling.py   y2, sums of j
    C  kernels/linear.py     soft permutations: x' by one product, or by a rotation's two; hard ones have none
       kernels/merging.py    of few rows C and the next A as one product
       kernels/scaling.py    before A and C, where operands are scaled: their factor, laid down as such
       kernels/packing.py    before A, where x1 is read faster row by row than a hard permutation leaves it
and one reduction. Features that are operands already are read where they lie; what lies between the blocks is
`state`'s.
"""

from __future__ import annotations

from collections.abc import Iterator

import torch
from torch import Tensor

from cflow_fast.kernels.chip import Chip
from cflow_fast.kernels.configs import (
    LinearConfig,
    PackingConfig,
    begins_early,
    select_reduction,
    select_scaling,
)
from cflow_fast.kernels.coupling import Halves, Norm, coupling_launch
from cflow_fast.kernels.launch import Launch, Scratch, cdiv
from cflow_fast.kernels.linear import Beyond, Positions, linear_launch
from cflow_fast.kernels.operands import adds_in_parts, how_mixed, how_taken, in_two_parts, is_scaled
from cflow_fast.kernels.packing import packing_launch
from cflow_fast.kernels.phase_weights import PhaseWeights, is_joined, sums_dtype
from cflow_fast.kernels.reduction import reduction_launch
from cflow_fast.kernels.rows import Rows, loose_rows
from cflow_fast.kernels.scaling import Bound, Factors, scaling_launch
from cflow_fast.kernels.state import HardState, MergedState, ScaledSoftState, SoftState
from cflow_fast.kernels.tuning import select_coupling, select_laying, select_linear

ROW_PADDING = 128
"""Workspaces have whole tiles of rows: no tile is higher than this."""

HiddenBias = list[Positions] | Tensor | None
"""Every block's tables by position, the rows' own condition (N, C), or b1 alone."""


class Phases:
    """The launches for one chunk of rows. They are made as they are run, so that split sums share their memory."""

    def __init__(self, prepared: PhaseWeights, rows: int, chip: Chip) -> None:
        self.prepared, self.rows, self.chip = prepared, rows, chip
        self.scratch = Scratch(prepared.device)
        half, hidden = prepared.half, prepared.hidden
        self.coupling = select_coupling(rows, hidden, half, prepared.precision, chip)
        self.early, self.begun = begins_early(rows, chip), False
        if self.early:
            self.scratch.counters(1)  # now: a launch can be early only after another one
        self.joined = is_joined(prepared.precision)
        v_takes = how_mixed(prepared.precision) or ""
        self.makes_v = self._config(half, hidden + half) if self.joined else self._config(half, half, v_takes)
        self.tiles = cdiv(half, self.coupling.block_out)
        self.v_tiles = 0 if prepared.norm_passive else cdiv(half, self.makes_v.block_out)
        self.padded_rows = cdiv(rows, ROW_PADDING) * ROW_PADDING
        self.packed = False
        self.factors = None
        if is_scaled(prepared.precision):
            matrices = prepared.soft.matrices if prepared.soft else 0
            widest = max(2 * half if matrices else half, _condition_width(prepared))
            in_two = in_two_parts(prepared.precision) or not prepared.hard
            self.factors = Factors(rows, self.padded_rows, widest, in_two, prepared.device)
        self.x1 = None
        if prepared.hard and select_laying(rows, half, prepared.precision, chip).row_by_row:
            self.x1 = Rows(self.empty(self.padded_rows, half), rows, half, half, 1)
        self.bias: HiddenBias = None
        self.hidden = self._hidden_rows(hidden)
        self.sums = self.empty(
            (prepared.weights.blocks + 1) * self.tiles + self.v_tiles, self.padded_rows, dtype=torch.float32
        )
        soft = MergedState if prepared.merged else SoftState if self.factors is None else ScaledSoftState
        self.state = HardState(self) if prepared.hard else soft(self)

    def launches(
        self, features: Rows, bias: HiddenBias, log_prob: Tensor, log_det: Tensor, want_u: bool = False
    ) -> Iterator[Launch]:
        """Everything up to log_prob and log_det, (N,) float32; with want_u `u` is there afterwards."""
        weights, state, self.bias = self.prepared.weights, self.state, bias
        source = Halves(features.narrow(0, weights.passive), features.narrow(weights.passive, weights.active))
        x1, self.packed = source.passive, self.packs(features)
        if self.packed:
            yield self._packing_layer(source)
            x1, source = state.first_input(0), state.packed_source(source)
        for block in range(weights.blocks):
            last = block == weights.blocks - 1
            kept = want_u or not last
            yield from self._first_layer(block, x1, bias, state.beyond(block, kept, last))
            yield self._coupling_layer(block, source, kept, last)
            if not last:
                yield from state.mix(block)
                source, x1 = state.source(block + 1), state.first_input(block + 1)
        log_dets = weights.blocks * self.tiles
        yield reduction_launch(
            self.sums,
            log_dets,
            weights.log_scale,
            weights.features,
            log_prob,
            log_det,
            select_reduction(self.rows),
            self._is_early(),
        )
        if want_u:
            yield from state.turn_into_u(weights.blocks - 1)

    def packs(self, features: Rows) -> bool:
        """Whether the first block takes the features from where they were packed, not from where they lie."""
        precision, hard = self.prepared.precision, bool(self.prepared.hard)
        if self.factors is not None or self.x1 is not None:  # what products take is laid down anyhow
            return False
        nothing_to_round = precision == "ieee" and features.tensor.dtype == torch.float32
        as_kept = nothing_to_round or self._taken(features) == how_taken(precision, exact=not hard)
        return not (as_kept and (hard or features.feature_stride == 1))

    @property
    def u(self) -> Tensor:
        """(N, D) float32, after launches that wanted it."""
        return self.state.u()

    def product(
        self,
        x: Rows,
        weight: Tensor,
        low: Tensor | None,
        y: Tensor,
        bias: Tensor | None = None,
        scale: Tensor | None = None,
        **options: object,
    ) -> Iterator[Launch]:
        """scale: where that of a scaled factor is kept, if it is still wanted afterwards."""
        takes = str(options.setdefault("takes", how_taken(self.prepared.precision, x)))
        config = self._config(weight.shape[1], weight.shape[0], takes, options.get("rotation") is not None)
        if self.factors is not None and x.scale is None:
            place = self.factors.place(weight.shape[1], takes == "parts", scale)
            yield self.scaled(x, place)
            x = place
        yield self._linear(x, weight, low, y, config, bias, **options)

    def scaled(self, x: Rows, place: Rows, mixed: Bound | None = None, hidden: Bound | None = None) -> Launch:
        """x as scaled operands."""
        config = select_scaling(place.features)
        return scaling_launch(x, place, config, mixed=mixed, hidden=hidden, early=self._is_early())

    def hidden_bound(self, block: int) -> Bound:
        assert self.factors is not None
        assert self.prepared.bounds is not None
        bounds, scale = self.prepared.bounds, self.factors.hidden_scale
        if isinstance(self.bias, Tensor):
            condition = self.factors.place(_condition_width(self.prepared), False, self.factors.condition_scale)
            return Bound(scale, bounds.hidden[block], bounds.offset[block], condition, bounds.condition[block])
        return Bound(scale, bounds.hidden[block], (bounds.positional if self.bias else bounds.offset)[block])

    def empty(self, *shape: int, dtype: torch.dtype | None = None) -> Tensor:
        """dtype: unless given, that of a state."""
        dtype = dtype or sums_dtype(self.prepared.precision)
        return torch.empty(shape, dtype=dtype, device=self.prepared.device)

    def _hidden_rows(self, width: int) -> Rows:
        parts = 2 if self.factors is not None and in_two_parts(self.prepared.precision) else 1
        large, *low = (self.empty(self.padded_rows, width, dtype=self.prepared.dtype) for _ in range(parts))
        scale = self.factors.hidden_scale if self.factors else None
        return Rows(large, self.rows, width, width, 1, low=low[0] if low else None, scale=scale)

    def _first_layer(self, block: int, x1: Rows, bias: HiddenBias, beyond: Beyond | None) -> Iterator[Launch]:
        w = self.prepared
        hidden = self.hidden
        takes = self._taken(x1)
        added = None
        if isinstance(bias, Tensor):
            assert w.w1_condition is not None
            low = None if w.low is None else _of(w.low.w1_condition, block)
            added, scale = hidden.tensor, None
            if self.factors is not None:
                added, scale = self.empty(self.padded_rows, w.hidden), self.factors.condition_scale
            yield from self.product(
                loose_rows(bias), w.w1_condition[block], low, added, scale=scale, rounded=self.factors is None
            )
        if self.factors is not None and x1.scale is None:
            place = self.state.factor() or self.factors.place(w.half, in_two_parts(w.precision))
            yield self.scaled(x1, place, hidden=self.hidden_bound(block))
            x1 = place
        if self.x1 is not None and (x1.index is not None or takes == "rounded"):
            rounded, early = not in_two_parts(w.precision), self._is_early()
            yield packing_launch(x1, None, self.x1, None, PackingConfig(), w.precision, rounded, early)
            x1, takes = self.x1, "operand" if rounded else takes
        outputs, inputs = w.w1[block].shape
        config = self._config(inputs, outputs, takes)
        if beyond and self.joined and beyond.squares is not None:
            config = self.makes_v  # whose tiles the sums are laid out for
        yield self._linear(
            x1,
            w.w1[block],
            None if w.low is None else w.low.w1[block],
            hidden.tensor,
            config,
            bias[block] if isinstance(bias, list) else w.bias[block],
            added=added,
            activation=w.weights.activation,
            beyond=beyond if self.joined else None,
            takes=takes,
            y_low=hidden.low,
            y_scale=hidden.scale,
        )
        if beyond and not self.joined:
            assert w.soft is not None
            rotation, nothing = block - w.soft.matrices, hidden.tensor[:, :0]
            v1, offset = w.soft.passive[rotation], w.soft.passive_offset[rotation]
            yield self._linear(x1, v1, None, nothing, self.makes_v, offset, beyond=beyond, takes=how_mixed(w.precision))

    def _packing_layer(self, source: Halves) -> Launch:
        passive, active = self.state.places()
        x2 = None if active is None else source.active
        self.begun = True
        return packing_launch(
            source.passive, x2, passive, active, PackingConfig(), self.prepared.precision, self.rounds_state
        )

    def _taken(self, x1: Rows) -> str:
        """How the first layer takes x1."""
        return how_taken(self.prepared.precision, x1, exact=not self.prepared.hard)

    def _coupling_layer(self, block: int, source: Halves, kept: bool, last: bool) -> Launch:
        w = self.prepared
        norm = None
        if last:
            passive_gain, passive_shift = w.norm_passive or (None, None)
            first = w.weights.blocks * self.tiles
            norm = Norm(self.sums[first : first + self.tiles], *w.norm_active, passive_gain, passive_shift)
        return coupling_launch(
            self.hidden,
            w.w2[block],
            w.b2[block],
            source,
            self.state.target(block, carries=block == 0 and not self.packed) if kept else None,
            self.sums[block * self.tiles : (block + 1) * self.tiles],
            w.weights.clamp,
            self.coupling,
            w.precision,
            self.scratch,
            self.chip.multiprocessors,
            pending=self.state.pending(block),
            norm=norm,
            rounded=self.rounds_state,
            low=None if w.low is None else w.low.w2[block],
            weight_scale=w.scale,
            early=self._is_early(),
        )

    def _is_early(self) -> bool:
        """Of the next launch: the first of a chain follows whatever the caller queued."""
        early, self.begun = self.early and self.begun, True
        return early

    @property
    def rounds_state(self) -> bool:
        """Whether what a product takes is stored as an operand; soft permutations in tf32 take it as two, and scaled
        operands are made of a state of their own."""
        return self.factors is None and (bool(self.prepared.hard) or self.prepared.precision != "tf32")

    def v_squares(self) -> Tensor:
        """The sums of v^2 after the last block's rotation."""
        return self.sums[-self.v_tiles :]

    def _config(self, inputs: int, outputs: int, takes: str = "", rotates: bool = False) -> LinearConfig:
        """takes: how the factor is taken that a state keeps, unless given."""
        precision = self.prepared.precision
        second = rotates or adds_in_parts(precision, takes or how_taken(precision))
        return select_linear(self.rows, inputs, outputs, precision, self.chip, second)

    def _linear(
        self,
        x: Rows,
        weight: Tensor,
        low: Tensor | None,
        y: Tensor,
        config: LinearConfig,
        bias: Tensor | Positions | None,
        **options: object,
    ) -> Launch:
        return linear_launch(
            x,
            weight,
            y,
            config,
            self.prepared.precision,
            self.scratch,
            self.chip.multiprocessors,
            bias=bias,
            low=low,
            weight_scale=self.prepared.scale,
            early=self._is_early(),
            **options,  # type: ignore[arg-type]
        )


def _condition_width(prepared: PhaseWeights) -> int:
    return 0 if prepared.w1_condition is None else prepared.w1_condition.shape[2]


def _of(matrices: Tensor | None, block: int) -> Tensor | None:
    return None if matrices is None else matrices[block]
