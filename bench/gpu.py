"""`make gpu`: everything that only a card can show, in one go, kept in bench/results/<card>/.

    python -m cflow_fast.bench.gpu [--output FOLDER] [--minutes 8.5] [--case-seconds 2] [--pack FILE]
                                   [--kernels FILE] [--leave-out STEP]...

Each step writes its own file as soon as it is done and a failure ends that step alone: the next ones run, and the
summary names what failed. What is right comes before what is fast, and all of it side by side, where the card has the
memory; what is timed comes one after another, the headline's numbers before the rest, since time may run out. Nothing
but PyTorch, Triton, timm and this package is needed; FrEIA, when it is there, is a contender.
Kernels are compiled before anything is timed, and what tuning finds is what the steps after it launch: they measure the
card as `cflow-fast tune` leaves it.
"""

from __future__ import annotations

import atexit
import importlib.util
import itertools
import os
import shlex
import shutil
import subprocess
import sys
import tempfile
import time
import warnings
from collections.abc import Callable, Sequence
from dataclasses import asdict
from functools import partial
from pathlib import Path
from typing import Any, NamedTuple

import click
import torch
import triton

from cflow_fast import parity
from cflow_fast.bench import decoder, end_to_end, maps
from cflow_fast.bench.ahead import unpack
from cflow_fast.bench.cases import DecoderCase, grid, scales_of
from cflow_fast.bench.contenders import ACCELERATED, PLAIN, device_precisions, is_installed
from cflow_fast.bench.end_to_end import ModelCase
from cflow_fast.bench.kernel_times import time_kernels
from cflow_fast.bench.machine import file_name
from cflow_fast.bench.maps import MapCase
from cflow_fast.bench.measurement import Effort
from cflow_fast.bench.planned import FIRST_SIZES, NARROW_SIZES, TUNED, WIDE_SIZES
from cflow_fast.bench.processes import end_groups_when_told, run_group
from cflow_fast.bench.results import Results, write_results
from cflow_fast.bench.roofline import measure_roofline
from cflow_fast.bench.session import Session, line_up
from cflow_fast.bench.suite import Part, Suite, watched
from cflow_fast.bench.tune import Finding, choose_by_measurement, in_words, table_of
from cflow_fast.bench.tune_card import CardTimer
from cflow_fast.bench.tune_targets import tails, targets
from cflow_fast.bench.warm import compile_on_all_cores
from cflow_fast.errors import CFlowFastError
from cflow_fast.files import check_writable, write_text
from cflow_fast.kernels import tuning
from cflow_fast.kernels.chip import Chip
from cflow_fast.kernels.tuning import shipped_table
from cflow_fast.kernels.tuning_table import Table, as_text

CARD = torch.device("cuda", 0)
BENCH = Path(__file__).resolve().parent  # the package may be links to the checkout
RESULTS = BENCH / "results"
WIDE = "wide_resnet50_2"
MINUTES = 8.5
CASE_SECONDS = 2.0
"""For all contenders of a case together, once they are made."""
MOST_COMPILING, MOST_CHECKING, MOST_TUNING = 150.0, 150.0, 100.0
"""Seconds for kernels beforehand, for all that is right, and for tuning."""
FOR_TIMES = 110.0
"""Seconds that all of these leave to what is timed. With half a second a case and four precisions an H200 took 31 for
the headline's decoders and 93 for everything but single kernels."""
LEAST_CHECKING, LEAST_TUNING = 60.0, 10.0
TOGETHER_BYTES = 40e9
"""Of a card's memory: with less, its checks run one after another."""


def card_tests(suite: Suite) -> str:
    """Capture, streams and threads first; then determinism, formats, whole models. Parity is a step of its own."""
    tests = BENCH.parent / "tests" / "test_gpu.py"
    command = [sys.executable, "-m", "pytest", "-q", "-m", "gpu", "--maxfail=30", "-k", "not yardstick", str(tests)]
    if importlib.util.find_spec("xdist"):
        command += ["-n", str(min(8, os.cpu_count() or 1))]  # most of the time goes into compiling
    environment = os.environ | {"TRITON_INTERPRET": "0", "OMP_NUM_THREADS": "1"}
    limit = max(30.0, suite.seconds_left - 5)
    with (suite.folder / "tests.txt").open("w") as log:
        try:
            code = run_group(command, limit, stdout=log, stderr=subprocess.STDOUT, env=environment).returncode
        except subprocess.TimeoutExpired:
            return f"failed: not done after {limit:.0f} s; see tests.txt"
    lines = (suite.folder / "tests.txt").read_text().strip().splitlines() or ["no output"]
    return lines[-1] if code == 0 else f"failed: {lines[-1]}; see tests.txt"


