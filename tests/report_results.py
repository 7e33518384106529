"""Results of a benchmark that never ran, with numbers that are easy to follow."""

from __future__ import annotations

from typing import Any

from cflow_fast.bench.results import Results, Row, Speedup, Summary

CPU: dict[str, Any] = {"cpu": "Xeon(R) Test", "threads": 2, "features": ["avx2"], "memory_bytes": 16_000_000_000}
GPU: dict[str, Any] = CPU | {"gpu": "NVIDIA Test", "capability": "9.0"}
PEAKS = {"fp32": 1e12, "bf16": 4e12}


def row(contender: str, precision: str, batch: int, device: str, **facts: Any) -> Row:
    axes: dict[str, str | int | float | bool] = {
        "encoder": "resnet18",
        "permutations": "soft",
        "size": 256,
        "batch": batch,
        "rows": 100 * batch,
    }
    case = f"resnet18, soft permutations, {batch} x 256 px"
    return Row("decoder", case, axes, contender, precision, device, **facts)


def timed(
    contender: str, precision: str, batch: int, images_per_second: float, device: str, speedup: float | None = None
) -> Row:
    """A row that ran and passed parity; ours has a speed-up over freia, of a factor of 2 unless it is given."""
    seconds = batch / images_per_second
    tflops = images_per_second * 5e-3
    if speedup is None and contender == "cflow-fast":
        speedup = 2.0
    return row(
        contender,
        precision,
        batch,
        device,
        seconds=Summary(seconds, 0.98 * seconds, 1.03 * seconds, seconds, 1.2 * seconds, 21),
        images_per_second=images_per_second,
        tflops=tflops,
        share_of_peak=tflops * 1e12 / PEAKS[precision],
        peak_memory_bytes=123_000_000,
        model_bytes=45_600_000,
        error_max=2e-6,
        error_rms=3e-7,
        parity=True,
        speedup=Speedup("freia fp32", speedup, 0.95 * speedup, 1.1 * speedup) if speedup else None,
    )


def run(rows: list[Row], machine: dict[str, Any]) -> Results:
    return Results(
        command="cflow-fast bench decoder --json FILE",
        created="2026-01-02T03:04:05+00:00",
        machine=machine,
        versions={"python": "3.11", "torch": "2.9", "anomalib": "not installed"},
        seed=7,
        commit="0123456789abcdef",
        peak_flops=PEAKS,
        rows=rows,
    )
