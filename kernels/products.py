"""Two ways of making the products of a folded decoder on a CPU, and the general one anywhere else.

`MatmulProducts` keeps the state feature-major, (features, rows): an NCHW map of one image is already that, both halves
are contiguous and a product is W X. It runs on every device and in every precision.
`OneDnnProducts` keeps it row-major and multiplies by weights that oneDNN packed once, with bias and an addition or an
activation in the product's own epilogue. Where the CPU's vector units are wide this is the faster one.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from cflow_fast.kernels.weights import NARROW, FlowWeights, SoftMixing


@dataclass(frozen=True)
class ProductFamily:
    """One family of products: a matrix (K, out, in) and a bias (K, out) or none."""

    matrix: Tensor
    bias: Tensor | None


def product_families(weights: FlowWeights) -> dict[str, ProductFamily]:
    """Every product that a folded decoder may make, by the names that `Products.product` takes."""
    active, passive = weights.active, weights.passive
    conditional = weights.w1_condition is not None
    table = {
        "w1": ProductFamily(weights.w1, None if conditional else weights.b1),
        "w2_scale": ProductFamily(weights.w2[:, :active], weights.b2[:, :active]),
        "w2_shift": ProductFamily(weights.w2[:, active:], weights.b2[:, active:]),
    }
    if weights.w1_condition is not None:
        table["w1_condition"] = ProductFamily(weights.w1_condition, weights.b1)
    if isinstance(weights.mixing, SoftMixing):
        soft = weights.mixing
        table["matrix_passive"] = ProductFamily(soft.matrix[:, :passive], soft.offset[:, :passive])
        table["matrix_active"] = ProductFamily(soft.matrix[:, passive:], soft.offset[:, passive:])
        table["passive"] = ProductFamily(soft.passive, soft.passive_offset)
        table["active"] = ProductFamily(soft.active, soft.active_offset)
        table["output"] = ProductFamily(soft.output, None)
        table["passive_output"] = ProductFamily(soft.passive_output, None)
    return table


_MIXING = frozenset({"matrix_passive", "matrix_active", "passive", "active", "output", "passive_output"})


def precision_of(name: str, weights: FlowWeights, operands: torch.dtype, state: torch.dtype | None) -> torch.dtype:
    """What a product is made in: `operands`, or `state` for those whose rounding the likelihood would show.

    state: None for the state's precision on a CPU, where a product in bf16 comes out rounded to bf16, which neither a
    state should be nor what a narrow decoder scales it by; and for `operands` elsewhere, see `_gives_sums`.
    """
    shows = name in _MIXING or (name == "w2_scale" and weights.features < NARROW)
    if not shows:
        return operands
    return state or (weights.state_dtype if weights.device.type == "cpu" else operands)


def _gives_sums(name: str, matrix: Tensor) -> bool:
    """Whether a product in bf16 comes out in the float32 that it was summed in, which a card can do: a state is not to
    be rounded between two blocks."""
    return name in _MIXING and matrix.is_cuda


class _Elementwise(ABC):
    """What lies between the products, one PyTorch operation after the other."""

    weights: FlowWeights
    operand_dtype: torch.dtype
    feature_dim: int

    @abstractmethod
    def product(
        self, name: str, block: int, x: Tensor, add: Tensor | None = None, activation: str = "none"
    ) -> Tensor: ...

    def coupled(self, block: int, hidden: Tensor, x2: Tensor, log_det: Tensor) -> Tensor:
        """t joins inside the product where that adds up in the state's precision, after it where it rounds."""
        j = self.product("w2_scale", block, hidden, activation="tanh")
        j = j.to(self.weights.state_dtype).mul_(self.weights.clamp)
        log_det += j.sum(self.feature_dim)
        scaled = j.exp_().mul_(x2)
        if self.operand_dtype == scaled.dtype:
            return self.product("w2_shift", block, hidden, add=scaled)
        return scaled.add_(self.product("w2_shift", block, hidden))

    def rotated(self, v: Tensor, w: Tensor, cosine: Tensor, sine: Tensor) -> tuple[Tensor, Tensor]:
        cosine, sine = (angle.unsqueeze(1 - self.feature_dim) for angle in (cosine, sine))
        return (v * cosine).addcmul_(w, sine, value=-1), (w * cosine).addcmul_(v, sine)


