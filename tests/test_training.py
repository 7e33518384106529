"""Training follows its recipe step by step, learns, and says when it fails."""

from __future__ import annotations

import copy
from collections.abc import Callable, Iterator
from itertools import chain
from pathlib import Path

import pytest
import torch
import torch.nn.functional as F
from tiny import SIZE, read, recipe, same_tensors, tiny_model
from torch import Tensor

from cflow_fast import training
from cflow_fast.errors import CFlowFastError, DataError
from cflow_fast.model import CFlowAD
from cflow_fast.recipes import PRESETS, Recipe
from cflow_fast.training import Progress, Trainer

VECTORS = (256, 64)
"""Of an image, at the tiny model's two scales."""


class Loader:
    """Gives images in batches of three and remembers which were asked for."""

    def __init__(self, images: Tensor) -> None:
        self.images = images
        self.asked: list[list[int]] = []

    def __call__(self, indices: list[int]) -> Iterator[Tensor]:
        self.asked.append(indices)
        yield from self.images[indices].split(3)


def train(model: CFlowAD, images: Tensor, recipe: Recipe, seed: int = 0) -> list[Progress]:
    """The progress of every step."""
    steps: list[Progress] = []
    assert Trainer(model, Loader(images), len(images), recipe, seed).run(steps.append)
    return steps


@pytest.fixture
def images(good_paths: list[Path]) -> Tensor:
    return read(good_paths)


@pytest.fixture
def fresh(good_paths: list[Path]) -> CFlowAD:
    return tiny_model()


def test_training_lowers_the_loss_at_every_scale(fresh: CFlowAD, images: Tensor) -> None:
    before = [log_prob.mean().item() for log_prob in fresh.log_probs(images)]
    steps = train(fresh, images, recipe(steps=60, vectors=128))
    after = [log_prob.mean().item() for log_prob in fresh.log_probs(images)]
    assert all(later > earlier + 0.3 for earlier, later in zip(before, after, strict=True))
    assert steps[-1].loss < steps[0].loss - 0.3
    assert not fresh.decoders.training


@pytest.mark.parametrize(
    ("loss", "of_log_prob"), [("likelihood", torch.neg), ("logsigmoid", lambda log_prob: -F.logsigmoid(log_prob))]
)
def test_loss_is_the_mean_over_all_vectors_under_their_own_positions_encoding(
    fresh: CFlowAD, images: Tensor, loss: str, of_log_prob: Callable[[Tensor], Tensor]
) -> None:
    with torch.no_grad():  # let the condition matter
        for decoder in fresh.decoders:
            decoder.blocks[0].subnet[2].weight.mul_(30)  # type: ignore[union-attr, index]
    expected = torch.stack([of_log_prob(log_prob).mean() for log_prob in fresh.log_probs(images)]).mean().item()
    (step,) = train(fresh, images, recipe(steps=1, vectors=10**6, loss=loss))
    assert step.loss == pytest.approx(expected, rel=1e-5)


def test_step_is_adam_at_the_recipes_learning_rate(fresh: CFlowAD, images: Tensor) -> None:
    """Adam's first step moves every parameter that has a gradient by the learning rate."""
    before = torch.nn.utils.parameters_to_vector(fresh.decoders.parameters())
    (step,) = train(fresh, images, recipe(steps=1, learning_rate=1e-3))
    moved = (torch.nn.utils.parameters_to_vector(fresh.decoders.parameters()) - before).abs()
    assert step.learning_rate == pytest.approx(1e-4), "the warm-up begins at a tenth"
    assert moved.max().item() == pytest.approx(1e-4, rel=1e-2)


@pytest.mark.parametrize(
    ("numbers", "count"),
    [
        ({"steps": 5}, 5),
        ({"steps": 5, "epochs": 2, "passes": 3}, 2 * 3 * 5),
        ({"steps": 5, "images": 5}, 3 * 5),  # groups of 5, 5 and 2
        ({"steps": 5, "images": 5, "drop_remainder": True}, 2 * 5),
        ({"steps": None, "vectors": 400}, 8),  # of 12 x 256 vectors
        ({"steps": None, "vectors": 400, "drop_remainder": True}, 7),
        ({"steps": None, "vectors": 400, "images": 5}, 4 + 4 + 2),
        ({"steps": None, "vectors": 400, "images": 5, "drop_remainder": True}, 3 + 3),
        ({"steps": None, "vectors": 10**6, "drop_remainder": True}, 1),  # rather than none
        ({"steps": 2, "images": 100, "drop_remainder": True}, 2),
    ],
)
def test_recipe_says_how_many_steps_there_are(
    fresh: CFlowAD, images: Tensor, numbers: dict[str, int], count: int
) -> None:
    steps = train(fresh, images, recipe(**numbers))
    assert len(steps) == count
    assert [step.done for step in steps] == sorted({step.done for step in steps})
    assert (steps[0].done, steps[-1].done < 1) == (0, True)


