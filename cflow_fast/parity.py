"""Numerical parity, as a table: what a fast decoder loses against float64, beside what FrEIA loses in that precision.

The yardstick is FrEIA's own rounding error on the same inputs, in log p / D:
    fp32, tf32x3, fp16x3  maximum at most 1.5 times FrEIA's in fp32; relative to max(1, |log p / D|) under 3e-6, or
                          under 1.5 times FrEIA's where a trained decoder takes FrEIA itself over that (log p / D below
                          -1000 on defects)
    tf32, fp16            RMS at most 1 times FrEIA's with tf32 allowed; on a device without tf32, as fp32. Where D is
                          no multiple of 4, which keeps cuBLAS from using tf32, FrEIA's with its operands rounded to it
    bf16                  RMS at most 0.9 times and maximum at most 1 times FrEIA's under bf16 autocast, Spearman >=
                          0.9995

On real images a trained decoder's log p / D falls to -1e8 in defects. Down to USUAL all of this holds against the
largest error of several runs of FrEIA's (`equivalents`). Of all positions errors relative to max(1, |log p / D|) are
judged: their RMS (fp32 at most 1.5 times FrEIA's, tf32 1, bf16 0.9), Spearman, and in fp32 the maximum.
"""

from __future__ import annotations

import copy
import math
from collections.abc import Callable, Iterator, Sequence
from contextlib import AbstractContextManager, contextmanager, nullcontext
from dataclasses import asdict, dataclass, field, fields, replace
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.overrides import TorchFunctionMode

from cflow_fast import ops
from cflow_fast.decoder import CLAMPS, FlowDecoder, gaussian_log_prob
from cflow_fast.folded import FoldedDecoder
from cflow_fast.kernels.weights import round_to_tf32
from cflow_fast.positional import encoding_factors, positional_encoding
from cflow_fast.precision import arithmetic, multiplies_bf16

SIZES = (64, 112, 160, 320, 512, 1024, 2048, 41)
"""Feature counts of the usual encoders' scales, and an odd one."""

FP32_BOUND = 3e-6
FP32_RATIO = 1.5
TF32_RMS_RATIO = 1.0
BF16_RMS_RATIO = 0.9
BF16_MAX_RATIO = 1.0
BF16_SPEARMAN = 0.9995

USUAL = -7000.0
"""log p / D down to which the whole yardstick holds on real images. Below, one feature is all of a position's value."""
RUNS = 4
"""Of FrEIA on real images, each rounded otherwise. There one position may be all of a maximum, and with its sums in
another order FrEIA has one up to 7 times as large (bench/results/parity)."""


@dataclass(frozen=True)
class Error:
    """Deviation of log p / D from float64, in nats per dimension."""

    maximum: float
    rms: float
    bounded: float  # maximum of the deviation over max(1, |log p / D|)
    spearman: float  # rank correlation of the scores
    relative_rms: float  # RMS of the deviation over max(1, |log p / D|)


@dataclass(frozen=True)
class Case:
    """A decoder and feature maps to compare on."""

    name: str
    decoder: FlowDecoder
    features: Tensor  # (B, D, H, W) float32
    runs: int = 1  # of the reference, each rounded otherwise, see `compare`

    @property
    def device(self) -> torch.device:
        return self.features.device


@dataclass(frozen=True)
class Row:
    """One line of the table."""

    case: str
    backend: str
    precision: str
    ours: Error
    reference: str
    theirs: Error  # of several runs, each number's worst
    failures: list[str] = field(default_factory=list)
    runs: list[Error] = field(default_factory=list)  # FrEIA's, one by one
    relative: bool = False  # judged by errors over max(1, |log p / D|)

    @property
    def passed(self) -> bool:
        return not self.failures

    def as_dict(self) -> dict[str, Any]:
        return asdict(self) | {"passed": self.passed}


def precisions(device: torch.device) -> tuple[str, ...]:
    """Those that mean something on a device; bf16 always does, since it is also a way to store."""
    return ("fp32", "tf32x3", "fp16x3", "tf32", "fp16", "bf16") if device.type == "cuda" else ("fp32", "bf16")


