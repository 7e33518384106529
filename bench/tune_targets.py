"""What is tuned: decoders on maps of one size, the problems that their launches pose, and candidates' launches."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from functools import lru_cache

import torch
from torch import Tensor

from cflow_fast.bench.aot import compile_key
from cflow_fast.bench.cases import BATCHES, HEADLINE_ENCODERS, PERMUTATIONS, SIZES, scales_of
from cflow_fast.bench.headline import PRECISIONS, decoder_launches
from cflow_fast.bench.kernel_times import CAPABILITY
from cflow_fast.bench.specimens import META, specimen_weights
from cflow_fast.decoder import FlowDecoder
from cflow_fast.kernels import tuning
from cflow_fast.kernels.chip import Chip
from cflow_fast.kernels.configs import TAIL_PRECISION, Config, Problem, candidates
from cflow_fast.kernels.launch import Launch
from cflow_fast.kernels.tuning import bucket
from cflow_fast.kernels.tuning_table import DecoderProblem
from cflow_fast.kernels.weights import FlowWeights
from cflow_fast.model import CFlowAD

SPECIMENS = 64
"""That are kept: every candidate asks for its decoder's."""


@dataclass(frozen=True)
class Target:
    """One decoder on the maps of a batch of images, in one of the kernels' precisions."""

    features: int
    height: int
    width: int
    batch: int
    permutations: str
    precision: str
    condition: int = 128
    blocks: int = 8
    activation: str = "relu"
    beside: str = ""  # decoders that run side by side have the same

    @property
    def label(self) -> str:
        maps = f"{self.batch} x {self.height} x {self.width}"
        return f"D {self.features}, {self.permutations}, {self.precision}, {maps}"

    @property
    def problem(self) -> DecoderProblem:
        rows = bucket(self.batch * self.height * self.width)
        return DecoderProblem(self.features, self.condition, self.blocks, self.permutations, self.precision, rows)

    def weights(self) -> FlowWeights:
        """On the meta device."""
        soft = self.permutations == "soft"
        return _specimen(self.features, soft, self._storage, self.condition, self.blocks, self.activation)

    def maps(self) -> Tensor:
        """On the meta device, as encoders give them."""
        shape = (self.batch, self.features, self.height, self.width)
        return torch.empty(shape, dtype=self._storage, device=META, memory_format=torch.channels_last)

    def all_launches(self, chip: Chip) -> list[Launch]:
        return decoder_launches(self.weights(), self.maps(), self.precision, chip)

    def launches(self, chip: Chip) -> dict[Problem, list[Launch]]:
        """Those of its launches that something is chosen for, by what it is chosen by, in buckets of rows."""
        groups: dict[Problem, list[Launch]] = {}
        for launch in self.all_launches(chip):
            if (problem := problem_of(launch)) is not None:
                groups.setdefault(problem, []).append(launch)
        return groups

    def way(self, chip: Chip) -> Problem | None:
        """By what it is chosen whether x1 is laid down row by row, or permutations are merged with first layers; None
        where there is no choice."""
        with tuning.trying({}):
            coupling = next((problem for problem in self.launches(chip) if problem.kernel == "coupling"), None)
        soft = self.permutations == "soft"
        if coupling is None or (soft and self.blocks < 2):
            return None
        kernel, numbers = ("merging", coupling.numbers) if soft else ("laying", coupling.numbers[1:])
        problem = Problem(kernel, coupling.precision, coupling.rows, numbers)
        return problem if len(candidates(problem, chip)) > 1 else None

    @property
    def _storage(self) -> torch.dtype:
        return torch.bfloat16 if self.precision == "bf16" else torch.float32


_specimen = lru_cache(SPECIMENS)(specimen_weights)


def targets(
    encoders: Sequence[str] = HEADLINE_ENCODERS,
    precisions: Sequence[str] = PRECISIONS,
    sizes: Sequence[int] = SIZES,
    batches: Sequence[int] = BATCHES,
) -> list[Target]:
    """The decoders of encoders; raises EncoderError for a name that timm does not know. Each once."""
    found = [
        Target(
            *(features, side, side, batch, permutations, precision),
            beside=f"{encoder}, {permutations}, {precision}, {batch} x {size} px",
        )
        for encoder in encoders
        for precision in precisions
        for size in sizes
        for batch in batches
        for permutations in PERMUTATIONS
        for features, side in zip(scales_of(encoder).channels, scales_of(encoder).sides(size), strict=True)
    ]
    return list(dict.fromkeys(found))


def tails(
    encoders: Sequence[str] = HEADLINE_ENCODERS, sizes: Sequence[int] = SIZES, batches: Sequence[int] = BATCHES
) -> list[tuple[int, int, int]]:
    """Their anomaly maps: batch, scales, size. Each once."""
    counts = dict.fromkeys(len(scales_of(encoder).channels) for encoder in encoders)
    return [(batch, count, size) for count in counts for size in sizes for batch in batches]


