"""What every operator promises, whatever its mathematics: one table of operators, one test a promise."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

import pytest
import torch
from torch import Tensor

import topk

N, K = 9, 3


@dataclass(frozen=True)
class Case:
    method: str
    options: dict[str, Any] = field(default_factory=dict)
    sums_to_k: float = 1e-5  # relative, in float32; infinite where it is not promised
    twice: bool = True  # smooth enough for second derivatives at random scores
    precision: float = 1e-9  # of values that an iteration approaches

    def __call__(self, scores: Tensor, k: float | Tensor = K, **keywords: Any) -> Tensor:
        torch.manual_seed(5)
        return topk.soft_topk(scores, k, method=self.method, **{**self.options, **keywords})


CASES = {
    "subset": Case("subset"),
    "subset, cold": Case("subset", {"temperature": 0.2}),
    "logistic": Case("logistic"),
    "sparse": Case("sparse", {"temperature": 2.0}),
    "laplace": Case("laplace"),
    "gaussian": Case("gaussian"),
    "fixed": Case("fixed", sums_to_k=torch.inf),
    "perturbed, quadrature": Case("perturbed", {"samples": None}),
    "odd_even": Case("sort"),
    "splitter_selection": Case("sort", {"sorter": "splitter_selection", "distribution": "logistic"}),
    "neuralsort": Case("sort", {"sorter": "neuralsort"}),
    "softsort": Case("sort", {"sorter": "softsort"}),
    "sinkhorn": Case("sort", {"sorter": "sinkhorn"}, precision=1e-5),
}
DRAWN = {
    "perturbed": Case("perturbed", {"samples": 4}, twice=False),
    "perturbed, gumbel": Case("perturbed", {"samples": 4, "noise": "gumbel"}, twice=False),
}
every_operator = pytest.mark.parametrize("operator", [*CASES.values()], ids=[*CASES])
every_operator_and_noise = pytest.mark.parametrize("operator", [*CASES.values(), *DRAWN.values()], ids=[*CASES, *DRAWN])


def batch(rows: int = 4, dtype: torch.dtype = torch.float64) -> Tensor:
    return (2 * torch.randn(rows, N, dtype=torch.float64)).to(dtype)


def mask_and_gradient(operator: Callable[..., Tensor], scores: Tensor, **keywords: Any) -> tuple[Tensor, Tensor]:
    scores = scores.detach().clone().requires_grad_()
    mask = operator(scores, **keywords)
    weight = torch.linspace(-1.0, 2.0, mask.shape[-1], dtype=mask.dtype)
    return mask.detach(), torch.autograd.grad((mask * weight).sum(), scores)[0]


@every_operator_and_noise
def test_masks_lie_between_0_and_1_and_sum_to_k(operator: Case) -> None:
    for k in (1, K, N - 1, N):
        mask = operator(batch(50, torch.float32), k)
        assert mask.dtype == torch.float32
        assert (mask >= -1e-6).all()
        if operator.sums_to_k < torch.inf and operator.options.get("sorter") not in ("neuralsort", "softsort"):
            assert (mask <= 1 + 1e-6).all()
        assert ((mask.sum(1) - k).abs() <= operator.sums_to_k * k).all()


@every_operator
def test_cold_masks_are_hard(operator: Case) -> None:
    scores = batch()
    hard = torch.zeros_like(scores).scatter_(1, scores.topk(K).indices, 1.0)
    options = {"distribution": "logistic"} if operator.method == "sort" else {}
    torch.testing.assert_close(operator(scores, temperature=1e-3, **options), hard, rtol=0, atol=1e-6)


@every_operator_and_noise
def test_masked_elements_are_never_chosen(operator: Case) -> None:
    scores = batch()
    scores[0, 2:4] = -torch.inf
    scores[1, 2:] = -torch.inf  # fewer than k are possible
    scores[2, :] = -torch.inf
    mask, gradient = mask_and_gradient(operator, scores)
    assert (mask[scores == -torch.inf] == 0).all()
    torch.testing.assert_close(mask[1, :2], torch.ones(2, dtype=mask.dtype), rtol=0, atol=operator.precision)
    assert gradient.isfinite().all()
    assert (gradient[scores == -torch.inf] == 0).all()
    if operator in CASES.values() and operator.method != "sort":  # there the order of the elements counts
        possible = torch.tensor([0, 1, *range(4, N)])
        torch.testing.assert_close(mask[:1, possible], operator(scores[:1, possible]))


@every_operator_and_noise
@pytest.mark.parametrize("value", [torch.nan, torch.inf])
def test_a_broken_row_stays_alone(operator: Case, value: float) -> None:
    scores = batch()
    expected = mask_and_gradient(operator, scores)
    scores[1, 4] = value
    mask, gradient = mask_and_gradient(operator, scores)
    others = torch.tensor([0, 2, 3])
    assert mask[1].isnan().all()
    torch.testing.assert_close(mask[others], expected[0][others], rtol=0, atol=operator.precision)
    torch.testing.assert_close(gradient[others], expected[1][others], rtol=0, atol=10 * operator.precision)


@every_operator
def test_equal_scores_have_equal_shares(operator: Case) -> None:
    if operator.method == "sort" and operator.options.get("sorter") not in ("neuralsort", "softsort", "sinkhorn"):
        pytest.skip("a network's result depends on the order in which elements enter")
    mask = operator(torch.zeros(2, N, dtype=torch.float64))
    share = 0.5 if operator.method == "fixed" else K / N
    torch.testing.assert_close(mask, torch.full_like(mask, share), rtol=0, atol=operator.precision)


@every_operator_and_noise
def test_hard_masks_take_the_first_of_equals_and_keep_the_gradient(operator: Case) -> None:
    scores = batch()
    scores[0] = 1.0
    scores[1, 1:7] = scores[1].max() + 1.0
    scores[2, 2:] = -torch.inf
    mask, gradient = mask_and_gradient(operator, scores, hard=True)
    expected = torch.zeros_like(scores)
    expected[0, :K] = expected[1, 1 : 1 + K] = expected[2, :2] = 1.0
    expected[3, scores[3].topk(K).indices] = 1.0
    assert (mask == expected).all()
    torch.testing.assert_close(gradient, mask_and_gradient(operator, scores)[1])


@every_operator_and_noise
@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_half_types_are_computed_in_float32(operator: Case, dtype: torch.dtype) -> None:
    scores = batch(dtype=dtype)
    mask, gradient = mask_and_gradient(operator, scores)
    assert mask.dtype == gradient.dtype == dtype
    exact = operator(scores.float())
    assert (mask == exact.to(dtype)).all()


@every_operator
@pytest.mark.parametrize("dim", [0, 1, -1])
def test_any_dimension(operator: Case, dim: int) -> None:
    scores = torch.randn(5, 4, 6, dtype=torch.float64)
    mask = operator(scores, dim=dim)
    rows = scores.movedim(dim, -1).reshape(-1, scores.shape[dim])
    expected = operator(rows).reshape(scores.movedim(dim, -1).shape).movedim(-1, dim)
    assert mask.shape == scores.shape
    torch.testing.assert_close(mask, expected, rtol=0, atol=operator.precision)
    assert operator(scores[0, 0]).shape == (6,)
    assert operator(scores[:0]).shape == (0, 4, 6)


@every_operator
def test_vmap(operator: Case) -> None:
    scores = torch.randn(3, 2, N, dtype=torch.float64)
    together = torch.stack([operator(each) for each in scores])
    torch.testing.assert_close(torch.func.vmap(operator)(scores), together, rtol=0, atol=operator.precision)
    jacobians = torch.func.vmap(torch.func.jacrev(operator))(scores)
    forward = torch.func.vmap(torch.func.jacfwd(operator))(scores)
    torch.testing.assert_close(jacobians, forward, rtol=0, atol=100 * operator.precision)


@every_operator
@pytest.mark.parametrize("fast", [True, pytest.param(False, marks=pytest.mark.slow)], ids=["projected", "entire"])
def test_gradients(operator: Case, fast: bool) -> None:
    scores = batch(2).requires_grad_()
    options: dict[str, Any] = {"fast_mode": True} if fast else {"check_batched_grad": True}
    torch.autograd.gradcheck(operator, (scores,), atol=1e-5, check_forward_ad=True, **options)
    if operator.twice:
        torch.autograd.gradgradcheck(operator, (scores,), atol=1e-4, fast_mode=fast)


@every_operator
def test_gradients_of_a_batch(operator: Case) -> None:
    scores = batch(2).requires_grad_()
    mask = operator(scores)
    upstream = torch.randn(3, *mask.shape, dtype=mask.dtype)
    (together,) = torch.autograd.grad(mask, scores, upstream, retain_graph=True, is_grads_batched=True)
    each = [torch.autograd.grad(mask, scores, one, retain_graph=True)[0] for one in upstream]
    torch.testing.assert_close(together, torch.stack(each), rtol=0, atol=operator.precision)


_TRACED = ("subset", "logistic", "fixed", "odd_even", "neuralsort", "sinkhorn", "perturbed")
"""One operator of every implementation: most of the time is the compiler's, some seconds for each."""


