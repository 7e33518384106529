"""What only a card can show: capture, streams, threads, real kernels. `make gpu` runs this first."""

from __future__ import annotations

import threading
from collections.abc import Iterator
from pathlib import Path

import pytest
import torch
from tiny import calibrated_model, read
from torch import Tensor

from cflow_fast import anomaly_map, parity
from cflow_fast.bench.planned import CONDITION, TESTED, TESTED_BLOCKS
from cflow_fast.decoder import FlowDecoder
from cflow_fast.folded import FoldedDecoder
from cflow_fast.kernels import registration
from cflow_fast.kernels.capture import GraphCache, side_by_side
from cflow_fast.model import CFlowAD

pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(not torch.cuda.is_available(), reason="there is no CUDA device"),
    pytest.mark.filterwarnings("error:no CUDA graph could be captured"),
]
CARD = torch.device("cuda", 0)


@pytest.fixture(autouse=True)
def _nothing_left_behind() -> Iterator[None]:
    yield
    torch.cuda.synchronize()
    torch.cuda.empty_cache()


def decoder(features: int = 64, **options: object) -> FlowDecoder:
    torch.manual_seed(3)
    made = FlowDecoder(features, CONDITION, coupling_blocks=TESTED_BLOCKS, **options)  # type: ignore[arg-type]
    parity.roughen(made)
    return made.to(CARD)


def maps(folded: FlowDecoder | FoldedDecoder, batch: int = 2, side: int = 8, seed: int = 0) -> Tensor:
    generator = torch.Generator().manual_seed(seed)
    return torch.randn(batch, folded.features, side, side, generator=generator).to(CARD)


def test_a_graph_replays_with_new_values_and_returns_copies() -> None:
    folded = decoder().fold("fp32")
    cache = GraphCache(lambda x: (folded.log_prob(x),))
    inputs = [maps(folded, seed=seed) for seed in range(3)]
    results = [cache(x)[0] for x in inputs]
    for x, result in zip(inputs, results, strict=True):
        assert torch.equal(result, folded.log_prob(x))


def test_a_graph_follows_the_callers_stream_and_waits_for_the_last_replay() -> None:
    folded = decoder(256).fold("fp32")
    cache = GraphCache(lambda x: (folded.log_prob(x),))
    x, y = maps(folded, 8, 32, seed=1), maps(folded, 8, 32, seed=2)
    expected = folded.log_prob(x), folded.log_prob(y)
    cache(x)
    streams = [torch.cuda.Stream(CARD) for _ in range(2)]
    for _ in range(20):
        found = []
        for stream, inputs in zip(streams, (x, y), strict=True):
            stream.wait_stream(torch.cuda.current_stream(CARD))
            with torch.cuda.stream(stream):
                found.append(cache(inputs)[0])
        torch.cuda.synchronize()
        assert torch.equal(found[0], expected[0])
        assert torch.equal(found[1], expected[1])


