"""What CFLOW-AD, PaDiM and SPADE cost: model sizes and images a second (the paper's Table 6), and why (Table 1).

Sizes are counted, in units of 10^6 bytes. The paper's are met with an encoder up to its last feature map, without a
classifier, plus FrEIA's decoders with 8 blocks, 128 channels of condition and both permutation matrices, of three
scales for WideResNet-50 (946.5) and MobileNetV3-L (24.8) and of the last two for ResNet-18 (96.2; three give 101.2).
"""

from __future__ import annotations

import copy
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, replace

import torch
from torch import Tensor

from cflow_fast.bench import counting
from cflow_fast.bench.baselines import SPADE, PaDiM, padim, spade
from cflow_fast.bench.baselines.maps import NotEnoughMemoryError, encode, require_memory
from cflow_fast.bench.contenders import is_installed
from cflow_fast.bench.maps import eager_map
from cflow_fast.bench.measurement import (
    HALVES,
    Effort,
    Track,
    clock,
    matmul_precision,
    matrix_rate,
    summarize,
    take_turns,
)
from cflow_fast.bench.paper import TABLE_6
from cflow_fast.bench.peers import row_log_prob, rows_encoding
from cflow_fast.bench.results import Row
from cflow_fast.encoders import Encoder
from cflow_fast.model import CFlowAD
from cflow_fast.precision import resolve_precision

ENCODERS = ("resnet18", "wide_resnet50_2", "mobilenetv3_large_100")
SIZES = (256, 512)
PAPER_SCALES = {
    "wide_resnet50_2": (512, 1024, 2048),
    "resnet18": (256, 512),
    "mobilenetv3_large_100": (40, 112, 160),
}
"""Features of the scales with which the reference's decoders have the size that the paper gives."""

RESNET_SCALES = {"resnet18": [64, 128, 256], "wide_resnet50_2": [256, 512, 1024]}
"""Features that PaDiM and SPADE take of a ResNet, at strides 4, 8 and 16."""

DATA_SETS = {"mvtec": (224, 242), "stc": (256, 5000)}
"""Image size and number of good images with which counting gives PaDiM's and SPADE's sizes in Table 6: MVTec AD's mean
number a class, and of ShanghaiTech Campus a subsample that the sizes imply."""

BATCH = {"cpu": 1, "cuda": 32}
"""Images a call; the published code's loader gives 32."""

LONGEST_CALL = 10.0
"""Seconds. What is counted to take longer is not measured."""


def size_rows(encoders: Sequence[str], device: torch.device) -> Iterator[Row]:
    """Model sizes: the reference's decoders and this package's, PaDiM's and SPADE's where the paper has them.

    They are the same on every device. Raises EncoderError for a name that timm does not know.
    """
    rows = (row for name in encoders for row in _sizes(name))
    return (replace(row, device=device.type) for row in rows)


def _sizes(name: str) -> Iterator[Row]:
    channels = PAPER_SCALES.get(name) or Encoder(name, pretrained=False).channels
    encoder = counting.encoder_bytes(name)
    yield _size_row(name, "encoder", "encoder only", encoder, ("encoder", name))
    scales = f"{len(channels)} scales"
    reference = counting.reference_bytes(channels)
    yield _size_row(name, "freia", f"CFLOW-AD, FrEIA's modules, {scales}", encoder + reference, ("cflow", name))
    for kind, soft in (("hard", False), ("soft", True)):
        own = encoder + counting.decoder_bytes(channels, soft)
        yield _size_row(name, "cflow-fast", f"CFLOW-AD, {kind} permutations, {scales}", own, ("cflow", name))
    yield from _baseline_sizes(name, encoder)


def _baseline_sizes(name: str, encoder: int) -> Iterator[Row]:
    """Without and with the encoder: PaDiM's paper, where the figures come from, is not of one mind."""
    if name not in RESNET_SCALES:
        return
    channels = RESNET_SCALES[name]
    for data_set, (size, images) in DATA_SETS.items():
        positions = _resnet_positions(size)
        d = padim.default_channels(name, sum(channels))
        sizes = {
            "padim": padim.counted_bytes(d, positions[0]),
            "spade": spade.counted_bytes(channels, positions, images),
        }
        for method, counted in sizes.items():
            label = f"{method}, {data_set}, {size} px" + (f", {images} images" if method == "spade" else f", d = {d}")
            yield _size_row(name, method, label, counted, (method, name), data_set, counted + encoder)


