"""What chapters say from records: names, intervals over paired seeds, sentences, tables."""

from __future__ import annotations

import math
from typing import Any

import numpy as np
import pandas as pd
import pytest

from topk_lab import page, records, report
from topk_lab.study.statistics import Interval, hierarchical, paired, t_interval

MIXTURE = '{"1": 0.5, "5": 0.5}'


@pytest.fixture
def said(monkeypatch: pytest.MonkeyPatch) -> list[str]:
    """What the page would show."""
    found: list[str] = []
    monkeypatch.setattr(report, "say", found.append)
    monkeypatch.setattr("topk_lab.page.say", found.append)
    return found


def frame_of(by_loss: dict[str, list[float]], **settings: Any) -> pd.DataFrame:
    """Runs with these top-5 accuracies, a seed each."""
    about = {"model.name": "linear", "candidates_99": 7, "date": "2030-01-02", "commit": "abc", "sweep": "s"} | settings
    about |= {"hardware.cpu": "a processor", "versions.torch": "2.9", "training.learning_rate": 0.1}
    return pd.DataFrame([
        {"loss": loss, "seed": seed, "top5": value, "top1": value / 2, **about}
        for loss, values in by_loss.items()
        for seed, value in enumerate(values)
    ])  # fmt: skip


THREE = {"cross-entropy": [0.5, 0.6, 0.7], "smooth": [0.51, 0.612, 0.708], "focal": [0.4, 0.7, 0.6]}


# --- intervals ---


def test_an_interval_by_hand() -> None:
    found = t_interval([1.0, 1.2, 0.8, math.nan])
    half = 4.302653 * 0.2 / 3**0.5  # Student's t for two degrees of freedom
    assert (found.mean, found.low, found.high) == pytest.approx((1.0, 1 - half, 1 + half), abs=1e-5)
    assert found.count == 3
    assert str(found) == f"1.00 ± {half:.2f}"
    assert [Interval(1, low, low + 1, 3).side for low in (0.5, -0.5, -1.5)] == [1, 0, -1]
    alone = t_interval([2.0])
    assert (alone.mean, alone.side, str(alone)) == (2.0, 0, "2.00")
    with pytest.raises(ValueError, match="confidence must lie between 0 and 1, got 95"):
        t_interval([1.0, 2.0], 95)


def test_intervals_hold_as_often_as_they_say() -> None:
    draws = np.random.default_rng(0).normal(size=(2000, 4))
    inside = [found.low <= 0 <= found.high for found in map(t_interval, draws)]
    assert 0.93 < np.mean(inside) < 0.97


def test_the_hierarchical_bootstrap_knows_both_sources_of_chance() -> None:
    """Normal effects of seeds, of rows and of both: the variance of a draw is the sum of what each contributes."""
    random = np.random.default_rng(1)
    seeds, rows = 40, 500
    effects = 0.5 * random.normal(size=(seeds, 1)), 2 * random.normal(size=rows), random.normal(size=(seeds, rows))
    for values in (effects[0] + 0 * effects[2], effects[1] + 0 * effects[2], sum(effects)):
        found, draws = hierarchical(values, draws=4000)
        expected = values.mean(1).var() / seeds + values.mean(0).var() / rows
        assert found.mean == pytest.approx(values.mean())
        assert draws.var() == pytest.approx(expected, rel=0.12)
        assert [found.low, found.high] == pytest.approx(np.quantile(draws, [0.025, 0.975]).tolist())


def test_rows_that_belong_together_are_drawn_together() -> None:
    values = np.repeat(np.random.default_rng(2).normal(size=(1, 100)), 9, axis=1)
    alone, _ = hierarchical(values)
    together, draws = hierarchical(values, groups=np.repeat(np.arange(100), 9))
    by_hand, _ = hierarchical(values[:, ::9])  # nine equal rows are one
    assert (together.mean, together.low, together.high) == pytest.approx((by_hand.mean, by_hand.low, by_hand.high))
    assert together.high - together.low > 2.5 * (alone.high - alone.low)
    assert len(draws) == 2000
    with pytest.raises(ValueError, match="groups must name a group for each of the 900 rows, got 3"):
        hierarchical(values, groups=np.arange(3))
    with pytest.raises(ValueError, match=r"differences must be \(seeds, rows\), .* got shape \(3,\)"):
        hierarchical(np.zeros(3))


def test_differences_are_paired_and_in_points() -> None:
    found = report.differences(frame_of(THREE), "top5")
    half = 4.302653 * np.std([1.0, 1.2, 0.8], ddof=1) / 3**0.5
    assert found["smooth"].mean == pytest.approx(1.0)
    assert found["smooth"].high == pytest.approx(1 + half, abs=1e-4)
    assert found["focal"].side == 0
    assert report.differences(frame_of(THREE), "candidates_99")["smooth"].mean == 0
    without = frame_of({"cross-entropy": [0.5, 0.6], "smooth": [0.6, 0.7, 0.1]})
    assert report.differences(without, "top5")["smooth"].count == 2  # the third has no partner