@dataclass(frozen=True)
class Comparison:
    """log p / D (N,) of a case's positions in one precision, one way: ours, FrEIA's, and in float64."""

    case: str
    backend: str
    precision: str
    kind: str  # the yardstick
    ours: Tensor
    reference: str
    theirs: list[Tensor]  # of every run
    exact: Tensor

    def row(self, lowest: float = -math.inf) -> Row:
        """The errors of positions whose exact log p / D is no lower, FrEIA's largest; and what ours have too large."""
        judged = self.exact >= lowest
        ours = measure(self.ours[judged], self.exact[judged])
        runs = [measure(run[judged], self.exact[judged]) for run in self.theirs]
        theirs = largest(runs)
        found = failures(self.kind, ours, theirs)
        return Row(self.case, self.backend, self.precision, ours, self.reference, theirs, found, runs)

    def trained_rows(self) -> list[Row]:
        """A trained decoder's, on real features: down to USUAL by the yardstick, and all relative to their values.

        PyTorch's products round as FrEIA's do, so that either's maximum may be the larger: of those the second row
        alone, without its maximum.
        """
        all_of_them = self.row()
        own = self.backend != "torch"
        found = relative_failures(self.kind, all_of_them.ours, all_of_them.theirs, maximum=own)
        rows = [replace(all_of_them, case=f"{self.case}, relative", failures=found, relative=True)]
        if own and (self.exact >= USUAL).any():
            rows.insert(0, self.row(USUAL))
        return rows


def check(case: Case, wanted: Sequence[str] | None = None) -> Iterator[Row]:
    """Judge one case in every precision wanted (all that the device has, when None)."""
    return (comparison.row() for comparison in compare(case, wanted))


def compare(case: Case, wanted: Sequence[str] | None = None) -> Iterator[Comparison]:
    """Compute one case in every precision wanted (all that the device has, when None), every way that there is.

    Far below what a decoder was trained on, a few positions are all of a maximum or an RMS, and one run of FrEIA's says
    little of them: it may happen to round well there. So it can have several, see `equivalents`.
    """
    exact = log_prob_per_dimension(copy.deepcopy(case.decoder).double(), case)
    reference_name = reference_decoder(case.decoder)[0]
    theirs: dict[str, list[Tensor]] = {}
    folds: dict[torch.dtype, FoldedDecoder] = {}  # precisions that store the same weights share a fold
    for precision in wanted or precisions(case.device):
        kind = yardstick_of(precision, case.device)
        if kind not in theirs:
            references = [reference_decoder(same)[1] for same in equivalents(case.decoder, case.runs, kind)]
            with arithmetic_of(kind, case.device, case.decoder.features):
                theirs[kind] = [log_prob_per_dimension(reference, case) for reference in references]
        storage = arithmetic(precision, case.device).storage
        if storage not in folds:
            folds[storage] = case.decoder.fold(precision)
        for backend, log_prob in ways(FoldedDecoder(folds[storage].weights, precision), case.features[:, 0].numel()):
            ours = log_prob(case.features).flatten() / case.decoder.features
            yield Comparison(case.name, backend, precision, kind, ours, reference_name, theirs[kind], exact)


def equivalents(decoder: FlowDecoder, count: int, kind: str = "fp32") -> Iterator[FlowDecoder]:
    """A decoder, then others of the same function, whose rounding errors are others: with the hidden units in another
    order, so that sums are added up in it; and for bf16, where that is not what rounds, with those of ReLUs scaled. A
    softplus cannot be: in bf16 its runs differ little."""
    yield decoder
    generator = torch.Generator().manual_seed(0)
    for _ in range(count - 1):
        other = copy.deepcopy(decoder)
        blocks: Any = other.blocks
        for block in blocks:
            first, second = block.subnet[0], block.subnet[2]
            order = torch.randperm(decoder.hidden, generator=generator).to(first.weight.device)
            scale = first.bias.new_ones(decoder.hidden)
            if kind == "bf16" and decoder.activation == "relu":
                scale = 1 + torch.rand(decoder.hidden, generator=generator).to(scale)
            first.weight.data = first.weight.data[order] * scale[:, None]
            first.bias.data = first.bias.data[order] * scale
            second.weight.data = second.weight.data[:, order] / scale
        yield other


