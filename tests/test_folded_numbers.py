"""The folded decoder's numbers are the same for any layout, batch, chunk, thread and way of multiplying."""

from __future__ import annotations

from concurrent.futures import ThreadPoolExecutor
from typing import Any
from unittest import mock

import pytest
import torch
from flows import rough_decoder
from torch import Tensor

from cflow_fast import FlowDecoder, FoldedDecoder, ops
from cflow_fast.kernels import torch_flow
from cflow_fast.kernels.cpu_flow import CpuFlow
from cflow_fast.kernels.cpu_library import Library, library, library_file
from cflow_fast.kernels.table_cache import MAX_TABLES
from cflow_fast.kernels.torch_flow import TorchFlow
from cflow_fast.precision import cpu_has, multiplies_bf16

CPU = torch.device("cpu")
FEATURES, CONDITION = 24, 8

TOLERANCES: dict[str, dict[str, Any]] = {"fp32": {"rtol": 1e-5, "atol": 1e-4}, "bf16": {"rtol": 0.02, "atol": 1.0}}
PRECISIONS = ["fp32", *(["bf16"] if multiplies_bf16(CPU) else [])]  # those that oneDNN multiplies here
needs_onednn = pytest.mark.skipif(not torch.backends.mkldnn.is_available(), reason="this PyTorch has no oneDNN")
each_way = pytest.mark.parametrize("way", ["plain", pytest.param("packed", marks=needs_onednn), "compiled", "avx2"])
each_permutation = pytest.mark.parametrize("permute_soft", [False, True])


def folded_with(decoder: FlowDecoder, way: str, precision: str = "fp32") -> FoldedDecoder:
    """Multiplied as the test wants it and not as the CPU would have it; what is not there skips the test."""
    folded = decoder.fold(precision)
    compiled = None
    if way in ("compiled", "avx2"):
        operand = folded.arithmetic.operands
        compiled = library(operand) if way == "compiled" else other_library("_flow_avx2", operand)
        if compiled is None:
            pytest.skip(f"no compiled code that multiplies {operand} here")
    with mock.patch.multiple(ops, library=lambda _: compiled, _takes_onednn=lambda *_: way == "packed"):
        flow = folded.flow
    assert isinstance(flow, CpuFlow if compiled else TorchFlow)
    assert compiled or flow.products.feature_dim == (way == "packed")  # type: ignore[union-attr]
    return folded


def other_library(name: str, operand: torch.dtype) -> Library | None:
    """One that this CPU can run but would not choose."""
    path = library_file(name)
    usable = operand == torch.float32 and cpu_has("avx2") and library(operand) is not None
    return Library(path, operand) if path and usable else None


@pytest.mark.parametrize("way", [pytest.param("packed", marks=needs_onednn), "compiled", "avx2"])
@each_permutation
@pytest.mark.parametrize("precision", PRECISIONS)
@pytest.mark.parametrize("features", [24, 25])
@pytest.mark.parametrize("condition", [0, 8])
@pytest.mark.parametrize("activation", ["relu", "softplus"])
def test_every_way_agrees_with_plain_products(
    way: str, permute_soft: bool, precision: str, features: int, condition: int, activation: str
) -> None:
    decoder = rough_decoder(features, permute_soft=permute_soft, condition=condition, activation=activation)
    plain, packed = folded_with(decoder, "plain", precision), folded_with(decoder, way, precision)
    features_map, z = torch.randn(2, features, 3, 5), torch.randn(9, features)
    c = [torch.randn(9, condition)] if condition else None
    torch.testing.assert_close(packed.log_prob(features_map), plain.log_prob(features_map), **TOLERANCES[precision])
    for ours, theirs in zip(packed(z, c), plain(z, c), strict=True):
        torch.testing.assert_close(ours, theirs, **TOLERANCES[precision])


@each_way
@each_permutation
@pytest.mark.parametrize("precision", PRECISIONS)
@pytest.mark.parametrize("condition", [0, 8])
@pytest.mark.parametrize("shape", [(0, 3, 4), (2, 0, 4), (2, 3, 0), (1, 1, 1), (3, 1, 7), (1, 7, 1)])
def test_maps_of_any_size_have_a_likelihood(
    way: str, permute_soft: bool, precision: str, condition: int, shape: tuple[int, int, int]
) -> None:
    batch, height, width = shape
    decoder = rough_decoder(FEATURES, permute_soft=permute_soft, condition=condition)
    features = torch.randn(batch, FEATURES, height, width)
    log_prob = folded_with(decoder, way, precision).log_prob(features)
    assert (log_prob.shape, log_prob.dtype) == (shape, torch.float32)
    torch.testing.assert_close(log_prob, decoder.log_prob(features).detach(), **TOLERANCES[precision])


