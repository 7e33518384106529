"""The benchmark's report: every number on the page, every mark where its value is, nothing dropped or from outside."""

from __future__ import annotations

import json
import math
import re
from dataclasses import replace
from pathlib import Path

import pytest
from click.testing import CliRunner
from report_page import Drawing, Page
from report_results import CPU, GPU, row, run, timed

from cflow_fast import kernels
from cflow_fast.bench import paper
from cflow_fast.bench.report import load, report, throughput_figure
from cflow_fast.bench.report.data import Source, measured
from cflow_fast.bench.report.tables import table_sections
from cflow_fast.bench.results import FORMAT, Results, Row, Speedup, write_results
from cflow_fast.cli.bench_report import report as report_command
from cflow_fast.errors import CFlowFastError
from cflow_fast.files import write_text


def _page(*results: Results) -> Page:
    return Page(report([Source(f"run{i}.json", r) for i, r in enumerate(results)]))


def _full() -> list[Results]:
    """Two devices, several contenders and precisions, one contender not installed and one that failed parity."""
    rows = [
        timed(contender, precision, batch, 40.0 * speed * batch / (batch + 1), device)
        for device in ("cpu", "cuda")
        for batch in (1, 8, 32)
        for contender, precision, speed in (
            ("cflow-fast", "fp32", 1.5),
            ("cflow-fast", "bf16", 4.0),
            ("freia", "fp32", 1.0),
            ("freia-compile", "fp32", 1.1),
        )
    ]
    rows.append(row("anomalib", "fp32", 1, "cpu", status="not installed", note="anomalib is not installed"))
    wrong = timed("freia", "bf16", 1, 987.0, "cpu")
    rows.append(replace(wrong, status="parity failed", parity=False, note="maximum is 1.2, over 0.01"))
    sweep = [timed("cflow-fast", "fp32", n, 10.0, "cpu") for n in (1, 2, 4, 8)]
    scaling = [replace(r, bench="scaling", axes={"axis": "rows", "rows": 64 * 2**i}) for i, r in enumerate(sweep)]
    return [
        run([r for r in rows if r.device == "cpu"] + scaling, CPU),
        run([r for r in rows if r.device == "cuda"], GPU),
    ]


def test_every_number_is_on_the_page() -> None:
    results = _full()
    text = _page(*results).text
    for one in (r for result in results for r in result.rows if r.status == "ok" and r.bench == "decoder"):
        assert one.seconds is not None
        assert one.images_per_second is not None
        assert one.share_of_peak is not None
        assert f"{one.images_per_second:.3g}" in text.replace(",", "")
        assert f"{1e3 * one.seconds.median:.3g}" in text.replace(",", "")
        assert f"{100 * one.share_of_peak:.0f}%" in text or f"{100 * one.share_of_peak:.1f}%" in text
        if one.speedup:
            assert f"{one.speedup.median:.2f}x" in text
            assert f"[{one.speedup.low:.2f}, {one.speedup.high:.2f}]" in text
    for name in (
        "Xeon Test, 2 threads",
        "NVIDIA Test",
        "cflow-fast bench decoder --json FILE",
        "0123456789ab",
        "torch 2.9",
    ):
        assert name in text


def test_a_row_that_is_not_ok_is_listed_with_its_reason_and_never_drawn() -> None:
    page = _page(*_full())
    assert "anomalib is not installed" in page.sections["not-compared"]
    assert "maximum is 1.2, over 0.01" in page.sections["not-compared"]
    assert "987" not in page.text
    assert not any("freia bf16" in label for d in page.drawings for label in d.labels)


def test_a_result_without_status_that_failed_parity_is_not_compared_either() -> None:
    wrong = replace(timed("cflow-fast", "fp32", 1, 50.0, "cpu", 3.0), parity=False, error_max=1.31)
    page = _page(run([wrong, timed("freia", "fp32", 1, 20.0, "cpu")], CPU))
    assert "largest error of log p / D 1.3 against float64" in page.sections["not-compared"]
    assert "3.00x" not in page.text


def test_a_doubled_throughput_is_drawn_at_the_place_its_axis_gives_it() -> None:
    rows = [timed("cflow-fast", "fp32", batch, 100.0 * batch, "cpu") for batch in (1, 2, 4)]
    drawing = _page(run(rows, CPU)).drawing("throughput")
    marks = sorted(drawing.marks_of("s0"))[:3]
    (x1, y1), (x2, y2), (x4, y4) = marks
    assert x2 - x1 == pytest.approx(x4 - x2, abs=0.1)
    assert y1 - y2 == pytest.approx(y2 - y4, abs=0.1)
    assert y1 > y2
    for value, y in ((100.0, y1), (200.0, y2), (400.0, y4)):
        assert y == pytest.approx(drawing.height_of(value), abs=0.3)


