"""What tuning asks of a CUDA device: the time of a launch, and of a decoder by Triton and by the plain path."""

from __future__ import annotations

import statistics
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager, nullcontext
from dataclasses import dataclass, fields, replace
from functools import partial
from typing import Any

import torch
from torch import Tensor

from cflow_fast.bench.kernel_times import captured, launch_seconds, on_device
from cflow_fast.bench.measurement import Clock, Effort, Ratio, Run, Track, clock, ratio_of, take_turns
from cflow_fast.bench.tune import LostCardError, Times
from cflow_fast.bench.tune_targets import Target
from cflow_fast.kernels import tuning
from cflow_fast.kernels.capture import side_by_side
from cflow_fast.kernels.configs import Config, Problem
from cflow_fast.kernels.launch import Launch
from cflow_fast.kernels.registration import Flow
from cflow_fast.kernels.torch_flow import TorchFlow
from cflow_fast.kernels.triton_flow import TritonFlow
from cflow_fast.kernels.weights import FlowWeights, HardMixing
from cflow_fast.positional import encoding_factors

EFFORT = Effort(seconds=0.3, target=0.02)
"""For one decoder both ways."""
ROUNDS, LEAST_TIMED, MOST_RUNS = 5, 4e-3, 20
"""Of decoders side by side: how often they are timed, about how many seconds and at most how many runs at a time."""


@dataclass(frozen=True)
class CardTimer:
    """Times on a CUDA device."""

    device: torch.device

    def launch(self, launch: Launch) -> float:
        with self._watched():
            return launch_seconds(on_device(launch, self.device), self.device)

    def decoder(self, target: Target, chosen: dict[Problem, Config]) -> Times:
        with self._watched():
            return self._decoder(target, chosen)

    def together(self, group: Sequence[Target]) -> Callable[[Mapping[Problem, Config]], float]:
        with self._watched():
            calls = self._calls(group)

        def seconds(chosen: Mapping[Problem, Config]) -> float:
            with self._watched(), tuning.trying(chosen), torch.no_grad():
                replay = captured(partial(side_by_side, calls, self.device), self.device)
                return _least_seconds(replay, clock(self.device))

        return seconds

    def side_by_side(
        self, group: Sequence[Target], standard: dict[Problem, Config], chosen: dict[Problem, Config]
    ) -> Ratio:
        with self._watched():
            return self._side_by_side(group, standard, chosen)

    @contextmanager
    def _watched(self) -> Iterator[None]:
        """After an error: whether the card still answers."""
        try:
            with torch.cuda.device(self.device) if self.device.type == "cuda" else nullcontext():
                yield
        except Exception as error:
            try:
                torch.cuda.synchronize(self.device)
            except RuntimeError:
                raise LostCardError(f"the card answers nothing any more after: {str(error).splitlines()[0]}") from error
            raise

    def _decoder(self, target: Target, chosen: dict[Problem, Config]) -> Times:
        weights = filled(target.weights(), self.device)
        flows = (
            TritonFlow(weights, target.precision),
            TorchFlow(weights, weights.operand_dtype, packed=False, fused=True),
        )
        with tuning.trying(chosen), torch.no_grad():
            maps = self._maps(target)
            triton, plain = self._take_turns([captured(_call(flow, target, maps), self.device) for flow in flows])
        return Times(statistics.median(triton), statistics.median(plain), ratio_of(triton, plain))

    def _side_by_side(
        self, group: Sequence[Target], standard: dict[Problem, Config], chosen: dict[Problem, Config]
    ) -> Ratio:
        calls, runs = self._calls(group), []
        for configs in (standard, chosen):
            with tuning.trying(configs), torch.no_grad():
                runs.append(captured(partial(side_by_side, calls, self.device), self.device))
        return ratio_of(*self._take_turns(runs))

    def _calls(self, group: Sequence[Target]) -> list[Callable[[], Tensor]]:
        flows = [TritonFlow(filled(target.weights(), self.device), target.precision) for target in group]
        return [_call(flow, target, self._maps(target)) for flow, target in zip(flows, group, strict=True)]

    def _maps(self, target: Target) -> Tensor:
        maps = 1.3 * torch.randn(target.maps().shape, device=self.device)
        return maps.to(target.maps().dtype).contiguous(memory_format=torch.channels_last)

    def _take_turns(self, runs: Sequence[Run]) -> tuple[list[float], list[float]]:
        first, second = tracks = [Track(run) for run in runs]
        take_turns(tracks, clock(self.device), EFFORT)
        for track in tracks:
            if track.error is not None:
                raise track.error
        return first.seconds, second.seconds


def _least_seconds(run: Run, seconds_of: Clock) -> float:
    """Of a run among others like it, which is what a difference shows in first."""

    def several() -> None:
        for _ in range(count):
            run()

    run()
    count = max(1, min(MOST_RUNS, round(LEAST_TIMED / seconds_of(run))))
    return min(seconds_of(several) for _ in range(ROUNDS)) / count


def _call(flow: Flow, target: Target, maps: Tensor) -> Callable[[], Tensor]:
    encoding = encoding_factors(target.condition, target.height, target.width) if target.condition else None
    return partial(flow.log_prob_map, maps, encoding)


def filled(weights: FlowWeights, device: torch.device) -> FlowWeights:
    """Weights on the meta device with memory behind them: small random numbers, and permutations for indices."""

    def real(tensor: Tensor) -> Tensor:
        return torch.empty(tensor.shape, dtype=tensor.dtype, device=device).normal_(0, 0.01)

    mixing: Any = weights.mixing
    changes = {f.name: getattr(mixing, f.name) for f in fields(mixing)}
    changes = {name: real(tensor) for name, tensor in changes.items() if tensor.dtype.is_floating_point}
    if isinstance(mixing, HardMixing):
        later = [torch.randperm(weights.features) for _ in range(weights.blocks - 1)]
        order = torch.stack([torch.arange(weights.features), *later]).to(device, torch.int32)  # nothing has moved yet
        passive, active = order.split([weights.passive, weights.active], 1)
        changes |= {"passive": passive.contiguous(), "active": active.contiguous(), "order": order[0].contiguous()}
    own: dict[str, Any] = {
        f.name: real(value) for f in fields(weights) if isinstance(value := getattr(weights, f.name), Tensor)
    }
    return replace(weights, mixing=replace(mixing, **changes), **own)
