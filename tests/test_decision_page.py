"""The decision page (book/which-loss.md) says what the records say."""

from __future__ import annotations

from functools import cache

import numpy as np
import pandas as pd

from topk_lab import records, report
from topk_lab.study import fair, keyboard

LAST_FIRST = "differentiable [.5, 0, 0, 0, .5]"


@cache
def every(chapter: str) -> pd.DataFrame:
    return report.runs(chapter)


@cache
def fair_runs() -> dict[str, pd.DataFrame]:
    return fair.runs()


def runs(chapter: str, sweep: str | None = None) -> pd.DataFrame:
    return report.of_sweep(every(chapter), sweep or chapter)


def of(frame: pd.DataFrame, metric: str) -> tuple[set[str], set[str]]:
    above, below = report.apart(frame, metric)
    return set(above), set(below)


def test_the_decision_page_on_cifar100() -> None:
    frame = runs("14_cifar100")
    above, below = of(frame, "top5")
    assert above == {"smooth, k = 1 and 5", "differentiable [.2, .2, .2, .2, .2]"}
    assert "smooth" not in below, "level"
    assert {"transition", "noised"} <= below
    assert {loss for loss in frame["loss"] if loss.endswith("hinge")} <= below
    above, below = of(frame, "top1")
    assert not above
    assert "smooth, k = 1 and 5" not in below, "keeps top-1"
    hidden = runs("14_cifar100", "14_cifar100.mlp")
    assert not of(hidden, "top1")[0] | of(hidden, "top5")[0]
    found = report.differences(frame, "candidates_99")
    saved = {loss: -interval.mean for loss, interval in found.items()}
    assert 0.5 < saved["transition"] < 1.5
    assert saved["transition"] < saved["smooth, k = 1 and 5"] < 3
    assert report.differences(frame, "candidates_99", confidence=1 - 0.05 / len(found))["transition"].side == 0
    chosen = frame.groupby("loss")["training.weight_decay"].first()
    between = set(chosen[(chosen > 0.1) & (chosen < 1)].index)
    assert between == {"cross-entropy", "truncated entropy"}, "the others could not"
    knobs = runs("19_sensitivity")
    k = pd.Series([records.k_of(text) if isinstance(text, str) else 0 for text in knobs["loss.k"]], knobs.index)
    wide = knobs[(knobs["loss"] == "cross-entropy") | (knobs["loss.width"].astype(float).eq(10) & k.eq(5))]
    assert report.differences(wide, "top5")["transition"].low > 0


def test_the_decision_page_on_the_fair_comparison() -> None:
    final = fair.final_runs(fair_runs())
    heads = [name for name in ("fair.linear", "fair.few_linear", "fair.few_mlp") if name in final]
    assert len(heads) == 3, "all three conditions"
    five, one = (
        {(row["sweep"], row["loss"]): row["verdict"] for row in fair.verdicts({x: final[x] for x in heads}, metric)}
        for metric in ("top5", "top1")
    )
    assert "ahead" not in five.values()
    for name in heads:
        assert five[name, "smooth, k = 1 and 5"] == five[name, LAST_FIRST] == "level"
        assert one[name, "smooth"] == five[name, "noised"] == "behind"
    assert [one[name, LAST_FIRST] for name in heads] == ["behind", "ahead", "ahead"]
    assert five["fair.linear", "transition"] == "level"
    assert {name for (name, _), verdict in one.items() if verdict == "ahead"} == {"fair.few_linear", "fair.few_mlp"}
    for name in ("fair.few_linear", "fair.few_mlp"):
        assert fair.compared(final[name], "candidates_99")[LAST_FIRST].low > 0, "needs more candidates for 99 %"
    frame = final["fair.linear"].groupby("loss")["top1"].mean()
    assert -0.045 < frame["smooth"] - frame["cross-entropy"] < -0.035, "up to four points"
    every = fair_runs()
    for name in heads:
        gap = {loss: around.mean for loss, around in fair.compared(final[name], "top1").items()}
        assert one[name, "transition"] == "behind"
        assert -2.5 < gap["transition"] < -1, "one to two points"
        assert min(gap["smooth, k = 1 and 5"], gap[LAST_FIRST]) > -0.55, "about half a point"
        curves = fair.expected_best(every[f"{name}.tuning"], "top5")
        assert max(curves, key=lambda loss: curves[loss][3]) == LAST_FIRST, "few candidates suffice"
        plain, last = curves["cross-entropy"], [curve[31] for curve in curves.values()]
        assert 6.9 < plain[31] - plain[0] < 10.1, "at most ten points"
        assert max(last) - min(last) < 1, "less than one"
    plain = fair.expected_best(every["fair.mlp.tuning"], "top5")["cross-entropy"]
    assert 3.9 < plain[31] - plain[0] < 4.1, "at least four"


