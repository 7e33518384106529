"""What tuning asks of a card and of a compiler, without either: stubbed times, stubbed machine code."""

from __future__ import annotations

import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import replace

from cflow_fast.bench.aot import Kernel
from cflow_fast.bench.compiled import Compiled, Loop
from cflow_fast.bench.measurement import Ratio
from cflow_fast.bench.prediction import CARDS
from cflow_fast.bench.tune import Finding, Times, choose_by_measurement
from cflow_fast.bench.tune_targets import Target
from cflow_fast.kernels.chip import Chip
from cflow_fast.kernels.configs import Config, CouplingConfig, LinearConfig, Problem
from cflow_fast.kernels.launch import Launch

CHIP = Chip((9, 0), 132, "Some Card")
H100 = CARDS[0]
WIDE = Target(512, 8, 8, 1, "soft", "bf16", blocks=3)
NARROW = Target(64, 16, 16, 2, "hard", "ieee", condition=8, blocks=2)
CODE = Compiled(128, 65536, 0, 700, (Loop(100, 0, 4, 0, 0),), False)
EVEN = Times(50e-6, 50e-6, Ratio(1.0, 0.98, 1.02))


PLAIN_FASTER = Times(52.3e-6, 41.0e-6, Ratio(1.28, 1.20, 1.33))
TRITON_FASTER = Times(30.0e-6, 60.0e-6, Ratio(0.5, 0.49, 0.51))


class StubTimer:
    """Every launch takes 10 us, but for those that `slow` says otherwise of."""

    def __init__(
        self,
        times: Times = EVEN,
        slow: Callable[[Launch], float] = lambda launch: 10e-6,
        faster: Ratio = Ratio(1.1, 1.05, 1.2),  # noqa: B008
        in_place: Callable[[Sequence[Target], Mapping[Problem, Config]], float] = lambda group, chosen: 1e-4,
    ) -> None:
        self.times, self.slow, self.faster, self.in_place = times, slow, faster, in_place
        self.compared: list[tuple[dict[Problem, Config], dict[Problem, Config]]] = []
        self.launched: list[Launch] = []
        self.decoders: list[dict[Problem, Config]] = []

    def launch(self, launch: Launch) -> float:
        self.launched.append(launch)
        return self.slow(launch)

    def decoder(self, target: Target, chosen: dict[Problem, Config]) -> Times:
        self.decoders.append(chosen)
        return self.times

    def together(self, group: Sequence[Target]) -> Callable[[Mapping[Problem, Config]], float]:
        return lambda chosen: self.in_place(group, chosen)

    def side_by_side(
        self, group: Sequence[Target], standard: dict[Problem, Config], chosen: dict[Problem, Config]
    ) -> Ratio:
        self.compared.append((dict(standard), dict(chosen)))
        return self.faster


def measured(timer: StubTimer, *wanted: Target, minutes: float = 1.0, **options: object) -> list[Finding]:
    until = time.monotonic() + 60 * minutes
    return list(choose_by_measurement(wanted or (WIDE,), CHIP, timer, until, **options))  # type: ignore[arg-type]


def step(config: Config | None) -> int:
    """Inputs that a product takes at a time; 0 of what is no product's configuration."""
    return config.block_k if isinstance(config, (LinearConfig, CouplingConfig)) else 0


def is_other(launch: Launch) -> bool:
    """Whether it takes fewer inputs a step than the rule has WIDE's products take: among the first that are tried."""
    return launch.constexprs.get("BLOCK_K", 0) == 64


SLOW = replace(CODE, instructions=9700, loops=(Loop(9000, 0, 4, 0, 0),))


def code_of(launch: Launch) -> Compiled:
    """The tiles that the rule takes for WIDE's products make slow code here."""
    return SLOW if launch.options.get("num_stages") == 6 else CODE


def machine_code(kernels: Sequence[Kernel], faulty: Callable[[Kernel], bool] = lambda kernel: False) -> list[Compiled]:
    return [replace(code_of(kernel.launch), serialized=faulty(kernel)) for kernel in kernels]