def largest(errors: Sequence[Error]) -> Error:
    """Of several runs, each number's worst."""
    worst = {f.name: max(getattr(error, f.name) for error in errors) for f in fields(Error)}
    return Error(**worst | {"spearman": min(error.spearman for error in errors)})


def ways(folded: FoldedDecoder, rows: int) -> Iterator[tuple[str, Callable[[Tensor], Tensor]]]:
    """A folded decoder by what it takes for maps of so many positions, by name; and by what else could do it here."""
    yield ops.implementation(folded.flow, rows), folded.log_prob
    other = ops.other_way(folded.flow, folded.arithmetic, rows)
    if other is not None:
        name, flow = other

        def by_other(features: Tensor) -> Tensor:
            condition = encoding_factors(folded.condition, *features.shape[2:]) if folded.condition else None
            with torch.no_grad():
                return flow.log_prob_map(features, condition)

        yield name, by_other


def yardstick_of(precision: str, device: torch.device) -> str:
    """The precision of FrEIA whose errors are the yardstick."""
    if precision in ("tf32", "fp16") and device.type == "cuda":
        return "tf32"
    return "bf16" if precision == "bf16" else "fp32"


TF32_MULTIPLE = 4
"""Numbers in a row of 16 bytes, which cuBLAS wants whole for tf32."""


@contextmanager
def arithmetic_of(kind: str, device: torch.device, features: int = TF32_MULTIPLE) -> Iterator[None]:
    """Have PyTorch multiply as the yardstick of a decoder does: nothing but fp32, tf32 allowed, or bf16 autocast."""
    allowed = torch.backends.cuda.matmul.allow_tf32
    emulated = kind == "tf32" and features % TF32_MULTIPLE != 0
    torch.backends.cuda.matmul.allow_tf32 = kind == "tf32" and not emulated
    try:
        with autocast(device) if kind == "bf16" else EmulatedTf32() if emulated else nullcontext():
            yield
    finally:
        torch.backends.cuda.matmul.allow_tf32 = allowed


def measure(approximate: Tensor, exact: Tensor) -> Error:
    """Both in log p / D, any shape."""
    a, e = approximate.flatten().double().cpu(), exact.flatten().double().cpu()
    deviation = (a - e).abs()
    relative = deviation / e.abs().clamp(min=1)
    return Error(
        maximum=deviation.max().item(),
        rms=deviation.square().mean().sqrt().item(),
        bounded=relative.max().item(),
        spearman=_spearman(a, e),
        relative_rms=relative.square().mean().sqrt().item(),
    )


def failures(kind: str, ours: Error, theirs: Error) -> list[str]:
    """What of `ours` is over the module's bounds in "fp32", "tf32" or "bf16", given FrEIA's own errors in it."""
    if not math.isfinite(ours.maximum):
        return ["not finite"]
    if kind == "fp32":
        relative = FP32_BOUND if theirs.bounded <= FP32_BOUND else FP32_RATIO * theirs.bounded
        limits = [
            ("maximum / FrEIA's", ours.maximum / max(theirs.maximum, 1e-300), FP32_RATIO),
            ("maximum / max(1, |log p / D|)", ours.bounded, relative),
        ]
    elif kind == "tf32":
        limits = [("RMS / FrEIA's", ours.rms / theirs.rms, TF32_RMS_RATIO)]
    else:
        limits = [
            ("RMS / FrEIA's", ours.rms / theirs.rms, BF16_RMS_RATIO),
            ("maximum / FrEIA's", ours.maximum / theirs.maximum, BF16_MAX_RATIO),
            ("1 - Spearman", 1 - ours.spearman, 1 - BF16_SPEARMAN),
        ]
    return _over(limits)