@every_operator_and_noise
@pytest.mark.parametrize(
    "backend", ["eager", *(pytest.param(name, marks=pytest.mark.slow) for name in ("aot_eager", "inductor"))]
)
def test_compiles_in_one_piece(
    operator: Case, backend: str, monkeypatch: pytest.MonkeyPatch, request: pytest.FixtureRequest
) -> None:
    if backend == "eager" and request.node.callspec.id.removeprefix("eager-") not in _TRACED:
        pytest.skip("compiled under `slow`")
    monkeypatch.undo()  # the compiler does not know the poisoned functions as makers of tensors
    torch._dynamo.reset()
    scores = batch(2)[:, :6]
    expected = mask_and_gradient(operator, scores)

    def function(x: Tensor) -> Tensor:
        return topk.soft_topk(x, K, method=operator.method, **operator.options)

    compiled = torch.compile(function, fullgraph=True, backend=backend)
    torch.manual_seed(5)
    found = mask_and_gradient(compiled, scores)
    if backend == "inductor" and operator.method == "perturbed":  # it has draws of its own
        torch.testing.assert_close(found[0].sum(1), expected[0].sum(1))
        assert found[1].isfinite().all()
        return
    torch.testing.assert_close(found, expected, rtol=0, atol=10 * operator.precision)