def _size_row(
    encoder: str,
    contender: str,
    label: str,
    counted: int,
    paper: tuple[str, str],
    data_set: str = "mvtec",
    with_encoder: int | None = None,
) -> Row:
    figure = TABLE_6.get(paper)
    published = figure and (figure.megabytes_stc if data_set == "stc" else figure.megabytes_mvtec)
    extra = {"table": 6, "megabytes": counted / counting.MEGABYTE, "paper_megabytes": published}
    if with_encoder is not None:
        extra["megabytes_with_encoder"] = with_encoder / counting.MEGABYTE
    axes: dict[str, str | int | float | bool] = {"encoder": encoder, "data_set": data_set}
    return Row("complexity", f"size, {encoder}: {label}", axes, contender, "fp32", "", model_bytes=counted, extra=extra)


@dataclass(frozen=True)
class Speed:
    """Something that is timed on one encoder and image size."""

    contender: str
    label: str
    precision: str
    paper: tuple[str, str]
    run: Callable[[], object]
    model_bytes: int
    note: str = ""


def speed_rows(
    encoder: str,
    size: int,
    device: torch.device,
    seed: int = 0,
    effort: Effort = Effort(seconds=10),  # noqa: B008  frozen
    on_round: Callable[[float, float], None] = lambda share, spread: None,
) -> Iterator[Row]:
    """Images a second of the encoder alone and of every method whole, random weights, contenders taking turns.

    SPADE, whose calls may take seconds, is timed after the others: it would leave them few rounds. An interruption is
    raised after the rows of the rounds that were finished by then.
    """
    torch.manual_seed(seed)
    batch = BATCH.get(device.type, 1)
    images = torch.rand(batch, 3, size, size, device=device)
    unmeasured: list[Row] = []
    speeds = list(_cflow_speeds(encoder, size, images))
    for make in (_padim_speed, _spade_speed):
        made = make(encoder, size, images)
        if isinstance(made, Row):
            unmeasured.append(made)
        elif made is not None:
            speeds.append(made)
    tracks = [Track(speed.run) for speed in speeds]
    interrupted: KeyboardInterrupt | None = None
    with torch.no_grad():
        for track in tracks:
            _warm_up(track)
        slow = [track for speed, track in zip(speeds, tracks, strict=True) if speed.contender == "spade"]
        together = [some for some in ([track for track in tracks if track not in slow], slow) if some]
        each = replace(effort, seconds=effort.seconds / len(together))
        try:
            for done, some in enumerate(together):

                def tell(share: float, spread: float, done: int = done) -> None:
                    on_round((done + share) / len(together), spread)

                take_turns(some, clock(device), each, on_round=tell)
        except KeyboardInterrupt as error:
            interrupted = error
    for speed, track in zip(speeds, tracks, strict=True):
        yield _speed_row(speed, track, encoder, size, batch, device)
    yield from unmeasured
    if interrupted:
        raise interrupted


def _warm_up(track: Track) -> None:
    try:
        track.run()
    except RuntimeError as error:  # out of memory, above all
        track.error = error


def _cflow_speeds(name: str, size: int, images: Tensor) -> Iterator[Speed]:
    model = CFlowAD(name, pretrained=False, image_size=size, precision="fp32").to(images.device).eval()
    model.log_prob_max.zero_()  # a map needs maxima, and its time does not depend on them
    encoder = model.encoder
    yield Speed(
        "encoder",
        "encoder only",
        "fp32",
        ("encoder", name),
        _in_fp32(lambda: encode(encoder, images)),
        _bytes_of(encoder),
    )
    if is_installed("FrEIA"):
        sequences = [decoder.to_freia().to(images.device).eval() for decoder in model.decoders]  # type: ignore[operator]
        size_of_all = _bytes_of(encoder) + sum(map(_bytes_of, sequences))
        label = "CFLOW-AD, FrEIA's modules on all rows, image to map"
        yield Speed("freia", label, "fp32", ("cflow", name), _reference(model, sequences, images), size_of_all)
    for precision in dict.fromkeys(("fp32", resolve_precision("auto", images.device))):
        yield Speed(
            "cflow-fast",
            "CFLOW-AD, image to map",
            precision,
            ("cflow", name),
            _with_precision(model, precision, images),
            _bytes_of(encoder) + _bytes_of(model.decoders),
        )


def _reference(model: CFlowAD, sequences: Sequence[torch.nn.Module], images: Tensor) -> Callable[[], object]:
    """The same weights by FrEIA in fp32, positional encodings made beforehand."""
    encodings = [rows_encoding(model.options["condition"], maps) for maps in encode(model.encoder, images)]

    def run() -> Tensor:
        maps = zip(sequences, encode(model.encoder, images), encodings, strict=True)
        log_probs = [row_log_prob(sequence, m, encoding) / m.shape[1] for sequence, m, encoding in maps]
        return eager_map(log_probs, images.shape[2])

    return _in_fp32(run)