def test_a_seed_twice_is_two_groups() -> None:
    frame = pd.concat([frame_of(THREE), frame_of({"smooth": [0.1]}, **{"data.noise": 0.4})])
    with pytest.raises(ValueError, match=r"seed 0 occurs twice; the runs differ in .*data\.noise"):
        report.differences(frame, "top5")
    with pytest.raises(ValueError, match="baseline must be one of cross-entropy, smooth, focal, got 'hinge'"):
        paired(frame_of(THREE), "top5", "hinge")


def test_more_lists_read_together_need_wider_intervals() -> None:
    above, below = report.apart(frame_of(THREE), "top5")
    assert (above, below) == ({"smooth": pytest.approx(1.0)}, {})
    sure = frame_of({"cross-entropy": [0.5, 0.6, 0.7], "smooth": [0.55, 0.651, 0.749], "noised": [0.41, 0.5, 0.6]})
    above, below = report.apart(sure, "top5")
    assert above == {"smooth": pytest.approx(5.0, abs=0.1)}
    assert set(below) == {"noised"}
    assert report.apart(sure, "top5", lists=10**6) == ({}, {})


# --- names and words ---


@pytest.mark.parametrize(
    ("row", "name"),
    [
        ({"loss.name": "cross_entropy", "loss.label_smoothing": 0.0}, "cross-entropy"),
        ({"loss.name": "cross_entropy", "loss.label_smoothing": 0.1}, "label smoothing"),
        ({"loss.name": "cross_entropy", "model.name": "cosine"}, "cross-entropy on cosines"),
        ({"loss.name": "cross_entropy", "loss.weight": "balanced"}, "weighted cross-entropy"),
        ({"loss.name": "smooth", "loss.k": "5", "loss.weight": "balanced"}, "weighted smooth"),
        ({"loss.name": "noised", "loss.k": "5", "model.name": "cosine"}, "noised on cosines"),
        ({"loss.name": "ldam", "model.name": "cosine"}, "LDAM"),
        ({"loss.name": "ldam", "loss.k": float("nan")}, "LDAM"),
        ({"loss.name": "hinge", "loss.variant": "kth", "loss.k": "5"}, "kth hinge"),
        ({"loss.name": "hinge", "loss.variant": "entropy", "loss.k": "5"}, "truncated entropy"),
        ({"loss.name": "hinge", "loss.variant": "smooth_limit", "loss.k": "2"}, "smooth-limit hinge, k = 2"),
        ({"loss.name": "smooth", "loss.k": "20"}, "smooth, k = 20"),
        ({"loss.name": "smooth", "loss.k": MIXTURE}, "smooth, k = 1 and 5"),
        ({"loss.name": "differentiable", "loss.k": MIXTURE}, "differentiable [.5, 0, 0, 0, .5]"),
        ({"loss.name": "differentiable", "loss.k": "5"}, "differentiable [0, 0, 0, 0, 1]"),
        (
            {
                "loss.name": "differentiable", "loss.k": "2",
                "loss.top1": "cross_entropy", "loss.cross_entropy_over": "all",
            },
            "differentiable [0, 1], cross-entropy over all",
        ),
        (
            {"loss.name": "differentiable", "loss.k": "2", "loss.top1": "softmax", "loss.cross_entropy_over": "all"},
            "differentiable [0, 1]",
        ),
        ({"loss.name": "noised", "loss.margins": "class", "loss.k": "5"}, "imbalanced noised"),
    ],
)  # fmt: skip
def test_losses_have_readable_names(row: dict[str, Any], name: str) -> None:
    assert report.loss_name(row) == name


def test_what_rounds_to_zero_has_no_sign() -> None:
    assert [report.signed(value) for value in (0.126, -0.3, 0.001, -0.001)] == ["+0.13", "-0.30", "0.00", "0.00"]
    assert report.low_to_high(Interval(0.18, -0.004, 0.37, 10)) == "0.00 to +0.37"


def test_words() -> None:
    metrics = ("top5", "train.top1", "macro_top5", "candidates_99", "validation.top5", "nll")
    words = ["top-5", "training top-1", "macro top-5", "guesses for 99 %", "validation top-5"]
    assert [report.metric_name(name) for name in metrics] == [*words, "negative log-likelihood"]
    assert report.listed("abc") == "a, b and c"
    assert (report.listed([]), report.listed([], "nothing")) == ("none", "nothing")


def test_provenance_names_where_runs_were_made() -> None:
    frame = pd.concat([frame_of(THREE), frame_of({"smooth": [0.5]}, date="2030-02-03", commit="def-dirty")])
    frame["hardware.gpu"] = [""] * 9 + ["a card"]
    text = report.provenance(frame)
    assert text == (
        "10 records, 3 seeds, sweep s; commit abc, def-dirty+; 2030-01-02 to 2030-02-03; a card, a processor; torch 2.9"
    )
    assert report.provenance(frame.iloc[:0]) == "no records yet"


# --- tables ---


