"""Counted sizes against the paper's and against real modules; what `bench complexity` prints and stores."""

from __future__ import annotations

import inspect
import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from click.testing import CliRunner, Result
from torch.utils.flop_counter import FlopCounterMode

from cflow_fast.bench import complexity as bench
from cflow_fast.bench import cost_formulas, counting, paper
from cflow_fast.bench.baselines import maps
from cflow_fast.bench.measurement import Effort
from cflow_fast.bench.results import Row, read_results
from cflow_fast.cli.bench_complexity import complexity
from cflow_fast.decoder import FlowDecoder
from cflow_fast.encoders import Encoder
from cflow_fast.errors import CFlowFastError, EncoderError
from cflow_fast.model import CFlowAD
from cflow_fast.precision import multiplies_bf16

CPU = torch.device("cpu")
PRECISIONS = ["fp32", "bf16"] if multiplies_bf16(CPU) else ["fp32"]
OURS = ["cflow-fast"] * len(PRECISIONS)
QUICK = Effort(seconds=0.1, least_rounds=1)


def run(*arguments: object) -> Result:
    result = CliRunner().invoke(complexity, [*(str(argument) for argument in arguments), "--device", "cpu"])
    if result.exception and not isinstance(result.exception, (SystemExit, CFlowFastError)):
        raise result.exception
    return result


@pytest.mark.parametrize(
    ("encoder", "megabytes"), [("wide_resnet50_2", 947), ("resnet18", 96), ("mobilenetv3_large_100", 25)]
)
def test_the_reference_weighs_what_the_paper_says(encoder: str, megabytes: int) -> None:
    counted = counting.encoder_bytes(encoder) + counting.reference_bytes(bench.PAPER_SCALES[encoder])
    assert round(counted / counting.MEGABYTE) == megabytes == paper.TABLE_6["cflow", encoder].megabytes_mvtec
    alone = paper.TABLE_6["encoder", encoder].megabytes_mvtec
    assert round(counting.encoder_bytes(encoder) / counting.MEGABYTE) == alone


def test_padims_and_spades_sizes_are_the_papers_within_three_percent() -> None:
    rows = [row for row in bench.size_rows(["resnet18", "wide_resnet50_2"], CPU) if row.contender in ("padim", "spade")]
    published = [row for row in rows if row.extra["paper_megabytes"] is not None]
    assert len(published) == 6
    for row in published:
        either = (row.extra["megabytes"], row.extra["megabytes_with_encoder"])
        assert any(counted == pytest.approx(row.extra["paper_megabytes"], rel=0.03) for counted in either), row


@pytest.mark.parametrize("permute_soft", [False, True])
@pytest.mark.parametrize(("features", "condition"), [(40, 128), (41, 16), (64, 0)])
def test_the_formula_counts_freias_own_modules(features: int, condition: int, permute_soft: bool) -> None:
    framework = pytest.importorskip("FrEIA.framework", reason="needs FrEIA: pip install FrEIA==0.2")
    modules = pytest.importorskip("FrEIA.modules")

    def subnet(inputs: int, outputs: int) -> torch.nn.Module:
        layers = torch.nn.Linear(inputs, 2 * inputs), torch.nn.ReLU(), torch.nn.Linear(2 * inputs, outputs)
        return torch.nn.Sequential(*layers)

    sequence = framework.SequenceINN(features)
    for _ in range(2):
        sequence.append(
            modules.AllInOneBlock,
            **({"cond": 0, "cond_shape": (condition,)} if condition else {}),
            subnet_constructor=subnet,
            affine_clamping=1.9,
            global_affine_type="SOFTPLUS",
            permute_soft=permute_soft,
        )
    state = sequence.state_dict()
    assert any(key.endswith("w_perm_inv") for key in state)
    stored = sum(tensor.numel() for tensor in state.values())
    assert counting.reference_floats(features, condition, blocks=2) == stored


