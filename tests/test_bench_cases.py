"""Cases are what the encoders make, and every peer computes the likelihoods that it is timed for."""

from __future__ import annotations

import copy
from dataclasses import replace
from typing import Any

import pytest
import torch

from cflow_fast.bench import decoder as decoders
from cflow_fast.bench import end_to_end, maps, peers, training
from cflow_fast.bench.cases import ENCODERS, DecoderCase, Scales, decoder_flop, grid, scales_of
from cflow_fast.bench.contenders import FLOOR, OURS, PLAIN, Built, Contender, is_installed
from cflow_fast.bench.decoder import CONTENDERS
from cflow_fast.bench.maps import MapCase, MapWork
from cflow_fast.bench.measurement import Effort
from cflow_fast.bench.runner import Entrant, measure_case
from cflow_fast.bench.yardstick import Yardstick
from cflow_fast.encoders import Encoder
from cflow_fast.errors import EncoderError
from cflow_fast.kernels.products import MatmulProducts, OneDnnProducts
from cflow_fast.kernels.torch_flow import TorchFlow
from cflow_fast.kernels.weights import FlowWeights

CASE = DecoderCase("tiny", Scales((16, 24), (8, 16)), 136, 2, "soft", coupling_blocks=2, condition=8)
EAGER = [name for name in CONTENDERS if name not in (OURS, FLOOR, "freia-compile")]


@pytest.mark.parametrize("name", ENCODERS)
def test_known_scales_are_the_encoders_own(name: str) -> None:
    encoder = Encoder(name, pretrained=False)
    assert ENCODERS[name] == Scales(encoder.channels, encoder.strides)
    images = torch.rand(1, 3, 72, 72)  # no multiple of the strides
    assert [f.shape[2] for f in encoder(images)] == list(ENCODERS[name].sides(72))


def test_scales_of_another_encoder_are_asked_for_and_an_unknown_one_is_refused() -> None:
    assert scales_of("resnet10t") == Scales((128, 256, 512), (8, 16, 32))
    with pytest.raises(EncoderError, match="no encoder 'resnet19'"):
        scales_of("resnet19")


def test_flop_of_the_wide_resnets_decoders_are_those_that_were_counted_by_hand() -> None:
    """Multiply-adds an image of 256 px, in units of 10^9, without the last rotation."""
    scales = ENCODERS["wide_resnet50_2"]
    soft, hard = (
        sum(decoder_flop(d, n, 8, 128, kind) for d, n in zip(scales.channels, scales.rows(256, 1), strict=True)) / 2e9
        for kind in (True, False)
    )
    assert soft == pytest.approx(18.1, abs=0.1)
    assert hard == pytest.approx(12.5, abs=0.1)


def test_work_is_the_same_for_the_same_seed_and_leaves_the_global_generator() -> None:
    torch.manual_seed(0)
    expected = torch.rand(1)
    torch.manual_seed(0)
    first, second = CASE.work(), replace(CASE, size=136).work()
    other = replace(CASE, seed=1).work()
    assert torch.equal(torch.rand(1), expected)
    assert torch.equal(first.features[0], second.features[0])
    assert not torch.equal(first.features[0], other.features[0])
    states = [work.decoders[1].state_dict() for work in (first, second, other)]
    assert all(torch.equal(states[0][name], states[1][name]) for name in states[0])
    assert not torch.equal(states[0]["blocks.0.rotation"], states[2]["blocks.0.rotation"])


def test_rotations_of_a_decoder_are_rotations_and_differ_from_block_to_block() -> None:
    first, second = (CASE.work().decoders[1].blocks[k].rotation.double() for k in (0, 1))
    for rotation in (first, second):
        torch.testing.assert_close(rotation @ rotation.t(), torch.eye(24).double(), rtol=0, atol=1e-6)
    assert not torch.equal(first, second)


@pytest.mark.parametrize("name", EAGER)
def test_peer_computes_the_likelihoods_that_it_is_timed_for(name: str) -> None:
    if not all(map(is_installed, CONTENDERS[name].packages)):
        pytest.skip(f"{name} is not installed")
    case = replace(CASE, batch=8)  # so many rows that the largest error of two arithmetics is about the same
    work = case.work()
    built = CONTENDERS[name].build(work, "fp32")
    built.run()
    judged = case.yardstick(work).judge(name, "fp32", built)  # type: ignore[union-attr]
    assert judged is not None
    assert judged.parity, judged.failures


