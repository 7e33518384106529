"""The presets' learning rates are the published ones, in literal numbers."""

from __future__ import annotations

import math
from dataclasses import replace
from typing import Any

import pytest

from cflow_fast.recipes import PRESETS, SOFT_PRESETS, Recipe


@pytest.mark.parametrize(
    ("preset", "position", "rate"),
    [
        # warm-up over two epochs, every step, from a tenth to where the cosine then is
        ("paper", 0, 2.0e-5),
        ("paper", 0.5, 6.495072e-5),
        ("paper", 1, 1.099014e-4),
        ("paper", 1.75, 1.773275e-4),
        ("cflow-ad", 0, 2.0e-5),
        ("cflow-ad", 0.5, 6.421536e-5),
        ("cflow-ad", 1, 1.084307e-4),
        ("cflow-ad", 1.75, 1.747538e-4),
        # then a cosine towards a thousandth, a step down at every epoch
        ("paper", 2, 1.998029e-4),
        ("paper", 2.99, 1.998029e-4),
        ("paper", 3, 1.995566e-4),
        ("paper", 50, 1.001000e-4),
        ("paper", 99, 2.492946e-7),
        ("paper", 99.9, 2.492946e-7),
        ("cflow-ad", 2, 1.968615e-4),
        ("cflow-ad", 3.5, 1.929847e-4),
        ("cflow-ad", 12, 1.063728e-4),
        ("cflow-ad", 24.99, 9.877413e-7),
    ],
)
def test_learning_rate_of_the_published_presets(preset: str, position: float, rate: float) -> None:
    assert PRESETS[preset].rate(position) == pytest.approx(rate, rel=1e-6)


def test_learning_rate_of_the_fast_preset_decays_at_every_step() -> None:
    """Linear to the cosine's value at 0.05, where it is within 1% of its top; a hundredth is left at the end."""
    recipe = PRESETS["fast"]
    top = recipe.learning_rate
    assert recipe.rate(0) == pytest.approx(0.1 * top)
    assert recipe.rate(0.025) == pytest.approx((0.1 + 0.993898) / 2 * top, rel=1e-5)
    assert recipe.rate(0.05) == pytest.approx(0.993898 * top, rel=1e-5)
    assert recipe.rate(0.5) == pytest.approx(0.505 * top)
    assert recipe.rate(1) == pytest.approx(0.01 * top)
    rates = [recipe.rate(0.05 + 0.95 * step / 100) for step in range(100)]
    assert rates == sorted(set(rates), reverse=True)


def test_paper_preset_has_the_papers_numbers() -> None:
    recipe = PRESETS["paper"]
    assert (recipe.learning_rate, recipe.epochs, recipe.images, recipe.vectors) == (2e-4, 100, 32, 8192)
    assert (recipe.warmup_epochs, recipe.rotation, recipe.loss) == (2, 5.0, "likelihood")
    assert not recipe.drop_remainder


def test_cflow_ad_preset_has_the_published_codes_numbers() -> None:
    recipe = PRESETS["cflow-ad"]
    assert (recipe.learning_rate, recipe.epochs, recipe.passes) == (2e-4, 25, 8)
    assert (recipe.images, recipe.vectors, recipe.drop_remainder) == (32, 256, True)
    assert (recipe.warmup_from, recipe.decay_to, recipe.rotation, recipe.loss) == (0.1, 0.001, 0.0, "logsigmoid")


def test_published_presets_train_soft_permutations() -> None:
    assert {"paper", "cflow-ad"} == SOFT_PRESETS


def test_run_without_warm_up_starts_at_its_highest() -> None:
    recipe = replace(PRESETS["paper"], warmup_epochs=0)
    assert recipe.rate(0) == recipe.learning_rate
    assert recipe.rate(1) < recipe.learning_rate


@pytest.mark.parametrize(
    ("number", "value", "words"),
    [
        ("learning_rate", 0.0, "learning_rate is positive, got 0.0"),
        ("learning_rate", math.nan, "learning_rate is positive, got nan"),
        ("epochs", 0, "epochs is positive, got 0"),
        ("passes", -1, "passes is positive, got -1"),
        ("images", 0, "images is positive, got 0"),
        ("vectors", 0, "vectors is positive, got 0"),
        ("steps", 0, "steps is positive, got 0"),
        ("warmup_epochs", -0.5, "warmup_epochs is not negative, got -0.5"),
        ("rotation", -5.0, "rotation is not negative, got -5.0"),
        ("decay_to", math.nan, "decay_to is not negative, got nan"),
        ("loss", "l1", "loss is one of likelihood, logsigmoid, got 'l1'"),
    ],
)
def test_impossible_number_is_refused_by_name(number: str, value: Any, words: str) -> None:
    with pytest.raises(ValueError, match=words):
        replace(PRESETS["fast"], **{number: value})


def test_images_and_steps_may_be_left_open() -> None:
    assert isinstance(replace(PRESETS["fast"], images=None, steps=None), Recipe)
