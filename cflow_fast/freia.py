"""The border to FrEIA: its SequenceINN of AllInOneBlocks to and from a FlowDecoder, and the one-line acceleration.

Three dialects of AllInOneBlock are in use (FrEIA's release, its later commits, and the copies that cflow-ad and
anomalib carry): they differ in the clamp and in how a hard permutation is stored, and the same state dict means another
likelihood under another clamp. So the block itself is asked, on a probe, and never a version or a class's module.
FrEIA need not be installed to convert from it.
"""

from __future__ import annotations

import math
from typing import Any, NoReturn

import torch
from torch import Tensor, nn

from cflow_fast.decoder import ACTIVATIONS, CLAMPS, GLOBAL_AFFINES, CouplingBlock, FlowDecoder, global_affine
from cflow_fast.errors import UnsupportedBlockError

ORTHOGONALITY = 1e-5
"""Largest deviation of w_perm's transpose from its inverse that still counts as a rounded rotation."""


def is_sequence(module: nn.Module) -> bool:
    """Whether a module is FrEIA's SequenceINN, from whichever copy of FrEIA."""
    return type(module).__name__ == "SequenceINN" and isinstance(getattr(module, "module_list", None), nn.ModuleList)


def from_freia(sequence: nn.Module) -> FlowDecoder:
    """See FlowDecoder.from_freia."""
    if not is_sequence(sequence):
        raise UnsupportedBlockError(f"expected a FrEIA SequenceINN, got {type(sequence).__name__}")
    if getattr(sequence, "force_tuple_output", False):
        raise UnsupportedBlockError("SequenceINN: force_tuple_output=True is not supported, u would be no tensor")
    blocks = list(sequence.module_list)  # type: ignore[arg-type]
    if not blocks:
        raise UnsupportedBlockError("SequenceINN: it has no blocks")
    read = [_ForeignBlock(block, f"module_list.{i} ({type(block).__name__})") for i, block in enumerate(blocks)]
    _check_conditions(getattr(sequence, "conditions", []), read)
    first = read[0]
    for other in read[1:]:
        for name, value in first.options.items():
            if other.options[name] != value:
                raise UnsupportedBlockError(
                    f"{other.name}: its {name} is {other.options[name]!r}, but {first.name} has {value!r}; "
                    "a FlowDecoder's blocks are alike"
                )
    soft = any(block.is_soft for block in read)
    parameter = first.block.global_scale
    with torch.device("meta"):
        decoder = FlowDecoder(**first.options, coupling_blocks=len(read), permute_soft=soft)
    decoder = decoder.to_empty(device=parameter.device).to(parameter.dtype)
    decoder.train(sequence.training)
    with torch.no_grad():
        for own, foreign in zip(decoder.blocks, read, strict=True):
            foreign.copy_to(own)  # type: ignore[arg-type]
    return decoder


def to_freia(decoder: FlowDecoder) -> nn.Module:
    """See FlowDecoder.to_freia."""
    try:
        from FrEIA.framework import SequenceINN
        from FrEIA.modules import AllInOneBlock
    except ImportError as error:
        raise ImportError("to_freia() needs FrEIA: pip install FrEIA==0.2") from error

    def subnet(inputs: int, outputs: int) -> nn.Module:
        return nn.Sequential(
            nn.Linear(inputs, decoder.hidden), ACTIVATIONS[decoder.activation](), nn.Linear(decoder.hidden, outputs)
        )

    sequence = SequenceINN(decoder.features)
    condition = {"cond": 0, "cond_shape": (decoder.condition,)} if decoder.condition else {}
    for own in decoder.blocks:
        sequence.append(
            AllInOneBlock,
            **condition,
            subnet_constructor=subnet,
            affine_clamping=decoder.affine_clamping,
            global_affine_type=decoder.global_affine_type,
            permute_soft=False,  # FrEIA takes minutes to draw a rotation of 2048 features; it is overwritten below
        )
        foreign = sequence.module_list[-1].to(decoder.device, decoder.dtype)
        if clamp_of(foreign, "AllInOneBlock") != decoder.clamp:
            raise UnsupportedBlockError(f"the installed FrEIA has another clamp than this decoder's {decoder.clamp}")
        _copy_to_freia(own, foreign)  # type: ignore[arg-type]
    return sequence.train(decoder.training)