def test_the_table_of_accuracies(said: list[str]) -> None:
    report.accuracies(frame_of(THREE), ["top5", "absent", "candidates_99"], order="top5")
    rows = said[0].splitlines()
    assert rows[0] == "| loss | seeds | top-5 | guesses for 99 % |"
    assert [row.split(" | ")[0] for row in rows[2:]] == ["| smooth", "| cross-entropy", "| focal"]
    half = 4.302653 * np.std([51, 61.2, 70.8], ddof=1) / 3**0.5
    assert f"61.00\u00a0±\u00a0{half:.2f}" in rows[2]
    report.accuracies(frame_of({}), ["top5"])
    assert said[-1] == report.PENDING


def test_the_table_of_what_was_chosen() -> None:
    tried = pd.DataFrame([
        {"loss": "smooth", "model.name": "linear", "loss.tau": tau, "loss.epsilon": 1.0, "validation.top5": value}
        for tau, value in ((0.3, 0.5), (1.0, 0.625), (3.0, 0.25))
    ])  # fmt: skip
    (row,) = report.tuned(tried, tried.iloc[[1]])
    best = {"validation top-5, best": "62.50", "worst": "25.00"}
    assert row == {"loss": "smooth", "candidates": 3, "chosen": "tau 1", **best}
    (row,) = report.tuned(tried.iloc[:0], tried.iloc[[1]])
    assert (row["candidates"], row["worst"]) == (0, "pending")
    two = pd.concat([tried.iloc[[1]], tried.iloc[[1]].assign(**{"model.name": "mlp"})])
    assert [row["head"] for row in report.tuned(tried, two)] == ["linear head", "512 hidden units"]


def test_learning_rates_at_an_edge_are_named() -> None:
    tried = pd.DataFrame([
        {"loss": loss, "model.name": "linear", "training.learning_rate": rate}
        for loss in "abc" for rate in (0.01, 0.1, 1.0)
    ])  # fmt: skip
    text = report.rates_at_an_edge(tried, tried.iloc[[0, 4, 8]])
    assert "the smallest that was tried for a and the largest that was tried for c" in text
    assert "inside" in report.rates_at_an_edge(tried, tried.iloc[[1, 4, 7]])


# --- the book's own records ---


def test_tables_list_losses_in_one_order() -> None:
    for chapter in ("14_cifar100", "16_little_data", "17_long_tails", "18_imagenet"):
        runs = report.of_sweep(report.runs(chapter), chapter)
        names = list(dict.fromkeys(runs["loss"]))
        assert names[0] == "cross-entropy"
        assert [report._place(name) for name in names] == sorted(map(report._place, names))
    runs = report.of_sweep(report.runs("16_little_data"), "16_little_data")
    heads = [head for head, _, _ in report.by_head(runs)]
    assert heads == ["linear head"] * 5 + ["512 hidden units"] * 5


def test_panels_of_records() -> None:
    runs = report.of_sweep(report.runs("15_label_noise"), "15_label_noise")
    panel = report.along(runs[runs["model.name"] == "mlp"], "data.noise", "top5", title="512 hidden units")
    assert panel.x == sorted(runs["data.noise"].unique())
    smooth = runs[(runs["model.name"] == "mlp") & (runs["loss"] == "smooth") & (runs["data.noise"] == 0.4)]["top5"]
    assert panel.lines["smooth"].mean[2] == pytest.approx(100 * smooth.mean())


def test_pending_runs_bring_their_command(said: list[str], monkeypatch: pytest.MonkeyPatch) -> None:
    sweeps = [
        {"sweep": "a", "runs": 3, "recorded": 3, "command": "x"},
        {"sweep": "b", "runs": 3, "recorded": 1, "command": "y"},
    ]
    monkeypatch.setattr(records, "sweeps", lambda chapter: sweeps)
    report.pending("14_cifar100")
    first, second = said[0].splitlines()[2:]
    assert first.endswith("| none |  |")
    assert second.endswith("| 2 | `y` |")


def test_numbers_are_printed_as_in_a_book() -> None:
    assert page.typeset("top-5: -0.3 (-1.5 to -.5), 2e-07, 0e+00") == "top-5: −0.3 (−1.5 to −.5), 2·10⁻⁷, 0"
    assert page.typeset("commit 80596e5504, 1e-05") == "commit 80596e5504, 10⁻⁵"
    assert page.typeset("2026-11-28, k-1, 4-8, c2e5f1") == "2026-11-28, k-1, 4-8, c2e5f1"


def test_code_and_formulas_are_printed_as_they_are(monkeypatch: pytest.MonkeyPatch) -> None:
    shown: list[str] = []
    monkeypatch.setattr(page, "Markdown", shown.append)
    monkeypatch.setattr(page, "display", lambda _: None)
    page.say("-1, `-1`, $-1$, [-1](x.html#-1)\n```\n-1\n```")
    assert shown == ["−1, `-1`, $-1$, [−1](x.html#-1)\n```\n-1\n```"]
