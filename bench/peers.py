"""FrEIA's modules, and how the published code and anomalib call them.

Every function takes the tensors of a case and gives a callable that does the peer's work, step by step as the peer does
it. FrEIA's own drawing of soft rotations is not used (it takes seconds to minutes): they are assigned.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Sequence
from types import SimpleNamespace
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from cflow_fast.accelerate import accelerate
from cflow_fast.bench.cases import Decoders
from cflow_fast.bench.contenders import Built, UnavailableError, eager_precision, module_bytes
from cflow_fast.bench.measurement import Run
from cflow_fast.decoder import gaussian_log_prob
from cflow_fast.positional import encoding_factors, positional_encoding

FIBER = 256
"""Feature vectors at a time in the published code."""

COMPILED_VARIANTS = 1024
"""Every case is another shape, and with too many of them dynamo would silently go back to eager."""

Sequences = Sequence[Callable[..., tuple[Tensor, Tensor]]]


def freia(work: Decoders, precision: str) -> Built:
    """Eager, on all rows at once, the encoding made beforehand."""
    return _all_rows(work, work.reference, precision)


def freia_compile(work: Decoders, precision: str) -> Built:
    """The same under torch.compile."""
    built = _all_rows(work, compiled(work.reference), precision)
    compile_now(built.run)
    return built


def accelerated(work: Decoders, precision: str) -> Built:
    """The same modules after `cflow_fast.accelerate`, this package's one line: u and log det of all rows."""
    modules: Any = accelerate(nn.ModuleList(work.reference), precision)
    built = _all_rows(work, modules, "fp32")  # around decoders that have a precision of their own
    return dataclasses.replace(built, model_bytes=module_bytes([modules]))


def compiled(modules: Sequence[nn.Module]) -> list[Any]:
    return [torch.compile(module, dynamic=False) for module in modules]


def compile_now(run: Run) -> None:
    """The first call, which compiles. Raises UnavailableError where that cannot be done."""
    try:
        with torch._dynamo.config.patch(recompile_limit=COMPILED_VARIANTS):
            run()
    except torch.OutOfMemoryError:
        raise
    except Exception as error:  # dynamo, inductor and the compiler that it calls raise their own
        raise UnavailableError("not available", f"torch.compile: {first_line(error)}") from error


def _all_rows(work: Decoders, sequences: Sequences, precision: str) -> Built:
    encodings = [rows_encoding(d.condition, f) for d, f in zip(work.decoders, work.features, strict=True)]

    def log_probs(features: Sequence[Tensor]) -> list[Tensor]:
        with eager_precision(precision, work.device):
            return [
                row_log_prob(sequence, f, encoding) / f.shape[1]
                for sequence, f, encoding in zip(sequences, features, encodings, strict=True)
            ]

    return Built(lambda: log_probs(work.features), log_probs, module_bytes(work.reference))


def row_log_prob(sequence: Callable[..., tuple[Tensor, Tensor]], features: Tensor, encoding: Tensor) -> Tensor:
    """(B, D, H, W) to log p (B, H, W)."""
    u, log_det = sequence(rows_of(features), [encoding])
    return (gaussian_log_prob(u.float()) + log_det.float()).view(len(features), *features.shape[2:])


def rows_of(features: Tensor) -> Tensor:
    """(B, D, H, W) to feature vectors (B H W, D)."""
    return features.permute(0, 2, 3, 1).reshape(-1, features.shape[1])


def rows_encoding(channels: int, features: Tensor) -> Tensor:
    """The condition of every feature vector, (B H W, C), on the features' device."""
    encoding = positional_encoding(channels, *features.shape[2:]).float().to(features.device)
    return encoding.flatten(1).t().repeat(len(features), 1)


def cflow_ad_loop(work: Decoders, precision: str) -> Built:
    """The published speed run: u and log det only, no likelihood."""

    def run() -> None:
        with eager_precision(precision, work.device):
            for sequence, features in zip(work.reference, work.features, strict=True):
                for _ in fibers(sequence, features, work.decoders[0].condition):
                    pass

    note = "its speed run: no likelihood is computed"
    return Built(run, lambda features: _loop_log_probs(work, features, precision), module_bytes(work.reference), note)


def cflow_ad_loop_lists(work: Decoders, precision: str) -> Built:
    """The published accuracy run: likelihoods and a loss, every fiber's results appended to Python lists."""

    def run() -> None:
        with eager_precision(precision, work.device):
            loop_lists(work.reference, work.features, work.decoders[0].condition)

    note = "its accuracy run: results become Python lists"
    return Built(run, lambda features: _loop_log_probs(work, features, precision), module_bytes(work.reference), note)