def test_a_speed_up_stands_on_a_logarithmic_axis_with_its_interval_around_it() -> None:
    rows = [timed("cflow-fast", "fp32", 1, 80.0, "cpu", 2.0), timed("cflow-fast", "bf16", 1, 160.0, "cpu", 4.0)]
    drawing = _page(run(rows, CPU)).drawing("speed-up")
    (two, _), (four, _) = sorted(drawing.marks_of("s0"))
    one = drawing.place_of(1.0)
    assert two - one == pytest.approx(four - two, abs=0.3)
    low, high = drawing.whiskers[0]
    assert (two - low) / (four - two) == pytest.approx(math.log(2 / 1.9) / math.log(2), abs=0.01)
    assert (high - two) / (four - two) == pytest.approx(math.log(2.2 / 2) / math.log(2), abs=0.01)


def test_a_share_of_the_peak_is_a_bar_in_proportion() -> None:
    rows = [replace(timed("freia", "fp32", b, 10.0, "cpu"), share_of_peak=share) for b, share in ((1, 0.25), (8, 0.5))]
    (x1, first), (x2, second) = _page(run(rows, CPU)).drawing("share-of-peak").bars
    assert x1 == x2
    assert second == pytest.approx(2 * first, abs=0.2)


def test_plots_without_rows_are_absent() -> None:
    plain = replace(timed("freia", "fp32", 1, 10.0, "cpu"), tflops=None, share_of_peak=None, speedup=None)
    page = _page(run([plain], CPU))
    assert set(page.sections) == {"throughput", "latency", "cost", "machines"}
    assert len(page.drawings) == 2
    assert page.headings[0] == "What cflow-fast bench measured"


def test_devices_stand_side_by_side_and_never_in_one_plot() -> None:
    page = _page(*_full())
    for anchor in ("speed-up", "throughput", "latency", "share-of-peak", "roofline"):
        places = [d.place for d in page.drawings if d.section == anchor]
        assert set(places) == {"Xeon Test, 2 threads", "NVIDIA Test"}
        assert places.count("NVIDIA Test") == places.count("Xeon Test, 2 threads")


def test_the_headline_counts_only_what_passed_parity() -> None:
    rows = [timed("cflow-fast", "fp32", 1, 80.0, "cpu", 2.0), timed("cflow-fast", "fp32", 8, 80.0, "cpu", 3.0)]
    unchecked = replace(timed("cflow-fast", "bf16", 1, 80.0, "cpu", 9.0), parity=None)
    page = _page(run([*rows, unchecked, timed("freia", "fp32", 1, 40.0, "cpu")], CPU))
    assert page.headings[0] == "cflow-fast decodes 2.00 to 3.00 times as fast as freia, both fp32"
    assert "cflow-fast is the fastest in 1 of 1" in page.sections["fastest"]
    assert "2.00x" in page.sections["fastest"]


def test_the_headline_compares_like_with_like() -> None:
    over_fp32 = timed("cflow-fast", "bf16", 1, 80.0, "cpu", 9.0)
    fp32 = [timed("cflow-fast", "fp32", batch, 80.0, "cpu", 1.0 + batch) for batch in (1, 2)]
    page = _page(run([over_fp32, *fp32], CPU))
    assert page.headings[0] == "cflow-fast decodes 2.00 to 3.00 times as fast as freia, both fp32"
    assert "9.00x bf16 against fp32" in " ".join(page.text.split())
    over_bf16 = {"freia bf16": {"against": "freia bf16", "median": 1.5, "low": 1.4, "high": 1.6}}
    both = replace(over_fp32, extra={"speedups": over_bf16})
    heading = _page(run([both, *fp32], CPU)).headings[0]
    assert heading == "cflow-fast decodes 1.50 to 3.00 times as fast as freia, both bf16 or both fp32"