@pytest.mark.parametrize("permute_soft", [False, True])
def test_our_decoders_weigh_what_is_counted(permute_soft: bool) -> None:
    decoders = [FlowDecoder(d, 16, 2, permute_soft=permute_soft) for d in (24, 33)]
    stored = sum(t.numel() * t.element_size() for decoder in decoders for t in decoder.state_dict().values())
    assert counting.decoder_bytes((24, 33), permute_soft, 16, 2) == stored


def test_encoders_weigh_what_is_counted() -> None:
    encoder = Encoder("resnet18", ("layer4",), pretrained=False)
    kept = dict(encoder.network.state_dict().items())
    assert counting.encoder_bytes("resnet18") == sum(t.numel() * t.element_size() for t in kept.values())


def test_decoder_flop_is_what_pytorch_counts() -> None:
    decoder = FlowDecoder(24, 16, 3, permute_soft=True)
    with FlopCounterMode(display=False) as counter, torch.no_grad():
        decoder.log_prob(torch.randn(1, 24, 5, 7))
    assert counting.decoder_flop([24], [35], 16, 3) == counter.get_total_flops()


def test_spades_cost_grows_with_the_square_of_its_positions_and_padims_with_their_number() -> None:
    small, large = (
        {cost.contender: cost for cost in cost_formulas.costs("resnet18", size, images=10)} for size in (64, 128)
    )
    growth = {}
    for method in ("padim", "spade"):
        own = [costs[method].test_flop - costs["spade"].train_flop for costs in (small, large)]  # without the encoder
        growth[method] = own[1] / own[0]
    assert growth == {"padim": pytest.approx(4), "spade": pytest.approx(16)}
    assert large["padim"].memory_bytes == 4 * small["padim"].memory_bytes
    assert large["cflow-fast"].memory_bytes == small["cflow-fast"].memory_bytes


def test_speeds_are_measured_for_every_method() -> None:
    rows = list(bench.speed_rows("resnet18", 64, CPU, effort=QUICK))
    assert [row.contender for row in rows] == ["encoder", "freia", *OURS, "padim", "spade"]
    assert [row.precision for row in rows if row.contender == "cflow-fast"] == PRECISIONS
    for row in rows:
        assert row.status == "ok"
        assert row.seconds is not None
        assert row.images_per_second == pytest.approx(1 / row.seconds.median)
        assert row.extra["paper_fps"] is None  # there are none at 64 px
    assert paper.TABLE_6["cflow", "wide_resnet50_2"].fps(256) == 27


