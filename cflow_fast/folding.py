"""From a trainable decoder to folded weights: every exact simplification, done once in float64.

1. The subnet's factor 0.1 (and 1/alpha where the clamp is tanh(s/alpha)) goes into its second layer.
2. sum ln sigma over all blocks becomes one number.
3. Scale sigma and offset o go into what follows them: a soft permutation's matrix, or, with hard permutations, the
   next product and epilogue that read the feature, so that no permutation, scaling or offset is ever carried out.
4. w_perm's inverse is its transpose and is not stored; a hard permutation is an index and not a matrix.
5. A soft permutation is stored by its cosine-sine decomposition: a quarter less work and storage.
The positional encoding is folded per size of the feature map, when the first map of that size arrives.
"""

from __future__ import annotations

from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor

import torch
from torch import Tensor

from cflow_fast.decoder import CLAMPS, CouplingBlock, FlowDecoder, global_affine
from cflow_fast.kernels.registration import without_autocast
from cflow_fast.kernels.weights import NARROW, FlowWeights, HardMixing, SoftMixing

CPU = torch.device("cpu")

ROTATION_RESIDUAL = 1e-9
"""How far what the decomposition makes of random vectors may be from what the permutation does; float32's own rounding
is 3e-8 a number."""

ROUNDED = 3e-7
"""Root mean square of how far a row of a rotation is from that of the orthogonal matrix that is folded in its place:
ten times what float32's rounding does to random ones. A matrix that is farther from one is folded as it is."""

SMALL = 1e-2
"""Cosines and sines that are found with all their digits where a decomposition is made with care."""

PROBES = 8
"""Random vectors that are sent through a permutation and its decomposition to tell."""

BF16_ROTATION_FEATURES = 1024
"""In bf16 a rotation rounds once more than a matrix and its elementwise part costs more than the product that it saves.
Half of the permutations of wide decoders are stored so all the same, for what it saves in memory."""


def fold_weights(decoder: FlowDecoder, storage: torch.dtype) -> FlowWeights:
    """Fold a decoder; matrices are stored in `storage`, vectors in float32 (float64 for float64). In bf16 the soft
    permutations of narrow decoders are float32 too.

    The arithmetic runs on the CPU whatever the decoder's device, so that a fold is the same everywhere.
    """
    with without_autocast(CPU):
        return cast_weights(_folded(decoder, storage), storage, decoder.device)


def _folded(decoder: FlowDecoder, storage: torch.dtype) -> FlowWeights:
    """In float64, but for the choice of what a permutation is stored as."""
    blocks = [_Block(block) for block in decoder.blocks]  # type: ignore[arg-type]
    mixing = (
        _soft_mixing(blocks, matrix_blocks(decoder.features, decoder.coupling_blocks, storage))
        if decoder.permute_soft
        else _hard_mixing(blocks)
    )
    return FlowWeights(
        activation=decoder.activation,
        clamp=decoder.affine_clamping,
        log_scale=float(sum(block.sigma.log().sum() for block in blocks)),
        w1=torch.stack([block.w1 for block in blocks]),
        w1_condition=torch.stack([block.w1_condition for block in blocks]) if decoder.condition else None,
        b1=torch.stack([block.b1 for block in blocks]),
        w2=torch.stack([block.w2 for block in blocks]),
        b2=torch.stack([block.b2 for block in blocks]),
        mixing=mixing,
    )


MATRICES = frozenset({"w1", "w1_condition", "w2"})
MIXING_MATRICES = frozenset({"matrix", "passive", "active", "output", "passive_output"})


def cast_weights(weights: FlowWeights, storage: torch.dtype, device: torch.device) -> FlowWeights:
    """Matrices to the storage precision, vectors to float32 or float64, indices to int32, all to the device."""
    vectors = torch.float64 if storage == torch.float64 else torch.float32
    of_mixing = mixing_storage(weights.features, storage)
    precision = dict.fromkeys(MATRICES, storage) | dict.fromkeys(MIXING_MATRICES, of_mixing)

    def cast(name: str, value: object) -> object:
        if not isinstance(value, Tensor):
            return value
        if not value.is_floating_point():
            return value.to(device, torch.int32)
        return value.to(device, precision.get(name, vectors)).contiguous()

    mixed = {name: cast(name, value) for name, value in vars(weights.mixing).items()}
    for name in [name for name in mixed if f"{name}_rest" in mixed]:
        exact = getattr(weights.mixing, name).double() + getattr(weights.mixing, f"{name}_rest").double()
        mixed[name] = cast(name, exact)
        mixed[f"{name}_rest"] = cast(name, exact - exact.to(vectors).double())
    mixing = type(weights.mixing)(**mixed)  # type: ignore[arg-type]
    own = {name: cast(name, value) for name, value in vars(weights).items() if name != "mixing"}
    return FlowWeights(**own, mixing=mixing)  # type: ignore[arg-type]