@torch.no_grad()
def _copy_to_freia(own: CouplingBlock, foreign: Any) -> None:
    foreign.global_scale.copy_(own.global_scale.unsqueeze(0))
    foreign.global_offset.copy_(own.global_offset.unsqueeze(0))
    foreign.subnet.load_state_dict(own.subnet.state_dict())
    w_perm: Tensor = foreign.w_perm
    if own.permute_soft:
        w_perm.copy_(own.rotation)
    else:
        w_perm.zero_()
        w_perm[torch.arange(own.features), own.permutation] = 1.0
    foreign.w_perm_inv.copy_(w_perm.t())


class _ForeignBlock:
    """An AllInOneBlock that passed every check: its options in a FlowDecoder's terms, and its parameters."""

    def __init__(self, block: Any, name: str) -> None:
        self.block, self.name = block, name
        if type(block).__name__ != "AllInOneBlock":
            self.refuse("only AllInOneBlock can be represented")
        if getattr(block, "GIN", False):
            self.refuse("GIN blocks (gin_block=True) are not supported")
        if getattr(block, "householder", 0):
            self.refuse("learned householder permutations are not supported")
        if getattr(block, "reverse_pre_permute", False):
            self.refuse("reverse_permutation=True is not supported")
        if getattr(block, "input_rank", 0) != 0:
            self.refuse("blocks over images or sequences are not supported, only over vectors (N, D)")
        first, self.activation, second = self.subnet_parts()
        features = block.in_channels
        passive, active = features - features // 2, features // 2
        condition = int(getattr(block, "condition_channels", 0))
        if first.in_features != passive + condition or second.out_features != 2 * active:
            self.refuse(
                f"its subnet maps {first.in_features} to {second.out_features} channels, "
                f"expected {passive + condition} to {2 * active}"
            )
        self.options: dict[str, Any] = {
            "features": features,
            "condition": condition,
            "affine_clamping": self.clamping(),
            "global_affine_type": self.global_affine_type(),
            "activation": self.activation,
            "hidden": first.out_features,
            "clamp": clamp_of(block, name),
        }
        self.permutation, self.rotation = self.read_permutation(features)

    def refuse(self, reason: str) -> NoReturn:
        raise UnsupportedBlockError(f"{self.name}: {reason}")

    def subnet_parts(self) -> tuple[nn.Linear, str, nn.Linear]:
        parts: list[Any] = list(self.block.subnet.children()) if isinstance(self.block.subnet, nn.Sequential) else []
        kinds = [type(part) for part in parts]
        activations = {nn.ReLU: "relu", nn.Softplus: "softplus"}
        if len(kinds) != 3 or kinds[0] is not nn.Linear or kinds[2] is not nn.Linear or kinds[1] not in activations:
            found = ", ".join(kind.__name__ for kind in kinds) or type(self.block.subnet).__name__
            self.refuse(f"its subnet is {found}; expected Linear, ReLU or Softplus, Linear")
        if kinds[1] is nn.Softplus and (parts[1].beta != 1 or parts[1].threshold != 20):
            self.refuse("its Softplus has another beta or threshold than PyTorch's default")
        if any(set(dict(linear.named_parameters())) != {"weight", "bias"} for linear in (parts[0], parts[2])):
            self.refuse("its subnet has a Linear without bias or with a reparametrised weight")
        return parts[0], activations[kinds[1]], parts[2]

    def clamping(self) -> float:
        """alpha, from the block's own attribute; a copy that keeps it elsewhere is refused."""
        clamp = getattr(self.block, "clamp", None)
        if not isinstance(clamp, (int, float)) or not clamp > 0:
            self.refuse(f"its clamp is {clamp!r}, expected a positive number")
        return float(clamp)

    def global_affine_type(self) -> str:
        """Which of the three activations the block applies, found by applying it."""
        probe = torch.linspace(-3.0, 4.0, 8, dtype=torch.float64)
        answer = self.block.global_scale_activation(probe)
        for kind in GLOBAL_AFFINES:
            if torch.allclose(answer, global_affine(kind, probe), rtol=1e-9):
                return kind
        self.refuse("its global affine is none of SOFTPLUS, SIGMOID, EXP")

    @property
    def is_soft(self) -> bool:
        return self.rotation is not None

    def read_permutation(self, features: int) -> tuple[Tensor | None, Tensor | None]:
        """(index, None) of a hard permutation, (None, matrix) of a soft one."""
        w_perm, w_perm_inv = (w.detach() for w in (self.block.w_perm, self.block.w_perm_inv))
        if w_perm.dim() == 1:
            index, inverse = w_perm.long(), w_perm_inv.long()
            identity = torch.arange(features, device=index.device)
            if not torch.equal(index.sort().values, identity):
                self.refuse("its w_perm is not a permutation")
            if not torch.equal(index[inverse], identity):
                self.refuse("its w_perm_inv is not the inverse of w_perm")
            return index, None
        matrix, inverse = w_perm.reshape(features, features), w_perm_inv.reshape(features, features)
        exact = matrix.double()
        deviation = (
            (exact @ exact.t() - torch.eye(features, dtype=torch.float64, device=exact.device)).abs().max().item()
        )
        if not deviation <= ORTHOGONALITY:
            self.refuse(f"its w_perm is not orthogonal: w_perm w_perm^T is off the identity by {deviation:.1e}")
        difference = (inverse - matrix.t()).abs().max().item()
        if not difference <= ORTHOGONALITY:
            self.refuse(f"its w_perm_inv is not w_perm's transpose: they differ by {difference:.1e}")
        if bool(((matrix == 0) | (matrix == 1)).all()):
            return matrix.argmax(1), None
        return None, matrix

    def copy_to(self, own: CouplingBlock) -> None:
        own.global_scale.copy_(self.block.global_scale.reshape(-1))
        own.global_offset.copy_(self.block.global_offset.reshape(-1))
        own.subnet.load_state_dict(self.block.subnet.state_dict())
        if not own.permute_soft:
            assert self.permutation is not None
            own.permutation.copy_(self.permutation)
        elif self.rotation is not None:
            own.rotation.copy_(self.rotation)
        else:  # a hard permutation between soft ones
            assert self.permutation is not None
            own.rotation.zero_()
            own.rotation[torch.arange(own.features), self.permutation] = 1.0


