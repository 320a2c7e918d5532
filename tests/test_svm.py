"""The drop-in for smooth-topk: its interface, its values by their own definitions, and code written for it."""

from __future__ import annotations

import copy
import math
import pickle

import brute_force as reference
import pytest
import torch
from torch import nn

import topk
from topk.svm import MaxTop1SVM, MaxTopkSVM, SmoothTop1SVM, SmoothTopkSVM

SMOOTH = {
    "SmoothTop1SVM": (SmoothTop1SVM, {}),
    "SmoothTopkSVM": (SmoothTopkSVM, {"k": 3}),
}
HARD = {
    "MaxTop1SVM": (MaxTop1SVM, {}),
    "MaxTopkSVM": (MaxTopkSVM, {"k": 3}),
}
ALL = {**SMOOTH, **HARD}
every_loss = pytest.mark.parametrize("name", ALL)


def make(name: str, n_classes: int, **options: float) -> nn.Module:
    kind, fixed = ALL[name]
    return kind(n_classes, **{**fixed, **options})


def a_batch(rows: int = 16, classes: int = 7, kind: torch.dtype = torch.float64) -> tuple[torch.Tensor, torch.Tensor]:
    return (2 * torch.randn(rows, classes, dtype=kind)).requires_grad_(), torch.randint(classes, (rows,))


def same_values_and_gradients(loss: torch.Tensor, expected: torch.Tensor, scores: torch.Tensor) -> None:
    torch.testing.assert_close(loss, expected, rtol=1e-10, atol=1e-10)
    gradients = [torch.autograd.grad(value, scores, retain_graph=True)[0] for value in (loss, expected)]
    torch.testing.assert_close(*gradients, rtol=1e-10, atol=1e-10)


# --- values ----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("alpha", [None, 0.0, 0.5, 3])
@pytest.mark.parametrize("tau", [0.1, 1.0, 5.0])
def test_smooth_top1_is_the_smoothed_multiclass_hinge(alpha: float | None, tau: float) -> None:
    scores, target = a_batch()
    margin = 1.0 if alpha is None else alpha
    augmented = scores + margin * (torch.arange(7) != target[:, None])
    expected = tau * torch.logsumexp((augmented - scores.gather(1, target[:, None])) / tau, 1).mean()
    same_values_and_gradients(SmoothTop1SVM(7, alpha, tau)(scores, target), expected, scores)


@pytest.mark.parametrize("k", [1, 2, 5, 6])
@pytest.mark.parametrize("tau", [0.1, 1.0, 5.0])
def test_smooth_topk_equals_enumeration(k: int, tau: float) -> None:
    scores, target = a_batch()
    rows = [reference.smooth_topk_loss(row, int(y), k, tau, 0.7) for row, y in zip(scores, target, strict=True)]
    same_values_and_gradients(SmoothTopkSVM(7, 0.7, tau, k)(scores, target), torch.stack(rows).mean(), scores)


@pytest.mark.parametrize("alpha", [None, 0.0, 0.5, 3])
def test_max_top1_is_the_multiclass_hinge(alpha: float | None) -> None:
    scores, target = a_batch()
    margin = 1.0 if alpha is None else alpha
    augmented = scores + margin * (torch.arange(7) != target[:, None])
    expected = (augmented.max(1).values - scores.gather(1, target[:, None]).squeeze(1)).mean()
    same_values_and_gradients(MaxTop1SVM(7, alpha)(scores, target), expected, scores)


def by_the_two_oracles(scores: torch.Tensor, target: int, k: int, alpha: float) -> torch.Tensor:
    """The best k-set without y, with margin, against the best k-set with y."""
    wrong = reference.wrong_scores(scores, target).sort(descending=True).values
    without, including = (wrong[:k] + alpha).mean(), (wrong[: k - 1].sum() + scores[target]) / k
    return (without - including).clamp(min=0)