class _Block:
    """One coupling block's numbers in float64, its first layer split by input; `w1` and `b1` are folded further."""

    def __init__(self, block: CouplingBlock) -> None:
        w1, self.b1, w2, b2 = (_numbers(parameter) for parameter in block.subnet.parameters())
        self.passive = block.passive
        self.w1, self.w1_condition = w1[:, : self.passive], w1[:, self.passive :]
        factor = w2.new_full((2 * block.active, 1), 0.1)
        if block.clamp == CLAMPS[1]:
            factor[: block.active] /= block.affine_clamping
        self.w2, self.b2 = w2 * factor, b2 * factor.squeeze(1)
        self.sigma = global_affine(block.global_affine_type, _numbers(block.global_scale))
        self.offset = _numbers(block.global_offset)
        self.permutation = None if block.permute_soft else block.permutation.cpu()
        self.rotation = _numbers(block.rotation) if block.permute_soft else None


def _numbers(tensor: Tensor) -> Tensor:
    return tensor.detach().to("cpu", torch.float64)


def _hard_mixing(blocks: list[_Block]) -> HardMixing:
    """Follow every feature through the permutations; its scale and offset stay pending until somebody reads it."""
    first = blocks[0]
    h, features = first.passive, len(first.sigma)
    order = torch.arange(features)
    gain, shift = torch.ones_like(first.sigma), torch.zeros_like(first.sigma)
    passive, active, gains, shifts = [], [], [], []
    for block in blocks:
        i1, i2 = order[:h], order[h:]
        block.b1 = block.b1 + block.w1 @ shift[i1]
        block.w1 = block.w1 * gain[i1]
        passive.append(i1)
        active.append(i2)
        gains.append(gain[i2])
        shifts.append(shift[i2])
        gain, shift = gain.clone(), shift.clone()
        gain[i1], shift[i1] = block.sigma[:h] * gain[i1], block.sigma[:h] * shift[i1] + block.offset[:h]
        gain[i2], shift[i2] = block.sigma[h:], block.offset[h:]
        assert block.permutation is not None
        order = order[block.permutation]
    pending = torch.stack(gains)
    return HardMixing(
        passive=torch.stack(passive),
        active=torch.stack(active),
        gain=pending,
        gain_rest=torch.zeros_like(pending),
        shift=torch.stack(shifts),
        output_gain=gain,
        output_gain_rest=torch.zeros_like(gain),
        output_shift=shift,
        order=order,
    )


def matrix_blocks(features: int, blocks: int, storage: torch.dtype) -> int:
    """How many of the first blocks keep their soft permutation as a matrix."""
    if storage != torch.bfloat16:
        return 0
    return blocks - blocks // 2 if features >= BF16_ROTATION_FEATURES else blocks


def mixing_storage(features: int, storage: torch.dtype) -> torch.dtype:
    """What the matrices of soft permutations are stored in where others are in `storage`. In bf16 these would lose more
    than everything else. It is a CPU that multiplies by all of these digits; on a card they are rounded to bf16."""
    return torch.float32 if storage == torch.bfloat16 and features < NARROW else storage


def _soft_mixing(blocks: list[_Block], matrices: int) -> SoftMixing:
    h = blocks[0].passive
    rotations = _decompositions([_soft(block) for block in blocks[matrices:]], h)
    if rotations is None:
        rotations, matrices = [], len(blocks)
    first = blocks[:matrices]
    features = len(blocks[0].sigma)
    basis = torch.eye(h, dtype=torch.float64)
    passive, active = [], []
    for block, rotation in zip(blocks[matrices:], rotations, strict=True):
        block.w1 = block.w1 @ basis
        passive.append((rotation.v1 * block.sigma[:h]) @ basis)
        active.append(rotation.v2 * block.sigma[h:])
        basis = rotation.u1

    def stack(tensors: list[Tensor], *shape: int) -> Tensor:
        return torch.stack(tensors) if tensors else torch.empty(0, *shape, dtype=torch.float64)

    d = features - h
    pairs = list(zip(blocks[matrices:], rotations, strict=True))
    return SoftMixing(
        matrix=stack([_soft(block) * block.sigma for block in first], features, features),
        offset=stack([_soft(block) @ block.offset for block in first], features),
        passive=stack(passive, h, h),
        passive_offset=stack([rotation.v1 @ block.offset[:h] for block, rotation in pairs], h),
        active=stack(active, d, d),
        active_offset=stack([rotation.v2 @ block.offset[h:] for block, rotation in pairs], d),
        output=stack([rotation.u2 for rotation in rotations], d, d),
        cosine=stack([rotation.cosine for rotation in rotations], d),
        sine=stack([rotation.sine for rotation in rotations], d),
        passive_output=stack([basis] if rotations else [], h, h),
    )


def _soft(block: _Block) -> Tensor:
    assert block.rotation is not None
    return block.rotation


