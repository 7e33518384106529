"""Elementary functions of the compiled code, on every lane of a vector."""

from __future__ import annotations

import ctypes
import math
import shutil
from typing import Any

import pytest
import torch
from compiled_code import SOURCES, built, compiled
from torch import Tensor


@pytest.fixture(scope="module", params=["avx2", "avx512"])
def functions(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Any:
    if shutil.which("gcc") is None:
        pytest.skip("gcc is not installed")
    built(request.param)
    folder = tmp_path_factory.mktemp("functions")
    loops = [
        f"EXPORTED void {name}_of(const float *x, float *y, size n) "
        f"{{ for (size i = 0; i < n; i += VECTOR) *(loose *)(y + i) = {name}(*(const loose *)(x + i)); }}"
        for name in ("exponential", "hyperbolic_tangent", "softplus")
    ]
    loops += [
        f"EXPORTED void {name}_of(const float *x, float *y, size n) {{ for (size i = 0; i < n; i += VECTOR) {{ "
        f"twofold two = {call}; *(loose *)(y + i) = two.high; *(loose *)(y + n + i) = two.low; }} }}"
        for name, call in (
            ("precise_exponential", "precise_exponential((twofold){*(const loose *)(x + i), all(3e-8f)})"),
            ("precise_hyperbolic_tangent", "precise_hyperbolic_tangent(*(const loose *)(x + i))"),
        )
    ]
    (folder / "functions.c").write_text("\n".join([f'#include "{SOURCES / "flow.h"}"', *loops]))
    return ctypes.CDLL(str(compiled(folder, folder / "functions.c", request.param, "-O2")))


def applied(functions: Any, name: str, x: Tensor, parts: int = 1) -> Tensor:
    """(parts, n), or (n,) for one; the parts of a number are added up by whoever wants it."""
    y = torch.empty(parts, len(x)).squeeze(0)
    function = getattr(functions, f"{name}_of")
    function.argtypes, function.restype = [ctypes.c_void_p, ctypes.c_void_p, ctypes.c_int64], None
    function(x.data_ptr(), y.data_ptr(), len(x))
    return y


FUNCTIONS = {"exponential": torch.exp, "hyperbolic_tangent": torch.tanh, "softplus": torch.nn.functional.softplus}


@pytest.mark.parametrize(
    ("name", "low", "high", "bound"),
    [
        ("exponential", -87.0, 88.0, 1.2e-7),
        ("exponential", -1e-3, 1e-3, 1.2e-7),
        ("hyperbolic_tangent", -30.0, 30.0, 2.0e-7),
        ("hyperbolic_tangent", -1.0, 1.0, 2.0e-7),
        ("hyperbolic_tangent", -1e-6, 1e-6, 1.0e-7),
        ("softplus", -80.0, 80.0, 3.6e-7),
        ("softplus", -1.0, 1.0, 3.6e-7),
    ],
)
def test_functions_are_right_to_a_few_last_places(
    functions: Any, name: str, low: float, high: float, bound: float
) -> None:
    x = torch.linspace(low, high, 1 << 18)
    expected = FUNCTIONS[name](x.double())
    error = (applied(functions, name, x) - expected).abs()
    assert (error <= bound * expected.abs()).all()


@pytest.mark.parametrize("high", [1e-6, 1.0, 1.9, 8.0, 40.0])
def test_precise_functions_have_more_digits_than_float32(functions: Any, high: float) -> None:
    x = torch.linspace(-high, high, 1 << 18)
    for name, function, argument, bound in (
        ("precise_exponential", torch.exp, x.double() + float(torch.tensor(3e-8)), 3e-9),
        ("precise_hyperbolic_tangent", torch.tanh, x.double(), 2.5e-8),
    ):
        exact = function(argument)
        parts = applied(functions, name, x, parts=2)
        assert ((parts.double().sum(0) - exact).abs() <= bound * exact.abs()).all()
        assert (parts[1].abs() <= 1.6e-7 * parts[0].abs()).all()


def test_functions_at_their_ends(functions: Any) -> None:
    ends = torch.tensor([math.nan, math.inf, -math.inf, 0.0, -0.0, 1e30, -1e30, 200.0] * 2)
    for name, function in FUNCTIONS.items():
        y, expected = applied(functions, name, ends), function(ends)
        assert torch.equal(y.isnan(), ends.isnan())
        finite = expected.isfinite()
        torch.testing.assert_close(y[finite], expected[finite], rtol=3e-7, atol=2e-38)
        assert (y[expected.isinf()] > 1e38).all()
    for name in ("exponential", "hyperbolic_tangent"):
        parts = applied(functions, f"precise_{name}", ends, parts=2)
        torch.testing.assert_close(parts[0], applied(functions, name, ends), rtol=3e-7, atol=2e-38, equal_nan=True)
        assert torch.equal(parts[1].isnan(), ends.isnan())