def compiled(suite: Suite) -> str:
    return compile_on_all_cores(max(10.0, min(MOST_COMPILING, suite.seconds_left - LEAST_CHECKING - FOR_TIMES)))


def roofline(suite: Suite) -> str:
    found = measure_roofline(CARD)
    suite.facts["roofline"] = asdict(found)
    suite.write_json("roofline.json", suite.facts)
    rates = ", ".join(f"{precision} {rate / 1e12:.0f} TFLOP/s" for precision, rate in found.matrix.items())
    assert found.l2_shared is not None
    assert found.l2_own is not None
    reads = f"L2 reads {found.l2_shared / 1e12:.2f} (shared) and {found.l2_own / 1e12:.2f} TB/s (own)"
    return f"{rates}; copies {found.copy / 1e12:.2f} TB/s; {reads}"


def _parity(suite: Suite, name: str, sizes: Sequence[int]) -> str:
    """Every precision and way of decoders with random parameters against float64, for as long as there is time."""
    decoders = [(features, permute_soft) for features in sizes for permute_soft in (False, True)]
    rows: list[parity.Row] = []
    compared, longest = 0, 10.0
    for features, permute_soft in decoders:
        if suite.seconds_left < longest:
            break
        began = time.monotonic()
        try:
            for row in parity.check(parity.random_case(features, permute_soft, device=CARD)):
                rows.append(row)
        finally:  # what was compared before a failure is worth having
            suite.write_json(name, [row.as_dict() for row in rows])
        compared, longest = compared + 1, max(longest, time.monotonic() - began)
    note = "" if compared == len(decoders) else f"; {compared} of {len(decoders)} decoders, for want of time"
    if not compared:
        return "not measured: no time was left"
    wrong = [f"{row.case} {row.precision}: {'; '.join(row.failures)}" for row in rows if not row.passed]
    if wrong:
        return f"failed: {' | '.join(wrong)}{note}"
    return f"{len(rows)} comparisons with float64 within their bounds{note}"


def kernels(suite: Suite) -> str:
    """Every launch of the wide decoders alone, beside its prediction and its floors."""
    seconds = min(60.0, suite.seconds_left - 30)
    until = time.monotonic() + seconds
    return time_kernels(CARD, suite.facts.get("roofline"), until, lambda rows: suite.write_json("kernels.json", rows))


def wide_decoders(suite: Suite) -> str:
    return _decoders(suite, "decoders-256.json", [WIDE], [256], [1, 8, 32])


def wide_decoders_512(suite: Suite) -> str:
    return _decoders(suite, "decoders-512.json", [WIDE], [512], [1, 8])


def narrow_decoders(suite: Suite) -> str:
    return _decoders(suite, "decoders-narrow.json", ["resnet18", "mobilenetv3_large_100"], [256], [1, 32])


def _decoders(suite: Suite, name: str, encoders: list[str], sizes: list[int], batches: list[int]) -> str:
    cases = grid(DecoderCase, encoders, ("soft", "hard"), sizes, batches, CARD)
    precisions = [p for p in ("fp32", "bf16", "tf32", "tf32x3", "fp16", "fp16x3") if p in device_precisions(CARD)]
    against = ["freia", PLAIN] if is_installed("FrEIA") else [PLAIN]
    return f"{_measured(suite, name, decoder.CONTENDERS, cases, against, precisions)}\n\n{SHARES}"


SHARES = (
    "Shares of the matrix rate count a soft permutation as a whole matrix: what its rotation saves raises them. The "
    "kernels' own table counts what each of them multiplies."
)


def accelerated(suite: Suite) -> str:
    """What `cflow_fast.accelerate` makes of FrEIA's modules that are then called as before, of few rows and of many."""
    if not is_installed("FrEIA"):
        return "not measured: FrEIA is not installed"
    cases = grid(DecoderCase, [WIDE], ("soft", "hard"), [256], [1, 32], CARD)
    return _measured(suite, "accelerated.json", decoder.CONTENDERS, cases, ["freia", ACCELERATED], ["bf16"])


def anomaly_maps(suite: Suite) -> str:
    cases = [MapCase(WIDE, scales_of(WIDE), size, batch, device=CARD) for size in (256, 512) for batch in (1, 32)]
    return _measured(suite, "map.json", maps.CONTENDERS, cases, ["eager"], ["fp32"])