def test_the_headline_says_so_where_only_unequal_precisions_were_measured() -> None:
    rows = [timed("cflow-fast", "bf16", batch, 80.0, "cpu", 3.0 * batch) for batch in (1, 2)]
    (heading,) = _page(run(rows, CPU)).headings
    assert heading == "cflow-fast decodes 3.00 to 6.00 times as fast as freia, bf16 against fp32"
    tf32 = replace(timed("cflow-fast", "bf16", 1, 80.0, "cpu", 2.0), precision="tf32")
    (heading,) = _page(run([*rows, tf32], CPU)).headings
    assert heading.endswith("freia, bf16 against fp32; 2.00 times as fast as freia, tf32 against fp32")


def test_who_is_fastest_may_be_another() -> None:
    rows = [timed("cflow-fast", "fp32", 1, 80.0, "cpu", 0.8), timed("freia", "fp32", 1, 100.0, "cpu")]
    page = _page(run(rows, CPU))
    assert page.headings[0] == "cflow-fast decodes 0.80 times as fast as freia, both fp32"
    assert "cflow-fast is the fastest in 0 of 1" in page.sections["fastest"]


def test_a_headline_of_many_cases_has_their_median_and_of_many_devices_their_number() -> None:
    rows = [timed("cflow-fast", "fp32", 2**n, 80.0, "cpu", ratio) for n, ratio in enumerate((2.0, 3.0, 5.0, 90.0))]
    (heading,) = _page(run(rows, CPU)).headings
    assert heading == "cflow-fast decodes 4.00 times (the median of 4 cases, 2.00 to 90.00) as fast as freia, both fp32"
    on_card = [timed("cflow-fast", "fp32", 1, 80.0, "cuda", 7.0)]
    (heading,) = _page(run(rows, CPU), run(on_card, GPU)).headings
    assert heading.endswith("(the median of 5 cases, 2.00 to 90.00) as fast as freia, both fp32, on 2 devices")


def test_the_fastest_stands_beside_a_rival_with_the_ratio_of_their_turns() -> None:
    speedups = {"freia fp32": {"against": "freia fp32", "median": 1.9, "low": 1.8, "high": 2.0}}
    ours = replace(timed("cflow-fast", "bf16", 1, 80.0, "cpu"), extra={"speedups": speedups})
    plain, rival = timed("cflow-fast-plain", "bf16", 1, 70.0, "cpu"), timed("freia", "fp32", 1, 40.0, "cpu")
    text = " ".join(_page(run([ours, plain, rival], CPU)).sections["fastest"].split())
    assert "1.90x" in text
    assert "cflow-fast-plain" not in text
    without = replace(ours, extra={})
    assert "2.00x" in _page(run([without, rival], CPU)).sections["fastest"]


def test_times_of_two_runs_make_no_ratio() -> None:
    ours, rival = timed("cflow-fast", "fp32", 1, 80.0, "cpu"), timed("freia", "fp32", 1, 40.0, "cpu")
    text = _page(run([ours], CPU), run([rival], CPU)).sections["fastest"]
    assert "freia fp32" in text
    assert "2.00x" not in text


def test_ours_is_compared_with_every_contender_in_its_own_precision_where_there_is_one() -> None:
    others = {
        name: {"against": name, "median": ratio, "low": ratio * 0.9, "high": ratio * 1.1}
        for name, ratio in (
            ("freia fp32", 2.0),
            ("freia bf16", 1.5),
            ("cflow-ad-loop fp32", 7.0),
            ("cflow-fast fp32", 1.2),
        )
    }
    bf16 = replace(timed("cflow-fast", "bf16", 1, 80.0, "cpu", 2.0), extra={"speedups": others})
    text = _page(run([bf16], CPU)).sections["speed-up"]
    assert all(ratio in text for ratio in ("2.00x", "1.50x", "7.00x"))
    assert "1.20x" not in text
    fp32 = replace(timed("cflow-fast", "fp32", 1, 80.0, "cpu", 1.1), extra={"speedups": others})
    assert "1.50x" not in _page(run([fp32], CPU)).sections["speed-up"]


def test_this_package_within_anothers_program_is_no_rival() -> None:
    speedups = {
        f"{name} fp32": {"against": f"{name} fp32", "median": ratio, "low": ratio, "high": ratio}
        for name, ratio in (("freia", 2.0), ("accelerated", 1.29), ("anomalib-accelerated", 1.31))
    }
    ours = replace(timed("cflow-fast", "fp32", 1, 80.0, "cpu"), extra={"speedups": speedups})
    page = _page(run([ours, timed("accelerated", "fp32", 1, 70.0, "cpu", 1.55)], CPU))
    assert "against accelerated" not in page.text
    assert "against freia" in page.text
    assert "1.55x" in page.sections["speed-up"], "over FrEIA it is what one line brings"
    assert "1.29x" not in page.text
    assert "1.31x" not in page.text