@every_operator
def test_a_hundred_thousand_rows_without_a_nan(operator: Case) -> None:
    rows = 100_000 if operator.method not in ("perturbed", "sort") else 1_000
    scale = 10.0 ** (6 * torch.rand(rows, 1) - 3)
    scores = scale * torch.randn(rows, N) + 100 * torch.randn(rows, 1)
    scores[::7] = scores[::7].round()
    scores[::11, ::3] = -torch.inf
    mask, gradient = mask_and_gradient(operator, scores)
    assert mask.isfinite().all()
    assert gradient.isfinite().all()
    if operator.method != "fixed":
        assert ((mask.sum(1) - K).abs() <= 3e-5 * K).all()


@pytest.mark.parametrize(
    ("change", "error", "message"),
    [
        ({"scores": [1.0, 2.0]}, TypeError, "scores must be a Tensor, got list"),
        ({"scores": torch.arange(5)}, TypeError, "scores must be float32.*torch.int64"),
        ({"scores": torch.randn(3, 0)}, ValueError, "scores must have at least one number along dim=-1"),
        ({"k": 0}, ValueError, "k must be a finite number > 0 and <= 9, got 0"),
        ({"k": N + 1}, ValueError, "k must be a finite number > 0 and <= 9, got 10"),
        ({"k": 2.5}, TypeError, "k must be an int for this method, got 2.5 of type float"),
        ({"k": torch.tensor(2.0)}, TypeError, "k must be an int for this method"),
        ({"k": torch.ones(3), "method": "logistic"}, ValueError, r"k must broadcast to shape \(4,\).*got shape \(3,\)"),
        ({"method": "soft"}, ValueError, "method must be one of 'subset'.*got 'soft'"),
        ({"temperature": 0.0}, ValueError, "temperature must be a finite number > 0, got 0.0"),
        ({"temperature": torch.ones(3)}, ValueError, r"temperature must broadcast to shape \(4,\).*got shape \(3,\)"),
        ({"dim": 2}, ValueError, r"dim must be a dimension of scores of shape \(4, 9\), got 2"),
        ({"dim": 1.0}, TypeError, "dim must be an int, got 1.0"),
        ({"samples": 3}, TypeError, "samples is no option of method='subset', expected none"),
        ({"method": "perturbed", "samples": 0}, ValueError, "samples must be at least 1, got 0"),
        ({"method": "perturbed", "noise": "cauchy"}, ValueError, "noise must be one of 'gaussian', 'gumbel'"),
        ({"method": "perturbed", "noise": "gumbel", "samples": None}, ValueError, "samples must be a number of draws"),
        ({"method": "perturbed", "generator": 3}, TypeError, "generator must be a torch.Generator or None, got int"),
        ({"method": "sort", "sorter": "bubble"}, ValueError, "method must be one of 'odd_even'.*got 'bubble'"),
        ({"method": "sort", "temperature": torch.ones(())}, TypeError, "temperature must be a number for"),
    ],
)
def test_errors_name_argument_value_and_expectation(
    change: dict[str, Any], error: type[Exception], message: str
) -> None:
    arguments = {"scores": torch.randn(4, N), "k": K, **change}
    with pytest.raises(error, match=message):
        topk.soft_topk(arguments.pop("scores"), arguments.pop("k"), **arguments)