class MatmulProducts(_Elementwise):
    """Feature-major products by the library's matrix multiplication, each in its `precision_of`."""

    feature_dim = 0

    def __init__(self, weights: FlowWeights, operand_dtype: torch.dtype, state: torch.dtype | None = None) -> None:
        self.weights = weights
        self.operand_dtype = operand_dtype
        self.sums = state is None  # else it says what a state is in
        self.matrices = {
            name: ProductFamily(m.matrix.to(dtype), None if m.bias is None else m.bias.to(bias).unsqueeze(2))
            for name, m in product_families(weights).items()
            for dtype in [precision_of(name, weights, operand_dtype, state)]
            for bias in [weights.state_dtype if self.sums and _gives_sums(name, m.matrix) else dtype]
        }

    def product(self, name: str, block: int, x: Tensor, add: Tensor | None = None, activation: str = "none") -> Tensor:
        family = self.matrices[name]
        matrix = family.matrix[block]
        bias, x = None if family.bias is None else family.bias[block], x.to(matrix.dtype)
        if self.sums and _gives_sums(name, matrix) and matrix.dtype == torch.bfloat16:
            assert add is None
            y = torch.mm(matrix, x, out_dtype=torch.float32)
            y = y if bias is None else y.add_(bias)
        elif add is not None:
            y = add.to(matrix.dtype).addmm_(matrix, x)
            y = y if bias is None else y.add_(bias)
        else:
            y = torch.mm(matrix, x) if bias is None else torch.addmm(bias, matrix, x)
        return _activate(y, activation)


class FusedProducts(MatmulProducts):
    """On a card with Triton: s and t in one product, and what lies between the products in one launch each."""

    def __init__(self, weights: FlowWeights, operand_dtype: torch.dtype, state: torch.dtype | None = None) -> None:
        super().__init__(weights, operand_dtype, state)
        del self.matrices["w2_scale"], self.matrices["w2_shift"]
        self.matrices["w2"] = ProductFamily(weights.w2.to(operand_dtype), weights.b2.to(operand_dtype).unsqueeze(2))

    def coupled(self, block: int, hidden: Tensor, x2: Tensor, log_det: Tensor) -> Tensor:
        y2, sums = pointwise().coupled(self.product("w2", block, hidden), x2.contiguous(), self.weights.clamp)
        log_det += sums
        return y2

    def rotated(self, v: Tensor, w: Tensor, cosine: Tensor, sine: Tensor) -> tuple[Tensor, Tensor]:
        return pointwise().rotated(v, w, cosine, sine)


def pointwise() -> Any:
    """The module, which needs Triton: there may be none where it is not used."""
    from cflow_fast.kernels import pointwise

    return pointwise


def _activate(y: Tensor, activation: str) -> Tensor:
    match activation:
        case "relu":
            return y.relu_()
        case "tanh":
            return y.tanh_()
        case "softplus":
            return F.softplus(y)
        case _:
            return y


class OneDnnProducts(_Elementwise):
    """Row-major products on weights packed for oneDNN, float32 or bfloat16, on a CPU.

    A linear layer takes a bias and either an addition or an activation into its epilogue. A 1 x 1 convolution would
    take all three, but one that was packed for another number of rows may be repacked at every call.
    """

    feature_dim = 1

    def __init__(
        self, weights: FlowWeights, operand_dtype: torch.dtype, rows: int, state: torch.dtype | None = None
    ) -> None:
        self.weights = weights
        self.operand_dtype = operand_dtype
        self.bias: dict[str, list[Tensor | None]] = {}
        self.packed: dict[str, list[Tensor]] = {}
        for name, family in product_families(weights).items():
            dtype = precision_of(name, weights, operand_dtype, state)
            self.packed[name] = [
                torch.ops.mkldnn._reorder_linear_weight(matrix.contiguous(), rows) for matrix in family.matrix.to(dtype)
            ]
            blocks = len(family.matrix)
            self.bias[name] = [None] * blocks if family.bias is None else list(family.bias.to(dtype))

    def product(self, name: str, block: int, x: Tensor, add: Tensor | None = None, activation: str = "none") -> Tensor:
        matrix, bias = self.packed[name][block], self.bias[name][block]
        x = x.to(matrix.dtype)
        if add is not None:
            y = torch.ops.mkldnn._linear_pointwise.binary(x, add.to(matrix.dtype), matrix, bias, "add")
            return _activate(y, activation)
        if activation == "softplus":
            return F.softplus(torch.ops.mkldnn._linear_pointwise(x, matrix, bias, "none", [], ""))
        return torch.ops.mkldnn._linear_pointwise(x, matrix, bias, activation, [], "")