def _with_precision(model: CFlowAD, precision: str, images: Tensor) -> Callable[[], Tensor]:
    """The same model in another precision, beside bf16 or fp16 its encoder too; decoders are folded at first."""
    other = copy.deepcopy(model)
    other.precision, other.encoder_precision = precision, precision if precision in HALVES else "fp32"

    def run() -> Tensor:
        with matmul_precision(precision):
            return other(images)

    return run


def _in_fp32(run: Callable[[], object]) -> Callable[[], object]:
    def in_fp32() -> object:
        with matmul_precision("fp32"):
            return run()

    return in_fp32


def _padim_speed(name: str, size: int, images: Tensor) -> Speed | Row | None:
    """With statistics made up: its time does not depend on them."""
    if name not in RESNET_SCALES:
        return None
    method = PaDiM(_resnet_encoder(name, images))
    d, positions = len(method.selected), _resnet_positions(size)[0]
    try:
        require_memory("PaDiM", padim.counted_bytes(d, positions), images.device)
    except NotEnoughMemoryError as error:
        return _unmeasured("padim", name, size, images, "out of memory", str(error))
    method.mean = torch.zeros(positions, d, device=images.device)
    method.whitening = torch.empty(positions, d, d, device=images.device).normal_().tril_()
    return Speed(
        "padim",
        "PaDiM, image to map",
        "fp32",
        ("padim", name),
        _in_fp32(lambda: method.anomaly_map(images)),
        method.model_bytes,
    )


def _spade_speed(name: str, size: int, images: Tensor) -> Speed | Row | None:
    """With a gallery of as many images as it compares with: the search for those takes no time worth measuring."""
    if name not in RESNET_SCALES:
        return None
    channels, positions = RESNET_SCALES[name], _resnet_positions(size)
    flop = len(images) * spade.counted_flop(channels, positions)
    expected = flop / matrix_rate("fp32", images.device)
    if expected > LONGEST_CALL:
        note = f"{flop / 1e12:.1f} TFLOP a call are counted, {expected:.0f} s at this device's matrix rate"
        return _unmeasured("spade", name, size, images, "not available", f"not measured: {note}")
    gallery = spade.counted_bytes(channels, positions, spade.NEIGHBOURS)
    method = SPADE(_resnet_encoder(name, images))
    try:
        require_memory("SPADE's gallery", gallery, images.device)
    except NotEnoughMemoryError as error:
        return _unmeasured("spade", name, size, images, "out of memory", str(error))
    method.fit(torch.rand_like(images[:1]) for _ in range(spade.NEIGHBOURS))
    return Speed(
        "spade",
        "SPADE, image to map",
        "fp32",
        ("spade", name),
        _in_fp32(lambda: method.anomaly_map(images)),
        method.model_bytes,
        note=f"a gallery of {spade.NEIGHBOURS} images",
    )


def _resnet_positions(size: int) -> list[int]:
    return [(-(-size // stride)) ** 2 for stride in (4, 8, 16)]


def _resnet_encoder(name: str, images: Tensor) -> Encoder:
    encoder = Encoder(name, ("layer1", "layer2", "layer3"), pretrained=False).to(images.device)
    return encoder.to(memory_format=torch.channels_last)


def _speed_row(speed: Speed, track: Track, encoder: str, size: int, batch: int, device: torch.device) -> Row:
    figure = TABLE_6.get(speed.paper)
    axes: dict[str, str | int | float | bool] = {"encoder": encoder, "size": size, "batch": batch}
    case = f"speed, {encoder}, {size} px, batch {batch}: {speed.label}"
    base = Row("complexity", case, axes, speed.contender, speed.precision, device.type, note=speed.note)
    if track.error is not None:
        out = isinstance(track.error, torch.OutOfMemoryError)
        note = f"{type(track.error).__name__}: {track.error}".splitlines()[0]
        return replace(base, status="out of memory" if out else "failed", note=note)
    if not track.seconds:
        return replace(base, status="not available", note="interrupted before a round was finished")
    summary = summarize(track.seconds)
    return replace(
        base,
        seconds=summary,
        images_per_second=batch / summary.median,
        model_bytes=speed.model_bytes,
        extra={"table": 6, "paper_fps": figure.fps(size) if figure else None},
    )


def _unmeasured(contender: str, encoder: str, size: int, images: Tensor, status: str, note: str) -> Row:
    axes: dict[str, str | int | float | bool] = {"encoder": encoder, "size": size, "batch": len(images)}
    case = f"speed, {encoder}, {size} px, batch {len(images)}: {contender}"
    figure = TABLE_6.get((contender, encoder))
    extra = {"table": 6, "paper_fps": figure.fps(size) if figure else None}
    return Row("complexity", case, axes, contender, "fp32", images.device.type, status=status, note=note, extra=extra)


def _bytes_of(module: torch.nn.Module) -> int:
    return sum(tensor.numel() * tensor.element_size() for tensor in [*module.parameters(), *module.buffers()])