@pytest.mark.parametrize("permutations", ["soft", "hard"])
def test_the_floor_makes_every_product_of_the_flow_once_and_no_likelihood(
    permutations: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    case = replace(CASE, permutations=permutations)
    work = case.work()
    made: list[tuple[str, int]] = []
    for kind in (MatmulProducts, OneDnnProducts):
        product = kind.product

        def counted(self: Any, name: str, block: int, *args: Any, product: Any = product, **options: Any) -> Any:
            made.append((name, block))
            return product(self, name, block, *args, **options)

        monkeypatch.setattr(kind, "product", counted)
    floor = CONTENDERS[FLOOR].build(work, "fp32")
    assert floor.log_probs is None
    floor.run()
    alone = sorted(made)
    made.clear()
    CONTENDERS[PLAIN].build(work, "fp32").run()
    assert alone == sorted(made)


@pytest.mark.parametrize("name", ["cflow-ad-loop", "cflow-ad-loop-lists"])
def test_published_loop_takes_256_vectors_at_a_time(name: str) -> None:
    work = CASE.work()
    seen: list[int] = []
    work.reference[0].register_forward_pre_hook(lambda module, args: seen.append(len(args[0])))
    CONTENDERS[name].build(work, "fp32").run()
    assert seen == [256, 256, 2 * 17 * 17 - 512]


def test_published_accuracy_run_collects_every_likelihood_in_lists() -> None:
    work = CASE.work()
    with torch.no_grad():
        lists = peers.loop_lists(work.reference, work.features, work.decoders[0].condition)
    for values, decoder, features in zip(lists, work.decoders, work.features, strict=True):
        expected = decoder.log_prob(features).flatten() / decoder.features
        torch.testing.assert_close(torch.tensor(values), expected.detach(), rtol=0, atol=1e-5)


@pytest.mark.parametrize("name", [name for name in maps.CONTENDERS if name != "anomalib"])
def test_every_map_is_the_map_in_float64(name: str) -> None:
    case = MapCase("resnet18", ENCODERS["resnet18"], 64, 2)
    work = case.work()
    judged = case.yardstick(work).judge(name, "fp32", maps.CONTENDERS[name].build(work, "fp32"))
    assert judged.parity, judged.failures


def test_a_wrong_map_is_found() -> None:
    case = MapCase("resnet18", ENCODERS["resnet18"], 64, 2)
    work = case.work()
    other = MapWork([log_prob + 1e-3 * torch.rand_like(log_prob) for log_prob in work.log_probs], work.size)
    judged = case.yardstick(work).judge(OURS, "fp32", maps.ours(other, "fp32"))
    assert not judged.parity


def test_training_leaves_the_case_as_it_was_and_moves_its_own_copy() -> None:
    case = training.TrainingCase("resnet18", ENCODERS["resnet18"], 32, 1, "hard", coupling_blocks=1, condition=8)
    work = case.work()
    before = [parameter.clone() for decoder in work.decoders for parameter in decoder.parameters()]
    for name in training.CONTENDERS:
        built = training.CONTENDERS[name].build(work, "fp32")
        built.run()
        judged = case.yardstick(work).judge(name, "fp32", built)  # type: ignore[union-attr]
        assert judged is not None
        assert judged.parity, (name, judged.failures)
    after = [parameter for decoder in work.decoders for parameter in decoder.parameters()]
    assert all(torch.equal(a, b) for a, b in zip(before, after, strict=True))
    assert case.extra(0.5)["epoch_seconds"] == 50


def test_whole_models_of_all_contenders_give_maps_of_the_images_size() -> None:
    case = end_to_end.ModelCase("resnet18", ENCODERS["resnet18"], 64, 2, "hard", coupling_blocks=1, condition=8)
    work = case.work()
    for name in (OURS, "freia", "cflow-ad-loop-lists"):
        result = end_to_end.CONTENDERS[name].build(work, "fp32").run()
        assert tuple(result.shape) == (2, 64, 64), name  # type: ignore[attr-defined]


MODEL_CASE = end_to_end.ModelCase("resnet18", ENCODERS["resnet18"], 64, 2, "hard", coupling_blocks=2, condition=8)


@pytest.mark.parametrize("name", [OURS, "freia"])
def test_whole_models_are_judged_from_images(name: str) -> None:
    work = MODEL_CASE.work()
    built = end_to_end.CONTENDERS[name].build(work, "fp32")
    judged = MODEL_CASE.yardstick(work).judge(name, "fp32", built)  # type: ignore[union-attr]
    assert judged is not None
    assert judged.parity, judged.failures
    assert built.from_images is not None
    assert [tuple(x.shape) for x in built.from_images(work.images)] == [tuple(f[:, 0].shape) for f in work.features]


def test_a_wrong_encoder_is_found_though_the_decoders_are_right() -> None:
    work = MODEL_CASE.work()
    other = copy.deepcopy(work.model)
    with torch.no_grad():
        next(other.encoder.parameters()).mul_(1 + 1e-4)
    built = end_to_end.ours(replace(work, model=other), "fp32")
    judged = MODEL_CASE.yardstick(work).judge(OURS, "fp32", built)  # type: ignore[union-attr]
    assert judged is not None
    assert not judged.parity
    assert "from images" in judged.failures


@pytest.mark.parametrize("seed", [0, 1, 2])
def test_a_small_image_is_judged_beside_others_of_its_kind(seed: int) -> None:
    """The ratio of two errors over the four positions of a coarsest scale says nothing."""
    case = replace(MODEL_CASE, batch=1, seed=seed)
    work = case.work()
    yardstick = case.yardstick(work)
    assert isinstance(yardstick, end_to_end.ModelYardstick)
    judged = yardstick.judge(OURS, "fp32", end_to_end.ours(work, "fp32"))
    assert judged is not None
    assert judged.parity, judged.failures
    assert judged.extra["judged_images"] == 16
    assert [x.numel() for x in yardstick.exact] == [16 * 64, 16 * 16, 16 * 4]
    assert len({images.sum().item() for images in yardstick.draws}) == 16


@pytest.mark.parametrize(("size", "batch", "draws", "judged"), [(256, 1, 1, 1), (64, 32, 1, 16), (64, 12, 2, 12)])
def test_images_are_drawn_where_the_cases_own_are_not_enough(size: int, batch: int, draws: int, judged: int) -> None:
    sides = MODEL_CASE.scales.sides(size)
    features = [torch.empty(batch, d, side, side) for d, side in zip(MODEL_CASE.scales.channels, sides, strict=True)]
    work = replace(MODEL_CASE.work(), features=features, images=torch.empty(batch, 3, size, size))
    yardstick = end_to_end.ModelYardstick(CASE.yardstick(CASE.work()), work)  # type: ignore[arg-type]
    assert len(yardstick.draws) == draws
    assert yardstick.judged == judged
    assert all(images.shape == work.images.shape for images in yardstick.draws)


def test_an_encoder_in_another_precision_is_found_and_the_row_has_its_numbers() -> None:
    def in_bf16(work: Any, precision: str) -> Built:
        model = copy.copy(work.model)
        model.precision, model.encoder_precision = "fp32", "bf16"
        built = end_to_end.ours(work, precision)
        return replace(built, from_images=model.log_probs)

    case = replace(MODEL_CASE, batch=1)
    effort = Effort(seconds=1.0, least_rounds=1, most_rounds=1)
    (row,) = measure_case(case, [Entrant(Contender(OURS, in_bf16), "fp32")], effort=effort)
    assert row.status == "parity failed"
    assert row.parity is False
    for scale, (ours, theirs) in enumerate(zip(row.extra["image_rms"], row.extra["image_rms_freia"], strict=True), 1):
        assert ours > 100 * theirs
        assert f"scale {scale}: RMS from images is {ours:.3g}, over 1.5 times FrEIA's {theirs:.3g}" in row.note


def test_likelihoods_that_are_no_numbers_fail_and_can_be_stored() -> None:
    work = MODEL_CASE.work()
    built = end_to_end.ours(work, "fp32")
    wrong = replace(built, from_images=lambda images: [torch.full_like(f[:, 0], torch.nan) for f in work.features])
    judged = MODEL_CASE.yardstick(work).judge(OURS, "fp32", wrong)  # type: ignore[union-attr]
    assert judged is not None
    assert not judged.parity
    assert judged.extra["image_rms"] == [None, None, None]


def test_the_floors_tensors_lie_where_the_decoders_are(monkeypatch: pytest.MonkeyPatch) -> None:
    work = CASE.work()
    flow = TorchFlow(work.decoders[0].fold("fp32").weights, torch.float32, packed=False)
    seen = []
    monkeypatch.setattr(MatmulProducts, "product", lambda self, name, block, x, add=None: seen.extend([x, add]))
    monkeypatch.setattr(FlowWeights, "device", torch.device("meta"))
    for run in decoders._products(flow.products, 8):
        run()
    assert {x.device.type for x in seen if x is not None} == {"meta"}


def test_grid_puts_cases_that_share_their_decoders_next_to_each_other() -> None:
    found = grid(DecoderCase, ["resnet18"], ["soft", "hard"], [64, 128], [1, 8], torch.device("cpu"))
    assert [case.permutations for case in found] == ["soft"] * 4 + ["hard"] * 4
    assert found[0].decoders() is found[3].decoders()


def test_few_positions_are_judged_on_more_of_their_kind() -> None:
    """So many as make the largest error of two arithmetics about the same, and none where there are enough."""
    few = DecoderCase("tiny", Scales((8,), (8,)), 16, 1, "hard", coupling_blocks=1, condition=8)
    yardstick = few.yardstick(few.work())
    assert isinstance(yardstick, Yardstick)
    assert len({draw[0].sum().item() for draw in yardstick.draws}) == len(yardstick.draws) == 32
    assert len(yardstick.exact) == 32 * 4
    assert yardstick.draws[5][0].std() == pytest.approx(1.3, rel=0.5)
    many = replace(few, size=256)
    assert len(many.yardstick(many.work()).draws) == 1  # type: ignore[union-attr]