def compiled_peer(suite: Suite) -> str:
    """FrEIA under torch.compile takes minutes to compile: one case."""
    cases = grid(DecoderCase, [WIDE], ("soft",), [256], [32], CARD)
    return _measured(suite, "freia-compile.json", decoder.CONTENDERS, cases, ["freia-compile"], ["bf16"])


def whole_models(suite: Suite) -> str:
    cases = grid(ModelCase, [WIDE, "resnet18"], ("hard",), [256], [1, 32], CARD)
    against = ["freia"] if is_installed("FrEIA") else []
    return _measured(suite, "end-to-end.json", end_to_end.CONTENDERS, cases, against, ["fp32", "bf16"])


def _measured(
    suite: Suite, name: str, contenders: Any, cases: Any, against: Sequence[str], precisions: Sequence[str]
) -> str:
    effort = Effort(seconds=suite.facts.get("case_seconds", CASE_SECONDS))
    session = Session(suite.facts.get("command", "make gpu"), CARD, effort=effort)
    session.peak_flops = dict(suite.facts.get("roofline", {}).get("matrix", {}))
    entrants, baseline = line_up(contenders, against, precisions)
    left_out = 0
    for case in cases:
        if suite.seconds_left < 20:
            left_out += 1
            continue
        session.measure(case, entrants, baseline)
        write_results(suite.folder / name, session.results())
    note = f"\n\n{left_out} cases were left out for want of time." if left_out else ""
    return _table(session.results()) + note


def _table(results: Results) -> str:
    headings = "| case | contender | us | images/s | calls in a row | of the matrix rate | over the baseline | |"
    lines = [headings, "|" + " --- |" * 8]
    for row in results.rows:
        who = f"{row.contender} {row.precision}"
        if row.seconds is None:
            lines.append(f"| {row.case} | {who} | not measured | | | | | {row.status}: {row.note} |")
            continue
        share = "" if row.share_of_peak is None else f"{row.share_of_peak:.0%}"
        faster = "" if row.speedup is None else f"{row.speedup.median:.2f}x {row.speedup.against}"
        rate = "" if row.images_per_second is None else f"{row.images_per_second:.0f}"
        in_a_row = row.number("queued_images_per_second")
        cells = [row.case, who, f"{1e6 * row.seconds.median:.0f}", rate, "" if in_a_row is None else f"{in_a_row:.0f}"]
        lines.append(f"| {' | '.join([*cells, share, faster, row.status])} |")
    return "\n".join(lines)


def tuned(suite: Suite) -> str:
    """Candidates of the wide decoders' kernels, and Triton beside the plain path, for as long as there is time.

    From here on this process, and those that it starts, launch what was found.
    """
    seconds = min(MOST_TUNING, suite.seconds_left - FOR_TIMES)
    if seconds < LEAST_TUNING:
        return "not measured: what time is left is for what comes after it"
    chip = Chip.of(CARD)
    until = time.monotonic() + seconds
    found: list[Finding] = []
    try:
        encoders, _, sizes, batches = TUNED
        timer, maps = CardTimer(CARD), tails(encoders, sizes, batches)
        for finding in choose_by_measurement(targets(*TUNED), chip, timer, until, shipped_table(chip), maps):
            found.append(finding)
    finally:  # what was found before a failure is worth having
        table = table_of(found, suite.facts["card"], chip.multiprocessors, suite.facts)
        suite.write("tuned.json", as_text(table))
    if not table.kernels:
        return "failed: nothing was measured"
    _put_to_use(table)
    parts = []
    for headings, rows in in_words(table):
        lines = [headings, ("---",) * len(headings), *rows]
        parts.append("\n".join(f"| {' | '.join(line)} |" for line in lines))
    parts += [f"{finding.target}: {finding.note}" for finding in found if finding.note]
    return "\n\n".join(parts)


def _put_to_use(table: Table) -> None:
    """In a folder of its own: the user's own table stays as it is."""
    os.environ["CFLOW_FAST_CACHE"] = folder = tempfile.mkdtemp(prefix="cflow-fast-tuned-")
    atexit.register(shutil.rmtree, folder, ignore_errors=True)
    write_text(tuning.cache_path(table.card), as_text(table))
    tuning.forget()