def relative_failures(kind: str, ours: Error, theirs: Error, maximum: bool = True) -> list[str]:
    """As `failures`, of errors over max(1, |log p / D|); the largest of them is judged in fp32 alone, if asked for."""
    if not math.isfinite(ours.maximum):
        return ["not finite"]
    allowed = {"fp32": FP32_RATIO, "tf32": TF32_RMS_RATIO, "bf16": BF16_RMS_RATIO}[kind]
    limits = [
        ("relative RMS / FrEIA's", ours.relative_rms / max(theirs.relative_rms, 1e-300), allowed),
        ("1 - Spearman", 1 - ours.spearman, 1 - BF16_SPEARMAN),
    ]
    if maximum and kind == "fp32":
        limits.append(("relative maximum / FrEIA's", ours.bounded / max(theirs.bounded, 1e-300), FP32_RATIO))
    return _over(limits)


def _over(limits: list[tuple[str, float, float]]) -> list[str]:
    return [f"{what} is {value:.3g}, over {limit:.3g}" for what, value, limit in limits if not value <= limit]


def random_case(
    features: int,
    permute_soft: bool = False,
    condition: int = 128,
    activation: str = "relu",
    global_affine_type: str = "SOFTPLUS",
    clamp: str = CLAMPS[0],
    size: tuple[int, int, int] | None = None,
    seed: int = 0,
    device: torch.device | str = "cpu",
) -> Case:
    """A decoder whose scales, offsets and weights are far from initial ones, and features beyond a unit Gaussian.

    size: (B, H, W) of the feature maps; when None 4800 positions for narrow decoders, down to 308 for the widest.
    """
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        decoder = FlowDecoder(
            features,
            condition,
            permute_soft=permute_soft,
            activation=activation,
            global_affine_type=global_affine_type,
            clamp=clamp,
        )
        roughen(decoder)
        batch, height, width = size or _enough_positions(features)
        maps = 1.3 * torch.randn(batch, features, height, width)
    permutation = "soft" if permute_soft else "hard"
    name = f"D={features} {permutation}, {'C=' + str(condition) if condition else 'unconditional'}, {activation}, "
    return Case(name + f"{global_affine_type}, {clamp}", decoder.to(device), maps.to(device))


def _enough_positions(features: int) -> tuple[int, int, int]:
    """For the maximum of an error to say something: it scatters less the more positions and features there are."""
    if features < 512:
        return 8, 24, 25
    return (4, 16, 18) if features < 2048 else (2, 11, 14)


@torch.no_grad()
def roughen(decoder: FlowDecoder) -> None:
    """Random parameters of the sizes that long training may reach, drawn from the global generator.

    Any larger and the flow turns chaotic: a single feature vector then decides every maximum, for us and for FrEIA.
    So an unconditional subnet weighs its features as if the usual 128 condition channels were beside them.
    """
    blocks: Any = decoder.blocks
    for block in blocks:
        block.global_scale.add_(0.5 * torch.randn_like(block.global_scale) * _scale_spread(decoder))
        block.global_offset.normal_(0, 0.1)
        for layer, inputs in ((block.subnet[0], block.passive + 128), (block.subnet[2], decoder.hidden)):
            layer.weight.normal_(0, 1 / math.sqrt(inputs))
            layer.bias.normal_(0, 0.1)


def _scale_spread(decoder: FlowDecoder) -> float:
    """EXP and SIGMOID react to their parameter about ten times as strongly as SOFTPLUS does."""
    return 1.0 if decoder.global_affine_type == "SOFTPLUS" else 0.1


def model_cases(decoders: Sequence[FlowDecoder], sizes: Sequence[tuple[int, int]], seed: int = 0) -> list[Case]:
    """A trained model's decoders, on features drawn from them at temperatures 1 to 2: usual ones and unusual ones."""
    generator = torch.Generator().manual_seed(seed)
    cases = []
    for scale, (decoder, (height, width)) in enumerate(zip(decoders, sizes, strict=True)):
        drawn = [decoder.sample(1, height, width, temperature, generator) for temperature in (1.0, 1.5, 2.0)]
        cases.append(Case(f"scale {scale + 1}, D={decoder.features}", decoder, torch.cat(drawn).float()))
    return cases