def test_threads_replay_one_graph_and_get_their_own_results() -> None:
    folded = decoder().fold("fp32")
    cache = GraphCache(lambda x: (folded.log_prob(x),))
    inputs = [maps(folded, seed=seed) for seed in range(4)]
    expected = [folded.log_prob(x) for x in inputs]
    wrong: list[int] = []

    def work(i: int) -> None:
        with torch.cuda.stream(torch.cuda.Stream(CARD)):
            for _ in range(50):
                if not torch.equal(cache(inputs[i])[0], expected[i]):
                    wrong.append(i)

    torch.cuda.synchronize()
    threads = [threading.Thread(target=work, args=(i,)) for i in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert not wrong


def test_a_capture_survives_allocations_of_another_thread() -> None:
    stop = threading.Event()

    def allocate() -> None:
        while not stop.is_set():
            torch.empty(1 << 20, device=CARD).zero_()

    thread = threading.Thread(target=allocate)
    thread.start()
    try:
        for size in range(1, 6):
            (result,) = GraphCache(lambda x: (2 * x,))(torch.ones(size, device=CARD))
            assert result.tolist() == [2.0] * size
    finally:
        stop.set()
        thread.join()


def test_caches_of_two_threads_are_captured_one_after_the_other() -> None:
    decoders = [decoder().fold("fp32") for _ in range(2)]
    inputs = [maps(folded, seed=seed) for seed, folded in enumerate(decoders)]
    expected = [folded.log_prob(x) for folded, x in zip(decoders, inputs, strict=True)]
    torch.cuda.synchronize()
    right: list[bool] = []

    def work(i: int) -> None:
        with torch.cuda.stream(torch.cuda.Stream(CARD)):
            for _ in range(5):  # a capture that fails warns, which is an error here
                cache = GraphCache(lambda x: (decoders[i].log_prob(x),))
                right.append(torch.equal(cache(inputs[i])[0], expected[i]))

    threads = [threading.Thread(target=work, args=(i,)) for i in range(2)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert right == [True] * 10


def test_a_graph_made_in_inference_mode_replays_outside_of_it() -> None:
    folded = decoder().fold("fp32")
    cache = GraphCache(lambda x: (folded.log_prob(x),))
    with torch.inference_mode():
        cache(maps(folded, seed=1))
    x = maps(folded, seed=2)
    assert torch.equal(cache(x)[0], folded.log_prob(x))


def test_a_graph_of_library_products_outlives_others() -> None:
    """Each has the library's workspace in its own memory: what is freed with one graph is no other's."""
    x, w = (torch.randn(512, 512, device=CARD) for _ in range(2))
    caches = [GraphCache(lambda x: (x @ w,)) for _ in range(3)]
    expected, *_ = [cache(x)[0] for cache in caches]
    caches[0].clear()
    torch.cuda.empty_cache()
    caches.append(GraphCache(lambda x: (w @ x,)))
    caches[-1](x)
    junk = [torch.full((1 << 22,), float("nan"), device=CARD) for _ in range(16)]
    for cache in caches[1:3]:
        assert torch.equal(cache(x)[0], expected)
    assert len(junk) == 16


def test_what_cannot_be_captured_runs_without_a_graph_on_the_callers_stream() -> None:
    cache = GraphCache(lambda x: (x + x.sum().item(),))
    with pytest.warns(UserWarning, match="no CUDA graph could be captured"):
        (result,) = cache(torch.ones(2, device=CARD))
    assert torch.cuda.current_stream(CARD) == torch.cuda.default_stream(CARD)
    assert result.tolist() == [3.0, 3.0]


@pytest.mark.parametrize("features", [64, 512])
def test_a_decoder_called_again_and_again_answers_the_same_bits(features: int) -> None:
    """A wide one by launches the first time, later by a graph; a narrow one by its launch."""
    folded = decoder(features).fold("bf16")
    x, rows, c = maps(folded), torch.randn(37, features, device=CARD), torch.randn(37, 128, device=CARD)
    first = folded.log_prob(x), folded.log_prob(rows, c), *folded(rows, [c])
    for _ in range(4):
        again = folded.log_prob(x), folded.log_prob(rows, c), *folded(rows, [c])
        assert all(torch.equal(mine, theirs) for mine, theirs in zip(again, first, strict=True))
    prepared = next(iter(p for p in registration._flows._flows.values() if p.flow is folded.flow))
    graphs = len(prepared._log_probs._graphs), len(prepared._rows._graphs)
    assert graphs == ((0, 0) if features == 64 else (2, 1))
    other = folded.log_prob(maps(folded, seed=5))
    assert torch.equal(other, folded.log_prob(maps(folded, seed=5)))
    assert not torch.equal(other, first[0])


def test_a_decoder_that_is_captured_with_its_model_has_no_graph_of_its_own() -> None:
    folded = decoder(512).fold("bf16")
    cache = GraphCache(lambda x: (folded.log_prob(x),))
    for _ in range(3):
        cache(maps(folded))
    prepared = next(iter(p for p in registration._flows._flows.values() if p.flow is folded.flow))
    assert not prepared._log_probs._graphs


def test_scales_side_by_side_give_what_they_give_in_turn() -> None:
    decoders = [decoder(features).fold("fp32") for features in (64, 128, 256)]
    inputs = [maps(folded, 4, side) for folded, side in zip(decoders, (32, 16, 8), strict=True)]
    expected = [folded.log_prob(x) for folded, x in zip(decoders, inputs, strict=True)]
    for _ in range(10):
        calls = [lambda f=f, x=x: f.log_prob(x) for f, x in zip(decoders, inputs, strict=True)]
        for mine, theirs in zip(side_by_side(calls, CARD), expected, strict=True):
            assert torch.equal(mine, theirs)


@pytest.mark.parametrize("precision", ["fp32", "tf32x3", "fp16x3", "tf32", "fp16", "bf16"])
@pytest.mark.parametrize("permute_soft", [True, False], ids=["soft", "hard"])
@pytest.mark.parametrize("features", TESTED[0][0])
def test_likelihoods_are_the_same_bit_by_bit_from_run_to_run(features: int, permute_soft: bool, precision: str) -> None:
    folded = decoder(features, permute_soft=permute_soft).fold(precision)
    for batch, side in TESTED[0][1]:
        x = maps(folded, batch, side)
        first = folded.log_prob(x)
        assert first.isfinite().all()
        for _ in range(5):
            assert torch.equal(folded.log_prob(x), first)


@pytest.mark.parametrize("precision", ["tf32x3", "fp16x3", "tf32", "fp16", "bf16"])
@pytest.mark.parametrize("permute_soft", [True, False], ids=["soft", "hard"])
def test_wide_decoders_give_the_same_bits_from_run_to_run(permute_soft: bool, precision: str) -> None:
    """What one group of warps overwrites while another still reads it shows here, if anywhere."""
    (features,), sizes = TESTED[1]
    folded = decoder(features, permute_soft=permute_soft).fold(precision)
    for batch, side in sizes:
        x = maps(folded, batch, side)
        first = folded.log_prob(x)
        for _ in range(10):
            assert torch.equal(folded.log_prob(x), first)


@pytest.mark.usefixtures("tuning_cache")
def test_few_rows_are_the_decoder_that_many_are() -> None:
    """Where few merge a permutation with the next first layer: by no more than bf16 loses."""
    folded = decoder(512, permute_soft=True).fold("bf16")
    x = maps(folded, 4, 32)
    together = folded.log_prob(x)
    assert set(folded.flow.triton.made) == {"prepared"}
    alone = folded.log_prob(x[:1])
    assert set(folded.flow.triton.made) == {"prepared", "merged"}
    assert ((alone - together[:1]).square().mean().sqrt() / 512) < 2e-3


@pytest.mark.parametrize("memory_format", [torch.contiguous_format, torch.channels_last])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.parametrize("features", [64, 512])
def test_features_are_read_in_any_format(features: int, dtype: torch.dtype, memory_format: torch.memory_format) -> None:
    folded = decoder(features).fold("fp32")
    x = maps(folded).to(dtype)
    expected = folded.log_prob(x.float())
    torch.testing.assert_close(folded.log_prob(x.contiguous(memory_format=memory_format)), expected, rtol=0, atol=1e-3)


@pytest.mark.parametrize("features", parity.SIZES)
@pytest.mark.parametrize("permute_soft", [True, False], ids=["soft", "hard"])
def test_every_precision_keeps_the_yardstick(features: int, permute_soft: bool) -> None:
    rows = list(parity.check(parity.random_case(features, permute_soft, device=CARD)))
    assert not [(row.precision, row.failures) for row in rows if not row.passed]


def test_the_anomaly_map_is_the_cpus() -> None:
    log_probs = [-torch.rand(2, side, side + 1) for side in (8, 4, 2)]
    for maxima in ([-0.2, -0.1, 0.0], None):
        mine = anomaly_map([x.to(CARD) for x in log_probs], (61, 70), maxima)
        torch.testing.assert_close(mine.cpu(), anomaly_map(log_probs, (61, 70), maxima), rtol=0, atol=2e-6)


@pytest.fixture
def models(good_paths: list[Path], tmp_path: Path) -> tuple[CFlowAD, CFlowAD]:
    """The same model on the CPU and on the card."""
    model = calibrated_model(good_paths, encoder_precision="fp32")
    model.save(tmp_path / "model.safetensors")
    return model, CFlowAD.load(tmp_path / "model.safetensors", CARD)


def test_predictions_are_the_cpus_and_do_not_depend_on_the_batch(
    models: tuple[CFlowAD, CFlowAD], good_paths: list[Path], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(torch.backends.cudnn, "allow_tf32", False)  # the encoder's convolutions are to be fp32
    on_cpu, on_card = models
    expected = on_cpu.predict(good_paths)
    for batch_size in (1, 5, 12, 1):
        for mine, theirs in zip(on_card.predict(good_paths, batch_size), expected, strict=True):
            assert mine.score == pytest.approx(theirs.score, abs=2e-3)


@pytest.mark.parametrize("precision", ["fp16", "bf16"])
def test_an_encoder_in_a_graph_predicts_what_it_predicts_without_one(precision: str, good_paths: list[Path]) -> None:
    model = calibrated_model(good_paths).to(CARD)
    model.precision = model.encoder_precision = precision
    images = read(good_paths[:3]).to(CARD)
    for captured, plain in zip(model.log_probs(images), model._log_probs(images), strict=True):
        torch.testing.assert_close(captured, plain)


def test_anomaly_maps_come_out_of_a_graph_and_follow_a_new_calibration(
    models: tuple[CFlowAD, CFlowAD], good_paths: list[Path]
) -> None:
    _, model = models
    images = read(good_paths[:3]).to(CARD)
    for shift in (0.0, 0.3):
        model.log_prob_max.add_(shift)
        maxima = model.log_prob_max.tolist()
        for _ in range(2):
            expected = anomaly_map(model.log_probs(images), (images.shape[2], images.shape[3]), maxima)
            assert torch.equal(model(images), expected)
        (graph,) = model._graphs["_maps"][1]._graphs.values()
        assert [output.shape for output in graph.outputs] == [expected.shape]


def test_a_decoder_called_on_more_than_a_graph_takes_answers_in_parts(monkeypatch: pytest.MonkeyPatch) -> None:
    folded = decoder(512).fold("tf32x3")
    x = maps(folded, 5)
    monkeypatch.setenv(registration.GRAPHS_SWITCH, "0")
    whole = folded.log_prob(x)
    monkeypatch.delenv(registration.GRAPHS_SWITCH)
    monkeypatch.setattr(registration, "GRAPH_ELEMENTS", 2 * x[0].numel())
    for _ in range(4):
        torch.testing.assert_close(folded.log_prob(x), whole, rtol=0, atol=0.01)
        assert torch.equal(folded.log_prob(x), folded.log_prob(x))
    prepared = next(iter(p for p in registration._flows._flows.values() if p.flow is folded.flow))
    assert sorted(len(graph.inputs[0]) for graph in prepared._log_probs._graphs.values()) == [1, 2]


def test_torch_compile_sees_through_a_folded_decoder() -> None:
    folded = decoder().fold("fp32")
    x = maps(folded)
    compiled = torch.compile(folded.log_prob, fullgraph=True)
    torch.testing.assert_close(compiled(x), folded.log_prob(x), rtol=0, atol=1e-3)


def test_graphs_that_torch_compile_makes_leave_a_decoder_out() -> None:
    folded = decoder(512).fold("bf16")
    x = maps(folded)
    expected = folded.log_prob(2 * x) + 1  # called once before it is compiled
    compiled = torch.compile(lambda x: folded.log_prob(2 * x) + 1, mode="reduce-overhead")
    for _ in range(4):
        torch.testing.assert_close(compiled(x).clone(), expected, rtol=1e-6, atol=1e-4)
