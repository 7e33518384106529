"""The counted prediction moves as the arithmetic says; nothing here needs a compiler or a card."""

from __future__ import annotations

from dataclasses import replace

import pytest

from cflow_fast.bench import aot
from cflow_fast.bench.compiled import Compiled, Loop, disassembled, matrix_loops
from cflow_fast.bench.headline import PRECISIONS, Headline, headlines, tail_launches
from cflow_fast.bench.prediction import (
    CARDS,
    Card,
    Prediction,
    l2_bytes,
    predict,
    predict_at_least,
    predict_together,
    residents,
)
from cflow_fast.kernels.chip import Chip
from cflow_fast.kernels.launch import Launch

H100, H200 = CARDS
CODE = Compiled(
    registers=128, shared=64 * 1024, spills=0, instructions=700, loops=(Loop(100, 0, 4, 0, 0),), serialized=False
)
WIDE = Headline("wide_resnet50_2", 0, 512, "soft", "bf16", 256, 32)


def product(kernel: str = "linear_kernel", line: Headline = WIDE) -> Launch:
    return next(launch for launch in line.launches(Chip()) if launch.kernel.__name__ == kernel)


def with_tile(launch: Launch, **constants: int) -> Launch:
    return replace(launch, constexprs=launch.constexprs | constants)


def test_every_headline_launch_is_counted() -> None:
    lines = [
        replace(line, permutations=permutations, precision=precision)
        for line in headlines(("wide_resnet50_2", "resnet18"), ("bf16",), (256,), (1, 32))
        for permutations in ("soft", "hard")
        for precision in PRECISIONS
    ]
    for line in lines:
        for launch in line.launches(Chip()):
            found = predict(launch, CODE, H100)
            assert 0 < found.seconds < 1
            assert found.work.matrix_flop >= found.work.flop * 0.999
    for launch in tail_launches():
        assert predict(launch, CODE, H100).work.flop == 0


def test_counted_work_of_a_decoder_is_the_designs() -> None:
    """6.71 GMAC an image for D = 512 with soft permutations as matrices; the last block's needs none."""
    work = sum(predict(launch, CODE, H100).work.flop for launch in WIDE.launches(Chip())) / WIDE.batch
    assert work / 2e9 == pytest.approx(6.71 * 1.0, rel=0.06)


def test_a_tile_twice_as_large_makes_half_the_units_with_the_same_work() -> None:
    small = predict(with_tile(product(), BLOCK_ROWS=64, SPLIT_K=1), CODE, H100)
    large = predict(with_tile(product(), BLOCK_ROWS=128, SPLIT_K=1), CODE, H100)
    assert large.work.units * 2 == small.work.units
    assert large.work.matrix_flop == small.work.matrix_flop
    assert large.waves * 2 == pytest.approx(small.waves)


def test_a_wider_tile_pulls_less_through_l2() -> None:
    narrow = predict(with_tile(product(), BLOCK_ROWS=128, BLOCK_OUT=128, SPLIT_K=1), CODE, H100)
    wide = predict(with_tile(product(), BLOCK_ROWS=128, BLOCK_OUT=256, SPLIT_K=1), CODE, H100)
    assert wide.l2_seconds == pytest.approx(0.75 * narrow.l2_seconds, rel=0.01)


def test_splitting_a_sum_makes_more_units_of_fewer_steps_and_more_traffic() -> None:
    whole = predict(with_tile(product(), SPLIT_K=1), CODE, H100).work
    split = predict(with_tile(product(), SPLIT_K=4), CODE, H100).work
    assert split.units == 4 * whole.units
    assert split.steps * 4 == whole.steps
    assert split.unit_bytes > whole.unit_bytes
    parts = with_tile(product(), SPLIT_K=4)
    free = replace(H100, split_seconds=0.0)
    waiting = pytest.approx(H100.split_seconds)
    assert predict(parts, CODE, H100).seconds - predict(parts, CODE, free).seconds == waiting
    assert predict_at_least(parts, H100) - predict_at_least(parts, free) == waiting


