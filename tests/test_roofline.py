"""The bandwidth kernels read what they are counted to read."""

from __future__ import annotations

import pytest
import torch

from cflow_fast.bench import roofline
from cflow_fast.bench.roofline import bytes_read, measure_roofline, read_launch

CPU = torch.device("cpu")


@pytest.mark.parametrize("shared", [True, False])
def test_every_program_reads_its_whole_region_as_often_as_counted(shared: bool) -> None:
    launch = read_launch(CPU, programs=3, shared=shared, region=4 * 64, reads=5, block=16)
    values = launch.args["x_ptr"]
    values.copy_(torch.arange(len(values)))
    launch.run()
    regions = values.view(1, -1).expand(3, -1) if shared else values.view(3, -1)
    torch.testing.assert_close(launch.args["sums_ptr"], 5 * regions.sum(1))
    assert bytes_read(launch) == 3 * 4 * 64 * 5


def test_regions_hold_a_whole_number_of_blocks() -> None:
    for size in (roofline.SHARED_BYTES, roofline.OWN_BYTES):
        assert size % (4 * roofline.BLOCK) == 0


@pytest.mark.parametrize("shared", [True, False])
def test_reads_take_much_longer_than_a_launch_and_stay_in_half_of_the_cache(shared: bool) -> None:
    programs, fastest, before_it_begins, half_of_the_cache = 2 * 132, 10e12, 40e-6, 25e6
    launch = read_launch(CPU, programs, shared)
    assert bytes_read(launch) / fastest > 50 * before_it_begins
    assert launch.args["x_ptr"].nbytes < half_of_the_cache


def test_a_cpu_has_matrix_and_copy_rates_and_no_l2_figure(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(roofline, "matrix_rate", lambda precision, device: 1e9)
    found = measure_roofline(CPU, copy_bytes=1 << 16)
    assert found.matrix["fp32"] == 1e9
    assert found.copy > 0
    assert found.l2_shared is None
    assert found.l2_own is None
