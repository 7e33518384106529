"""What PaDiM and SPADE share: feature pyramids, distances made into anomaly maps, and bounded memory."""

from __future__ import annotations

from collections.abc import Sequence

import torch
import torch.nn.functional as F
from torch import Tensor

from cflow_fast.encoders import Encoder
from cflow_fast.errors import CFlowFastError

SIGMA = 4.0
"""Standard deviation, in pixels, of the Gaussian that both papers smooth their maps with."""


class NotEnoughMemoryError(CFlowFastError):
    """A method's state would not fit into the memory that is free."""


def encode(encoder: Encoder, images: Tensor) -> list[Tensor]:
    """Images (B, 3, H, W), RGB in [0, 1], on any device, to the encoder's maps."""
    return encoder(images.to(encoder.mean.device).contiguous(memory_format=torch.channels_last))


def pyramid(features: Sequence[Tensor]) -> Tensor:
    """Maps (B, D_k, H_k, W_k) to one of all channels at the first map's resolution, each position repeating what
    covers it (nearest): (B, sum of D_k, H_1, W_1)."""
    size = features[0].shape[-2:]
    return torch.cat([f if f.shape[-2:] == size else F.interpolate(f, size=size) for f in features], 1)


def anomaly_maps(distances: Tensor, size: tuple[int, int]) -> Tensor:
    """Distances (B, h, w) upsampled bilinearly to `size` and smoothed: (B, *size)."""
    return smooth(F.interpolate(distances.unsqueeze(1), size=size, mode="bilinear", align_corners=False)).squeeze(1)


def smooth(maps: Tensor, sigma: float = SIGMA) -> Tensor:
    """Gaussian filter of (B, 1, H, W), cut off at four standard deviations and mirrored at the edges.

    Raises ValueError for maps that are no larger than the filter's reach.
    """
    reach = int(4 * sigma + 0.5)
    if min(maps.shape[-2:]) <= reach:
        raise ValueError(f"images are larger than {reach} px, the filter's reach, got {tuple(maps.shape[-2:])}")
    offsets = torch.arange(-reach, reach + 1, dtype=maps.dtype, device=maps.device)
    weights = (-0.5 * (offsets / sigma).square()).exp()
    weights = weights / weights.sum()
    padded = F.pad(maps, [reach] * 4, mode="reflect")
    return F.conv2d(F.conv2d(padded, weights.view(1, 1, -1, 1)), weights.view(1, 1, 1, -1))


def tensor_bytes(tensors: Sequence[Tensor]) -> int:
    return sum(tensor.numel() * tensor.element_size() for tensor in tensors)


def encoder_bytes(encoder: Encoder) -> int:
    """Of its parameters and buffers, up to the last tap."""
    return tensor_bytes([*encoder.parameters(), *encoder.buffers()])


def require_memory(what: str, needed: int, device: torch.device) -> None:
    """Raise NotEnoughMemoryError when `needed` bytes are more than two thirds of what is free on a device."""
    free = free_bytes(device)
    if free is not None and needed > 2 * free // 3:
        raise NotEnoughMemoryError(
            f"{what} needs {needed / 1e9:.1f} GB, and {free / 1e9:.1f} GB are free on {device}: "
            "take smaller images, fewer of them, or a smaller encoder"
        )


def free_bytes(device: torch.device) -> int | None:
    """Memory that a process may still take on a device; None where the system does not say."""
    if device.type == "cuda":
        return torch.cuda.mem_get_info(device)[0]
    try:
        with open("/proc/meminfo", encoding="ascii") as file:
            lines = dict(line.split(":", 1) for line in file)
        return 1024 * int(lines["MemAvailable"].split()[0])
    except (OSError, KeyError, ValueError):
        return None
