"""The kernels under a GPU's arithmetic: interpreted with the errors that exp, log, / and sqrt may have there."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any

import numpy as np
import pytest
import torch
from kernel_cases import GPU_CASES, compare, special_rows
from torch import Tensor
from triton.runtime import interpreter

from bench.trips import halving

pytestmark = pytest.mark.filterwarnings("ignore::RuntimeWarning")  # numpy's, about what a kernel masks afterwards

# Units in the last place, as CUDA's documentation bounds them: ex2.approx and div.full 2, sqrt.approx 1 (and so does
# rcp.approx, a division here); lg2.approx an absolute 2^-22 and one rounding of the product with log 2, between -pi and
# pi sin.approx an absolute 2^-21.41 and cos.approx 2^-21.19.
_RELATIVE = {"create_exp": 2, "create_exp2": 2, "create_fdiv": 2, "create_sqrt": 1, "create_log": 1, "create_log2": 1}
_ABSOLUTE = {"create_log": 2.0**-22 * np.log(2.0), "create_log2": 2.0**-22}
_RELATIVE.update(create_sin=0, create_cos=0)
_ABSOLUTE.update(create_sin=2.0**-21.41, create_cos=2.0**-21.19)

CASES = [
    pytest.param(function, keywords, id=f"{name}-{keywords}")
    for name, (function, variants) in GPU_CASES.items()
    for keywords in variants
]


@pytest.fixture(params=[pytest.param(1.0, id="upwards"), pytest.param(-1.0, id="downwards")])
def _documented_errors(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> None:
    """Every result in float32 is off by as much as it may be, all in one direction."""
    builder = interpreter.InterpreterBuilder

    def off(name: str) -> Callable[..., Any]:
        exact = getattr(builder, name)

        def inexact(self: Any, *arguments: Any) -> Any:
            result = exact(self, *arguments)
            if result.data.dtype == np.float32:
                wide = result.data.astype(np.float64)
                moved = wide * (1.0 + request.param * _RELATIVE[name] * 2.0**-23)
                moved += request.param * _ABSOLUTE.get(name, 0.0) * (np.abs(wide) < 1.0)
                result.data = np.where(np.isfinite(wide), moved, wide).astype(np.float32)
            return result

        return inexact

    for name in _RELATIVE:
        monkeypatch.setattr(builder, name, off(name))
    monkeypatch.setattr(interpreter.ReduceOps, "generic_reduce", halving)


@pytest.mark.slow
@pytest.mark.parametrize(("loss", "keywords"), CASES)
@pytest.mark.usefixtures("_documented_errors")
def test_within_tolerance_at_64_classes(loss: Callable[..., Tensor], keywords: Mapping[str, Any]) -> None:
    """As many classes as let the circle of k = 50, or of k = 20, use all its nodes, among rows of every kind."""
    compare(loss, *special_rows(64, torch.float32), tolerance=8.0, **keywords)
