"""`bench decoder`: the decoders of an encoder on features that are there already, encoder and map left out."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from functools import lru_cache, partial

import torch
from torch import Tensor

from cflow_fast import ops
from cflow_fast.bench import peers
from cflow_fast.bench.cases import Decoders
from cflow_fast.bench.contenders import (
    ACCELERATED,
    FLOOR,
    IN_THREE,
    OURS,
    PLAIN,
    Built,
    Contender,
    module_bytes,
    registry,
)
from cflow_fast.bench.measurement import matmul_precision
from cflow_fast.decoder import FlowDecoder
from cflow_fast.folded import FoldedDecoder
from cflow_fast.kernels.capture import GraphCache, side_by_side
from cflow_fast.kernels.products import MatmulProducts, OneDnnProducts, product_families
from cflow_fast.kernels.torch_flow import TorchFlow
from cflow_fast.positional import encoding_factors

FOLDED_KEPT = 24
"""Folded decoders that are kept for the next case: folding three takes seconds, and cases differ in size and batch."""


def ours(work: Decoders, precision: str) -> Built:
    """This package's folded decoders, as CFlowAD runs them: on a GPU side by side in a CUDA graph."""
    decoders = [_folded(decoder, precision) for decoder in work.decoders]
    log_probs = GraphCache(lambda *features: tuple(_side_by_side(decoders, features)))
    return Built(lambda: log_probs(*work.features), lambda features: list(log_probs(*features)), module_bytes(decoders))


def plain(work: Decoders, precision: str) -> Built:
    """The same folded weights by PyTorch's own products; on a GPU fused between them, and in a CUDA graph too."""
    flows = []
    for decoder in work.decoders:
        folded = _folded(decoder, precision)
        flow = ops.torch_flow(folded.weights, folded.arithmetic)
        if ops.backend(work.device) == "triton":
            flow = TorchFlow(folded.weights, folded.arithmetic.operands, packed=False, fused=True)
        flows.append((flow, folded))

    def run(*features: Tensor) -> tuple[Tensor, ...]:
        with torch.no_grad(), matmul_precision(precision):
            calls = [partial(_plain_log_prob, *flow, f) for flow, f in zip(flows, features, strict=True)]
            return tuple(side_by_side(calls, work.device))

    log_probs = GraphCache(run)
    decoders = [folded for _, folded in flows]
    return Built(lambda: log_probs(*work.features), lambda features: list(log_probs(*features)), module_bytes(decoders))


def products_alone(work: Decoders, precision: str) -> Built:
    """A floor: only the matrix products of the folded decoders, as PyTorch makes them fastest, nothing between them."""
    runs: list[Callable[[], object]] = []
    for decoder, features in zip(work.decoders, work.features, strict=True):
        folded = _folded(decoder, precision)
        operands, rows = folded.arithmetic.operands, features[:, 0].numel()
        packed = ops.onednn_is_faster(decoder.device, operands)
        flow = TorchFlow(folded.weights, operands, packed, state=operands)
        chunk = flow.chunk_rows(decoder.device)
        for start in range(0, rows, chunk):
            runs += _products(flow.products, min(chunk, rows - start))

    @torch.no_grad()
    def run() -> None:
        with matmul_precision(precision):
            for product in runs:
                product()

    return Built(run, None, note="no likelihoods: a floor")


def _products(products: MatmulProducts | OneDnnProducts, rows: int) -> list[Callable[[], object]]:
    """Those of one pass; the last block mixes nothing, and the condition is in tables."""
    runs: list[Callable[[], object]] = []
    device, dtype = products.weights.device, products.operand_dtype
    for name, family in product_families(products.weights).items():
        count, _, inputs = family.matrix.shape
        if name in ("w1_condition", "passive_output"):
            continue
        x = torch.randn((rows, inputs) if products.feature_dim else (inputs, rows)).to(device, dtype)
        bias = torch.randn((rows, family.matrix.shape[1])).to(device, dtype) if name == "w1" else None
        bias = bias if bias is None or products.feature_dim else bias.t().contiguous()
        for block in range(count - (name == "output")):
            runs.append(partial(products.product, name, block, x, add=bias))
    return runs


def folded_log_probs(decoders: Sequence[FoldedDecoder]) -> Callable[[Sequence[Tensor]], list[Tensor]]:
    """Feature maps of every scale to their log p / D."""
    return lambda features: _side_by_side(decoders, features)


@lru_cache(FOLDED_KEPT)
def _folded(decoder: FlowDecoder, precision: str) -> FoldedDecoder:
    same_weights = precision in ("tf32", "fp16", *IN_THREE)  # they differ in how these are multiplied
    if same_weights and decoder.device.type == "cuda":
        return FoldedDecoder(_folded(decoder, "fp32").weights, precision)
    return decoder.fold(precision)


def _side_by_side(decoders: Sequence[FoldedDecoder], features: Sequence[Tensor]) -> list[Tensor]:
    calls = [partial(_log_prob, decoder, f) for decoder, f in zip(decoders, features, strict=True)]
    return side_by_side(calls, features[0].device)


def _log_prob(decoder: FoldedDecoder, features: Tensor) -> Tensor:
    return decoder.log_prob(features) / decoder.features


def _plain_log_prob(flow: TorchFlow, folded: FoldedDecoder, features: Tensor) -> Tensor:
    encoding = encoding_factors(folded.condition, *features.shape[2:]) if folded.condition else None
    return flow.log_prob_map(features, encoding) / folded.features


CONTENDERS = registry(
    Contender(OURS, ours),
    Contender(PLAIN, plain),
    Contender(ACCELERATED, peers.accelerated, ("FrEIA",)),
    Contender(FLOOR, products_alone),
    Contender("freia", peers.freia, ("FrEIA",)),
    Contender("freia-compile", peers.freia_compile, ("FrEIA",)),
    Contender("cflow-ad-loop", peers.cflow_ad_loop, ("FrEIA",)),
    Contender("cflow-ad-loop-lists", peers.cflow_ad_loop_lists, ("FrEIA",)),
    Contender("anomalib", peers.anomalib_decoders, ("anomalib", "FrEIA")),
)