def test_scaling_gives_the_exponent_of_the_axis() -> None:
    rows = [
        replace(
            timed("freia", "fp32", 1, 100.0 / n**1.5, "cpu"),
            bench="scaling",
            axes={"encoder": "one", "axis": "D", "D": n},
        )
        for n in (16, 64, 256)
    ]
    page = _page(run(rows, CPU))
    assert "freia fp32: 1.50" in page.drawing("scaling").labels
    assert "Time against features D: one" in page.text


def test_the_paper_s_figure_has_its_own_mark_beside_ours_and_stands_where_ours_was_not_measured() -> None:
    ours = row("cflow-fast", "fp32", 1, "cpu", images_per_second=54.0, extra={"table": 6, "paper_fps": 27.0})
    failed = row("padim", "fp32", 1, "cpu", status="out of memory", note="5 GB", extra={"table": 6, "paper_fps": 4.4})
    drawing = _page(run([replace(r, bench="complexity") for r in (ours, failed)], CPU)).drawing("paper-speed")
    (own,), papers = drawing.marks_of("s0"), drawing.marks_of("paper")
    assert len(papers) == 2
    assert "54.0 (27.0)" in drawing.labels
    assert "not measured (4.40)" in drawing.labels
    octave = drawing.place_of(20.0) - drawing.place_of(10.0)
    assert own[0] - max(papers)[0] == pytest.approx(octave, abs=0.3)


def _accuracy(contender: str, encoder: str, category: str = "bottle") -> Row:
    measured = {"image_auroc": 0.9812, "image_auroc_deviation": 0.0034, "pixel_auroc": 0.975, "aupro": None}
    axes: dict[str, str | int | float | bool] = {"category": category, "encoder": encoder, "size": 256}
    plain = row(contender, "fp32", 1, "cpu", extra=measured)
    return replace(plain, bench="accuracy", axes=axes, case=f"{category}, {encoder}, 256 px")


def test_accuracy_stands_beside_the_paper_s() -> None:
    text = _page(run([_accuracy("cflow-fast", "wide_resnet50_2")], CPU)).sections["accuracy"]
    for expected in ("0.9812 ± 0.0034", "0.975", "1.0000", "0.9898", "0.9680", "not measured: AUPRO"):
        assert expected in text


@pytest.mark.parametrize(
    ("contender", "encoder", "figures"),
    [
        ("cflow-fast", "wide_resnet50_2", ["1.0000", "0.9898", "0.9680"]),
        ("cflow-fast", "resnet18", ["1.0000", "0.9864", "not found"]),
        ("padim", "resnet18", ["not found", "0.9830", "0.9480"]),
        ("patchcore", "wide_resnet50_2", ["not found"] * 3),
    ],
)
def test_the_paper_s_accuracy_is_that_of_the_row_s_method_and_encoder(
    contender: str, encoder: str, figures: list[str]
) -> None:
    (section,) = table_sections(measured([Source("a.json", run([_accuracy(contender, encoder)], CPU))])[0])
    (table,) = section.tables
    (line,) = table.rows
    assert [cell for name, cell in zip(table.head, line, strict=True) if name.startswith("paper ")] == figures


def test_accuracy_says_of_the_paper_s_figures_what_the_command_says() -> None:
    rows = [_accuracy("cflow-fast", "resnet18", category) for category in ("bottle", "zipper")]
    text = " ".join(_page(run(rows, CPU)).sections["accuracy"].split())
    assert paper.BEST_EPOCH in text
    assert paper.conditions(["bottle", "zipper"])[1:] in text
    assert "with WideResNet-50, but CFLOW-AD's with ResNet-18 beside ResNet-18" in text
    assert "512 px (bottle), 512 px (zipper)" in text
    elsewhere = _page(run([_accuracy("cflow-fast", "resnet18", "cloth")], CPU)).sections["accuracy"]
    assert "The paper's figures: not found for this category." in elsewhere


