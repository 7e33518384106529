"""`bench accuracy` and `bench ablation` on a tiny category, and the paper's figures beside them."""

from __future__ import annotations

import shutil
import statistics
from pathlib import Path
from typing import Any

import click
import pytest
from click.testing import CliRunner, Result
from tiny import recipe

from cflow_fast.bench import accuracy as bench
from cflow_fast.bench import paper
from cflow_fast.bench.ablation import variations
from cflow_fast.bench.baselines import maps
from cflow_fast.bench.results import read_results
from cflow_fast.cli.bench_ablation import ablation
from cflow_fast.cli.bench_accuracy import accuracy
from cflow_fast.datasets import MVTecCategory
from cflow_fast.encoders import Encoder
from cflow_fast.errors import CFlowFastError, DataError, EncoderError

TINY = ("--encoder", "resnet18", "--layers", "layer1,layer2", "--untrained", "--device", "cpu", "--steps", "3")


def run(command: click.Command, *arguments: object) -> Result:
    result = CliRunner().invoke(command, [str(argument) for argument in arguments])
    if result.exception and not isinstance(result.exception, (SystemExit, CFlowFastError)):
        raise result.exception
    return result


def scores(image_auroc: float = 0.9, **others: Any) -> bench.Scores:
    facts = {"pixel_auroc": 0.8, "aupro": 0.7, "fit_seconds": 1.0, "seconds_per_image": 0.5, "model_bytes": 10}
    return bench.Scores(image_auroc, **facts | others)


def setting(**options: Any) -> bench.Setting:
    return bench.Setting("resnet18", recipe(steps=3), 64, ("layer1", "layer2"), pretrained=False, **options)


def test_three_methods_over_two_seeds(category: Path, tmp_path: Path) -> None:
    result = run(accuracy, category, *TINY, "--image-size", 64, "--runs", 2, "--json", tmp_path / "out.json")
    assert result.exit_code == 0
    assert "best epoch on the test set, at an image size chosen for each class" in " ".join(result.output.split())
    rows = {row.contender: row for row in read_results(tmp_path / "out.json").rows}
    assert list(rows) == list(bench.METHODS)
    for name in ("cflow-fast", "padim"):
        assert rows[name].extra["seeds"] == [0, 1]
        assert rows[name].extra["pixel_auroc_deviation"] > 0
    assert rows["spade"].extra["seeds"] == [0]
    assert rows["spade"].extra["image_auroc_deviation"] is None
    assert rows["spade"].extra["neighbour_auroc"] is not None
    for row in rows.values():
        assert row.extra["pixel_auroc"] > 0.9  # the scratches are plain to see
        assert row.images_per_second is not None
        assert row.images_per_second > 0
        assert row.extra["fit_seconds"] > 0
        assert row.axes == {"category": "cloth", "encoder": "resnet18", "size": 64}
        assert f"{100 * row.extra['pixel_auroc']:.2f}" in result.output


