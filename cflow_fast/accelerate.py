"""One line that makes an existing model fast: every FrEIA decoder in it is replaced by its folded equivalent."""

from __future__ import annotations

import copy
import logging
from dataclasses import dataclass

from torch import nn

from cflow_fast.errors import UnsupportedBlockError
from cflow_fast.freia import from_freia, is_sequence

logger = logging.getLogger("cflow_fast")


@dataclass(frozen=True)
class Acceleration:
    """What `accelerate` did: decoders replaced, with their precision, and decoders left, with the reason."""

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
    Raises UnsupportedBlockError when nothing could be replaced, naming the reasons.
    """
    if is_sequence(module):
        return _accelerate_one(module, precision)
    if not any(is_sequence(child) for child in module.modules()):
        raise UnsupportedBlockError(
            f"{type(module).__name__} contains no FrEIA SequenceINN: there is nothing to replace"
        )
    result = module if inplace else copy.deepcopy(module)
    found = {name: child for name, child in result.named_modules(remove_duplicate=False) if is_sequence(child)}
    replaced, left = {}, {}
    for name, sequence in found.items():
        try:
            folded = from_freia(sequence).fold(precision)
        except UnsupportedBlockError as error:
            left[name] = str(error)
            logger.warning("accelerate left %s as it was: %s", name, error)
            continue
        result.set_submodule(name, folded)
        replaced[name] = str(folded.arithmetic)
    if not replaced:
        raise UnsupportedBlockError("nothing could be replaced: " + "; ".join(f"{n}: {r}" for n, r in left.items()))
    return _report(result, Acceleration(replaced, left))


def _accelerate_one(sequence: nn.Module, precision: str) -> nn.Module:
    folded = from_freia(sequence).fold(precision)
    return _report(folded, Acceleration({"": str(folded.arithmetic)}, {}))


def _report(module: nn.Module, acceleration: Acceleration) -> nn.Module:
    logger.info("accelerate:\n%s", acceleration)
    module.acceleration = acceleration  # type: ignore[assignment]
    return module