def test_the_decision_page_on_next_words() -> None:
    every = keyboard.registered_first(report.runs("25_keyboard"))
    final = keyboard.latest(every[~every["sweep"].str.endswith(".tuning")])
    found = {name: part.groupby("loss")[["top1", "top3"]].mean() for name, part in keyboard.conditions(final)}
    gaps = {name: 100 * (means - means.loc["cross-entropy"]) for name, means in found.items()}
    gap = gaps["3,000 words, 16 units"]
    assert gap.loc["smooth, k = 3", "top3"] < -1, "more than a point"
    assert gap.loc["smooth, k = 1 and 3"].round(1).tolist() == [0.6, 0.3]
    others = gap.drop(index=["cross-entropy", "smooth, k = 3", "smooth, k = 1 and 3"])
    assert len(others) == 4, "transition, noised, differentiable, calibrated hinge"
    assert (others < 0).all(axis=None)
    assert others["top3"].idxmin() == "calibrated hinge, k = 3", "by far"
    gap = gaps["3,000 words, 256 units"]
    assert gap.loc["smooth, k = 3"].abs().round(1).tolist() == [1.2, 0.0]
    assert (gap.loc["smooth, k = 1 and 3"] < -0.2).all(), "the mixture is behind"
    gap = gaps["12,000 words, 16 units"]
    assert gap.loc["smooth, k = 1 and 3"].round(1).tolist() == [0.4, 0.1], "ahead in top-1, level in top-3"
    assert gap.loc["smooth, k = 3"].round(1).tolist() == [-2.5, -1.4]


def test_the_decision_page_on_long_tails() -> None:
    cifar = runs("17_long_tails")
    for frame in (cifar[cifar["data.imbalance"] == 100], runs("17_long_tails", "17_long_tails.imagenet")):
        mean = frame.groupby("loss")["macro_top5"].mean()
        margins, weighted = ["LDAM", "imbalanced noised"], [name for name in mean.index if name.startswith("weighted")]
        assert mean[weighted].min() > mean[margins].max(), "weights more than any margin"
        assert of(frame, "many_top5")[1] >= {"weighted cross-entropy", "weighted smooth"}, "the frequent classes pay"
        assert abs(mean["weighted smooth"] - mean["weighted cross-entropy"]) < 0.006
        first = frame.groupby("loss")["macro_top1"].mean()
        assert first["weighted smooth"] < first["weighted cross-entropy"]
        assert mean["LDAM"] > mean["imbalanced noised"] > max(mean["noised"], mean["cross-entropy"])
        assert mean["cross-entropy on cosines"] - mean["cross-entropy"] > 0.3 * (
            mean["imbalanced noised"] - mean["cross-entropy"]
        )
        assert of(frame, "few_top5")[1] >= {"noised", "smooth"}, "rare classes worse"
    for imbalance, frame in cifar.groupby("data.imbalance"):
        above, _ = of(frame, "macro_top5")
        assert ("imbalanced noised" in above) == (float(str(imbalance)) >= 50)
        assert "imbalanced noised" not in of(frame, "macro_top1")[0]