def test_stages_stand_one_after_the_other_up_to_the_whole() -> None:
    parts = {"read": 2.0, "encode": 5.0, "map": 2.5, "total": 10.0}
    rows = [
        replace(
            timed("cflow-fast", "fp32", 1, 1.0, "cpu"), bench="stages", axes={"stage": name}, case=name, extra=extra
        )
        for name, extra in ((n, {"milliseconds_per_image": ms, "share": ms / 10}) for n, ms in parts.items())
    ]
    page = _page(run(rows, CPU))
    (read, wide), (encode, wider), (last, width), (whole, full) = page.drawing("stages").bars
    assert whole == read
    assert encode == pytest.approx(read + wide, abs=0.2)
    assert last == pytest.approx(encode + wider, abs=0.2)
    assert last + width - read == pytest.approx(0.95 * full, abs=0.3)
    assert "the stages add up to 95% of the total" in page.text


def test_a_later_run_on_the_same_device_takes_the_place_of_an_earlier_one_and_says_so() -> None:
    old = replace(run([timed("freia", "fp32", 1, 137.0, "cpu")], CPU), created="2026-01-01T00:00:00+00:00")
    new = replace(run([timed("freia", "fp32", 1, 251.0, "cpu")], CPU), created="2026-01-02T00:00:00+00:00")
    text = _page(new, old).text
    assert "251" in text
    assert "137" not in text
    assert "1 measurement of run1.json left out" in text


def test_an_interrupted_run_says_so_and_takes_no_whole_runs_place() -> None:
    whole = replace(run([timed("freia", "fp32", 1, 137.0, "cpu")], CPU), created="2026-01-01T00:00:00+00:00")
    rows = [timed("freia", "fp32", batch, rate, "cpu") for batch, rate in ((1, 251.0), (2, 433.0))]
    part = replace(run(rows, CPU), interrupted=True)
    assert part.created > whole.created
    page = _page(whole, part)
    assert "137" in page.text
    assert "433" in page.text
    assert "251" not in page.text
    assert "1 measurement of run1.json left out" in page.text
    assert page.sections["machines"].count("interrupted") == 1
    assert "run1.json · 2026-01-02 03:04 · interrupted before its end" in page.text
    assert "interrupted" not in _page(whole).text


def test_what_was_not_measured_is_written() -> None:
    rows = [timed("freia", "fp32", 1, 10.0, "cpu"), replace(timed("freia", "bf16", 1, 10.0, "cpu"), model_bytes=None)]
    without_peaks = replace(run(rows, CPU), peak_flops={})
    page = _page(without_peaks)
    assert "not measured" in page.sections["cost"]
    assert "measured matrix rate not measured" in " ".join(page.sections["machines"].split())


def test_text_from_files_is_escaped() -> None:
    evil = "<script>alert('&\"')</script>"
    hostile = replace(timed("freia", "fp32", 1, 10.0, "cpu", 2.0), contender=evil, case=evil, axes={evil: evil})
    hostile = replace(hostile, speedup=Speedup(evil, 2.0, 1.9, 2.1), extra={evil: evil})
    failed = replace(hostile, precision=evil, status="failed", note=evil)
    ablation = replace(hostile, bench="ablation")
    machine = {"cpu": evil, evil: evil}
    results = replace(run([hostile, failed, ablation], machine), command=evil, commit=evil, versions={evil: evil})
    page = Page(report([Source(evil, results)]))
    assert "script" not in page.tags
    assert evil in page.text
    assert "<script" not in page.source


def test_the_page_is_whole_and_asks_for_nothing_from_outside() -> None:
    page = _page(*_full())
    assert not re.search(r"https?:|//|@import|url\(", page.source)
    assert page.tags.isdisjoint({"script", "link", "iframe", "object", "img"})
    assert {link.lstrip("#") for link in page.links} <= set(page.sections)
    assert all(d.title for d in page.drawings)


def test_colours_are_not_the_only_difference_between_series() -> None:
    drawing = next(d for d in _page(*_full()).drawings if d.section == "throughput" and d.place == "NVIDIA Test")
    looks = drawing.looks
    assert len(looks) == len(set(looks)) == 4
    assert len({(shape, is_hollow) for shape, is_hollow, _ in looks}) == 4


def test_files_that_cannot_be_read_are_named_and_left_out(tmp_path: Path) -> None:
    write_results(tmp_path / "good.json", _full()[0])
    (tmp_path / "cut.json").write_text((tmp_path / "good.json").read_text()[:100])
    (tmp_path / "empty.json").write_bytes(b"")
    (tmp_path / "old.json").write_text(f'{{"format": {FORMAT + 1}, "rows": []}}')
    (tmp_path / "note.txt").write_text("no results")
    result = CliRunner().invoke(report_command, [str(tmp_path), "-o", str(tmp_path / "page.html")])
    assert result.exit_code == 0
    for name in ("cut.json", "empty.json", "old.json"):
        assert len([line for line in result.output.splitlines() if name in line]) == 1
    assert "note.txt" not in result.output
    assert "good.json" in (tmp_path / "page.html").read_text()


