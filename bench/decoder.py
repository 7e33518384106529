"""`bench decoder`: the decoders of an encoder on features that are there already, encoder and map left out."""

from __future__ import annotations

from collections.abc import Callable, Sequence

from torch import Tensor

from cflow_fast.bench import peers
from cflow_fast.bench.cases import Decoders
from cflow_fast.bench.contenders import OURS, Built, Contender, module_bytes, registry
from cflow_fast.folded import FoldedDecoder


def ours(work: Decoders, precision: str) -> Built:
    """This package's folded decoders."""
    decoders = [decoder.fold(precision) for decoder in work.decoders]
    log_probs = folded_log_probs(decoders)
    return Built(lambda: log_probs(work.features), log_probs, module_bytes(decoders))


def folded_log_probs(decoders: Sequence[FoldedDecoder]) -> Callable[[Sequence[Tensor]], list[Tensor]]:
    """Feature maps of every scale to their log p / D."""
    return lambda features: [d.log_prob(f) / d.features for d, f in zip(decoders, features, strict=True)]


CONTENDERS = registry(
    Contender(OURS, ours),
    Contender("freia", peers.freia, ("FrEIA",)),
    Contender("freia-compile", peers.freia_compile, ("FrEIA",)),
    Contender("cflow-ad-loop", peers.cflow_ad_loop, ("FrEIA",)),
    Contender("cflow-ad-loop-lists", peers.cflow_ad_loop_lists, ("FrEIA",)),
    Contender("anomalib", peers.anomalib_decoders, ("anomalib", "FrEIA")),
)
