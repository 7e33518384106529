"""What lies between two coupling blocks, and how it is mixed: the permutations' part of `phases`.

soft   row-major (N, [passive | active]), twice, since no product writes where others still read; and once in float32;
       merged with the next first layer, which then takes the state, or by launches of its own
hard   feature-major (D, N), once: y2 is written over x2, and nothing else ever moves
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import replace
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from cflow_fast.kernels.coupling import Halves, Pending, Target
from cflow_fast.kernels.launch import Launch
from cflow_fast.kernels.linear import Beyond, Rotation
from cflow_fast.kernels.operands import how_mixed
from cflow_fast.kernels.rows import Rows
from cflow_fast.kernels.scaling import Bound
from cflow_fast.kernels.weights import SoftMixing

if TYPE_CHECKING:
    from cflow_fast.kernels.phases import Phases


class HardState:
    """Block k reads its halves by index; the first reads the features and lays down what was not packed."""

    def __init__(self, phases: Phases) -> None:
        self.phases = phases
        assert phases.prepared.hard is not None
        self.mixing = phases.prepared.hard
        self.v = phases.empty(phases.prepared.weights.features, phases.padded_rows)

    def source(self, block: int) -> Halves:
        weights = self.phases.prepared.weights
        return Halves(
            self._indexed(self.mixing.passive[block], weights.passive),
            self._indexed(self.mixing.active[block], weights.active),
        )

    def target(self, block: int, carries: bool) -> Target:
        """carries: x1 too, from the caller's features."""
        halves = self.source(block)
        return Target(halves.active, halves.passive if carries else None)

    def places(self) -> tuple[Rows, None]:
        """Of packed features: x2 stays where it is, and is read once."""
        return self.source(0).passive, None

    def packed_source(self, features: Halves) -> Halves:
        """Where the first coupling layer finds its halves."""
        return features

    def first_input(self, block: int) -> Rows:
        """What a block's first layer takes."""
        return self.source(block).passive

    def pending(self, block: int) -> Pending:
        return Pending(self.mixing.gain[block], self.mixing.shift[block])

    def beyond(self, block: int, kept: bool, last: bool) -> None:
        return None

    def factor(self) -> None:
        """Where x1 is kept as scaled operands: nowhere for longer than a product."""

    def mix(self, block: int) -> Iterator[Launch]:
        return iter(())

    turn_into_u = mix

    def u(self) -> Tensor:
        v = self.v[:, : self.phases.rows].t().float()
        return torch.addcmul(self.mixing.output_shift, v, self.mixing.output_gain)[:, self.mixing.order.long()]

    def _indexed(self, index: Tensor, features: int) -> Rows:
        return Rows(self.v, self.phases.rows, features, 1, self.v.stride(0), index=index)