@each_way
@each_permutation
@pytest.mark.parametrize("precision", PRECISIONS)
@pytest.mark.parametrize("condition", [0, 8])
@pytest.mark.parametrize("count", [0, 1])
def test_few_rows_are_rows(way: str, permute_soft: bool, precision: str, condition: int, count: int) -> None:
    decoder = rough_decoder(FEATURES, permute_soft=permute_soft, condition=condition)
    folded = folded_with(decoder, way, precision)
    z, c = torch.randn(count, FEATURES), [torch.randn(count, condition)] if condition else None
    assert folded.log_prob(z, c[0] if c else None).shape == (count,)
    with torch.no_grad():
        for ours, expected in zip(folded(z, c), decoder(z, c), strict=True):
            torch.testing.assert_close(ours, expected, **TOLERANCES[precision])


@each_way
@each_permutation
@pytest.mark.parametrize("chunk", [1, 5, 7, 12, 59, 60])
def test_chunks_of_rows_do_not_show(way: str, permute_soft: bool, chunk: int, monkeypatch: pytest.MonkeyPatch) -> None:
    """60 positions in lines of 5, so that chunks end within images, at their ends, and in a line of its own."""
    folded = folded_with(rough_decoder(FEATURES, permute_soft=permute_soft), way)
    features, z, c = torch.randn(3, FEATURES, 4, 5), torch.randn(60, FEATURES), torch.randn(60, CONDITION)
    whole_map, whole_rows = folded.log_prob(features), folded(z, [c])
    monkeypatch.setattr(torch_flow, "CPU_CHUNK_ROWS", chunk)
    torch.testing.assert_close(folded.log_prob(features), whole_map, rtol=1e-5, atol=1e-4)
    for chunked, whole in zip(folded(z, [c]), whole_rows, strict=True):
        torch.testing.assert_close(chunked, whole, rtol=1e-5, atol=1e-4)


@each_way
@each_permutation
@pytest.mark.parametrize("batch", [1, 3])
def test_layout_of_a_map_in_memory_does_not_matter(way: str, permute_soft: bool, batch: int) -> None:
    folded = folded_with(rough_decoder(FEATURES, permute_soft=permute_soft), way)
    features = torch.randn(batch, FEATURES, 4, 6)
    spaced = torch.randn(batch, 2 * FEATURES, 8, 12)
    spaced[:, ::2, ::2, ::2] = features
    layouts = [
        features.to(memory_format=torch.channels_last),
        spaced[:, ::2, ::2, ::2],
        features.mT.contiguous().mT,
        features.transpose(0, 3).contiguous().transpose(0, 3),
    ]
    expected = folded.log_prob(features)
    for same in layouts:
        torch.testing.assert_close(folded.log_prob(same), expected, rtol=1e-6, atol=1e-5)
    expanded = torch.randn(1, FEATURES, 1, 1).expand(batch, FEATURES, 4, 6)
    expected = folded.log_prob(expanded.contiguous())
    torch.testing.assert_close(folded.log_prob(expanded), expected, rtol=1e-6, atol=1e-5)


@each_way
@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float64])
def test_features_of_another_precision_are_those_numbers(way: str, dtype: torch.dtype) -> None:
    folded = folded_with(rough_decoder(FEATURES), way)
    features = torch.randn(2, FEATURES, 3, 4).to(dtype)
    z, c = torch.randn(3, FEATURES).to(dtype), torch.randn(3, CONDITION).to(dtype)
    log_prob, (u, log_det) = folded.log_prob(features), folded(z, [c])
    assert (log_prob.dtype, u.dtype, log_det.dtype) == (torch.float32,) * 3
    assert torch.equal(log_prob, folded.log_prob(features.float()))
    assert torch.equal(u, folded(z.float(), [c.float()])[0])