def loop_lists(sequences: Sequences, features: Sequence[Tensor], condition: int) -> list[list[float]]:
    """Each scale's log p / D, as the published accuracy run collects them."""
    total_loss, distributions = 0.0, []
    for sequence, maps in zip(sequences, features, strict=True):
        distribution: list[float] = []
        for u, log_det in fibers(sequence, maps, condition):
            log_prob = (gaussian_log_prob(u.float()) + log_det.float()) / maps.shape[1]
            total_loss += float(-F.logsigmoid(log_prob).sum().cpu().numpy())
            distribution = distribution + log_prob.cpu().tolist()
        distributions.append(distribution)
    return distributions


def fibers(sequence: Callable[..., tuple[Tensor, Tensor]], features: Tensor, condition: int) -> Any:
    """Yield (u, log det) of 256 vectors after the other; the encoding is made on the CPU and copied, every time."""
    batch, channels, height, width = features.shape
    by_row, by_column = (factor.float() for factor in encoding_factors(condition, height, width))
    half = condition // 2
    encoding = torch.empty(condition, height, width)
    encoding[:half], encoding[half:] = by_column.t().unsqueeze(1), by_row.t().unsqueeze(2)
    repeated = encoding.to(features.device).unsqueeze(0).repeat(batch, 1, 1, 1)
    conditions = repeated.flatten(2).transpose(1, 2).reshape(-1, condition)
    vectors = features.flatten(2).transpose(1, 2).reshape(-1, channels)
    for start in range(0, len(vectors), FIBER):
        index = torch.arange(start, min(start + FIBER, len(vectors)))
        yield sequence(vectors[index], [conditions[index]])


@torch.no_grad()
def _loop_log_probs(work: Decoders, features: Sequence[Tensor], precision: str) -> list[Tensor]:
    results = []
    with eager_precision(precision, work.device):
        for sequence, maps in zip(work.reference, features, strict=True):
            parts = [
                gaussian_log_prob(u.float()) + log_det.float()
                for u, log_det in fibers(sequence, maps, work.decoders[0].condition)
            ]
            results.append(torch.cat(parts).view(len(maps), *maps.shape[2:]) / maps.shape[1])
    return results


def anomalib_decoders(work: Decoders, precision: str, decoders: nn.ModuleList | None = None) -> Built:
    """anomalib's forward, its encoder replaced by the case's features and its map left out.

    decoders: in the place of anomalib's own, such as `accelerate` makes of them.
    """
    from anomalib.models.image.cflow.torch_model import CflowModel

    layers = [f"scale{k}" for k in range(len(work.decoders))]
    model = CflowModel.__new__(CflowModel)
    nn.Module.__init__(model)
    maps = _Maps(layers, work.features)
    model.encoder, model.anomaly_map_generator, model.pool_layers = maps, maps.collector, layers
    model.fiber_batch_size, model.condition_vector = 64, work.decoders[0].condition
    model.decoders = decoders or nn.ModuleList(_anomalib_decoder(decoder) for decoder in work.decoders)
    images = torch.empty(len(work.features[0]), 3, 1, 1, device=work.device)

    def log_probs(features: Sequence[Tensor]) -> list[Tensor]:
        maps.features = list(features)
        with eager_precision(precision, work.device):
            model(images)
        found = zip(maps.collector.distribution, features, strict=True)
        return [values.view(len(f), *f.shape[2:]) for values, f in found]

    note = "its forward in fibers of 64, without encoder and map"
    return Built(lambda: log_probs(work.features), log_probs, module_bytes([model.decoders]), note)


def _anomalib_decoder(decoder: Any) -> nn.Module:
    from anomalib.models.image.cflow.utils import cflow_head

    head: nn.Module = cflow_head(
        decoder.condition, decoder.coupling_blocks, decoder.affine_clamping, decoder.features, permute_soft=False
    )
    head.load_state_dict(decoder.to_freia().state_dict())
    return head.to(decoder.device)


class _Maps(nn.Module):
    """Stands where anomalib's model has its encoder: gives features that are there already."""

    def __init__(self, layers: Sequence[str], features: Sequence[Tensor]) -> None:
        super().__init__()
        self.layers, self.features, self.collector = layers, list(features), _Collector()

    def forward(self, images: Tensor) -> dict[str, Tensor]:
        return dict(zip(self.layers, self.features, strict=True))


class _Collector(nn.Module):
    """Stands where anomalib's model makes its map: keeps each scale's log p / D."""

    def __init__(self) -> None:
        super().__init__()
        self.found = SimpleNamespace(distribution=[])

    @property
    def distribution(self) -> list[Tensor]:
        return self.found.distribution

    def forward(self, distribution: list[Tensor], **rest: Any) -> Tensor:
        self.found.distribution = distribution
        return torch.zeros(1, 1, 1)


def first_line(error: Exception) -> str:
    """The class of an error and its message's first line that says something."""
    lines = [line.strip() for line in str(error).splitlines() if line.strip()]
    return f"{type(error).__name__}: {lines[0]}"[:200] if lines else type(error).__name__