def test_the_decision_page_on_wrong_labels_and_rare_classes() -> None:
    final = fair.final_runs(fair_runs())
    for name in ("fair.noise_mlp", "fair.noise_mlp_clean"):
        gain = {metric: fair.compared(final[name], metric)["smooth"] for metric in ("top5", "top1", "candidates_99")}
        assert 0.95 < gain["top5"].mean < 1.45
        assert gain["top5"].low > 0
        assert gain["top1"].high < -5
        assert 5.5 < gain["candidates_99"].mean < 7
    budget = fair.expected_best(fair_runs()["fair.noise_mlp.tuning"], "top5")
    lead = [smooth - plain for smooth, plain in zip(budget["smooth"], budget["cross-entropy"], strict=True)]
    assert lead[3] < -0.3 < -0.2 < lead[7] < 0.2 < 0.8 < lead[31], "a wide search"
    budget = fair.expected_best(fair_runs()["fair.tails.tuning"], "top5")
    assert max(budget, key=lambda loss: budget[loss][3]) == "balanced softmax"
    tails = final["fair.tails"]
    first = ["balanced softmax", "LDAM deferred"]
    top_k = [name for name in tails["loss"].unique() if name.split(",")[0].endswith(("smooth", "transition", "noised"))]
    assert len(top_k) == 4
    for metric, lead in (("top5", 0.9), ("top1", 1.5)):
        plain = fair.compared(tails, metric)
        weights = fair.compared(tails, metric, baseline="weighted cross-entropy")
        assert min(plain[name].mean for name in first) > 7
        assert min(weights[name].mean for name in first) > lead
        assert min(weights[name].low for name in first) > 0
        assert max(plain[name].mean for name in top_k) < min(plain[name].mean for name in first)
    noised = fair.compared(tails, "top5")["imbalanced noised"], fair.compared(tails, "top5", "weighted cross-entropy")
    assert 0 < noised[0].mean < 1
    assert round(noised[1]["imbalanced noised"].mean) == -5


def leads(chapter: str, setting: str, head: str, loss: str) -> pd.DataFrame:
    """A loss's mean top-1 and top-5 less those of cross-entropy, in points, by a setting."""
    frame = runs(chapter)
    mean = 100 * frame[frame["model.name"] == head].groupby(["loss", setting])[["top1", "top5", "train.top1"]].mean()
    return mean.loc[loss] - mean.loc["cross-entropy"]


def test_the_decision_page_on_noise_in_blocks() -> None:
    noisily, truly = (fair_runs()[f"fair.noise_mlp_block{end}"] for end in ("", "_clean"))
    found = [round(fair.compared(truly, metric)["smooth"].mean, 1) for metric in ("top5", "top1")]
    assert found == [1.2, 3.9]
    assert all(fair.compared(truly, metric)["smooth"].low > 0 for metric in ("top5", "top1"))
    assert round(fair.compared(noisily, "top5")["smooth"].mean) == -2
    assert fair.compared(noisily, "top5")["smooth"].high < 0


def ahead(frame: pd.DataFrame, setting: str, loss: str, comparisons: int) -> list[float]:
    """The settings where a loss is surely above cross-entropy in top-5, after so many comparisons."""
    found = {
        float(str(value)): report.differences(part, "top5", confidence=1 - 0.05 / comparisons)[loss]
        for value, part in frame.groupby(setting)
    }
    return [value for value, interval in found.items() if interval.side > 0]