def _of_a_card(folder: Path) -> None:
    """What `make gpu` leaves in a card's folder, results apart, and what `cflow-fast parity` does beside it."""
    facts = {"card": "Some Card", "torch": "2", "triton": "3"}
    rows = [{"case": "a case", "precision": "bf16"}]
    compared = {"command": "cflow-fast parity", "created": "", "machine": CPU, "versions": {}, "seed": 0, "commit": ""}
    for name, content in {
        "some-card/state.json": {"folder": "some-card", "facts": facts, "summary": [], "failed": []},
        "some-card/roofline.json": facts | {"roofline": {"matrix": {"bf16": 1e15}}},
        "some-card/parity.json": rows,
        "some-card/kernels.json": rows,
        "parity/cpu.json": compared | {"rows": rows},
    }.items():
        write_text(folder / name, json.dumps(content))
    shipped = next((Path(kernels.__file__).parent / "tuned").glob("*.json"))
    write_text(folder / "some-card/tuned.json", shipped.read_text())


def test_results_are_found_in_folders_of_folders_and_other_files_there_passed_over(tmp_path: Path) -> None:
    cpu, gpu = _full()
    _of_a_card(tmp_path)
    write_results(tmp_path / "cpu.json", cpu)
    write_results(tmp_path / "some-card" / "map.json", gpu)
    told: list[str] = []
    assert [source.name for source in load([tmp_path], told.append)] == ["cpu.json", "some-card/map.json"]
    assert told == []
    text = Page(report(load([tmp_path / "some-card", tmp_path], told.append))).text
    assert "NVIDIA Test" in text
    assert "left out" not in text, "a file that is found twice is read once"


def test_a_file_of_something_else_that_was_named_is_told(tmp_path: Path) -> None:
    _of_a_card(tmp_path)
    write_results(tmp_path / "cpu.json", _full()[0])
    others = sorted(path for path in tmp_path.rglob("*.json") if path.name != "cpu.json" or path.parent != tmp_path)
    assert len(others) == 6
    told: list[str] = []
    assert len(load([*others, tmp_path], told.append)) == 1
    assert told == [f"{path}: not a results file of `cflow-fast bench`" for path in others]


@pytest.mark.parametrize("content", [None, "", "[]", '{"format": 99}', '{"format": 99, "rows": []}'])
def test_without_a_result_there_is_one_line_and_no_page(tmp_path: Path, content: str | None) -> None:
    if content is not None:
        (tmp_path / "a.json").write_text(content)
    skipped: list[str] = []
    with pytest.raises(CFlowFastError, match="no results to report"):
        load([tmp_path], skipped.append)
    assert len(skipped) == 1
    assert str(tmp_path) in skipped[0]


def test_a_page_that_cannot_be_written_is_one_clear_error(tmp_path: Path) -> None:
    write_results(tmp_path / "good.json", _full()[0])
    (tmp_path / "file").write_text("")
    result = CliRunner().invoke(
        report_command, [str(tmp_path / "good.json"), "-o", str(tmp_path / "file" / "page.html")]
    )
    assert isinstance(result.exception, CFlowFastError)
    assert "cannot write" in str(result.exception)


def test_the_figure_names_machine_and_command(tmp_path: Path) -> None:
    from PIL import Image

    sources = [Source(f"run{i}.json", r) for i, r in enumerate(_full())]
    path = throughput_figure(sources, tmp_path / "figure.png")
    with Image.open(path) as picture:
        assert picture.format == "PNG"
        assert picture.width == 1520
        assert "cflow-fast bench decoder --json FILE" in picture.info["Description"]
        assert "NVIDIA Test" in picture.info["Description"]
    with pytest.raises(CFlowFastError, match="nothing to draw"):
        throughput_figure([Source("a.json", run([timed("freia", "fp32", 1, 1.0, "cpu")], CPU))], tmp_path / "none.png")
    assert not (tmp_path / "none.png").exists()


def test_marks_of_a_drawing_are_inside_it() -> None:
    for drawing in _page(*_full()).drawings:
        assert isinstance(drawing, Drawing)
        for x, y in drawing.all_marks:
            assert 0 <= x <= drawing.width
            assert 0 <= y <= drawing.height