def model_targets(model: CFlowAD, batches: Sequence[int], precisions: Sequence[str]) -> list[Target]:
    """A model's decoders on its encoder's maps of images of its size."""
    maps = model.features(torch.zeros(1, 3, *model.image_size))
    decoders: list[FlowDecoder] = list(model.decoders)  # type: ignore[arg-type]
    return [
        Target(
            decoder.features,
            features.shape[2],
            features.shape[3],
            batch,
            "soft" if decoder.permute_soft else "hard",
            precision,
            decoder.condition,
            decoder.coupling_blocks,
            decoder.activation,
            f"{precision}, {batch} images",
        )
        for precision in precisions
        for batch in batches
        for decoder, features in zip(decoders, maps, strict=True)
    ]


def groups_of(wanted: Sequence[Target]) -> list[list[Target]]:
    """Those that run side by side."""
    groups: dict[str, list[Target]] = {}
    for target in wanted:
        groups.setdefault(target.beside or target.label, []).append(target)
    return list(groups.values())


def families_of(wanted: Sequence[Target], chip: Chip) -> list[list[list[Target]]]:
    """Groups of which one shares a problem with another, together: what is chosen for it is chosen for both."""
    families: list[tuple[set[Problem], list[list[Target]]]] = []
    for group in groups_of(wanted):
        with tuning.trying({}):
            problems = {problem for target in group for problem in target.launches(chip)}
        related = [family for family in families if family[0] & problems]
        merged = (problems.union(*(p for p, _ in related)), [g for _, groups in related for g in groups] + [group])
        place = families.index(related[0]) if related else len(families)
        families = [family for family in families if family not in related]
        families.insert(place, merged)
    return [groups for _, groups in families]


def problem_of(launch: Launch) -> Problem | None:
    """What the configuration of a launch was chosen by, in buckets of rows; None where nothing is chosen."""
    args, c = launch.args, launch.constexprs
    match launch.kernel.__name__:
        case "linear_kernel":
            numbers = args["inputs"], args["outputs"], int(c["EPILOGUE"] == "rotate" or c["IN_PARTS"])
            return Problem("linear", c["PRECISION"], bucket(args["rows"]), numbers)
        case "coupling_kernel":
            return Problem("coupling", c["PRECISION"], bucket(args["rows"]), (args["inputs"], args["half"]))
        case "whole_flow_kernel":
            rows = bucket(args["images"] * args["height"] * args["width"])
            numbers = c["PASSIVE"] + c["ACTIVE"], int(c["CONDITION"] == "rows"), int(c["HARD"])
            return Problem("whole_flow", c["PRECISION"], rows, numbers)
        case "tail_kernel":
            batch, height, width = args["result_ptr"].shape
            return Problem("tail", TAIL_PRECISION, bucket(batch), (len(args["scales"]), height, width))
    return None


def most_frequent(launches: Sequence[Launch]) -> int:
    """The place of a launch that stands for those like it: the first blocks read maps, the last leave sums."""
    keys = [compile_key(launch, CAPABILITY) for launch in launches]
    return keys.index(Counter(keys).most_common(1)[0][0])


def candidate_launches(wanted: Sequence[Target], chip: Chip) -> Iterator[Launch]:
    """All that measuring launches, to be compiled beforehand: family by family first what is launched alone, then what
    stands beside it when decoders run side by side."""
    seen: set[Problem] = set()
    shipped = shipped_configs(chip)
    for family in families_of(wanted, chip):
        others: list[Launch] = []
        for target in (target for group in family for target in group):
            places: dict[Problem, int] = {}
            for trial in trials(target, chip, seen):
                for problem, launches in trial.items():
                    yield launches[places.setdefault(problem, most_frequent(launches))]
                    others += launches
            others += other_way(target, chip) + other_way(target, chip, shipped)
        yield from others


def shipped_configs(chip: Chip) -> dict[Problem, Config]:
    table = tuning.shipped_table(chip)
    return {problem: entry.config for problem, entry in table.kernels.items()} if table else {}


def other_way(target: Target, chip: Chip, configs: Mapping[Problem, Config] | None = None) -> list[Launch]:
    """What a decoder launches where it has a choice of ways and not the rule's is taken; configs: before the rules'."""
    problem = target.way(chip)
    if problem is None:
        return []
    with tuning.trying({**(configs or {}), problem: candidates(problem, chip)[1]}):
        return target.all_launches(chip)


def trials(target: Target, chip: Chip, seen: set[Problem]) -> Iterator[dict[Problem, list[Launch]]]:
    """A decoder's launches of problems not yet seen: by the rules, then each problem's next candidate at once."""
    with tuning.trying({}):
        by_rule = {problem: launches for problem, launches in target.launches(chip).items() if problem not in seen}
    seen |= set(by_rule)
    yield by_rule
    options = {problem: candidates(problem, chip) for problem in by_rule}
    for i in range(1, max(map(len, options.values()), default=0)):
        tried = {problem: configs[i] for problem, configs in options.items() if i < len(configs)}
        with tuning.trying(tried):
            launches = target.launches(chip)
        yield {problem: launches[problem] for problem in tried}