def test_few_rows_wait_for_their_operands_unless_many_steps_are_on_their_way() -> None:
    launch = with_tile(product(), BLOCK_ROWS=64, BLOCK_OUT=32, BLOCK_K=64, SPLIT_K=1)
    launch = replace(launch, args=launch.args | {"rows": 64})
    late = replace(H100, latency_seconds=20e-6)
    three, six = (replace(launch, options=launch.options | {"num_stages": stages}) for stages in (3, 6))
    assert predict(three, CODE, late).bound == "latency"
    waits = [predict(each, CODE, late).seconds - predict(each, CODE, H100).seconds for each in (three, six)]
    assert waits[0] > 2 * waits[1] > 0
    assert predict_at_least(three, late) > predict_at_least(six, late)


def test_one_multiprocessor_pulls_no_more_than_its_own() -> None:
    launch = with_tile(product(), BLOCK_ROWS=64, BLOCK_OUT=64, BLOCK_K=64, SPLIT_K=1)
    launch = replace(launch, args=launch.args | {"rows": 64, "outputs": 64, "y_outputs": 64})
    slow = replace(H100, l2_each=1e9)
    assert predict(launch, CODE, slow).bound == "L2"
    assert predict(launch, CODE, slow).l2_seconds == predict(launch, CODE, H100).l2_seconds, "of the whole card"


def test_what_begins_early_comes_sooner_and_a_product_takes_a_start() -> None:
    launch = product()
    early = replace(launch, constexprs=launch.constexprs | {"EARLY": True})
    sooner = H100.launch_seconds - H100.early_seconds
    assert predict(launch, CODE, H100).seconds - predict(early, CODE, H100).seconds == pytest.approx(sooner)
    at_once = replace(H100, start_seconds=0.0)
    start = predict(launch, CODE, H100).seconds - predict(launch, CODE, at_once).seconds
    assert start == pytest.approx(H100.start_seconds)