def image_cases(decoders: Sequence[FlowDecoder], maps: Sequence[Tensor], runs: int = RUNS) -> list[Case]:
    """A trained model's decoders, on what its encoder makes of images: (B, D_k, H_k, W_k) of every scale."""
    return [
        Case(f"scale {scale + 1}, D={decoder.features}", decoder, features.float().contiguous(), runs)
        for scale, (decoder, features) in enumerate(zip(decoders, maps, strict=True))
    ]


def reference_decoder(decoder: FlowDecoder) -> tuple[str, Callable[..., tuple[Tensor, Tensor]]]:
    """FrEIA's own module where it can be had; else our unfolded one, which follows the same steps; and its name."""
    if decoder.clamp == CLAMPS[0]:
        try:
            return "FrEIA", decoder.to_freia().eval()
        except ImportError:
            return "unfolded (FrEIA is not installed)", decoder
    return "unfolded (FrEIA's release has another clamp)", decoder


ROWS_AT_ONCE = 1 << 14
"""What the published way is given at once, so that its intermediate results fit into memory in float64."""


@torch.no_grad()
def log_prob_per_dimension(decoder: Callable[..., tuple[Tensor, Tensor]], case: Case) -> Tensor:
    """As the published code does it: rows, concatenated encoding, u and log_det, (B H W,)."""
    channels, height, width = case.features.shape[1:]
    encoding = None
    if case.decoder.condition:
        encoding = positional_encoding(case.decoder.condition, height, width).to(case.device).flatten(1).t()
    parts = []
    for images in case.features.split(max(1, ROWS_AT_ONCE // max(1, height * width))):
        z = images.permute(0, 2, 3, 1).reshape(-1, channels)
        parts.append(rows_log_prob(decoder, z, None if encoding is None else encoding.repeat(len(images), 1)))
    return torch.cat(parts) / channels


def rows_log_prob(decoder: Callable[..., tuple[Tensor, Tensor]], z: Tensor, encoding: Tensor | None) -> Tensor:
    """log p (N,) of rows (N, D) under encodings (N, C) by FrEIA's module or a FlowDecoder, in its dtype."""
    z = z.double() if isinstance(decoder, FlowDecoder) and decoder.dtype == torch.float64 else z
    u, log_det = decoder(z) if encoding is None else decoder(z, [encoding.to(z)])
    u, log_det = (x if x.dtype == torch.float64 else x.float() for x in (u, log_det))
    return gaussian_log_prob(u) + log_det


def autocast(device: torch.device) -> AbstractContextManager[Any]:
    """bf16 autocast, emulated on devices that cannot multiply bf16 at a bearable speed."""
    if multiplies_bf16(device):
        return torch.autocast(device.type, dtype=torch.bfloat16)
    return EmulatedAutocast()


class EmulatedAutocast(TorchFunctionMode):
    """bf16 autocast for linear layers: operands and results rounded to bf16, the product itself made in fp32."""

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if func is not F.linear:
            return func(*args, **(kwargs or {}))
        rounded: list[Any] = [None if tensor is None else tensor.bfloat16().float() for tensor in args]
        return func(*rounded, **(kwargs or {})).bfloat16()


class EmulatedTf32(TorchFunctionMode):
    """tf32 in linear layers: operands rounded to it, to nearest as cuBLAS does, the product itself made in fp32."""

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if func is not F.linear:
            return func(*args, **(kwargs or {}))
        x, weight, *bias = args
        return func(round_to_tf32(x), round_to_tf32(weight), *bias, **(kwargs or {}))


def _spearman(a: Tensor, b: Tensor) -> float:
    if len(a) < 2:
        return 1.0
    ranks = torch.stack([x.argsort().argsort().double() for x in (a, b)])
    return torch.corrcoef(ranks)[0, 1].item()
