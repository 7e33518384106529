"""The implementation of a folded decoder by compiled code on a CPU: `cpu/flow.h`, the calls as `TorchFlow` has them."""

from __future__ import annotations

import math

import torch
import torch.nn.functional as F
from torch import Tensor

from cflow_fast.kernels.cpu_library import CPU, Decoder, Library, Task, address, check_is_here
from cflow_fast.kernels.flow import FlowResult
from cflow_fast.kernels.table_cache import TableCache
from cflow_fast.kernels.torch_flow import positional_tables
from cflow_fast.kernels.weights import FlowWeights, HardMixing, SoftMixing

INPUT_BYTES = 3 << 19
"""Of a product's input that a thread works on at once: most of a second-level cache, the weights pass by."""
MAX_PANELS = 8


class CpuFlow:
    """A folded decoder packed for one library; matrices that are stored in another precision than its are converted.

    Of soft permutations that are stored in more digits than an operand has, and of the state that they mix, a number is
    two operands: bf16 then keeps 16 binary digits there, for three products instead of one.
    """

    def __init__(self, weights: FlowWeights, lib: Library) -> None:
        self.weights, self.library = weights, lib
        self._packed = _packed(weights, lib)
        self._decoder = Decoder(
            blocks=weights.blocks,
            passive=weights.passive,
            active=weights.active,
            hidden=weights.hidden,
            condition=weights.condition,
            softplus=weights.activation == "softplus",
            hard=isinstance(weights.mixing, HardMixing),
            matrices=weights.mixing.matrices if isinstance(weights.mixing, SoftMixing) else 0,
            parts=_parts(weights, lib),
            clamp=weights.clamp,
            log_scale=weights.log_scale,
            **{name: tensor.data_ptr() for name, tensor in self._packed.items()},
        )
        of_panel = 2 * lib.vector * lib.operand.itemsize * max(weights.passive, weights.hidden)
        self.chunk_panels = max(1, min(MAX_PANELS, INPUT_BYTES // of_panel))
        self.tables: TableCache[tuple[Tensor, Tensor]] = TableCache(CPU)

    def log_prob_map(self, features: Tensor, encoding: tuple[Tensor, Tensor] | None) -> Tensor:
        """As TorchFlow.log_prob_map: natural log-likelihoods (B, H, W) of feature maps (B, D, H, W), float32."""
        batch, _, height, width = features.shape
        tables = None if encoding is None else self._tables_for(height, width, encoding)
        return self._run(features.float().resolve_neg(), None, tables, want_u=False).log_prob.view(batch, height, width)

    def rows(self, z: Tensor, condition: Tensor | None, want_u: bool) -> FlowResult:
        """As TorchFlow.rows: loose feature vectors (N, D) with a condition (N, C) each; u as (N, D)."""
        c = None if condition is None else condition.float().contiguous().resolve_neg()
        return self._run(z.float().resolve_neg()[:, :, None, None], c, None, want_u)

    def launches_often(self, rows: int, own_condition: bool) -> bool:
        return False

    @torch.compiler.disable  # it passes addresses
    def _run(
        self, features: Tensor, condition: Tensor | None, tables: tuple[Tensor, Tensor] | None, want_u: bool
    ) -> FlowResult:
        batch, channels, height, width = features.shape
        rows = batch * height * width
        check_is_here(features, condition)
        log_prob, log_det = (torch.empty(rows, dtype=torch.float32, device=CPU) for _ in range(2))
        u = torch.empty(rows, channels, dtype=torch.float32, device=CPU) if want_u else None
        if not rows:
            return FlowResult(log_prob, log_det, u)
        by_row, by_column = tables or (None, None)
        image, feature, line, column = features.stride()
        task = Task(
            features=features.data_ptr(),
            condition=address(condition),
            rows=rows,
            height=height,
            width=width,
            stride_image=image,
            stride_feature=feature,
            stride_line=line,
            stride_column=column,
            stride_condition=0 if condition is None else condition.stride(0),
            by_row=address(by_row),
            by_column=address(by_column),
            table_rows=0 if by_row is None else by_row.shape[2],
            table_columns=0 if by_column is None else by_column.shape[2],
            log_prob=log_prob.data_ptr(),
            log_det=log_det.data_ptr(),
            u=address(u),
            threads=torch.get_num_threads(),
            chunk_panels=self.chunk_panels,
        )
        self.library.run("flow", task, self._decoder)
        return FlowResult(log_prob, log_det, u)

    def _tables_for(self, height: int, width: int, encoding: tuple[Tensor, Tensor]) -> tuple[Tensor, Tensor]:
        def made() -> tuple[Tensor, Tensor]:
            exact = positional_tables(self.weights, encoding, torch.float32)
            return self._table(exact.rows), self._table(exact.columns)

        return self.tables.get((height, width), made)

    def _table(self, table: Tensor) -> Tensor:
        """(K, positions, m) to (K, m, positions): outputs in whole groups, at least a vector of positions."""
        _, positions, hidden = table.shape
        return _filled(table.mT, self.library.whole_groups(hidden), max(positions, self.library.vector))


def _filled(tensor: Tensor, *shape: int) -> Tensor:
    """The last dimensions filled up with zeros, in float32."""
    missing = [length - there for length, there in zip(shape, tensor.shape[-len(shape) :], strict=True)]
    padding = [side for length in reversed(missing) for side in (0, length)]
    return F.pad(tensor.to(torch.float32), padding).contiguous()


def _packed(weights: FlowWeights, lib: Library) -> dict[str, Tensor]:
    """The arrays of flow.h's decoder, by name."""
    active, mixing = weights.active, weights.mixing
    packed = {
        "w1": _matrices(weights.w1, lib),
        "b1": _vectors(weights.b1, lib),
        "w2_scale": _matrices(weights.w2[:, :active], lib),
        "b2_scale": _vectors(weights.b2[:, :active], lib),
        "w2_shift": _matrices(weights.w2[:, active:], lib),
        "b2_shift": _vectors(weights.b2[:, active:], lib),
    }
    if weights.w1_condition is not None:
        packed["w1_condition"] = _matrices(weights.w1_condition, lib)
    of_mixing = _soft(mixing, weights, lib) if isinstance(mixing, SoftMixing) else _hard(mixing, weights, lib)
    return packed | of_mixing


def _matrices(family: Tensor, lib: Library, at_least: int = 0) -> Tensor:
    """(K, out, in) to groups of outputs as the library multiplies them; at_least: rows, the last ones zeros."""
    blocks, rows, inputs = family.shape
    step = lib.inputs_together
    steps, groups = math.ceil(inputs / step), lib.whole_groups(max(rows, at_least)) // lib.outputs
    whole = torch.zeros(blocks, groups * lib.outputs, steps * step, dtype=lib.operand, device=CPU)
    whole[:, :rows, :inputs] = family
    return whole.view(blocks, groups, lib.outputs, steps, step).transpose(2, 3).contiguous()


def _parts(weights: FlowWeights, lib: Library) -> int:
    """In how many operands a number of a soft permutation comes: two where it is stored in more digits than one has."""
    mixing = weights.mixing
    return 2 if isinstance(mixing, SoftMixing) and mixing.matrix.dtype.itemsize > lib.operand.itemsize else 1


def _matrices_in_parts(family: Tensor, lib: Library, parts: int, at_least: int = 0) -> Tensor:
    """As `_matrices`, each followed by what rounding to operands left of it where there are two parts."""
    if parts == 1:
        return _matrices(family, lib, at_least)
    rest = family - family.to(lib.operand)
    return _matrices(torch.stack([family, rest], 1).flatten(0, 1), lib, at_least)


def _vectors(family: Tensor, lib: Library) -> Tensor:
    return _filled(family, lib.whole_groups(family.shape[1]))


def _soft(mixing: SoftMixing, weights: FlowWeights, lib: Library) -> dict[str, Tensor]:
    passive, half = weights.passive, lib.whole_groups(weights.passive)
    first, second = slice(passive), slice(passive, None)
    parts = _parts(weights, lib)
    unpaired = passive - weights.active  # a passive feature without a partner turns with cosine 1
    cosine = torch.cat([mixing.cosine, mixing.cosine.new_ones(len(mixing.cosine), unpaired)], 1)
    return {
        "passive_by_passive": _matrices_in_parts(mixing.matrix[:, first, first], lib, parts),
        "passive_by_active": _matrices_in_parts(mixing.matrix[:, first, second], lib, parts),
        "active_by_passive": _matrices_in_parts(mixing.matrix[:, second, first], lib, parts),
        "active_by_active": _matrices_in_parts(mixing.matrix[:, second, second], lib, parts),
        "passive_offset": _vectors(mixing.offset[:, first], lib),
        "active_offset": _vectors(mixing.offset[:, second], lib),
        "v": _matrices_in_parts(mixing.passive, lib, parts),
        "v_offset": _vectors(mixing.passive_offset, lib),
        "w": _matrices_in_parts(mixing.active, lib, parts, at_least=passive),
        "w_offset": _filled(mixing.active_offset, half),
        "cosine": _filled(cosine, half),
        "sine": _filled(mixing.sine, half),
        "output": _matrices_in_parts(mixing.output, lib, parts),
        "passive_output": _matrices_in_parts(mixing.passive_output, lib, parts),
    }


def _hard(mixing: HardMixing, weights: FlowWeights, lib: Library) -> dict[str, Tensor]:
    half = lib.whole_groups(weights.passive)
    active = torch.full((weights.blocks, half), weights.features, dtype=torch.int32, device=CPU)
    active[:, : weights.active] = mixing.active
    return {
        "passive_index": mixing.passive.contiguous(),
        "active_index": active,
        "order": mixing.order.contiguous(),
        "gain": _filled(mixing.gain, half),
        "gain_rest": _filled(mixing.gain_rest, half),
        "shift": _filled(mixing.shift, half),
        "output_gain": _vectors(mixing.output_gain[None], lib)[0],
        "output_gain_rest": _vectors(mixing.output_gain_rest[None], lib)[0],
        "output_shift": _vectors(mixing.output_shift[None], lib)[0],
    }