def clamp_of(block: Any, name: str) -> str:
    """The clamp that a block applies, found by applying it: FrEIA's block has `_affine(x, a)` with s, t = 0.1 a."""
    alpha = float(block.clamp)
    s = torch.tensor([[0.7 * alpha]], dtype=torch.float64)
    x = torch.ones(1, 1, dtype=torch.float64)
    a = torch.cat([s, torch.zeros_like(s)], 1) / 0.1
    try:
        _, log_det = block._affine(x, a)
    except (AttributeError, TypeError, RuntimeError) as error:
        raise UnsupportedBlockError(f"{name}: its coupling cannot be asked for its clamp ({error})") from error
    answer = float(log_det)
    candidates = {CLAMPS[0]: alpha * math.tanh(float(s)), CLAMPS[1]: alpha * math.tanh(float(s) / alpha)}
    for clamp, expected in candidates.items():
        if math.isclose(answer, expected, rel_tol=1e-6):
            return clamp
    raise UnsupportedBlockError(
        f"{name}: its coupling clamps {float(s):.3f} to {answer:.6f}, known are "
        + ", ".join(f"alpha {clamp} = {value:.6f}" for clamp, value in candidates.items())
    )


def _check_conditions(conditions: list[int | None], blocks: list[_ForeignBlock]) -> None:
    for block, condition in zip(blocks, conditions, strict=True):
        if condition not in (None, 0):
            block.refuse(f"it takes condition number {condition}; only one condition is supported")
        if (condition is None) != (block.options["condition"] == 0):
            block.refuse("it has condition channels but takes no condition")