@pytest.mark.parametrize("k", [1, 2, 5, 6])
@pytest.mark.parametrize("alpha", [0.0, 0.5, 3])
def test_max_topk_equals_its_two_oracles(k: int, alpha: float) -> None:
    scores, target = a_batch()
    rows = [by_the_two_oracles(row, int(y), k, alpha) for row, y in zip(scores, target, strict=True)]
    same_values_and_gradients(MaxTopkSVM(7, alpha, k)(scores, target), torch.stack(rows).mean(), scores)


@every_loss
def test_all_guesses_right_and_empty_batches_give_zero(name: str) -> None:
    """As the package's smooth losses did; the functional forms give NaN for an empty mean."""
    scores = torch.zeros(0, 7, requires_grad=True)
    loss = make(name, 7)(scores, torch.zeros(0, dtype=torch.int64))
    loss.backward()
    assert loss == 0
    if "k" in ALL[name][1]:
        assert make(name, 7, k=7)(*a_batch()) == 0


def test_several_k_at_once() -> None:
    scores, target = a_batch()
    both = SmoothTopkSVM(7, k={1: 0.25, 5: 0.75})(scores, target)
    parts = 0.25 * SmoothTop1SVM(7)(scores, target) + 0.75 * SmoothTopkSVM(7)(scores, target)
    torch.testing.assert_close(both, parts)


# --- where the package switches to the hard loss ---------------------------------------------------------------------


def behind_a_gap(rows: int, classes: int, k: int, tau: float) -> torch.Tensor:
    """The k largest scores at least k tau log 1000 above the others, with spreads from none to wide."""
    spread = 10.0 ** torch.randint(-3, 2, (rows, 1)).double()
    scores = -torch.rand(rows, classes, dtype=torch.float64) * spread * tau
    gap = k * tau * math.log(1e3)
    scores[:, :k] = gap + torch.rand(rows, k, dtype=torch.float64) * spread * tau
    return scores


@pytest.mark.parametrize("tau", [0.05, 1.0, 3.0])
@pytest.mark.parametrize(("classes", "k"), [(2, 1), (7, 1), (7, 3), (7, 6), (50, 5), (2000, 1), (2000, 5)])
def test_the_stated_distance_from_the_hard_loss_holds(classes: int, k: int, tau: float) -> None:
    count = 150
    scores = behind_a_gap(count, classes, k, tau)
    for alpha in (0.0, 1.0, 20.0 * tau):
        for inside in (True, False):
            target = torch.randint(k, (count,)) if inside else torch.randint(k, classes, (count,))
            smooth = topk.smooth_topk_loss(scores, target, k, tau=tau, margin=alpha, reduction="none")
            rows = zip(scores, target.tolist(), strict=True)
            difference = smooth - torch.stack([by_the_two_oracles(row, y, k, alpha) for row, y in rows])
            if not inside:
                low, high = -tau * math.log(k), tau * math.log1p((classes - k) / 1e3)
            elif alpha <= tau * math.log(1e3):
                low, high = 0.0, tau * math.log1p((classes - k) * math.exp(alpha / tau) / 1e3)
            else:
                high = tau * math.log(max(k, classes - k + 1))
                low = -high
            rounding = 1e-12 * (1 + scores.abs().max())
            assert low - rounding <= difference.min()
            assert difference.max() <= high + rounding


def test_for_two_classes_the_branches_differ_by_thousandths() -> None:
    """What CLAM uses: SmoothTop1SVM(n_classes=2) at its defaults."""
    scores = torch.tensor([[math.log(1e3), 0.0], [50.0, 0.0], [0.0, 7.0]], dtype=torch.float64)
    for target in (torch.tensor([0, 0, 1]), torch.tensor([1, 1, 0])):
        torch.testing.assert_close(SmoothTop1SVM(2)(scores, target), MaxTop1SVM(2)(scores, target), rtol=0, atol=3e-3)


# --- the interface ---------------------------------------------------------------------------------------------------