def test_a_paper_category_has_the_papers_figures_beside_it(
    category: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    bottle = shutil.copytree(category, tmp_path / "bottle")
    monkeypatch.setattr(bench, "measure", lambda *arguments: scores())
    monkeypatch.setattr("sys.argv", ["/somewhere/bin/cflow-fast", "bench", "accuracy", str(bottle), "--runs", "4"])
    path = tmp_path / "out.json"
    result = run(accuracy, bottle, "--runs", 4, "--device", "cpu", "--json", path)
    text = " ".join(result.output.split())
    assert paper.conditions(["bottle"]) in text
    assert "CFLOW-AD at 512 px (bottle)" in text
    assert all(figure in text for figure in ("98.98", "96.80", "98.30", "94.80", "98.40", "95.50"))
    assert read_results(path).command == "cflow-fast bench accuracy bottle --runs 4"
    assert read_results(path).rows[0].extra["seeds"] == [0, 1, 2, 3]


def test_the_change_since_an_older_file_is_in_metrics_and_times(
    category: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    path = tmp_path / "old.json"
    monkeypatch.setattr("sys.argv", ["cflow-fast", "bench", "accuracy", "cloth", "--steps", "3", "[/bold]"])
    monkeypatch.setattr(bench, "measure", lambda *arguments: scores())
    assert run(accuracy, category, *TINY, "--methods", "padim,spade", "--json", path).exit_code == 0
    better = scores(0.95, aupro=float("nan"), fit_seconds=3.0, seconds_per_image=0.25)
    monkeypatch.setattr(bench, "measure", lambda *arguments: better)
    output = run(accuracy, category, *TINY, "--methods", "padim", "--compare", path).output
    changes = output[output.index("change since the older file") :].splitlines()
    (line,) = [line for line in changes if "padim" in line]
    assert " ".join(line.split()).endswith("padim fp32 95.00 (+5.00) 80.00 (+0.00) - 3.00 2.00")
    assert not any("spade" in line for line in changes)
    assert "cflow-fast bench accuracy cloth --steps 3 '[/bold]'" in " ".join(output.split())


@pytest.mark.parametrize("command", [accuracy, ablation])
def test_an_older_file_that_is_none_is_one_line_before_anything_is_measured(
    command: click.Command, category: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(Encoder, "__init__", lambda *arguments, **options: pytest.fail("an encoder is made"))
    (tmp_path / "old.json").write_text('{"format": 1, "rows": [')
    result = run(command, category, *TINY, "--compare", tmp_path / "old.json")
    assert isinstance(result.exception, CFlowFastError)
    assert "old.json: not a whole results file" in str(result.exception)


def test_means_and_deviations_are_the_samples(category: Path) -> None:
    values = [0.91, 0.95, 0.99]
    row = bench.summary_row("padim", "cloth", setting(), [scores(value) for value in values], [0, 1, 2])
    assert row.extra["image_auroc"] == pytest.approx(0.95)
    assert row.extra["image_auroc_deviation"] == pytest.approx(statistics.stdev(values))
    assert row.extra["pixel_auroc_deviation"] == pytest.approx(0)
    assert row.images_per_second == 2.0
    one = bench.summary_row("padim", "cloth", setting(), [scores(float("nan"))], [0])
    assert one.extra["image_auroc"] is None  # undefined, and no number that JSON does not have


def test_the_same_seed_gives_the_same_scores(category: Path) -> None:
    found = MVTecCategory(category)
    for method in ("cflow-fast", "padim"):
        first, again, other = (bench.measure(method, found, setting(), seed) for seed in (4, 4, 5))
        assert first.pixel_auroc == again.pixel_auroc != other.pixel_auroc


def test_a_test_image_that_cannot_be_read_is_skipped_and_said_once(category: Path, tmp_path: Path) -> None:
    copy = shutil.copytree(category, tmp_path / "cloth")
    (copy / "test/good/002.png").write_bytes(b"no image")
    result = run(accuracy, copy, *TINY, "--image-size", 64, "--runs", 2, "--methods", "padim")
    assert result.exit_code == 0
    assert "1 image(s) were skipped" in result.output
    assert result.stderr.count("skipped cannot read image") == 1


def test_an_interruption_prints_what_there_is(category: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def measure(method: str, *arguments: Any) -> bench.Scores:
        if method == "spade":
            raise KeyboardInterrupt
        return scores()

    monkeypatch.setattr(bench, "measure", measure)
    result = run(accuracy, category, *TINY, "--methods", "padim,spade", "--json", tmp_path / "out.json")
    assert result.exit_code == 130
    assert "90.00" in result.output
    assert "interrupted: this is what was measured until then" in result.output
    stored = read_results(tmp_path / "out.partial.json")
    assert stored.interrupted
    assert [row.contender for row in stored.rows] == ["padim"]
    assert not (tmp_path / "out.json").exists()


def test_an_interruption_before_the_first_row_leaves_an_older_file_as_it_is(
    category: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def measure(*arguments: Any) -> bench.Scores:
        raise KeyboardInterrupt

    monkeypatch.setattr(bench, "measure", measure)
    path = tmp_path / "out.json"
    path.write_text("an older run")
    result = run(accuracy, category, *TINY, "--json", path)
    assert result.exit_code == 130
    assert "nothing was measured" in result.output
    assert path.read_text() == "an older run"


def test_a_method_that_does_not_fit_into_memory_is_a_row_that_says_so(
    category: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(maps, "free_bytes", lambda device: 1000)
    path = tmp_path / "out.json"
    result = run(accuracy, category, *TINY, "--image-size", 64, "--methods", "cflow-fast,padim", "--json", path)
    assert result.exit_code == 0
    first, last = read_results(path).rows
    assert (first.status, last.status) == ("ok", "out of memory")
    assert "PaDiM needs" in last.note
    alone = run(accuracy, category, *TINY, "--image-size", 64, "--methods", "padim", "--json", path)
    assert alone.exit_code == 1, "nothing could be measured"
    assert [row.status for row in read_results(path).rows] == ["out of memory"]


def test_a_data_folder_that_cannot_be_used_is_one_clear_line_before_an_encoder_is_made(
    category: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    made: list[object] = []
    monkeypatch.setattr(Encoder, "__init__", lambda self, *arguments, **options: made.append(arguments))
    without = shutil.copytree(category, tmp_path / "cloth")
    untestable = shutil.copytree(category, tmp_path / "untestable")
    shutil.rmtree(without / "train")
    shutil.rmtree(untestable / "test")
    (tmp_path / "file").write_text("")
    for command in (accuracy, ablation):
        for data, complaint in (
            (tmp_path / "missing", "missing is missing; name a category, laid out as train/good/"),
            (tmp_path / "file", "file is a file, not a folder; name a category"),
            (without, "cloth has no folder train/good"),
            (untestable, "untestable has no folder test"),
        ):
            result = run(command, data, "--device", "cpu", "--json", tmp_path / "out.json")
            assert isinstance(result.exception, DataError), result.output
            assert complaint in str(result.exception)
            assert "\n" not in str(result.exception)
    assert not made
    assert not (tmp_path / "out.json").exists()


def test_wrong_options_are_one_clear_line(category: Path) -> None:
    result = run(accuracy, category, "--encoder", "resnet81", "--untrained", "--device", "cpu")
    assert isinstance(result.exception, EncoderError)
    assert "\n" not in str(result.exception)
    result = run(accuracy, category, *TINY, "--methods", "padim,patchcore")
    assert result.exit_code == 2
    assert "unknown method 'patchcore'; there are cflow-fast, padim, spade" in result.stderr


@pytest.mark.parametrize(
    ("encoder", "options", "complaint"),
    [
        ("resnet18", ("--baseline-layers", "layer1,foo"), "resnet18 has no layer 'foo'; it has conv1, bn1"),
        ("resnet18", ("--baseline-layers", "fc"), "resnet18's fc gives no feature map"),
        ("resnetv2_50", (), "resnetv2_50 has no layer 'layer1'; it has"),  # their papers' taps, in another ResNet
    ],
)
def test_taps_of_the_baselines_are_checked_before_anything_is_trained(
    encoder: str, options: tuple[str, ...], complaint: str, category: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(bench, "measure", lambda *arguments: pytest.fail("it trains"))
    result = run(accuracy, category, "--encoder", encoder, "--untrained", "--device", "cpu", *options)
    assert result.exit_code == 2
    assert f"--baseline-layers: {complaint}" in " ".join(result.stderr.split())


def test_the_papers_figures_average_to_its_abstract() -> None:
    """98.26 and 98.62 AUROC and 94.60 AUPRO, as the paper's averages are."""
    rows = paper.TABLE_3.values()
    assert len(paper.TABLE_3) == 15
    averages = [statistics.fmean(getattr(row.cflow, name) for row in rows) for name in bench.METRICS]
    assert averages == pytest.approx([98.26, 98.62, 94.60], abs=0.01)
    bottle = paper.TABLE_3["bottle"]
    assert bottle.figures("padim", "resnet18") == bottle.padim
    assert bottle.figures("cflow-fast", "resnet18") == paper.Accuracy(100.0, 98.64, None)
    assert bottle.figures("cflow-fast", "wide_resnet50_2") == paper.Accuracy(100.0, 98.98, 96.80)
    assert bottle.figures("patchcore", "wide_resnet50_2") is None


def test_the_papers_taps_are_the_baselines(category: Path) -> None:
    assert bench.baseline_encoder("padim", setting()).layers == ("layer1", "layer2", "layer3")
    assert bench.baseline_encoder("spade", setting()).layers == ("layer1", "layer2", "layer3", "layer4")
    assert bench.baseline_encoder("spade", setting(baseline_layers=("layer2",))).layers == ("layer2",)


def test_an_ablation_changes_one_factor_at_a_time() -> None:
    base = setting()
    found = variations(base, sizes=(64, 32), encoders=("mobilenetv3_large_100",))
    assert [variation.label for variation in found] == [
        "base",
        "coupling layers: 4",
        "pooling layers: 1",
        "image size: 32 px",
        "condition: none",
        "encoder: mobilenetv3_large_100",
    ]
    changed = [
        {name for name in vars(base) if getattr(variation.setting, name) != getattr(base, name)} for variation in found
    ]
    assert changed == [set(), {"coupling_blocks"}, {"layers"}, {"image_size"}, {"condition"}, {"encoder", "layers"}]
    assert found[2].setting.layers == ("layer2",)