def test_the_encoder_computes_in_the_rows_precision(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(bench, "resolve_precision", lambda precision, device: "bf16")
    seen = []
    with_precision = bench._with_precision

    def noted(model: CFlowAD, precision: str, images: torch.Tensor) -> Callable[[], torch.Tensor]:
        run = with_precision(model, precision, images)
        other = inspect.getclosurevars(run).nonlocals["other"]
        seen.append((precision, other.precision, other.encoder_precision))
        return run

    monkeypatch.setattr(bench, "_with_precision", noted)
    list(bench._cflow_speeds("resnet18", 64, torch.zeros(1, 3, 64, 64)))
    assert seen == [("fp32", "fp32", "fp32"), ("bf16", "bf16", "bf16")]


def test_slow_methods_do_not_take_rounds_from_the_others(monkeypatch: pytest.MonkeyPatch) -> None:
    together: list[int] = []
    turns = bench.take_turns

    def noted(tracks: Any, *arguments: Any, **options: Any) -> None:
        together.append(len(tracks))
        turns(tracks, *arguments, **options)

    monkeypatch.setattr(bench, "take_turns", noted)
    rows = list(bench.speed_rows("resnet18", 64, CPU, effort=QUICK))
    assert together == [len(rows) - 1, 1]


def test_what_takes_too_long_or_too_much_is_a_row_that_says_so(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(bench, "LONGEST_CALL", 0.0)
    monkeypatch.setattr(maps, "free_bytes", lambda device: 1000)
    rows = {row.contender: row for row in bench.speed_rows("resnet18", 64, CPU, effort=QUICK)}
    assert rows["padim"].status == "out of memory"
    assert "PaDiM needs" in rows["padim"].note
    assert rows["spade"].status == "not available"
    assert "not measured" in rows["spade"].note
    assert rows["spade"].seconds is None
    assert rows["encoder"].status == "ok"


def test_an_interruption_keeps_the_rounds_that_were_finished(monkeypatch: pytest.MonkeyPatch) -> None:
    def interrupt(share: float, spread: float) -> None:
        raise KeyboardInterrupt

    rows: list[Row] = []
    with pytest.raises(KeyboardInterrupt):
        rows.extend(bench.speed_rows("mobilenetv3_large_100", 64, CPU, effort=QUICK, on_round=interrupt))
    assert [row.contender for row in rows] == ["encoder", "freia", *OURS]
    assert all(row.seconds is not None and row.seconds.rounds == 1 for row in rows)


def test_an_interrupted_run_is_stored_beside_a_whole_one(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def interrupt(*arguments: object) -> None:
        raise KeyboardInterrupt

    monkeypatch.setattr(bench, "speed_rows", interrupt)
    result = run("--encoder", "resnet18", "--size", 64, "--json", tmp_path / "out.json")
    assert result.exit_code == 130
    assert read_results(tmp_path / "out.partial.json").interrupted
    assert not (tmp_path / "out.json").exists()


def test_the_tables_have_the_papers_figures_beside_ours(tmp_path: Path) -> None:
    result = run("--encoder", "resnet18", "--no-speed", "--size", 64, "--json", tmp_path / "out.json", "--seed", 5)
    assert result.exit_code == 0
    lines = {" ".join(line.split()) for line in result.output.splitlines()}
    assert any(line.startswith("resnet18: encoder only 44.7") and line.endswith("45") for line in lines)
    assert any("96.2" in line and line.endswith("96") for line in lines)
    assert "E + K P_1^2 sum_k D_k" in result.output
    assert "the paper's own formulas: not found" in " ".join(result.output.split()).lower()
    stored = read_results(tmp_path / "out.json")
    assert stored.seed == 5
    assert {row.bench for row in stored.rows} == {"complexity"}
    assert {row.extra["table"] for row in stored.rows} == {1, 6}
    names = [row.case.removeprefix("size, ") for row in stored.rows if row.extra["table"] == 6]
    assert all(any(name in line for line in lines) for name in names), "a model's name stands in one line"
    assert len({row.key for row in stored.rows}) == len(stored.rows)


def test_the_change_since_an_older_file_is_in_bytes_and_times(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path = tmp_path / "old.json"
    command = ("--encoder", "mobilenetv3_large_100", "--size", 64, "--seconds", 0.1)
    assert run(*command, "--json", path).exit_code == 0
    facts = json.loads(path.read_text())
    for row in facts["rows"]:
        row["model_bytes"] *= 4
        if row["seconds"]:
            row["seconds"]["median"] = 1e6
    path.write_text(json.dumps(facts))
    output = run(*command, "--compare", path).output
    counted, timed = output.split("change since the older file")[1:]
    sizes = [line for line in counted.splitlines() if line.strip().endswith(" 0.25")]
    assert len(sizes) == len([row for row in facts["rows"] if not row["seconds"]])
    assert "size, new / old" in counted
    assert "time, new / old" in timed
    assert timed.count(" 0.00 ") == len([row for row in facts["rows"] if row["seconds"]])
    (alone,) = run(*command, "--no-speed", "--compare", path).output.split("change since the older file")[1:]
    assert "size, new / old" in alone


def test_an_unknown_encoder_and_a_folder_in_the_files_place_are_one_clear_line(tmp_path: Path) -> None:
    result = run("--encoder", "resnet81", "--no-speed")
    assert isinstance(result.exception, EncoderError)
    assert "no encoder 'resnet81' in timm: did you mean" in str(result.exception)
    far = run("--encoder", "nosuch", "--no-speed")
    assert "no encoder 'nosuch' in timm: this package is tested with wide_resnet50_2, resnet18" in str(far.exception)
    result = run("--no-speed", "--json", tmp_path)
    assert result.exit_code == 2
    assert "is a directory" in result.output
