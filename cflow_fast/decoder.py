"""The trainable conditional normalizing flow of one pooling scale.

One coupling block maps x = [x1; x2] with D features, h = D - D//2 of them passive (x1), given a condition c:

    a    = 0.1 subnet([x1; c])                    a = [s; t]
    j    = alpha tanh(s)   or   alpha tanh(s / alpha)
    y    = [x1; x2 exp(j) + t]
    x'   = P (sigma y + o)                        sigma: the global affine, positive by construction
    log|det J| = sum(j) + sum(ln sigma)

P is a fixed permutation (hard) or rotation (soft). This is FrEIA's AllInOneBlock as CFLOW-AD configures it.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from cflow_fast.positional import positional_encoding

if TYPE_CHECKING:
    from cflow_fast.folded import FoldedDecoder

GLOBAL_AFFINES = ("SOFTPLUS", "SIGMOID", "EXP")
ACTIVATIONS = {"relu": nn.ReLU, "softplus": nn.Softplus}
CLAMPS = ("tanh(s)", "tanh(s/alpha)")


class CouplingBlock(nn.Module):
    """Affine coupling, global affine and permutation. See the module's formula; FlowDecoder has the options."""

    def __init__(
        self,
        features: int,
        condition: int,
        hidden: int,
        affine_clamping: float,
        global_affine_init: float,
        global_affine_type: str,
        permute_soft: bool,
        activation: str,
        clamp: str,
    ) -> None:
        super().__init__()
        self.features, self.condition = features, condition
        self.active = features // 2
        self.passive = features - self.active
        self.affine_clamping, self.global_affine_type, self.clamp = affine_clamping, global_affine_type, clamp
        initial = inverse_global_affine(global_affine_type, global_affine_init)
        self.global_scale = nn.Parameter(torch.full((features,), initial))
        self.global_offset = nn.Parameter(torch.zeros(features))
        if permute_soft:
            self.register_buffer("rotation", random_rotation(features))
        else:
            self.register_buffer("permutation", torch.randperm(features))
        inputs = self.passive + condition
        self.subnet = nn.Sequential(
            nn.Linear(inputs, hidden), ACTIVATIONS[activation](), nn.Linear(hidden, 2 * self.active)
        )

    if TYPE_CHECKING:
        rotation: Tensor
        permutation: Tensor

    @property
    def permute_soft(self) -> bool:
        return hasattr(self, "rotation")

    def scale(self) -> Tensor:
        """sigma, (D,)."""
        return global_affine(self.global_affine_type, self.global_scale)

    def forward(self, x: Tensor, c: Tensor | None, rev: bool = False) -> tuple[Tensor, Tensor]:
        """Rows (N, D) and their condition (N, C) to rows (N, D) and log|det J| (N,) of the direction taken."""
        sigma = self.scale()
        log_sigma = sigma.log().sum()
        if not rev:
            x1, x2 = x[:, : self.passive], x[:, self.passive :]
            j, t = self.coupling(x1, c)
            y = torch.cat([x1, x2 * j.exp() + t], 1)
            return self.mix(sigma * y + self.global_offset), j.sum(1) + log_sigma
        y = (self.unmix(x) - self.global_offset) / sigma
        x1, y2 = y[:, : self.passive], y[:, self.passive :]
        j, t = self.coupling(x1, c)
        return torch.cat([x1, (y2 - t) * (-j).exp()], 1), -(j.sum(1) + log_sigma)

    def coupling(self, x1: Tensor, c: Tensor | None) -> tuple[Tensor, Tensor]:
        """The active half's log-scale j and shift t, (N, d) each."""
        a = 0.1 * self.subnet(x1 if c is None else torch.cat([x1, c], 1))
        s, t = a[:, : self.active], a[:, self.active :]
        alpha = self.affine_clamping
        return alpha * torch.tanh(s if self.clamp == CLAMPS[0] else s / alpha), t

    def mix(self, x: Tensor) -> Tensor:
        return F.linear(x, self.rotation) if self.permute_soft else x[:, self.permutation]

    def unmix(self, x: Tensor) -> Tensor:
        return F.linear(x, self.rotation.t()) if self.permute_soft else x[:, self.permutation.argsort()]


