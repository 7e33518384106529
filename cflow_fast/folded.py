"""The folded decoder: immutable, fast, for inference only."""

from __future__ import annotations

import copy
from collections.abc import Sequence
from contextlib import AbstractContextManager, nullcontext
from typing import Any

import torch
from torch import Tensor, nn

from cflow_fast import ops
from cflow_fast.decoder import FlowDecoder, check_map_or_rows, check_maps, check_rows
from cflow_fast.folding import fold_weights
from cflow_fast.kernels.torch_flow import TorchFlow
from cflow_fast.kernels.weights import MIXINGS, FlowWeights, mixing_kind
from cflow_fast.positional import encoding_factors
from cflow_fast.precision import Arithmetic, arithmetic, resolve_precision

_MIXING_PREFIX = "mixing_"


class FoldedDecoder(nn.Module):
    """A decoder with everything folded that can be, computing the same likelihoods. Made by `FlowDecoder.fold`.

    `log_prob(features)` for maps, `log_prob(z, c)` for rows, `u, log_det = folded(z, [c])` as FrEIA's SequenceINN.
    Its weights are buffers; `arithmetic` says what it stores and multiplies in. On its first use on a device it makes
    a working copy there, in the layout that is fastest (and in float32 where bf16 cannot be multiplied).

    It has no inverse, no gradients and no training mode: keep the FlowDecoder for those.
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
        self._flow: TorchFlow | None = None
        super().train(False)

    @classmethod
    @torch.no_grad()
    def from_decoder(cls, decoder: FlowDecoder, precision: str = "auto") -> FoldedDecoder:
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
        tensors = {name: self.get_buffer(name) for name in self._tensor_names}
        mixing = {k.removeprefix(_MIXING_PREFIX): v for k, v in tensors.items() if k.startswith(_MIXING_PREFIX)}
        own: dict[str, Any] = {k: v for k, v in tensors.items() if not k.startswith(_MIXING_PREFIX)}
        own.setdefault("w1_condition", None)
        return FlowWeights(**own, **self._constants, mixing=MIXINGS[self._mixing_kind](**mixing))

    @torch.no_grad()
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
            _refuse_gradients(features, condition)
            with _without_autocast(self.device):
                return self.flow.rows(features, condition, want_u=False).log_prob
        check_maps(features, self.features)
        _refuse_gradients(features)
        encoding = encoding_factors(self.condition, *features.shape[2:]) if self.condition else None
        with _without_autocast(self.device):
            return self.flow.log_prob_map(features, encoding)

    @torch.no_grad()
    def forward(
        self, z: Tensor, c: Sequence[Tensor] | None = None, rev: bool = False, jac: bool = True
    ) -> tuple[Tensor, Tensor]:
        """Feature vectors z (N, D) under [condition (N, C)] to u (N, D) and log|det du/dz| (N,), as FrEIA's modules."""
        if rev:
            raise RuntimeError(
                "a folded decoder has no inverse (rev=True): use the FlowDecoder that it was folded from"
            )
        condition = check_rows(z, c, self.features, self.condition)
        _refuse_gradients(z, condition)
        with _without_autocast(self.device):
            result = self.flow.rows(z, condition, want_u=True)
        assert result.u is not None
        return result.u.to(result.log_det.dtype), result.log_det

    @property
    def flow(self) -> TorchFlow:
        """The working copy on the decoder's device, made on first use."""
        if self._flow is None:
            self._flow = ops.prepare_flow(self.weights, self.arithmetic)
        return self._flow

    def train(self, mode: bool = True) -> FoldedDecoder:
        if mode:
            raise RuntimeError("a folded decoder cannot be trained: train the FlowDecoder that it was folded from")
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
        self._flow = None
        return super()._apply(lambda tensor: tensor.to(device), recurse)

    def get_extra_state(self) -> Tensor:
        """The one number of the weights that is no tensor: log_scale, in float64."""
        return torch.tensor(self._constants["log_scale"], dtype=torch.float64)

    def set_extra_state(self, state: Tensor) -> None:
        self._constants["log_scale"] = float(state)

    def _load_from_state_dict(self, *args: Any, **kwargs: Any) -> None:
        super()._load_from_state_dict(*args, **kwargs)
        self._flow = None

    def __getstate__(self) -> dict[str, Any]:
        return self.__dict__ | {"_flow": None}

    def __deepcopy__(self, memo: dict[int, Any]) -> FoldedDecoder:
        clone = self.__class__.__new__(self.__class__)
        memo[id(self)] = clone
        clone.__dict__.update(copy.deepcopy(self.__getstate__(), memo))
        return clone


def _without_autocast(device: torch.device) -> AbstractContextManager[object]:
    """The precision is the decoder's own, whatever surrounds the call."""
    available = torch.amp.is_autocast_available(device.type)
    return torch.autocast(device.type, enabled=False) if available else nullcontext()


def _refuse_gradients(*tensors: Tensor | None) -> None:
    if any(tensor is not None and tensor.requires_grad for tensor in tensors):
        raise RuntimeError(
            "a folded decoder has no gradients: detach the features, or use the FlowDecoder that it was folded from"
        )
