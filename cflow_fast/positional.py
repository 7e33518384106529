"""The 2D sinusoidal positional encoding that CFLOW-AD conditions its decoders on."""

from __future__ import annotations

import torch
from torch import Tensor


def positional_encoding(channels: int, height: int, width: int) -> Tensor:
    """Encode every position of an H x W map, the condition vectors of the paper: float64 (C, H, W).

    For i < C/4: c[2i] = sin(column 10000^(-4i/C)) and c[2i+1] = cos(the same); the channels from C/2 on are the same
    in the row. Raises ValueError unless C is a positive multiple of 4.
    """
    rows, columns = encoding_factors(channels, height, width)
    by_column = columns.t().unsqueeze(1).expand(-1, height, -1)
    by_row = rows.t().unsqueeze(2).expand(-1, -1, width)
    return torch.cat([by_column, by_row])


def encoding_factors(channels: int, height: int, width: int) -> tuple[Tensor, Tensor]:
    """The encoding's two factors, float64: the half over rows (H, C/2) and the half over columns (W, C/2)."""
    if channels < 4 or channels % 4:
        raise ValueError(f"a positional encoding needs a positive multiple of 4 channels, got {channels}")
    return _sinusoid(channels, height), _sinusoid(channels, width)


def _sinusoid(channels: int, length: int) -> Tensor:
    """sin and cos in turn, (length, C/2)."""
    frequency = 10000.0 ** (-4.0 * torch.arange(channels // 4, dtype=torch.float64, device="cpu") / channels)
    angle = torch.arange(length, dtype=torch.float64, device="cpu").unsqueeze(1) * frequency
    return torch.stack([angle.sin(), angle.cos()], dim=2).flatten(1)