def test_the_decision_page_on_label_noise() -> None:
    smooth = leads("15_label_noise", "data.noise", "mlp", "smooth")
    assert smooth["top5"].loc[0.0] < 0 < smooth["top5"].loc[0.2]
    assert smooth["top5"].loc[:0.8].is_monotonic_increasing
    assert (smooth["top1"].loc[0.6:0.8] > 0).all()
    assert (smooth["train.top1"] < 0).all(), "memorises less"
    frame = runs("15_label_noise")
    for noise in (0.4, 0.6, 0.8, 1.0):
        assert "smooth" in of(frame[(frame["model.name"] == "mlp") & (frame["data.noise"] == noise)], "top5")[0]
    mlp = frame[frame["model.name"] == "mlp"]
    assert min(ahead(mlp, "data.noise", "smooth", comparisons=48)) == 0.4
    linear = frame[frame["model.name"] == "linear"]
    for noise, part in linear.groupby("data.noise"):
        above = report.apart(part, "top5", lists=12)[0]
        assert list(above) == ([LAST_FIRST] if 0 < float(noise) < 1 else [])
    assert leads("15_label_noise", "data.noise", "linear", LAST_FIRST)["top5"].max() < 1
    assert linear["train.top1"].max() < frame.loc[frame["model.name"] == "mlp", "train.top1"].max()


def test_the_decision_page_on_little_data() -> None:
    for head, least in (("linear", 0.5), ("mlp", 1.0)):
        smooth = leads("16_little_data", "data.fraction", head, "smooth")
        assert smooth["top5"].loc[0.05] > least
        assert smooth["top5"].loc[1.0] < 0.2
        assert (smooth["top1"] < 0).all()
    mixture = leads("16_little_data", "data.fraction", "mlp", LAST_FIRST)
    assert mixture["top5"].between(0, 1, inclusive="neither").all()
    frame = runs("16_little_data")
    mlp = frame[frame["model.name"] == "mlp"]
    assert ahead(mlp, "data.fraction", LAST_FIRST, comparisons=40) == [0.05, 0.1, 0.25]


def test_the_decision_page_on_training_from_scratch() -> None:
    frame = runs("14_cifar100", "14_cifar100.small")
    assert set(frame["training.epochs"].astype(int)) == {4}
    assert set(frame.groupby("loss")["seed"].nunique()) == {3}
    gaps = report.differences(frame, "top5")
    plain, kept = ["transition", "smooth", "noised", LAST_FIRST], "cross-entropy over all"
    with_all = ["smooth, k = 1 and 5", f"differentiable [.5, 0, 0, 0, .5], {kept}"]
    assert set(gaps) == {*plain, *with_all}
    assert all(gaps[loss].high < 0 for loss in plain)
    assert 0.5 < -gaps["transition"].mean < 1.5
    assert all(gaps[loss].mean < -5 for loss in plain[1:])
    assert all(gaps[loss].mean > -3 for loss in with_all)


def test_the_decision_page_on_imagenet_blocks() -> None:
    tuned = fair.named(runs("18_imagenet", "18_imagenet.blocks"))
    fixed = runs("18_imagenet", "18_imagenet.blocks_check")
    smooth, mixed = "smooth, k = 1 and 5", "differentiable [.5, 0, 0, 0, .5]"
    ahead = {metric: fair.compared(tuned, metric) for metric in ("top5", "top1")}
    assert [round(ahead["top5"][loss].mean, 1) for loss in (smooth, mixed)] == [2.8, 2.7]
    assert [round(ahead["top1"][loss].mean, 1) for loss in (smooth, mixed)] == [1.1, 0.9]
    fixed = fixed.assign(loss=fixed["loss"].mask(fixed["loss.m"].astype(float) == 64, "m = 64"))
    slow, slowest = (fixed[fixed["training.learning_rate"] == rate] for rate in (5.93e-4, 2.88e-4))
    found = {metric: fair.compared(slow, metric) for metric in ("top5", "top1")}
    assert found["top5"][smooth].side == found["top1"][smooth].side == found["top5"][mixed].side == 0, "level"
    assert [round(found[metric]["m = 64"].mean, 1) for metric in found] == [0.8, 0.8]
    each = pd.concat([slowest[slowest["loss"] == "cross-entropy"], slow[slow["loss"] != "cross-entropy"]])
    own = {metric: fair.compared(each, metric) for metric in found}
    assert [round(own["top5"][loss].mean, 1) for loss in (smooth, mixed)] == [-1.0, -0.6]
    assert own["top1"][smooth].side == own["top1"][mixed].side == 0, "level"
    assert all(own[metric]["m = 64"].side == fair.compared(slowest, metric)["m = 64"].side == 0 for metric in found)
    first, last = (report.means(frame, "top5")["cross-entropy"] for frame in (tuned, slow))
    assert 5 < last - first < 5.5, "five points"


