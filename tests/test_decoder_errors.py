"""Options and tensors that do not fit a decoder are refused in one clear line, by the folded one too."""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any

import pytest
import torch
from flows import rough_decoder
from torch import Tensor

from cflow_fast import FlowDecoder


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"features": 1}, "features is a whole number of at least 2, got 1"),
        ({"features": 8.0}, "features is a whole number of at least 2, got 8.0"),
        ({"condition": -4}, "condition is a whole number of at least 0, got -4"),
        ({"coupling_blocks": 0}, "coupling_blocks is a whole number of at least 1, got 0"),
        ({"hidden": 0}, "hidden is a whole number of at least 1, got 0"),
        ({"global_affine_type": "TANH"}, "global_affine_type is one of SOFTPLUS, SIGMOID, EXP, got 'TANH'"),
        ({"activation": "gelu"}, "activation is one of relu, softplus, got 'gelu'"),
        ({"clamp": "atan"}, r"clamp is one of tanh\(s\), tanh\(s/alpha\), got 'atan'"),
        ({"affine_clamping": 0.0}, "affine_clamping is positive, got 0.0"),
        ({"affine_clamping": math.nan}, "affine_clamping is positive, got nan"),
        ({"global_affine_init": 0.0}, "global_affine_init is positive .*, got 0.0"),
        ({"global_affine_type": "SIGMOID", "global_affine_init": 10.0}, "under 10 for SIGMOID.*, got 10.0"),
    ],
)
def test_impossible_options_are_refused(options: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        FlowDecoder(**({"features": 8} | options))


def _zeros(*shape: int, dtype: torch.dtype = torch.float32) -> Tensor:
    return torch.zeros(shape, dtype=dtype)


BAD_CALLS: list[tuple[Callable[[Any], Any], type[Exception], str]] = [
    (
        lambda d: d(_zeros(3, 6), [_zeros(3, 8)]),
        ValueError,
        r"feature vectors of shape \(N, 7\), got \(3, 6\)",
    ),
    (lambda d: d(_zeros(7), [_zeros(1, 8)]), ValueError, r"expected feature vectors of shape \(N, 7\), got \(7,\)"),
    (lambda d: d(_zeros(3, 7)), ValueError, r"expected one condition of shape \(3, 8\) in a list, got 0"),
    (lambda d: d(_zeros(3, 7), [_zeros(3, 4)]), ValueError, r"expected a condition of shape \(3, 8\), got \(3, 4\)"),
    (lambda d: d(_zeros(3, 7), [_zeros(1, 8)]), ValueError, r"expected a condition of shape \(3, 8\), got \(1, 8\)"),
    (lambda d: d(_zeros(3, 7), [_zeros(3, 8)] * 2), ValueError, "expected one condition .*, got 2"),
    (lambda d: d(_zeros(3, 7), _zeros(3, 8)), TypeError, r"in a list, decoder\(z, \[c\]\)"),
    (lambda d: d(_zeros(3, 7).long(), [_zeros(3, 8)]), TypeError, "floating-point feature vectors, got torch.int64"),
    (lambda d: d(_zeros(3, 7) + 0j, [_zeros(3, 8)]), TypeError, "floating-point feature vectors, got torch.complex64"),
    (lambda d: d(_zeros(3, 7), [_zeros(3, 8).int()]), TypeError, "floating-point conditions, got torch.int32"),
    (lambda d: d.log_prob(_zeros(2, 6, 3, 4)), ValueError, r"shape \(B, 7, H, W\), got \(2, 6, 3, 4\)"),
    (lambda d: d.log_prob(_zeros(7, 3, 4)), ValueError, r"maps \(B, D, H, W\), or rows .*, got \(7, 3, 4\)"),
    (lambda d: d.log_prob(_zeros(1, 7, 3, 4), _zeros(12, 8)), ValueError, "pass no condition with them"),
    (lambda d: d.log_prob(_zeros(1, 7, 3, 4).byte()), TypeError, "floating-point feature maps, got torch.uint8"),
    (lambda d: d.log_prob(_zeros(3, 7)), ValueError, "expected one condition"),
]


@pytest.mark.parametrize("folded", [False, True])
@pytest.mark.parametrize(("call", "error", "message"), BAD_CALLS)
def test_tensors_that_do_not_fit_are_refused(
    call: Callable[[Any], Any], error: type[Exception], message: str, folded: bool
) -> None:
    decoder = rough_decoder()
    with pytest.raises(error, match=message):
        call(decoder.fold("fp32") if folded else decoder)


@pytest.mark.parametrize("folded", [False, True])
def test_condition_of_an_unconditional_decoder_is_refused(folded: bool) -> None:
    decoder = rough_decoder(condition=0)
    with pytest.raises(ValueError, match=r"has no condition \(condition=0\), got 1"):
        (decoder.fold("fp32") if folded else decoder)(_zeros(3, 7), [_zeros(3, 8)])


@pytest.mark.parametrize("folded", [False, True])
def test_condition_that_cannot_encode_positions_takes_rows_only(folded: bool) -> None:
    decoder = rough_decoder(condition=6)
    scorer = decoder.fold("fp32") if folded else decoder
    assert scorer.log_prob(_zeros(3, 7), _zeros(3, 6)).shape == (3,)
    with pytest.raises(ValueError, match="multiple of 4 channels, got 6"):
        scorer.log_prob(_zeros(1, 7, 2, 2))