SANITIZER = ("compute-sanitizer", "/usr/local/cuda/bin/compute-sanitizer")
SMALL = (sys.executable, "-m", "cflow_fast.bench.warm", "--small")
LEAST_SANITIZING = 20.0


def memory_check(suite: Suite) -> str:
    """Small decoders under compute-sanitizer, where it is installed; once without it first, which compiles them."""
    tool = next((path for path in SANITIZER if _runs(path)), None)
    if tool is None:
        return "not measured: compute-sanitizer is not installed"
    # An allocation that PyTorch asks for in vain, or a query of CUDA's that fails, is no error of a kernel's.
    checked = (tool, "--tool", "memcheck", "--report-api-errors", "no", "--error-exitcode", "9", *SMALL)
    # The allocator's own large blocks would hide most of what is out of bounds.
    uncached = os.environ | {"PYTORCH_NO_CUDA_MEMORY_CACHING": "1"}
    ends = time.monotonic() + max(LEAST_SANITIZING, suite.seconds_left - 5)
    log = ""
    for command, environment in ((SMALL, os.environ), (checked, uncached)):
        try:
            done = run_group(
                command, ends - time.monotonic(), stdout=subprocess.PIPE, stderr=subprocess.STDOUT, env=environment
            )
        except subprocess.TimeoutExpired:
            return f"not measured: {command[0]} was not done in time"
        log += f"$ {' '.join(command)}\n{done.stdout}"
        suite.write("sanitizer.txt", log[-20000:])
        if done.returncode:
            return f"failed: exit code {done.returncode} of {command[0]}, see sanitizer.txt"
    return "no error"


def _runs(tool: str) -> bool:
    try:
        return subprocess.run([tool, "--version"], capture_output=True).returncode == 0
    except OSError:
        return False


class Step(NamedTuple):
    """together: it times nothing, and may run beside its neighbours that do not either."""

    name: str
    run: Callable[[Suite], str]
    together: bool = False


STEPS = (
    Step("kernels compiled ahead", compiled),
    Step("tests on the card", card_tests, together=True),
    Step("parity, first sizes", partial(_parity, name="parity-first.json", sizes=FIRST_SIZES), together=True),
    Step("parity, narrow", partial(_parity, name="parity-narrow.json", sizes=NARROW_SIZES), together=True),
    Step("parity, wide", partial(_parity, name="parity-wide.json", sizes=WIDE_SIZES), together=True),
    Step("memory check", memory_check, together=True),
    Step("roofline", roofline),
    Step("tuning", tuned),
    Step("decoders of WideResNet-50, 256 px", wide_decoders),
    Step("anomaly map", anomaly_maps),
    Step("whole models", whole_models),
    Step("FrEIA's modules after one line", accelerated),
    Step("decoders of WideResNet-50, 512 px", wide_decoders_512),
    Step("decoders of ResNet-18 and MobileNetV3-L", narrow_decoders),
    Step("kernels, measured beside predicted", kernels),
    Step("FrEIA compiled", compiled_peer),
)

ARCHIVE = click.Path(path_type=Path, dir_okay=False, exists=True)


