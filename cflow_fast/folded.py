"""The folded decoder: immutable, fast, for inference only."""

from __future__ import annotations

import functools
from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor, nn

from cflow_fast import ops
from cflow_fast.decoder import FlowDecoder, check_map_or_rows, check_maps, check_rows
from cflow_fast.folding import fold_weights
from cflow_fast.kernels import registration
from cflow_fast.kernels.registration import Flow, FlowDescription, FlowDispatch
from cflow_fast.kernels.weights import FlowWeights, mixing_kind
from cflow_fast.positional import encoding_factors
from cflow_fast.precision import Arithmetic, arithmetic, resolve_precision


class FoldedDecoder(nn.Module):
    """A decoder with everything folded that can be, computing the same likelihoods. Made by `FlowDecoder.fold`.

    `log_prob(features)` for maps, `log_prob(z, c)` for rows, `u, log_det = folded(z, [c])` as FrEIA's SequenceINN.
    Its weights are buffers; `arithmetic` says what it stores and multiplies in. On its first use on a device it makes
    a working copy there, in the layout that is fastest (and in float32 where bf16 cannot be multiplied).

    It has no inverse, no gradients and no training mode (`train()` changes nothing): keep the FlowDecoder for those.
    Under torch.compile and torch.export `log_prob` is one op, `cflow_fast::flow_log_prob`, and a call another,
    `cflow_fast::flow_rows`.
    """

    def __init__(self, weights: FlowWeights, precision: str) -> None:
        super().__init__()
        self.precision = precision
        self.features, self.condition = weights.features, weights.condition
        self._constants: dict[str, Any] = {
            "activation": weights.activation,
            "clamp": weights.clamp,
            "log_scale": weights.log_scale,
        }
        self._mixing_kind = mixing_kind(weights.mixing)
        self._tensor_names = tuple(weights.tensors())
        for name, tensor in weights.tensors().items():
            self.register_buffer(name, tensor)
        super().train(False)

    @classmethod
    @torch.no_grad()
    def from_decoder(cls, decoder: FlowDecoder, precision: str = "auto") -> FoldedDecoder:
        """As `FlowDecoder.fold`. Raises ValueError for a precision that is none."""
        resolved = resolve_precision(precision, decoder.device, decoder.dtype)
        storage = arithmetic(resolved, decoder.device).storage
        return cls(fold_weights(decoder, storage), resolved)

    @property
    def arithmetic(self) -> Arithmetic:
        """What is stored and what is multiplied in, on the device where the decoder now is."""
        return arithmetic(self.precision, self.device)

    @property
    def device(self) -> torch.device:
        return self.get_buffer("b1").device

    @property
    def weights(self) -> FlowWeights:
        """The folded tensors, as the kernels take them."""
        return registration.as_weights(self._tensors, self._description)

    def log_prob(self, features: Tensor, c: Tensor | None = None) -> Tensor:
        """Natural log-likelihood in nats (eq. 8), not divided by D; float32, or float64 in precision "fp64".

        features: maps (B, D, H, W) in any memory format, to (B, H, W), under the positional encoding; or rows (N, D)
        with their own condition c (N, C), to (N,). Features that are not finite give NaN or -inf at their own position
        and nowhere else.
        Raises ValueError for another shape, TypeError for integer or complex features, RuntimeError for features that
        ask for gradients.
        """
        check_map_or_rows(features, c)
        if features.dim() == 2:
            condition = check_rows(features, None if c is None else [c], self.features, self.condition)
        else:
            condition = None
            check_maps(features, self.features)
        _refuse_gradients(features, condition)
        return registration.flow_log_prob(features, condition, self._tensors, self._description)

    def forward(
        self, x_or_z: Tensor, c: Sequence[Tensor] | None = None, rev: bool = False, jac: bool = True
    ) -> tuple[Tensor, Tensor]:
        """Feature vectors z (N, D) under [condition (N, C)] to u (N, D) and log|det du/dz| (N,), as FrEIA's modules.

        The arguments have FrEIA's names.
        """
        if rev:
            raise RuntimeError(
                "a folded decoder has no inverse (rev=True): use the FlowDecoder that it was folded from"
            )
        condition = check_rows(x_or_z, c, self.features, self.condition)
        _refuse_gradients(x_or_z, condition)
        return registration.flow_rows(x_or_z, condition, self._tensors, self._description)

    @property
    def flow(self) -> Flow:
        """The working copy on the decoder's device, made on first use."""
        return registration.prepared_flow(self._tensors, self._description)

    @property
    def _tensors(self) -> list[Tensor]:
        return [getattr(self, name) for name in self._tensor_names]

    @property
    def _description(self) -> FlowDescription:
        return FlowDescription(self._mixing_kind, **self._constants, precision=self.precision)

    def train(self, mode: bool = True) -> FoldedDecoder:
        """It stays in evaluation: models that hold it switch back and forth (anomalib's at the end of every call)."""
        return super().train(False)

    def extra_repr(self) -> str:
        w = self.weights
        return (
            f"features={w.features}, condition={w.condition}, coupling_blocks={w.blocks}, "
            f"permutations={self._mixing_kind!r}, precision={str(self.arithmetic)!r}"
        )

    def _apply(self, fn: Any, recurse: bool = True) -> FoldedDecoder:
        """Move between devices; a change of dtype leaves what was folded as it is."""
        device = fn(torch.empty(0, device=self.device)).device
        return super()._apply(lambda tensor: tensor.to(device), recurse)

    def get_extra_state(self) -> Tensor:
        """The one number of the weights that is no tensor: log_scale, in float64."""
        return torch.tensor(self._constants["log_scale"], dtype=torch.float64)

    def set_extra_state(self, state: Tensor) -> None:
        self._constants["log_scale"] = float(state)


def _prepare(weights: FlowWeights, precision: str) -> Flow:
    return ops.prepare_flow(weights, arithmetic(precision, weights.device))


registration.use(FlowDispatch(_prepare, functools.lru_cache(maxsize=32)(encoding_factors)))


def _refuse_gradients(*tensors: Tensor | None) -> None:
    if any(tensor is not None and tensor.requires_grad for tensor in tensors):
        raise RuntimeError(
            "a folded decoder has no gradients: detach the features, or use the FlowDecoder that it was folded from"
        )