@each_way
@each_permutation
@pytest.mark.parametrize("precision", ["fp32", "bf16"])
@pytest.mark.parametrize("value", [torch.nan, torch.inf, -torch.inf])
def test_features_that_are_not_finite_spoil_their_own_position_alone(
    way: str, permute_soft: bool, precision: str, value: float
) -> None:
    if way == "packed" and precision == "bf16" and not multiplies_bf16(CPU):
        precision = "fp32"
    folded = folded_with(rough_decoder(FEATURES, permute_soft=permute_soft), way, precision)
    features = torch.randn(2, FEATURES, 5, 7)
    expected = folded.log_prob(features)
    spoilt = {(0, 0, 0): 0, (0, 4, 6): FEATURES - 1, (1, 2, 3): FEATURES // 2}
    for (image, row, column), feature in spoilt.items():
        features[image, feature, row, column] = value
    log_prob = folded.log_prob(features)
    for position in spoilt:
        assert not log_prob[position].isfinite()
        log_prob[position] = expected[position]
    torch.testing.assert_close(log_prob, expected, rtol=1e-6, atol=1e-5)


@each_way
@each_permutation
@pytest.mark.parametrize("precision", ["fp32", "bf16", "fp64"])
def test_repeated_calls_are_bit_for_bit_the_same(way: str, permute_soft: bool, precision: str) -> None:
    if way == "packed" and not (precision == "fp32" or (precision == "bf16" and multiplies_bf16(CPU))):
        pytest.skip(f"oneDNN does not multiply {precision} here")
    decoder = rough_decoder(FEATURES, permute_soft=permute_soft)
    features = torch.randn(2, FEATURES, 5, 7)
    first = folded_with(decoder, way, precision)
    expected = first.log_prob(features)
    assert torch.equal(first.log_prob(features), expected)
    assert torch.equal(folded_with(decoder, way, precision).log_prob(features), expected)


@each_way
@each_permutation
def test_image_has_the_same_likelihood_alone_and_in_any_batch(way: str, permute_soft: bool) -> None:
    folded = folded_with(rough_decoder(FEATURES, permute_soft=permute_soft), way)
    images = 1.5 * torch.randn(5, FEATURES, 6, 7)
    together = folded.log_prob(images) / FEATURES
    order = torch.tensor([3, 0, 4, 1, 2])
    torch.testing.assert_close(folded.log_prob(images[order]) / FEATURES, together[order], rtol=1e-6, atol=1e-6)
    for i, image in enumerate(images):
        torch.testing.assert_close(folded.log_prob(image[None])[0] / FEATURES, together[i], rtol=1e-6, atol=1e-6)


@each_way
def test_tables_of_many_map_sizes_do_not_pile_up(way: str) -> None:
    decoder = rough_decoder(FEATURES)
    folded = folded_with(decoder, way)
    sizes = [(height, width) for height in (2, 3, 4, 5) for width in (3, 4, 5)]
    for height, width in sizes * 2:
        features = torch.randn(1, FEATURES, height, width)
        torch.testing.assert_close(folded.log_prob(features), decoder.log_prob(features).detach(), rtol=0.02, atol=0.02)
        assert len(folded.flow.tables) <= MAX_TABLES


def test_surrounding_autocast_does_not_change_the_precision() -> None:
    for permute_soft in (False, True):
        decoder = rough_decoder(FEATURES, permute_soft=permute_soft)
        features, z, c = torch.randn(1, FEATURES, 3, 4), torch.randn(3, FEATURES), torch.randn(3, CONDITION)
        for way in ("plain", "packed" if torch.backends.mkldnn.is_available() else "plain", None):
            folded = decoder.fold("fp32") if way is None else folded_with(decoder, way)
            expected = folded.log_prob(features), folded.log_prob(z, c), *folded(z, [c])
            with torch.autocast("cpu", dtype=torch.bfloat16):
                answers = folded.log_prob(features), folded.log_prob(z, c), *folded(z, [c])
            assert all(torch.equal(answer, plain) for answer, plain in zip(answers, expected, strict=True))


def test_first_use_in_inference_mode_serves_outside_of_it() -> None:
    folded = rough_decoder(FEATURES).fold("fp32")
    features, z, c = torch.randn(1, FEATURES, 3, 4), torch.randn(3, FEATURES), torch.randn(3, CONDITION)
    with torch.inference_mode():
        inside = folded.log_prob(features).clone()
    assert torch.equal(folded.log_prob(features), inside)
    assert folded(z, [c])[0].shape == (3, FEATURES)


@each_way
def test_threads_share_one_decoder(way: str) -> None:
    folded = folded_with(rough_decoder(FEATURES, permute_soft=True), way)
    maps = [torch.randn(1, FEATURES, 3 + i % 4, 4 + i % 5) for i in range(40)]
    expected = [folded.log_prob(features) for features in maps]
    folded = folded_with(rough_decoder(FEATURES, permute_soft=True), way)
    with ThreadPoolExecutor(8) as pool:
        answers: list[Tensor] = list(pool.map(folded.log_prob, maps))
    for answer, alone in zip(answers, expected, strict=True):
        torch.testing.assert_close(answer, alone, rtol=1e-6, atol=1e-5)