class SoftState:
    """[x1 or q | y2] as products take them, and [v | x2] in float32, which nothing but the next sum reads.

    A matrix takes a state from one buffer to the other; a rotation leaves it in its own.
    """

    def __init__(self, phases: Phases) -> None:
        self.phases = phases
        assert phases.prepared.soft is not None
        self.mixing: SoftMixing = phases.prepared.soft
        shape = phases.padded_rows, 2 * phases.prepared.half
        self.state = phases.empty(*shape)
        self.other = phases.empty(*shape) if self.mixing.matrices or phases.factors is None else self.state[:0]
        self.values = phases.empty(*shape, dtype=torch.float32)
        self.wanted_u: Tensor | None = None

    def source(self, block: int) -> Halves:
        return Halves(self._rows(self._passive(self.state)), self._rows(self._active(self.values)))

    def target(self, block: int, carries: bool) -> Target:
        """carries: x1 too, from the caller's features, for a matrix that takes both."""
        passive = self._passive(self.state) if carries and self.mixing.matrices else None
        return Target(self._rows(self._active(self.state)), None if passive is None else self._rows(passive))

    def places(self) -> tuple[Rows, Rows]:
        """Of packed features."""
        halves = self.source(0)
        return halves.passive, halves.active

    def packed_source(self, features: Halves) -> Halves:
        """Where the first coupling layer finds its halves."""
        return self.source(0)

    def first_input(self, block: int) -> Rows:
        """What a block's first layer takes."""
        return self.source(block).passive

    def pending(self, block: int) -> None:
        return None

    def beyond(self, block: int, kept: bool, last: bool) -> Beyond | None:
        """v of a rotation."""
        rotation = block - self.mixing.matrices
        if rotation < 0:
            return None
        return Beyond(
            values=self._passive(self.values) if kept else None,
            squares=self.phases.v_squares() if last else None,
        )

    def mix(self, block: int) -> Iterator[Launch]:
        rotation = block - self.mixing.matrices
        if rotation < 0:
            x2 = Beyond(values=self._active(self.values), squares=None)
            yield from self._mixed(self._rows(self.state), "matrix", block, self._passive(self.other), beyond=x2)
            self.state, self.other = self.other, self.state
            return
        yield from self._rotate(rotation)
        yield from self._mixed(self._turned(), "output", rotation, self._active(self.values), rounded=False)

    def factor(self) -> Rows | None:
        """Where x1 is kept as scaled operands, if it is."""
        return None

    def turn_into_u(self, block: int) -> Iterator[Launch]:
        half = self.phases.prepared.half
        self.wanted_u = u = self.phases.empty(self.phases.padded_rows, 2 * half, dtype=torch.float32)
        rotation = block - self.mixing.matrices
        if rotation < 0:
            yield from self._mixed(self._rows(self.state), "matrix", block, u, rounded=False)
            return
        yield from self._rotate(rotation)
        q = self.source(block + 1).passive
        yield from self._mixed(q, "passive_output", 0, self._passive(u), rounded=False)
        yield from self._mixed(self._turned(), "output", rotation, self._active(u), rounded=False)

    def u(self) -> Tensor:
        assert self.wanted_u is not None
        rows, weights, u = self.phases.rows, self.phases.prepared.weights, self.wanted_u
        return torch.cat([self._passive(u)[:rows, : weights.passive], self._active(u)[:rows, : weights.active]], 1)

    def _rotate(self, rotation: int) -> Iterator[Launch]:
        """w from y2, and with v elementwise to q', in q's place, and to what the output matrix takes to x2."""
        rotated, v = self._active(self.other), self._passive(self.values)
        parts = Rotation(v, self.mixing.cosine[rotation], self.mixing.sine[rotation], rotated)
        y2 = self._rows(self._active(self.state))
        return self._mixed(y2, "active", rotation, self._passive(self.state), rotation=parts)

    def _turned(self) -> Rows:
        """What a rotation's output matrix takes."""
        return self._rows(self._active(self.other))

    def _mixed(self, x: Rows, name: str, block: int, y: Tensor, **options: Any) -> Iterator[Launch]:
        """One of the mixing's products; in tf32 its factor is taken as two operands, and nothing else keeps digits."""
        prepared = self.phases.prepared
        matrices, offsets = getattr(self.mixing, name), getattr(self.mixing, OFFSETS.get(name, ""), None)
        low = None if prepared.low is None else getattr(prepared.low.soft, name)[block]
        options = {"rounded": self.phases.rounds_state} | options
        if takes := how_mixed(prepared.precision):
            options["takes"] = takes
        return self.phases.product(
            x,
            matrices[block],
            low,
            y,
            None if offsets is None else offsets[block],
            **options,
        )

    def _rows(self, x: Tensor) -> Rows:
        return Rows(x, self.phases.rows, x.shape[1], x.stride(0), 1)

    def _passive(self, x: Tensor) -> Tensor:
        return x[:, : self.phases.prepared.half]

    def _active(self, x: Tensor) -> Tensor:
        return x[:, self.phases.prepared.half :]


class MergedState(SoftState):
    """Every first layer but the first one mixes, too (`merging`), from one buffer to the other."""

    def first_input(self, block: int) -> Rows:
        return self._rows(self.other) if block else super().first_input(block)

    def beyond(self, block: int, kept: bool, last: bool) -> Beyond | None:
        if not block:
            return None
        return Beyond(self._active(self.values), squares=None, operands=self._passive(self.state))

    def mix(self, block: int) -> Iterator[Launch]:
        self.state, self.other = self.other, self.state
        return iter(())

    def turn_into_u(self, block: int) -> Iterator[Launch]:
        return super().turn_into_u(0)


class ScaledSoftState(SoftState):
    """A rotation leaves q and what its output matrix takes as scaled operands, by a bound on both that is new in every
    block: y2 is measured as it is laid down, and q beside it."""

    def __init__(self, phases: Phases) -> None:
        super().__init__(phases)
        factors = phases.factors
        assert factors is not None
        self.q, self.turned = (factors.own_place(phases.prepared.half, in_two=True) for _ in range(2))
        self.free_scale = factors.scales()
        self.rotated = False

    def source(self, block: int) -> Halves:
        halves = super().source(block)
        return Halves(self.q, halves.active) if self.rotated else halves

    def factor(self) -> Rows:
        return self.q

    def _rotate(self, rotation: int) -> Iterator[Launch]:
        phases, bounds = self.phases, self.phases.prepared.bounds
        assert phases.factors is not None
        assert bounds is not None
        assert self.q.scale is not None
        place = phases.factors.place(phases.prepared.half, in_two=True)
        gains = bounds.active[rotation], bounds.mixed[rotation], self.q, bounds.passive[rotation]
        following = self.mixing.matrices + rotation + 1
        hidden = phases.hidden_bound(following) if following < phases.prepared.weights.blocks else None
        y2 = self._rows(self._active(self.state))
        yield phases.scaled(y2, place, mixed=Bound(self.free_scale, *gains), hidden=hidden)
        scale, self.free_scale = self.free_scale, self.q.scale
        self.q, self.turned = replace(self.q, scale=scale), replace(self.turned, scale=scale)
        self.rotated = True
        angles = self.mixing.cosine[rotation], self.mixing.sine[rotation]
        parts = Rotation(self._passive(self.values), *angles, self.turned.tensor, self.turned.low)
        yield from self._mixed(
            place, "active", rotation, self.q.tensor, rotation=parts, y_low=self.q.low, y_scale=scale
        )

    def _turned(self) -> Rows:
        return self.turned


OFFSETS = {"matrix": "offset", "active": "active_offset"}
"""Of the mixing's products those that have one, by name."""
