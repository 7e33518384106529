"""One line that makes an existing model fast: every FrEIA decoder in it is replaced by its folded equivalent."""

from __future__ import annotations

import copy
import logging
from dataclasses import dataclass

from torch import nn

from cflow_fast.errors import UnsupportedBlockError
from cflow_fast.folded import FoldedDecoder
from cflow_fast.freia import from_freia, is_sequence
from cflow_fast.precision import resolve_precision

logger = logging.getLogger("cflow_fast")


@dataclass(frozen=True)
class Acceleration:
    """What `accelerate` did, and had done before: decoders replaced, with their precision; decoders left, and why."""

    replaced: dict[str, str]
    left: dict[str, str]

    def __str__(self) -> str:
        lines = [f"replaced {name or 'the module'}: {precision}" for name, precision in self.replaced.items()]
        lines += [f"left {name or 'the module'}: {reason}" for name, reason in self.left.items()]
        return "\n".join(lines)


def accelerate(module: nn.Module, precision: str = "auto", inplace: bool = False) -> nn.Module:
    """Replace a SequenceINN, or all that a module contains, by fast decoders answering `decoder(z, [c])` as before.

    Args:
        module: FrEIA's SequenceINN or a module with some inside (anomalib's CflowModel, a ModuleList, ...).
        precision: as FlowDecoder.fold takes it.
        inplace: replace within `module` instead of in a copy. A SequenceINN itself cannot be: take what is returned.

    The result has an attribute `acceleration` (printable) that says what was replaced and what was left and why; what
    was left is logged as a warning too. The replaced decoders are for inference: they have no gradients, no inverse.
    A module that was accelerated before is given back itself, unless it has new decoders. Raises UnsupportedBlockError
    when nothing could be replaced, naming the reasons, or when what was replaced before has another precision, and
    TypeError for what is no module.
    """
    if not isinstance(module, nn.Module):
        raise TypeError(f"accelerate takes a torch.nn.Module (of several, a ModuleList), got {type(module).__name__}")
    if is_sequence(module):
        return _accelerate_one(module, precision)
    children = dict(module.named_modules(remove_duplicate=False))
    sequences = {name: child for name, child in children.items() if is_sequence(child)}
    before = {name: child for name, child in children.items() if isinstance(child, FoldedDecoder)}
    if not sequences and not before:
        raise UnsupportedBlockError(
            f"{type(module).__name__} contains no FrEIA SequenceINN: there is nothing to replace"
        )
    new, left = {}, {}
    for name, sequence in sequences.items():
        try:
            new[name] = from_freia(sequence).fold(precision)
        except UnsupportedBlockError as error:
            left[name] = str(error)
            logger.warning("accelerate left %s as it was: %s", name, error)
    if not new:
        _check_nothing_is_new(before, left, precision)
    result = module if inplace or not new else copy.deepcopy(module)
    for name, folded in new.items():
        result.set_submodule(name, folded)
    replaced = {name: str(folded.arithmetic) for name, folded in (before | new).items()}
    return _report(result, Acceleration(replaced, left))


def _check_nothing_is_new(before: dict[str, FoldedDecoder], left: dict[str, str], precision: str) -> None:
    """That nothing was replaced is right where all of it was before, in the precision that is asked for."""
    if not before:
        raise UnsupportedBlockError("nothing could be replaced: " + "; ".join(f"{n}: {r}" for n, r in left.items()))
    for name, folded in before.items():
        if precision != "auto" and resolve_precision(precision, folded.device) != folded.precision:
            raise UnsupportedBlockError(
                f"{name or 'the module'} was accelerated in {folded.precision} before: "
                f"accelerate the original in {precision}"
            )


def _accelerate_one(sequence: nn.Module, precision: str) -> nn.Module:
    folded = from_freia(sequence).fold(precision)
    return _report(folded, Acceleration({"": str(folded.arithmetic)}, {}))


def _report(module: nn.Module, acceleration: Acceleration) -> nn.Module:
    logger.info("accelerate:\n%s", acceleration)
    module.acceleration = acceleration  # type: ignore[assignment]
    return module