class _CosineSine:
    """P = [U1 0; 0 U2] [C -S; S C] [V1 0; 0 V2], with h rows in the first half and d = h or h - 1 in the second.

    Cosines ascend: with h = d + 1 the last one is 1 and has no sine.
    """

    def __init__(self, p: Tensor, h: int, squared: Tensor, vectors: Tensor, small: float = 0.0) -> None:
        """Of an orthogonal matrix and what `_eigh` makes of its first quarter's Gram matrix.

        small: cosines and sines below it are found anew, which costs more. An eigenvalue tells them only as far as
        their squares have digits, and divided by one a vector of U is as far from orthogonal to others.
        """
        d = len(p) - h
        cosine, v1 = squared.clamp(0, 1).sqrt(), vectors
        upper = p[:h, :h] @ v1
        u1 = upper / upper.norm(dim=0)
        if count := int((squared < small**2).sum()) if small else 0:
            basis = _complement(u1[:, count:])
            x, values, turn = torch.linalg.svd(basis.T @ upper[:, :count])
            u1[:, :count], cosine[:count] = basis @ x.flip(1), values.flip(0)
            v1[:, :count] = v1[:, :count] @ turn.T.flip(1)
        lower = p[h:, :h] @ v1
        sine = lower.norm(dim=0)[:d]
        u2 = lower[:, :d] / sine
        if count := int((squared > 1 - small**2).sum()) if small else 0:
            rest = h - count
            basis = _complement(u2[:, :rest])
            x, sine[rest:], turn = torch.linalg.svd(basis.T @ lower[:, rest:])
            u2[:, rest:] = basis @ x
            v1[:, rest:] = v1[:, rest:] @ turn.T
            upper = p[:h, :h] @ v1[:, rest:]
            cosine[rest:] = upper.norm(dim=0)
            u1[:, rest:] = upper / cosine[rest:]
        self.u1, self.u2, self.v1, self.cosine, self.sine = u1, u2, v1.T, cosine[:d], sine
        self.v2 = self.cosine.unsqueeze(1) * (u2.T @ p[h:, h:]) - sine.unsqueeze(1) * (u1[:, :d].T @ p[:h, h:])
        probes = torch.randn(len(p), PROBES, dtype=p.dtype, generator=torch.Generator().manual_seed(0))
        self.residual = float((self.times(probes) - p @ probes).abs().max().nan_to_num(torch.inf))

    def times(self, x: Tensor) -> Tensor:
        """The product of the five factors with x (h + d, N)."""
        h, d = len(self.u1), len(self.u2)
        v, w = self.v1 @ x[:h], self.v2 @ x[h:]
        c, s = self.cosine.unsqueeze(1), self.sine.unsqueeze(1)
        turned = torch.cat([c * v[:d] - s * w, v[d:]])  # what has no partner stays
        return torch.cat([self.u1 @ turned, self.u2 @ (s * v[:d] + c * w)])


def _eigh(symmetric: Sequence[Tensor]) -> list[tuple[Tensor, Tensor]]:
    """Side by side, each on one thread: the solver's threads gain nothing and, where other work shares the cores, wait
    for seconds."""
    threads = torch.get_num_threads()
    try:
        with ThreadPoolExecutor(threads, initializer=torch.set_num_threads, initargs=(1,)) as pool:
            return list(pool.map(torch.linalg.eigh, symmetric))
    finally:
        torch.set_num_threads(threads)


def _orthogonalised(matrix: Tensor) -> Tensor:
    """The nearest orthogonal matrix to one that was rounded, by Newton-Schulz steps, each squaring the deviation."""
    for _ in range(3):
        excess = matrix.T @ matrix
        excess.diagonal().sub_(1.0)
        deviation = excess.norm()
        if deviation < 1e-5:  # at once for a rotation rounded to float32: what is left is under 1e-10
            return matrix - 0.5 * (matrix.float() @ excess.float()).double()  # 1e-7 of 1e-5 is under that too
        matrix = torch.addmm(matrix, matrix, excess, alpha=-0.5)
    return matrix


def _complement(columns: Tensor) -> Tensor:
    """An orthonormal basis of what is orthogonal to orthonormal columns."""
    return torch.linalg.qr(columns, mode="complete").Q[:, columns.shape[1] :]


def _decompositions(matrices: Sequence[Tensor], h: int) -> list[_CosineSine] | None:
    """h rows in the first half. None where a matrix is no rotation but for float32's rounding."""
    exact = [_orthogonalised(matrix) for matrix in matrices]
    if not all((p - matrix).norm() <= ROUNDED * len(p) ** 0.5 for p, matrix in zip(exact, matrices, strict=True)):
        return None
    pairs = _eigh([_gram(p, h) for p in exact])
    found = [_CosineSine(p, h, *pair) for p, pair in zip(exact, pairs, strict=True)]
    for i, p in enumerate(exact):  # of random rotations one in a few hundred
        if found[i].residual >= ROTATION_RESIDUAL:
            squared, vectors = torch.linalg.eigh(_gram(p, h))
            found[i] = _CosineSine(p, h, squared, vectors, small=SMALL)
    return found if all(each.residual < ROTATION_RESIDUAL for each in found) else None


def _gram(p: Tensor, h: int) -> Tensor:
    return p[:h, :h].T @ p[:h, :h]