def test_constructors_take_the_packages_arguments_by_position_and_name() -> None:
    assert SmoothTop1SVM(4, 0.5, 2.0).tau == SmoothTop1SVM(n_classes=4, alpha=0.5, tau=2.0).tau == 2.0
    assert SmoothTopkSVM(9, 0.5, 2.0, 3).k == SmoothTopkSVM(n_classes=9, alpha=0.5, tau=2.0, k=3).k == 3
    assert MaxTop1SVM(4, 0.5).alpha == MaxTop1SVM(n_classes=4, alpha=0.5).alpha == 0.5
    assert MaxTopkSVM(9, 0.5, 3).k == MaxTopkSVM(n_classes=9, alpha=0.5, k=3).k == 3
    assert SmoothTopkSVM(9).k == MaxTopkSVM(9).k == 5
    assert SmoothTopkSVM(9).alpha == SmoothTop1SVM(9, alpha=None).alpha == 1
    assert SmoothTopkSVM(9).thresh == SmoothTop1SVM(9).thresh == 1e3
    assert MaxTop1SVM(4).tau is None


@every_loss
def test_the_state_is_the_packages(name: str) -> None:
    loss = make(name, 7)
    state = loss.state_dict()
    assert list(state) == ["labels"]
    assert torch.equal(state["labels"], torch.arange(7))
    assert state["labels"].dtype == torch.int64
    assert loss.half().labels.dtype == torch.int64
    model = nn.ModuleDict({"body": nn.Linear(3, 7), "instance_loss_fn": loss})
    checkpoint = {**nn.Linear(3, 7).state_dict(prefix="body."), "instance_loss_fn.labels": torch.arange(7)}
    model.load_state_dict(checkpoint, strict=True)


@pytest.mark.parametrize("name", SMOOTH)
def test_tau_can_be_set_after_construction(name: str) -> None:
    scores, target = a_batch()
    loss = make(name, 7)
    before = loss(scores, target)
    loss.tau = 0.2
    assert loss.tau == 0.2
    assert loss(scores, target) != before
    torch.testing.assert_close(loss(scores, target), make(name, 7, tau=0.2)(scores, target))
    with pytest.raises(ValueError, match="tau must be a finite number > 0, got 0"):
        loss.tau = 0


@every_loss
def test_pickle_copy_and_cpu(name: str) -> None:
    scores, target = a_batch()
    loss = make(name, 7, alpha=0.3)
    expected = loss(scores, target)
    for other in (pickle.loads(pickle.dumps(loss)), copy.deepcopy(loss), loss.cpu(), loss.to("cpu")):
        assert torch.equal(other(scores, target), expected)


@every_loss
def test_half_types_are_computed_in_float32(name: str) -> None:
    for kind in (torch.float16, torch.bfloat16):
        scores, target = a_batch(kind=kind)
        loss = make(name, 7)(scores, target)
        assert loss.dtype == torch.float32
        torch.testing.assert_close(loss, make(name, 7)(scores.float(), target))


@every_loss
@pytest.mark.parametrize("backend", ["eager", pytest.param("aot_eager", marks=pytest.mark.slow)])
def test_compiles_whole(name: str, backend: str) -> None:
    scores, target = a_batch()
    loss = make(name, 7)
    compiled = torch.compile(loss, fullgraph=True, backend=backend)
    same_values_and_gradients(compiled(scores, target), loss(scores, target), scores)
    if name in SMOOTH:
        for loss.tau in (0.5, 0.2):  # compiles again for each
            same_values_and_gradients(compiled(scores, target), loss(scores, target), scores)


def test_repr() -> None:
    assert repr(SmoothTopkSVM(9, k=3)) == "SmoothTopkSVM(n_classes=9, alpha=1.0, tau=1.0, k=3)"
    assert repr(MaxTop1SVM(9, alpha=2)) == "MaxTop1SVM(n_classes=9, alpha=2.0)"


@pytest.mark.gpu
@every_loss
def test_scores_may_be_on_another_device(name: str) -> None:
    scores, target = a_batch()
    loss = make(name, 7)
    expected = loss(scores, target)
    torch.testing.assert_close(loss(scores.cuda(), target.cuda()).cpu(), expected)
    torch.testing.assert_close(loss.cuda()(scores.cuda(), target.cuda()).cpu(), expected)
    assert loss.labels.is_cuda


