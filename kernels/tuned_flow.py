"""A folded decoder on a GPU that takes, call by call, what the tuning table names: Triton's kernels or the plain path.

Where the table says nothing, Triton; but in fp32 without the matrix units, where a wide decoder, or a narrow one of
many rows, is nothing but products, the plain path: the library's are more than twice as fast (bench/results). The same
for loose rows.
"""

from __future__ import annotations

import threading

import torch
from torch import Tensor

from cflow_fast.kernels import tuning
from cflow_fast.kernels.capture import finish, in_capture, on_device
from cflow_fast.kernels.configs import MOST_ROWS_WITHOUT_MATRIX_UNITS
from cflow_fast.kernels.flow import FlowResult
from cflow_fast.kernels.torch_flow import TorchFlow
from cflow_fast.kernels.triton_flow import TritonFlow
from cflow_fast.kernels.tuning_table import DecoderProblem
from cflow_fast.kernels.weights import FlowWeights, mixing_kind


class TunedFlow:
    """Safe from several threads. What the plain path needs is made when it is first taken, in no capture."""

    def __init__(self, weights: FlowWeights, precision: str, operand_dtype: torch.dtype) -> None:
        self.weights = weights
        self.triton = TritonFlow(weights, precision)
        self.operand_dtype = operand_dtype
        self._plain: TorchFlow | None = None
        self._lock = threading.Lock()

    def log_prob_map(self, features: Tensor, encoding: tuple[Tensor, Tensor] | None) -> Tensor:
        batch, _, height, width = features.shape
        flow: TritonFlow | TorchFlow = self.triton
        with on_device(features.device):  # the plain path launches Triton's kernels between its products
            if self.backend(batch * height * width) == "plain":
                flow = self._ready(height, width, encoding) or flow
            return flow.log_prob_map(features, encoding)

    def rows(self, z: Tensor, condition: Tensor | None, want_u: bool) -> FlowResult:
        if self._unmeasured(len(z), own_condition=condition is not None) == "plain":
            with on_device(z.device), self._lock:
                if self._plain is None and not in_capture(self.weights.device):
                    self._plain = self.plain()
                    finish(self.weights.device)
            if self._plain is not None:
                with on_device(z.device):
                    return self._plain.rows(z, condition, want_u)
        return self.triton.rows(z, condition, want_u)

    def launches_often(self, rows: int, own_condition: bool) -> bool:
        taken = self._unmeasured(rows, own_condition) if own_condition else self.backend(rows)
        return taken == "triton" and self.triton.launches_often(rows, own_condition)

    def backend(self, rows: int) -> str:
        """What the table names for so many positions at once."""
        weights = self.weights
        problem = DecoderProblem(
            weights.features,
            weights.condition,
            weights.blocks,
            mixing_kind(weights.mixing),
            self.triton.precision,
            rows,
        )
        chosen = tuning.choice(problem, self.triton.chip)
        if chosen is None:
            return self._unmeasured(rows)
        return chosen.backend if self._as_measured() else "triton"

    def _unmeasured(self, rows: int, own_condition: bool = False) -> str:
        """What is taken where no table says."""
        many = rows > MOST_ROWS_WITHOUT_MATRIX_UNITS or self.triton.launches_often(rows, own_condition)
        return "plain" if self.triton.precision == "ieee" and many and self._as_measured() else "triton"

    def plain(self) -> TorchFlow:
        """A plain path of its own."""
        return TorchFlow(self.weights, self.operand_dtype, packed=False, fused=True)

    def _as_measured(self) -> bool:
        """PyTorch's float32 products are float32, unless the caller switched tf32 on for the whole process."""
        try:
            return self.operand_dtype != torch.float32 or torch.get_float32_matmul_precision() == "highest"
        except RuntimeError:  # which of PyTorch's two ways of asking applies is not told
            return False

    def _ready(self, height: int, width: int, encoding: tuple[Tensor, Tensor] | None) -> TorchFlow | None:
        """The plain path with its tables for H x W; None where they would have to be made inside a capture."""
        with self._lock:
            plain = self._plain
            if plain is None or (encoding is not None and (height, width) not in plain.tables):
                if in_capture(self.weights.device):
                    return None
                plain = plain or self.plain()
                if encoding is not None:
                    plain._tables_for(height, width, encoding)
                finish(self.weights.device)
                self._plain = plain
            return plain