class FlowDecoder(nn.Module):
    """A stack of conditional coupling blocks: the decoder of one pooling scale.

    Args:
        features: D, channels of the encoder's feature map; at least 2.
        condition: C, channels of the condition; 0 for an unconditional flow (the paper's UFLOW).
        coupling_blocks: number of blocks; the paper uses 8.
        affine_clamping: alpha above, positive.
        global_affine_init: sigma at the beginning.
        global_affine_type: "SOFTPLUS" (0.1 softplus with beta 0.5), "SIGMOID" (10 sigmoid(g - 2)) or "EXP".
        permute_soft: random rotations instead of random permutations between blocks.
        activation: of the subnet's hidden layer, "relu" (the published code) or "softplus" (the paper's text).
        hidden: width of that layer; 2 (h + C) when None, as published.
        clamp: "tanh(s)" for j = alpha tanh(s), FrEIA's releases; "tanh(s/alpha)" for j = alpha tanh(s / alpha).

    Called as FrEIA's SequenceINN: `u, log_det = decoder(z, [c])`, z (N, D), c (N, C), log_det (N,) in nats;
    `decoder(z)` when unconditional, `rev=True` for the inverse.
    Raises ValueError for impossible sizes, unknown names and tensors of another shape, TypeError for integer or
    complex ones.
    """

    def __init__(
        self,
        features: int,
        condition: int = 128,
        coupling_blocks: int = 8,
        affine_clamping: float = 1.9,
        global_affine_init: float = 1.0,
        global_affine_type: str = "SOFTPLUS",
        permute_soft: bool = False,
        activation: str = "relu",
        hidden: int | None = None,
        clamp: str = CLAMPS[0],
    ) -> None:
        super().__init__()
        for name, value, least in (
            ("features", features, 2),
            ("condition", condition, 0),
            ("coupling_blocks", coupling_blocks, 1),
            ("hidden", 1 if hidden is None else hidden, 1),
        ):
            if not isinstance(value, int) or value < least:
                raise ValueError(f"{name} is a whole number of at least {least}, got {value!r}")
        for name, text, choices in (
            ("global_affine_type", global_affine_type, GLOBAL_AFFINES),
            ("activation", activation, tuple(ACTIVATIONS)),
            ("clamp", clamp, CLAMPS),
        ):
            if text not in choices:
                raise ValueError(f"{name} is one of {', '.join(choices)}, got {text!r}")
        if not affine_clamping > 0:
            raise ValueError(f"affine_clamping is positive, got {affine_clamping!r}")
        self.features, self.condition = features, condition
        self.affine_clamping, self.global_affine_type = affine_clamping, global_affine_type
        self.global_affine_init = global_affine_init
        self.permute_soft, self.activation, self.clamp = permute_soft, activation, clamp
        self.hidden = 2 * (features - features // 2 + condition) if hidden is None else hidden
        self.blocks = nn.ModuleList(
            CouplingBlock(
                features,
                condition,
                self.hidden,
                affine_clamping,
                global_affine_init,
                global_affine_type,
                permute_soft,
                activation,
                clamp,
            )
            for _ in range(coupling_blocks)
        )

    @property
    def coupling_blocks(self) -> int:
        return len(self.blocks)

    @property
    def options(self) -> dict[str, Any]:
        """The constructor's arguments that rebuild this decoder, parameters aside."""
        names: tuple[str, ...] = ("features", "condition", "coupling_blocks", "affine_clamping", "global_affine_init")
        names += ("global_affine_type", "permute_soft", "activation", "hidden", "clamp")
        return {name: getattr(self, name) for name in names}

    def extra_repr(self) -> str:
        return ", ".join(f"{name}={value!r}" for name, value in self.options.items())

    def forward(
        self, z: Tensor, c: Sequence[Tensor] | None = None, rev: bool = False, jac: bool = True
    ) -> tuple[Tensor, Tensor]:
        """Map feature vectors z (N, D) to u (N, D) and log|det du/dz| (N,); with rev=True u back to z.

        c: [condition (N, C)], or None when the decoder has no condition. `jac` is accepted for FrEIA's sake.
        """
        condition = check_rows(z, c, self.features, self.condition)
        log_det = z.new_zeros(len(z))
        x = z
        for block in reversed(self.blocks) if rev else self.blocks:
            x, block_log_det = block(x, condition, rev)
            log_det = log_det + block_log_det
        return x, log_det

    def log_prob(self, features: Tensor, c: Tensor | None = None) -> Tensor:
        """Natural log-likelihood of feature vectors under their condition (eq. 8), in nats, not divided by D.

        features: maps (B, D, H, W) in any memory format, to (B, H, W), the condition being the positional encoding;
        or rows (N, D) with their own condition c (N, C), to (N,).
        float32, or float64 for a float64 module.
        """
        check_map_or_rows(features, c)
        if features.dim() == 2:
            z = features.to(self.dtype)
            u, log_det = self(z, None if c is None else [c.to(z.dtype)])
            u, log_det = (x if x.dtype == torch.float64 else x.float() for x in (u, log_det))
            return gaussian_log_prob(u) + log_det
        check_maps(features, self.features)
        batch, _, height, width = features.shape
        rows = features.to(self.dtype).permute(0, 2, 3, 1).reshape(-1, self.features)
        if not self.condition:
            return self.log_prob(rows).view(batch, height, width)
        encoding = positional_encoding(self.condition, height, width).to(rows)
        return self.log_prob(rows, encoding.flatten(1).t().repeat(batch, 1)).view(batch, height, width)

    @torch.no_grad()
    def sample(
        self, batch: int, height: int, width: int, temperature: float = 1.0, generator: torch.Generator | None = None
    ) -> Tensor:
        """Draw feature maps (B, D, H, W) from the flow, each position under its own encoding.

        temperature: standard deviation of the Gaussian that is drawn from.
        """
        count = batch * height * width
        u = torch.randn(count, self.features, dtype=self.dtype, generator=generator).to(self.device) * temperature
        condition = None
        if self.condition:
            encoding = positional_encoding(self.condition, height, width).to(u)
            condition = [encoding.flatten(1).t().repeat(batch, 1)]
        z, _ = self(u, condition, rev=True)
        return z.view(batch, height, width, self.features).permute(0, 3, 1, 2)

    def fold(self, precision: str = "auto") -> FoldedDecoder:
        """An immutable, fast decoder that computes the same function: see FoldedDecoder.

        precision: "fp32", "tf32", "bf16", "fp64", or on a GPU's matrix units "tf32x3" and "fp16x3" (fp32's accuracy),
        "fp16" (tf32's; every row of features has a scale of its own); "auto" takes bf16 where this decoder's device
        multiplies it, fp32 elsewhere (fp64 for a float64 module). The result's `arithmetic` says what was taken.
        """
        from cflow_fast.folded import FoldedDecoder

        return FoldedDecoder.from_decoder(self, precision)

    @classmethod
    def from_freia(cls, sequence: nn.Module) -> FlowDecoder:
        """Copy a FrEIA SequenceINN of AllInOneBlocks exactly, in its dtype and on its device.

        Raises UnsupportedBlockError naming the block and the reason where no FlowDecoder computes the same.
        """
        from cflow_fast.freia import from_freia

        return from_freia(sequence)

    def to_freia(self) -> nn.Module:
        """The same flow as a FrEIA SequenceINN (FrEIA 0.2 must be installed), parameters copied exactly.

        Raises UnsupportedBlockError for the clamp "tanh(s/alpha)", which the released FrEIA does not have.
        """
        from cflow_fast.freia import to_freia

        return to_freia(self)

    @property
    def dtype(self) -> torch.dtype:
        return next(self.parameters()).dtype

    @property
    def device(self) -> torch.device:
        return next(self.parameters()).device


def gaussian_log_prob(u: Tensor) -> Tensor:
    """Log-density of rows (N, D) under a standard Gaussian, (N,)."""
    return -0.5 * (u.square().sum(1) + u.shape[1] * math.log(2 * math.pi))


def global_affine(kind: str, g: Tensor) -> Tensor:
    """sigma of FrEIA's global affine transformations."""
    match kind:
        case "SOFTPLUS":
            return 0.1 * F.softplus(g, beta=0.5)
        case "SIGMOID":
            return 10 * torch.sigmoid(g - 2.0)
        case _:
            return g.exp()


def inverse_global_affine(kind: str, sigma: float) -> float:
    """The g for which `global_affine` gives sigma."""
    if not sigma > 0 or (kind == "SIGMOID" and sigma >= 10):
        raise ValueError(f"global_affine_init is positive (and under 10 for SIGMOID), got {sigma!r}")
    match kind:
        case "SOFTPLUS":
            return 2.0 * math.log(math.expm1(5.0 * sigma))
        case "SIGMOID":
            return 2.0 - math.log(10.0 / sigma - 1.0)
        case _:
            return math.log(sigma)


def random_rotation(size: int) -> Tensor:
    """A rotation drawn uniformly from SO(size), float32 (size, size).

    A product of reflections along Gaussian vectors of falling length (Stewart 1980, SIAM J. Numer. Anal. 17), which is
    what a QR factorisation of a Gaussian matrix would find, without having to find it.
    """
    gaussian = torch.randn(size, size, dtype=torch.float64).tril()
    sign = torch.where(gaussian.diagonal() < 0, -1.0, 1.0).double()
    pivot = gaussian.diagonal() + sign * gaussian.norm(dim=0)
    reflectors = gaussian / pivot
    reflectors.fill_diagonal_(1.0)
    tau = 2.0 / reflectors.square().sum(0)
    tau[-1] = 0.0  # the last vector has one entry: it only chooses a sign, and that is the determinant's
    signs = -sign
    signs[-1] = (-1.0) ** (size - 1) * signs[:-1].prod()
    return (torch.linalg.householder_product(reflectors, tau) * signs).float()


def check_rows(z: Tensor, c: Sequence[Tensor] | None, features: int, condition: int) -> Tensor | None:
    """Validate FrEIA-style arguments and give back the condition, one tensor or None."""
    if z.dim() != 2 or z.shape[1] != features:
        raise ValueError(f"expected feature vectors of shape (N, {features}), got {tuple(z.shape)}")
    _check_floating("feature vectors", z)
    if isinstance(c, Tensor):
        raise TypeError(f"the condition is passed in a list, decoder(z, [c]), got a tensor of shape {tuple(c.shape)}")
    given = [] if c is None else list(c)
    if not condition:
        if given:
            raise ValueError(f"this decoder has no condition (condition=0), got {len(given)}")
        return None
    if len(given) != 1:
        raise ValueError(f"expected one condition of shape ({len(z)}, {condition}) in a list, got {len(given)}")
    if given[0].shape != (len(z), condition):
        raise ValueError(f"expected a condition of shape ({len(z)}, {condition}), got {tuple(given[0].shape)}")
    _check_floating("conditions", given[0])
    return given[0]


def check_map_or_rows(features: Tensor, c: Tensor | None) -> None:
    if features.dim() == 4 and c is not None:
        raise ValueError("feature maps (B, D, H, W) get their positional encoding inside: pass no condition with them")
    if features.dim() not in (2, 4):
        raise ValueError(
            f"expected feature maps (B, D, H, W), or rows (N, D) with a condition (N, C), got {tuple(features.shape)}"
        )


def check_maps(features: Tensor, channels: int) -> None:
    if features.dim() != 4 or features.shape[1] != channels:
        raise ValueError(f"expected feature maps of shape (B, {channels}, H, W), got {tuple(features.shape)}")
    _check_floating("feature maps", features)


def _check_floating(what: str, x: Tensor) -> None:
    if not x.is_floating_point():
        raise TypeError(f"expected floating-point {what}, got {x.dtype}")
