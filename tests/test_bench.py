"""The benchmark tells the truth: wrong contenders get no number, a killed run goes on, memory claims hold."""

from __future__ import annotations

import functools
import math
import re
import time
from collections.abc import Callable
from pathlib import Path

import pytest
import torch

import topk
from bench import plots, runner, suites
from bench.contenders import CONTENDERS, Contender, Setting, contenders
from bench.memory import peak_temporaries
from topk import reference

LOSSES: dict[str, Callable[..., torch.Tensor]] = {
    "smooth": topk.smooth_topk_loss,
    "transition": topk.transition_topk_loss,
}


def _smooth_truth(setting: Setting, row: torch.Tensor, y: int) -> torch.Tensor:
    return reference.smooth_topk_loss_log_space(row, y, setting.k)


def test_a_wrong_contender_is_refused() -> None:
    setting = Setting("smooth", 4, 30, 3)
    right = Contender("right", "smooth", lambda s, n: lambda x, y: topk.smooth_topk_loss(x, y, s.k), _smooth_truth)
    right.gate(setting)
    wrong = Contender(
        "wrong", "smooth", lambda s, n: lambda x, y: 1.001 * topk.smooth_topk_loss(x, y, s.k), _smooth_truth
    )
    with pytest.raises(AssertionError, match="wrong is wrong at smooth 4x30 k=3"):
        wrong.gate(setting)


def test_contenders_say_why_they_sit_out() -> None:
    missing = Contender("x", "smooth", lambda s, n: lambda x, y: x.sum(), needs=("no_such_package",))
    assert missing.why_not(Setting("smooth", 1, 2, 1)) == "no_such_package is not installed"
    small = Contender("x", "smooth", lambda s, n: lambda x, y: x.sum(), largest=10)
    assert "too slow" in str(small.why_not(Setting("smooth", 10, 10, 1)))
    assert {c.family for c in CONTENDERS} == {"any", *suites.FAMILIES}


@pytest.mark.parametrize("family", suites.FAMILIES)
def test_every_contender_passes_its_gate(family: str) -> None:
    setting = Setting(family, 16, 100, 5)
    present = contenders(setting)
    assert {"cross_entropy", "copy", f"topk {family}"} <= {c.name for c in present}
    for contender in present:
        contender.gate(setting)


def test_records_are_kept_and_resumed(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(runner, "SECONDS", 0.05)
    settings = [Setting("hinge", 4, 20, 2), Setting("smooth", 4, 20, 2)]
    path = runner.run_suite("smoke", settings[:1], tmp_path)
    first = runner.read(path)
    assert {row["contender"] for row in first} >= {"cross_entropy", "copy", "topk hinge"}
    assert all(float(row["p20_ms"]) <= float(row["p50_ms"]) <= float(row["p80_ms"]) for row in first)
    assert all(int(row["peak_bytes"]) > 0 and row["commit"] and row["torch"] == torch.__version__ for row in first)
    assert runner.run_suite("smoke", settings, tmp_path) == path
    both = runner.read(path)
    assert both[: len(first)] == first, "what had a record was measured again"
    assert len(both) > len(first)
    assert "topk smooth" in plots.table(path)
    assert plots.draw(path).stat().st_size > 1000
    assert not list(path.parent.glob("*.tmp"))


def _gradient(loss: Callable[..., torch.Tensor], scores: torch.Tensor, target: torch.Tensor) -> torch.Tensor:
    return torch.autograd.grad(loss(scores, target), scores)[0]


@pytest.mark.parametrize("family", ["smooth", "transition"])
def test_temporaries_stay_below_twice_the_scores(family: str) -> None:
    for rows, classes in ((256, 1000), (64, 20_000)):
        scores, target = torch.randn(rows, classes), torch.randint(classes, (rows,))
        tracked = scores.clone().requires_grad_()
        size = scores.numel() * scores.element_size()
        loss = LOSSES[family]
        assert peak_temporaries(functools.partial(loss, scores, target)) <= 2 * size
        # Forward and backward together: the gradient itself, and no more than the scores once beside it.
        assert peak_temporaries(functools.partial(_gradient, loss, tracked, target)) <= 2 * size


@pytest.mark.parametrize("family", ["smooth", "transition"])
def test_what_is_kept_for_backward_grows_with_k_alone(family: str) -> None:
    options = {"smooth": (1.0, 1.0), "transition": (1.0, 0.0)}[family]
    forward = getattr(torch.ops.topk, f"{family}_fwd")
    kept = {}
    for classes in (1000, 10_000):
        for k in (5, 20):
            extras = [] if family == "smooth" else [torch.empty(3, 0)]
            scores, target = torch.randn(3, classes), torch.arange(3)
            _, saved = forward(scores, target, extras, -100, "torch", [k], [1.0], *options)
            kept[classes, k] = sum(part.numel() for part in saved) / 3
    assert kept[1000, 5] == kept[10_000, 5]
    assert kept[1000, 20] == kept[10_000, 20] <= 10 * 20 + 10


def test_the_readmes_table_is_the_record() -> None:
    """The README prints one machine's record, named below the table, and nothing by hand."""
    root = Path(__file__).parent.parent
    readme = (root / "README.md").read_text()
    named = re.search(r"`(bench/results/[^`<]+/headline\.csv)`", readme)
    assert named, "the README names no record"
    assert plots.summary(root / named.group(1)) in readme


@pytest.mark.slow
def test_two_hundred_thousand_classes() -> None:
    """64 x 200,000, k = 20 works; time grows like n, and at most like k."""

    def seconds(classes: int, k: int) -> float:
        scores, target = torch.randn(64, classes, requires_grad=True), torch.randint(classes, (64,))
        times = []
        for _ in range(3):
            start = time.perf_counter()
            (gradient,) = torch.autograd.grad(topk.smooth_topk_loss(scores, target, k), scores)
            times.append(time.perf_counter() - start)
        assert gradient.isfinite().all()
        assert math.isclose(float(gradient.sum()), 0.0, abs_tol=1e-3)
        return min(times)

    large = seconds(200_000, 20)
    assert large / seconds(50_000, 20) <= 1.5 * 4
    assert seconds(100_000, 40) / seconds(100_000, 10) <= 1.5 * 4