def test_learning_rate_warms_up_step_by_step_and_decays_by_epochs(fresh: CFlowAD, images: Tensor) -> None:
    """The published code's schedule over 25 epochs of 2 passes with 2 groups of images each, one step a group."""
    published = recipe(
        learning_rate=2e-4,
        epochs=25,
        passes=2,
        images=6,
        steps=1,
        vectors=8,
        warmup_epochs=2,
        decay_to=0.001,
        decay_every_step=False,
    )
    rates = [step.learning_rate for step in train(fresh, images, published)]
    assert rates == [pytest.approx(PRESETS["cflow-ad"].rate(step / 4)) for step in range(100)]
    assert rates[:3] == [pytest.approx(2e-5), pytest.approx(4.210768e-5), pytest.approx(6.421536e-5)]
    assert rates[-4:] == [pytest.approx(9.877413e-7)] * 4


def test_features_are_computed_once_without_rotation(fresh: CFlowAD, images: Tensor) -> None:
    load = Loader(images)
    Trainer(fresh, load, len(images), recipe(epochs=2, passes=2, images=5)).run()
    assert load.asked == [list(range(12))]


def test_every_pass_shows_every_image_once_in_another_order(fresh: CFlowAD, images: Tensor) -> None:
    load = Loader(images)
    Trainer(fresh, load, len(images), recipe(epochs=2, passes=2, images=5, steps=1, rotation=5.0)).run()
    assert [len(group) for group in load.asked] == [5, 5, 2] * 4
    passes = [list(chain(*load.asked[start : start + 3])) for start in range(0, 12, 3)]
    assert [sorted(order) for order in passes] == [list(range(12))] * 4
    assert len({tuple(order) for order in passes}) == 4


def test_every_image_is_rotated_by_another_angle_in_every_pass(fresh: CFlowAD, monkeypatch: pytest.MonkeyPatch) -> None:
    bar = torch.zeros(1, 3, SIZE, SIZE)
    bar[..., SIZE // 2 - 2 : SIZE // 2 + 2, :] = 1  # as bright at either end: its slope is the angle's tangent
    seen: list[float] = []
    encode = fresh.features

    def measured(images: Tensor) -> list[Tensor]:
        rows = torch.arange(SIZE, dtype=torch.float32).view(1, SIZE)
        left, right = ((images[:, 0, :, column] * rows).sum(1) / images[:, 0, :, column].sum(1) for column in (8, 55))
        seen.extend(((right - left) / (55 - 8)).atan().rad2deg().tolist())
        return encode(images)

    monkeypatch.setattr(fresh, "features", measured)
    Trainer(
        fresh,
        lambda indices: [bar.expand(len(indices), -1, -1, -1)],
        4,
        recipe(epochs=1, passes=10, images=2, steps=1, rotation=5.0),
    ).run()
    assert len({round(angle, 3) for angle in seen}) == len(seen) == 40
    assert min(seen) < -3
    assert 3 < max(seen) < 5.2


def test_runs_are_repeatable_and_depend_on_their_seed(good_paths: list[Path], images: Tensor) -> None:
    models = [tiny_model() for _ in range(3)]
    for model, seed in zip(models, (1, 1, 2), strict=True):
        torch.rand(1)  # the global random state is of no importance
        train(model, images, recipe(images=5, rotation=5.0), seed)
    assert same_tensors(models[0], models[1])
    assert not same_tensors(models[0], models[2])


def test_a_scales_result_does_not_depend_on_the_others(good_paths: list[Path], images: Tensor) -> None:
    both, first = tiny_model(), tiny_model(layers=("layer1",))
    first.decoders[0].load_state_dict(both.decoders[0].state_dict())
    first.encoder.load_state_dict(both.encoder.state_dict(), strict=False)
    for model in (both, first):
        train(model, images, recipe())
    assert same_tensors(both.decoders[0], first.decoders[0])


def test_features_beyond_the_memory_for_them_are_thinned_out_evenly(
    fresh: CFlowAD, images: Tensor, monkeypatch: pytest.MonkeyPatch
) -> None:
    floats = 12 * (VECTORS[0] * 64 + VECTORS[1] * 128)
    monkeypatch.setattr(training, "FEATURE_BYTES", 4 * floats // 4)
    counts: list[int] = []
    for decoder in fresh.decoders:
        decoder.register_forward_hook(lambda module, inputs, output: counts.append(len(inputs[0])))
    train(fresh, images, recipe(steps=1, vectors=10**6))
    assert counts == [12 * VECTORS[0] // 4, 12 * VECTORS[1] // 4]


def test_divergence_is_an_error_that_says_so(fresh: CFlowAD, images: Tensor) -> None:
    with pytest.raises(CFlowFastError, match=r"training diverged: the loss of scale \d is .*lower the learning rate"):
        train(fresh, images, recipe(learning_rate=1e8, steps=30))


def test_image_that_is_not_finite_is_an_error(fresh: CFlowAD, images: Tensor) -> None:
    images[3, 0, 0, 0] = torch.nan
    with pytest.raises(CFlowFastError, match=r"the loss of scale 1 is nan; .* images that are not finite"):
        train(fresh, images, recipe(vectors=10**6))


def test_no_image_is_refused(fresh: CFlowAD) -> None:
    with pytest.raises(DataError, match="no image to train on"):
        Trainer(fresh, lambda indices: [], 0, recipe())


def test_features_of_a_bf16_encoder_can_be_trained_on(images: Tensor) -> None:
    model = tiny_model(encoder_precision="bf16")
    before = copy.deepcopy(model.decoders)
    train(model, images, recipe())
    assert not same_tensors(before, model.decoders)
