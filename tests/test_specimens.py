"""What is compiled and counted without values has the shapes of what is folded."""

from __future__ import annotations

import pytest
import torch
from flows import rough_decoder

from cflow_fast.bench.specimens import specimen_weights
from cflow_fast.folding import fold_weights


@pytest.mark.parametrize("storage", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("permute_soft", [True, False], ids=["soft", "hard"])
@pytest.mark.parametrize(("features", "condition"), [(9, 8), (12, 0)])
def test_a_specimen_has_the_shapes_of_a_folded_decoder(
    features: int, condition: int, permute_soft: bool, storage: torch.dtype
) -> None:
    decoder = rough_decoder(features, condition, permute_soft=permute_soft)
    folded = fold_weights(decoder, storage).tensors()
    specimen = specimen_weights(features, permute_soft, storage, condition, decoder.coupling_blocks).tensors()
    assert {name: (tensor.shape, tensor.dtype) for name, tensor in specimen.items()} == {
        name: (tensor.shape, tensor.dtype) for name, tensor in folded.items()
    }
