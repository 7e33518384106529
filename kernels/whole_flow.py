"""Narrow decoders, up to 256 features or so, 192 with soft permutations: all blocks in one launch.

Every program reads the features of its rows once, carries them through all coupling blocks, in registers or, where
they are permuted by index, in a scratch of its own, and writes one number per row (`whole_flow_kernel`), on weights
padded once (`whole_flow_weights`):

    log p = -(||u||^2 + D ln 2 pi) / 2 + log_det                 the same as `flow.run_flow`, block by block
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from cflow_fast.kernels.chip import Chip
from cflow_fast.kernels.configs import WholeFlowConfig
from cflow_fast.kernels.flow import FlowResult
from cflow_fast.kernels.launch import Launch
from cflow_fast.kernels.tuning import select_whole_flow
from cflow_fast.kernels.whole_flow_kernel import whole_flow_kernel
from cflow_fast.kernels.whole_flow_weights import WholeFlowWeights

ARRAYS = (
    *("w1", "w1_condition", "b1", "w2", "b2"),
    *("matrix", "offset", "rotation", "angle", "passive_output"),
    *("index", "pending", "final", "place"),
)
"""What the kernel takes of the prepared weights."""
READABLE = (torch.float32, torch.bfloat16, torch.float16)
"""Dtypes of features and conditions that the kernel reads as they are."""


def whole_flow_map(
    features: Tensor,
    prepared: WholeFlowWeights,
    tables: Tensor | None,
    config: WholeFlowConfig | None = None,
) -> Tensor:
    """Natural log-likelihood of every position of maps (B, D, H, W), in any strides: (B, H, W) float32.

    tables: `prepared.tables` of the positional tables for H x W; None when the decoder has no condition.
    Raises ValueError where the decoder is too wide for this kernel and no config is given.
    """
    batch, _, height, width = features.shape
    log_prob = torch.empty(batch, height, width, device=features.device)
    if log_prob.numel():
        map_launch(_readable(features), prepared, tables, log_prob, config).run()
    return log_prob


def whole_flow_rows(
    z: Tensor, condition: Tensor | None, prepared: WholeFlowWeights, want_u: bool, config: WholeFlowConfig | None = None
) -> FlowResult:
    """Loose feature vectors (N, D) with a condition (N, C) each, in any strides; u comes back as (N, D) float32."""
    count, features = z.shape
    log_prob, log_det = (torch.empty(count, device=z.device) for _ in range(2))
    u = torch.empty(count, features, device=z.device) if want_u else None
    if count:
        c = None if condition is None else prepared.operands(condition)
        rows_launch(_readable(z), c, prepared, FlowResult(log_prob, log_det, u), config).run()
    return FlowResult(log_prob, log_det, u)


def map_launch(
    features: Tensor,
    prepared: WholeFlowWeights,
    tables: Tensor | None,
    log_prob: Tensor,
    config: WholeFlowConfig | None = None,
) -> Launch:
    """What `whole_flow_map` launches; a function of shapes, strides and dtypes, so that meta tensors do as well."""
    batch, _, height, width = features.shape
    config = config or _select(features, prepared, batch * height * width)
    cover = IN_ORDER
    if (tables is None) != (prepared.w1_condition is None):
        raise ValueError(
            f"positional tables go with a condition; the decoder has {prepared.weights.condition} channels of it"
        )
    if tables is not None and prepared.precision != "ieee":
        cover = Cover.of_maps(batch, height, width, config.block_rows, prepared.main + prepared.side)
    image_stride, feature_stride, line_stride, column_stride = features.stride()
    if tables is not None:
        expected = (prepared.weights.blocks, height + width, prepared.hidden)
        if tables.shape != expected:
            raise ValueError(
                f"tables of shape {expected} are expected (see WholeFlowWeights.tables), got {tuple(tables.shape)}"
            )
    place: dict[str, Any] = {
        "images": batch,
        "height": height,
        "width": width,
        "image_stride": image_stride,
        "feature_stride": feature_stride,
        "line_stride": line_stride,
        "column_stride": column_stride,
    }
    kind = "none" if tables is None else "tables"
    args = place | {"tables_ptr": tables, "log_prob_ptr": log_prob}
    return _launch(features, args, kind, prepared, cover, config)


def rows_launch(
    z: Tensor,
    condition: Tensor | None,
    prepared: WholeFlowWeights,
    out: FlowResult,
    config: WholeFlowConfig | None = None,
) -> Launch:
    """What `whole_flow_rows` launches: rows are the lines of one map that is one column wide.

    condition: `prepared.operands` of the rows' conditions.
    """
    config = config or _select(z, prepared, len(z), condition is not None)
    place: dict[str, Any] = {
        "images": 1,
        "height": len(z),
        "width": 1,
        "image_stride": 0,
        "feature_stride": z.stride(1),
        "line_stride": z.stride(0),
        "column_stride": 0,
    }
    kind = "none" if condition is None else "rows"
    outputs = {"log_prob_ptr": out.log_prob, "log_det_ptr": out.log_det, "u_ptr": out.u}
    return _launch(z, place | outputs | {"condition_ptr": condition}, kind, prepared, IN_ORDER, config)


@dataclass(frozen=True)
class Cover:
    """How a program's rows lie on the maps: a patch of lines x columns in so many images, or (columns = 0) one after
    another.

    entries: places for the lines and columns that a tile touches, of which one product adds the positional tables;
    0 where they are added element by element.
    """

    images: int
    lines: int
    columns: int
    entries: int

    @classmethod
    def of_maps(cls, batch: int, height: int, width: int, rows: int, places: int) -> Cover:
        """The cover of least work for tiles of `rows`: what lies outside the maps costs products, and so do entries.

        places: that a half of the features is padded to.
        """
        sides = [1 << i for i in range(rows.bit_length())]
        covers = [
            cls(rows // (lines * columns), lines, columns, _entries(lines + columns))
            for lines in sides
            for columns in sides
            if lines * columns <= rows
        ]
        lines = (rows + width - 2) // width + 1
        covers.append(cls(0, lines, 0, _entries(lines + width)))
        return min(covers, key=lambda c: c.programs(batch, height, width, rows) * (c.entries + 3 * places))

    def programs(self, batch: int, height: int, width: int, rows: int) -> int:
        if not self.columns:
            return -(-batch * height * width // rows)
        return -(-batch // self.images) * -(-height // self.lines) * -(-width // self.columns)


IN_ORDER = Cover(0, 0, 0, 0)


def _entries(touched: int) -> int:
    return max(16, 1 << (touched - 1).bit_length())


def _select(features: Tensor, prepared: WholeFlowWeights, rows: int, own_condition: bool = False) -> WholeFlowConfig:
    chip = Chip.of(features.device)
    config = select_whole_flow(chip, prepared.weights.features, rows, prepared.precision, own_condition, prepared.hard)
    if config is None:
        raise ValueError(
            f"a decoder of {prepared.weights.features} features does not fit one kernel in {prepared.precision}"
        )
    return config


def _launch(
    features: Tensor,
    own: dict[str, Any],
    condition: str,
    prepared: WholeFlowWeights,
    cover: Cover,
    config: WholeFlowConfig,
) -> Launch:
    weights = prepared.weights
    if not prepared.hard and prepared.side and prepared.side < _columns_beside(config):
        raise ValueError(f"{config.warps} warps cannot share {prepared.side} columns of {config.block_rows} rows")
    programs = cover.programs(own["images"], own["height"], own["width"], config.block_rows)
    if programs * config.block_rows >= 2**31:
        raise ValueError(f"at most 2^31 - 1 positions can be given at once, got {own['log_prob_ptr'].numel()}")
    scratch = None
    if prepared.hard:
        scratch = features.new_empty(programs * weights.features * config.block_rows, dtype=torch.float32)
    channels = 0 if prepared.w1_condition is None else prepared.w1_condition.shape[2]
    args = {
        "features_ptr": features,
        "condition_ptr": None,
        "tables_ptr": None,
        **{f"{name}_ptr": getattr(prepared, name) for name in ARRAYS},
        "scratch_ptr": scratch,
        "log_prob_ptr": None,
        "log_det_ptr": None,
        "u_ptr": None,
        **own,
        "clamp": float(weights.clamp),
        "log_scale": float(weights.log_scale),
        "log_normaliser": weights.log_scale - 0.5 * weights.features * math.log(2 * math.pi),
    }
    constexprs = {
        "BLOCKS": weights.blocks,
        "MATRICES": 0 if prepared.matrix is None else len(prepared.matrix),
        "HARD": prepared.hard,
        "ACTIVATION": weights.activation,
        "CONDITION": condition,
        "CHANNELS": channels,
        "PASSIVE": weights.passive,
        "ACTIVE": weights.active,
        "MAIN": prepared.main,
        "SIDE": prepared.side,
        "HIDDEN": prepared.hidden,
        "PRECISION": prepared.precision,
        "IMAGES": cover.images,
        "LINES": cover.lines,
        "COLUMNS": cover.columns,
        "ENTRIES": cover.entries,
        "BLOCK_ROWS": config.block_rows,
        "BLOCK_HIDDEN": math.gcd(config.block_hidden, prepared.hidden),
        "BLOCK_CHANNELS": math.gcd(channels, 64),
        "STAGES": config.stages,
    }
    options = {"num_warps": config.warps, "num_stages": config.stages, "enable_fp_fusion": True}
    return Launch(whole_flow_kernel, (programs,), args, constexprs, options)


def _columns_beside(config: WholeFlowConfig) -> int:
    """The narrowest matrix instruction for every group of four warps that has the same rows as another. Where there are
    fewer columns, Triton 3.6 has the second group read beyond the shared memory that it was given."""
    rows_of_a_group = 64
    if config.block_rows < rows_of_a_group:
        return 0
    return 16 * max(1, config.warps // 4 // (config.block_rows // rows_of_a_group))


def _readable(x: Tensor) -> Tensor:
    return x if x.dtype in READABLE else x.float()