def test_the_decision_page_on_imagenet_heads() -> None:
    frame = runs("18_imagenet")
    other = {"loss.method": "splitter_selection", "loss.distribution": "cauchy", "loss.m": 16.0}
    usual = np.ones(len(frame), dtype=bool)
    for column, value in other.items():
        same = frame[column].astype(float) == value if column == "loss.m" else frame[column] == value
        usual &= (same | (frame["loss.name"] != "differentiable")).to_numpy()
    above, below = of(frame[usual], "top5")
    assert not above
    mixtures = {loss for loss in frame["loss"] if loss.startswith("differentiable") and loss != "differentiable [1]"}
    assert not below & {"smooth", "transition"}
    assert len(mixtures - below) >= 4 == len(mixtures) - 1, "most are level"
    above, worse = of(frame[usual], "top1")
    assert not above
    assert len(worse & ({"smooth", "transition"} | mixtures)) > 4
    mean = frame[usual].groupby("loss")[["top5", "candidates_99"]].mean()
    spread = mean.loc[[*sorted(mixtures), "differentiable [1]"], "top5"]
    assert 0.0028 < spread.max() - spread.min() < 0.0038, "P_K moves top-5 by a third of a point"
    mixed = frame[(frame["loss"] == "differentiable [.25, 0, 0, 0, .75]") & (frame["loss.m"].astype(float) == 16)]
    by_operator = mixed[mixed["loss.distribution"] == "cauchy"].groupby("loss.method")["top5"].mean()
    order = by_operator.sort_values(ascending=False)
    assert (order.index[0], order.index[-1]) == ("splitter_selection", "bitonic")
    assert order.iloc[0] - order.iloc[-1] < 0.0067
    assert {"neuralsort", "softsort"} <= set(order.index[1:-1])
    assert mean.loc[sorted(mixtures), "candidates_99"].min() > mean.loc["cross-entropy", "candidates_99"]


def test_the_decision_page_on_training_for_fewer_guesses() -> None:
    frame = runs("19_sensitivity")
    usual = {"loss.tau": 1.0, "loss.width": 1.0, "loss.epsilon": 1.0, "loss.samples": 5.0}
    plain = np.ones(len(frame), dtype=bool)
    for column, value in usual.items():
        plain &= (frame[column].isna() | (frame[column].astype(float) == value)).to_numpy()
    trained = [records.k_of(text) if isinstance(text, str) else 0 for text in frame["loss.k"]]
    plain &= [isinstance(k, int) or len(k) == 1 for k in trained]
    k = pd.Series([float(k if isinstance(k, int) else max(k)) for k in trained], frame.index)
    best = frame[plain].assign(k=k[plain]).groupby(["loss.name", "k"])["top5"].mean()
    for name, fewer, gain in (("smooth", 2, 0.0045), ("noised", 3, 0.0027)):
        assert best[name].idxmax() == fewer, name
        assert abs(best[name][fewer] - best[name][5] - gain) < 0.0005
        rival = frame[plain].assign(loss=k[plain].map("{:g}".format))[(frame[plain]["loss.name"] == name)]
        assert f"{fewer}" in report.apart(rival, "top5", baseline="5")[0]
    for name in ("differentiable", "hinge"):
        assert best[name].idxmax() == 5, name
    spread = {
        name: best[name].max() - best[name].min() for name in ("smooth", "transition", "noised", "differentiable")
    }
    assert max(spread, key=spread.__getitem__) == "transition"
    width = frame[(frame["loss.name"] == "transition") & (k == 5)].groupby("loss.width")["top5"].mean()
    assert width.idxmax() > 1.0
    for name, column in (("smooth", "loss.tau"), ("noised", "loss.epsilon"), ("transition", "loss.width")):
        own = frame[(frame["loss.name"] == name) & (k == 5)]
        if name == "noised":
            own = own[own["loss.samples"].astype(float) == 5]
        by = own.groupby(own[column].astype(float))["top5"].mean()
        assert by.max() - by.min() > 0.0075, (name, by)  # of the number of samples: see below
        assert by[1.0] > by.min() + 0.001, (name, by)
    samples = frame[(frame["loss.name"] == "noised") & (k == 5) & (frame["loss.epsilon"].astype(float) == 1)]
    by = samples.groupby("loss.samples")["top5"].mean()
    assert by.max() - by.min() < 0.0075