# --- code written for the package ------------------------------------------------------------------------------------


def test_attention_pooling_with_an_instance_loss_runs_unchanged() -> None:
    """The way pathology code of the CLAM kind uses the package: instance labels from the most attended patches."""
    from topk.svm import SmoothTop1SVM

    device = torch.device("cpu")
    instance_loss_fn = SmoothTop1SVM(n_classes=2)
    if device.type == "cuda":
        instance_loss_fn = instance_loss_fn.cuda()
    body, attention, head = nn.Linear(32, 16), nn.Linear(16, 1), nn.Linear(16, 2)
    classifier = nn.Linear(16, 2)
    model = nn.ModuleList([body, attention, head, classifier, instance_loss_fn]).to(device)
    optimizer = torch.optim.Adam([p for p in model.parameters() if p.requires_grad], lr=1e-2)
    label = torch.tensor([1])
    bag = torch.randn(60, 32) + torch.randn(32)
    bag[:20] += 1.0
    losses = []
    for _ in range(40):
        features = body(bag).relu()
        weights = attention(features).T
        top_p = features[weights.topk(8)[1][-1]]
        top_n = features[(-weights).topk(8, dim=1)[1][-1]]
        p_targets = torch.full((8,), 1, device=device).long()
        n_targets = torch.full((8,), 0, device=device).long()
        logits = head(torch.cat([top_p, top_n], dim=0))
        instance_loss = instance_loss_fn(logits, torch.cat([p_targets, n_targets], dim=0))
        bag_loss = nn.functional.cross_entropy(classifier(weights.softmax(1) @ features), label)
        total_loss = 0.7 * bag_loss + 0.3 * instance_loss
        total_loss.backward()
        optimizer.step()
        optimizer.zero_grad()
        losses.append(instance_loss.item())
    assert losses[-1] < 0.5 * losses[0]
    assert head.weight.isfinite().all()


# --- wrong arguments -------------------------------------------------------------------------------------------------


@every_loss
@pytest.mark.parametrize(
    ("options", "error", "message"),
    [
        ({"n_classes": 0}, ValueError, "n_classes must be at least 1, got 0"),
        ({"n_classes": 3.0}, TypeError, "n_classes must be an int, got 3.0"),
        ({"alpha": -1}, ValueError, "alpha must be a finite number >= 0, got -1"),
        ({"alpha": "1"}, TypeError, "alpha must be a number, got '1'"),
    ],
)
def test_wrong_constructor_arguments(name: str, options: dict, error: type[Exception], message: str) -> None:
    kind, fixed = ALL[name]
    with pytest.raises(error, match=message):
        kind(**{"n_classes": 7, **fixed, **options})


@pytest.mark.parametrize("kind", [SmoothTopkSVM, MaxTopkSVM])
def test_wrong_k(kind: type[nn.Module]) -> None:
    with pytest.raises(ValueError, match="k must be at least 1, got 0"):
        kind(7, k=0)
    with pytest.raises(ValueError, match="k must be at most the number of classes, 7, got 8"):
        kind(7, k=8)
    with pytest.raises(TypeError, match="k must be an int"):
        kind(7, k=2.5)


@pytest.mark.parametrize("tau", [0.0, -1.0, math.inf, math.nan])
def test_wrong_tau(tau: float) -> None:
    for kind in (SmoothTop1SVM, SmoothTopkSVM):
        with pytest.raises(ValueError, match="tau must be a finite number > 0, got"):
            kind(7, tau=tau)
        with pytest.raises(TypeError, match="tau must be a number, got None"):
            kind(7, tau=None)


@every_loss
def test_another_number_of_classes_is_refused(name: str) -> None:
    with pytest.raises(ValueError, match="scores must have n_classes = 7 classes, got 9"):
        make(name, 7)(torch.randn(4, 9), torch.zeros(4, dtype=torch.int64))