def test_what_a_launch_moves_is_what_its_tiles_pull_and_push() -> None:
    launch = with_tile(product(), BLOCK_ROWS=64, BLOCK_OUT=64, BLOCK_K=64, SPLIT_K=1)
    rows, inputs, outputs = (launch.args[name] for name in ("rows", "inputs", "outputs"))
    tiles = -(-rows // 64) * -(-outputs // 64)
    assert l2_bytes(launch, H100) == tiles * (128 * inputs + 64 * 64) * launch.args["w_ptr"].element_size()


def test_twice_the_images_take_twice_as_long_once_the_card_is_full() -> None:
    seconds = [
        sum(predict(launch, CODE, H100).seconds for launch in replace(WIDE, batch=batch).launches(Chip()))
        for batch in (256, 512)
    ]
    assert seconds[1] / seconds[0] == pytest.approx(2, rel=0.05)


@pytest.mark.parametrize(("rate", "bound"), [("matrix", "matrix"), ("l2", "L2"), ("memory", "memory")])
def test_a_resource_that_becomes_scarce_becomes_the_bound_and_sets_the_time(rate: str, bound: str) -> None:
    slow: Card = replace(H100, matrix={"bf16": 1e12}) if rate == "matrix" else replace(H100, **{rate: 1e10})
    found = predict(product(), CODE, slow)
    assert found.bound == bound
    halved = replace(slow, matrix={"bf16": 5e11}) if rate == "matrix" else replace(slow, **{rate: 5e9})
    assert predict(product(), CODE, halved).seconds == pytest.approx(2 * found.seconds, rel=0.05)


def test_more_instructions_in_the_loop_end_in_issue_as_the_bound() -> None:
    busy = replace(CODE, loops=(Loop(20000, 0, 4, 0, 0),), instructions=20600)
    assert predict(product(), busy, H100).bound == "issue"


def test_weights_that_are_still_in_the_cache_cost_no_memory_time() -> None:
    cold, warm = (predict(product(), CODE, H100, cold_weights=cold) for cold in (True, False))
    assert cold.memory_seconds > warm.memory_seconds


@pytest.mark.parametrize(
    ("changed", "programs"),
    [({"registers": 255}, 1), ({"registers": 64}, 3), ({"shared": 200 * 1024}, 1), ({"registers": 32, "shared": 0}, 8)],
)
def test_programs_that_share_a_multiprocessor_are_limited_by_registers_memory_and_warps(
    changed: dict[str, int], programs: int
) -> None:
    assert residents(replace(CODE, **changed), warps=8) == programs  # type: ignore[arg-type]


def test_programs_that_are_not_launched_share_no_multiprocessor() -> None:
    """There is room for two: only where two were launched does one's epilogue hide behind the other's loop."""
    alone, shared = (predict(replace(product(), grid=(132 * n,)), CODE, H100) for n in (1, 2))
    assert residents(CODE, product().options["num_warps"]) >= 2
    assert (alone.resident, shared.resident) == (1, 2)
    assert alone.seconds > shared.seconds


def test_decoders_side_by_side_take_the_longest_chain_or_all_the_work() -> None:
    def chain(seconds: float, busy: float) -> list[Prediction]:
        found = predict(product(), CODE, H100)
        zero = {"issue_seconds": 0.0, "l2_seconds": 0.0, "memory_seconds": 0.0}
        return [replace(found, seconds=seconds, matrix_seconds=busy, **zero)]

    assert predict_together([chain(3.0, 1.0), chain(2.0, 1.0)], H100) == 3.0
    assert predict_together([chain(3.0, 2.5), chain(2.0, 1.5)], H100) == 4.0


def test_the_weights_of_one_image_are_read_sooner_from_a_faster_memory() -> None:
    one = replace(WIDE, batch=1, features=2048, scale=2)
    seconds = [
        sum(predict(launch, CODE, card).memory_seconds for launch in one.launches(Chip())) for card in (H100, H200)
    ]
    assert seconds[1] == pytest.approx(seconds[0] * H100.memory / H200.memory)


LISTING = """
.L_x_0:
        /*0000*/                   MOV R1, c[0x0][0x28] ;
.L_x_1:
        /*0010*/                   HGMMA.64x128x16.F32.BF16 R24, gdesc[UR8], R24 ;
        /*0020*/              @!P0 LDL R2, [R1] ;
.L_x_2:
        /*0030*/                   FADD R2, R2, R3 ;
        /*0040*/               @P1 BRA `(.L_x_2) ;
        /*0050*/                   BRA `(.L_x_3) ;
.L_x_4:
        /*0060*/                   HGMMA.64x128x16.F32.BF16 R24, gdesc[UR8], R24 ;
        /*0070*/                   STL [R1], R2 ;
        /*0080*/               @P2 BRA `(.L_x_4) ;
.L_x_3:
        /*0090*/               @P0 BRA `(.L_x_1) ;
        /*00a0*/                   EXIT ;
"""


def test_only_the_innermost_loops_that_multiply_are_matrix_loops() -> None:
    listing = disassembled(LISTING)
    assert [operation for operation, _ in listing.code][:3] == ["MOV", "HGMMA", "LDL"]
    assert matrix_loops(listing) == [Loop(instructions=3, spills=1, hgmma=1, hmma=0, ffma=0)]


def test_what_makes_a_kernel_slow_is_a_fault() -> None:
    kernel = aot.Kernel(with_tile(product(), BLOCK_ROWS=128), 90)
    assert aot.faults(kernel, CODE) == []
    assert aot.faults(kernel, replace(CODE, loops=(Loop(100, 2, 4, 0, 0),))) == ["2 spills inside a matrix loop"]
    assert aot.faults(kernel, replace(CODE, serialized=True)) == ["wgmma serialized"]
    assert aot.faults(kernel, replace(CODE, unwaiting=True)) == ["begins early and waits for nothing"]
    assert aot.faults(kernel, replace(CODE, shared=10**6)) == ["1000000 bytes of shared memory, over 232448"]
    no_wgmma = replace(CODE, loops=(Loop(100, 0, 0, 8, 0),))
    assert aot.faults(kernel, no_wgmma) == ["bf16 products without wgmma"]
    few_rows = aot.Kernel(with_tile(product(), BLOCK_ROWS=16), 90)
    assert aot.faults(few_rows, no_wgmma) == []
    assert aot.faults(aot.Kernel(kernel.launch, 80), no_wgmma) == []


def test_launches_of_one_machine_code_are_compiled_once() -> None:
    launches = WIDE.launches(Chip())
    keys = {aot.compile_key(launch, 90) for launch in launches}
    assert 3 <= len(keys) < len(launches)
    assert aot.compile_key(launches[0], 90) != aot.compile_key(launches[0], 80)
    assert aot.compile_key(with_tile(launches[0], BLOCK_K=16), 90) not in keys