def test_the_decision_page_on_the_term_over_all_classes() -> None:
    reached = {
        name: 100 * runs("14_cifar100", f"14_cifar100.{name}.tuning").groupby("loss")["validation.top5"].max()
        for name in ("pixels_long", "pixels_others")
    }
    tried = runs("14_cifar100", "14_cifar100.pixels_others.tuning")
    assert (tried["loss"] == LAST_FIRST).sum() == 8, "eight candidates"
    assert reached["pixels_others"][LAST_FIRST].round() == 27
    assert reached["pixels_long"].max().round() == 80


def test_the_decision_page_on_a_long_tail_from_pixels() -> None:
    whole = fair.named(runs("17_long_tails", "17_long_tails.pixels"))
    gain = {metric: fair.compared(whole, metric) for metric in ("top5", "top1")}
    names = ("balanced softmax", "LDAM deferred", "imbalanced noised")
    soft, late, noisy = (gain["top5"][loss] for loss in names)
    assert [round(each.mean) for each in (soft, late, noisy)] == [6, 4, -5]
    assert [round(gain["top1"][loss].mean) for loss in names[:2]] == [5, 4]
    assert min(soft.low, late.low) > 0 > noisy.high


def test_the_decision_page_on_wrong_labels_from_pixels() -> None:
    whole = fair.named(runs("15_label_noise", "15_label_noise.pixels"))
    gain = {metric: fair.compared(whole, metric) for metric in ("top5", "top1")}
    assert -1.1 < gain["top5"]["smooth"].mean < -0.9
    assert -7.5 < gain["top1"]["smooth"].mean < -6.5
    others = [found for loss, found in gain["top5"].items() if loss != "smooth"]
    assert len(others) == 4
    assert all(-3.5 < found.mean < -1.4 and found.high < 0 for found in others)
    blocks = fair.named(runs("15_label_noise", "15_label_noise.pixels_block"))
    gain = {metric: fair.compared(blocks, metric)["smooth"] for metric in ("top5", "top1")}
    assert gain["top5"].low < 0 < gain["top5"].high
    assert round(gain["top1"].mean) == -3


def test_the_decision_page_on_more_losses_from_pixels() -> None:
    others, longer = (fair.named(runs("14_cifar100", f"14_cifar100.pixels_{name}")) for name in ("others", "long"))
    beside = pd.concat([longer[longer["loss"] == "cross-entropy"], others])
    gain = {metric: fair.compared(beside, metric) for metric in ("top5", "top1", "candidates_99")}
    sorting = next(loss for loss in gain["top5"] if loss.startswith("differentiable"))
    assert gain["top5"][sorting].low < 0 < gain["top5"][sorting].high
    assert -1.05 < gain["top1"][sorting].mean < -0.95
    assert gain["top1"][sorting].high < 0
    assert gain["candidates_99"][sorting].high < 0
    needed = beside.groupby("loss")["candidates_99"].mean()
    assert [round(needed[loss]) for loss in ("cross-entropy", sorting)] == [36, 33]
    assert gain["top5"]["noised"].mean < -2
    assert gain["top5"]["noised"].high < -1.5
    assert round(gain["top1"]["noised"].mean) == -10
    without_noise = runs("14_cifar100", "14_cifar100.pixels_calibrated")
    assert len(without_noise) == 2
    assert without_noise["top5"].max() < 0.3
