"""Where the rows of a product lie in memory: loose feature vectors, feature maps in any strides, or a kept state."""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import Any

from torch import Tensor


@dataclass(frozen=True)
class MapGeometry:
    """Rows counted through maps, position by position: row r is column r % width of line (r // width) % height."""

    height: int
    width: int
    line_stride: int
    image_stride: int


@dataclass(frozen=True)
class Rows:
    """Feature k of row r is element r row_stride + k feature_stride from the start of `tensor`.

    maps: rows go through maps instead of being evenly spaced; row_stride is then the step from column to column.
    outer: the caller's own tensor, of any dtype and nothing readable beyond its rows and features. Otherwise a
    workspace: operands, or float32 that is rounded on loading, its rows padded to whole tiles.
    index: input k is the feature index[k], where a state keeps its features in an order of its own.
    low: in the same strides, what rounding left, where a workspace holds operands in two parts.
    scale: (padded count,) float32, the power of two that every row was divided by (see `scaling`).
    """

    tensor: Tensor
    count: int
    features: int
    row_stride: int
    feature_stride: int
    outer: bool = False
    maps: MapGeometry | None = None
    index: Tensor | None = None
    low: Tensor | None = None
    scale: Tensor | None = None

    def narrow(self, start: int, features: int) -> Rows:
        """Some of the features, one after another."""
        return replace(self, tensor=self.tensor.narrow(1, start, features), features=features)

    def addresses(self, prefix: str) -> dict[str, Any]:
        """The kernel arguments that say where rows begin."""
        maps = self.maps or MapGeometry(0, 0, 0, 0)
        return {
            f"{prefix}_row_stride": self.row_stride,
            f"{prefix}_feature_stride": self.feature_stride,
            f"{prefix}_line_stride": maps.line_stride,
            f"{prefix}_image_stride": maps.image_stride,
            f"{prefix}_height": maps.height,
            f"{prefix}_width": maps.width,
        }


def loose_rows(z: Tensor) -> Rows:
    """(N, D) in any strides."""
    rows, features = z.shape
    return Rows(z, rows, features, z.stride(0), z.stride(1), outer=True)


def map_rows(features: Tensor) -> Rows:
    """(B, D, H, W) in any strides: B H W rows, evenly spaced where the strides allow it."""
    batch, channels, height, width = features.shape
    image_stride, feature_stride, line_stride, row_stride = features.stride()
    if width == 1:
        row_stride = line_stride
    if height == 1 or width == 1 or line_stride == width * row_stride:  # no gap between lines: one long line
        height, width = 1, height * width
    if height == 1 and (batch == 1 or image_stride == width * row_stride):
        return Rows(features, batch * width, channels, row_stride, feature_stride, outer=True)
    maps = MapGeometry(height, width, line_stride, image_stride)
    return Rows(features, batch * height * width, channels, row_stride, feature_stride, outer=True, maps=maps)