@click.command()
@click.option("--output", type=click.Path(path_type=Path, file_okay=False), help="  [default: bench/results/<card>]")
@click.option("--minutes", type=click.FloatRange(0.1), default=MINUTES, show_default=True, help="For all of it.")
@click.option("--case-seconds", type=click.FloatRange(0.1), default=CASE_SECONDS, show_default=True, help="A case's.")
@click.option("--pack", type=click.Path(path_type=Path, dir_okay=False), help="A .tar.gz of what is in the folder.")
@click.option("--kernels", "archive", type=ARCHIVE, help="What `make gpu-kernels` compiled.")
@click.option("--leave-out", multiple=True, metavar="STEP", help="One of the steps, by its name; any number of times.")
@click.option("--go-on-from", type=int, default=0, hidden=True)
@click.option("--part", hidden=True, help="One step of a suite that another process runs.")
def main(
    output: Path | None,
    minutes: float,
    case_seconds: float,
    pack: Path | None,
    archive: Path | None,
    leave_out: tuple[str, ...],
    go_on_from: int,
    part: str | None,
) -> None:
    """Check, then measure, on the first CUDA device."""
    if not torch.cuda.is_available():
        raise click.ClickException("there is no CUDA device here; `make aot` says what can be said without one")
    names = [step.name for step in STEPS]
    if unknown := sorted(set(leave_out).difference(names)):
        raise click.BadParameter(f"{unknown[0]!r} is none of {', '.join(names)}")
    warnings.filterwarnings("error", message="no CUDA graph could be captured")  # eager times are not a graph's
    if part is not None:
        assert output is not None
        _run_part(part, Part.of(output, 60 * minutes))
        return
    card = torch.cuda.get_device_name(CARD)
    folder = output or RESULTS / file_name(card)
    folder.mkdir(parents=True, exist_ok=True)
    try:
        for path in filter(None, (folder / "state.json", pack)):
            check_writable(path)
    except CFlowFastError as error:
        raise click.ClickException(str(error)) from error
    ends = time.time() + 60 * minutes
    suite = Suite.stored(folder, pack) if go_on_from else Suite(folder, ends, _facts(card), pack=pack)
    if not go_on_from:
        suite.facts |= {"command": _command(minutes, case_seconds, leave_out), "case_seconds": case_seconds}
        suite.facts |= {"compiled_before": _unpacked(archive)} if archive else {}
    with watched(suite):
        next_step = _run_steps(suite, go_on_from, leave_out)
    if next_step is not None:
        go_on = [sys.executable, "-m", "cflow_fast.bench.gpu", "--go-on-from", str(next_step), "--output", str(folder)]
        go_on += [word for name in leave_out for word in ("--leave-out", name)]
        sys.exit(subprocess.call(go_on + (["--pack", str(pack)] if pack else [])))
    print("\n".join([f"everything is in {folder}", *(f"FAILED {line}" for line in suite.failed)]))
    sys.exit(1 if suite.failed else 0)


def _run_steps(suite: Suite, first: int, leave_out: Sequence[str] = ()) -> int | None:
    """None when all are done; else the one to go on from in another process, since this one has lost the card."""
    number = first
    while number < len(STEPS):
        neighbours = list(itertools.takewhile(lambda step: step.together, STEPS[number:])) or [STEPS[number]]
        number += len(neighbours)
        wanted = [step for step in neighbours if step.name not in leave_out]
        if not wanted:
            continue
        if neighbours[0].together:
            _run_together(suite, [step.name for step in wanted])
        else:
            suite.run(*wanted[0][:2])
        suite.store()
        if not _card_answers():  # after an illegal access
            return number
    return None


def _run_together(suite: Suite, names: list[str]) -> None:
    """In processes of their own, so that what breaks one of them breaks no other."""

    def part(name: str, seconds: float) -> list[str]:
        options = ["--part", name, "--output", str(suite.folder), "--minutes", f"{seconds / 60:.3f}"]
        return [sys.executable, "-m", "cflow_fast.bench.gpu", *options]

    seconds = min(suite.seconds_left, max(LEAST_CHECKING, min(MOST_CHECKING, suite.seconds_left - FOR_TIMES)))
    ends = time.monotonic() + seconds
    roomy = torch.cuda.get_device_properties(CARD).total_memory >= TOGETHER_BYTES
    for some in [names] if roomy else [[name] for name in names]:
        suite.run_together({name: partial(part, name) for name in some}, ends - time.monotonic())


def _run_part(name: str, suite: Part) -> None:
    step = next(step for step in STEPS if step.name == name)
    end_groups_when_told()
    with watched(suite):
        suite.run(step.name, step.run)
        suite.store()


def _unpacked(archive: Path) -> str:
    """One that is of no use is no reason to stop."""
    try:
        words = unpack(archive, torch.cuda.get_device_capability(CARD))
    except CFlowFastError as error:
        words = f"nothing: {error}"
    print(f"compiled before: {words}\n", flush=True)
    return words


def _command(minutes: float, case_seconds: float, leave_out: Sequence[str]) -> str:
    options = ["--minutes", f"{minutes:g}"] if minutes != MINUTES else []
    options += ["--case-seconds", f"{case_seconds:g}"] if case_seconds != CASE_SECONDS else []
    options += [word for name in leave_out for word in ("--leave-out", name)]
    return f"make gpu SUITE={shlex.quote(shlex.join(options))}" if options else "make gpu"


def _facts(card: str) -> dict[str, Any]:
    capability = ".".join(map(str, torch.cuda.get_device_capability(CARD)))
    versions = {"torch": torch.__version__, "triton": triton.__version__}
    return {"card": card, "capability": capability} | versions


def _card_answers() -> bool:
    try:
        torch.cuda.synchronize(CARD)
        torch.cuda.empty_cache()
    except RuntimeError:
        return False
    return True


if __name__ == "__main__":
    main()
