"""What the chapters of part IV draw and say from records: names, intervals, paired differences, what is pending.

    runs = experiments.runs("14_cifar100")              # one row a run, with a column `loss` to read
    experiments.accuracy_table(runs, ["top1", "top5"])
    experiments.forest(runs, ["top1", "top5"])          # differences to cross-entropy on the same seeds

Everything comes from `topk.lab.shipped`; a number that has no record is not shown.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Iterator, Mapping, Sequence
from typing import TYPE_CHECKING, Any

import matplotlib.pyplot as plt
import numpy as np

from topk.lab import figures, notebook, shipped, statistics

if TYPE_CHECKING:
    import pandas as pd
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

BASELINE = "cross-entropy"
_POINTS = {"top", "macro_top", "many_top", "medium_top", "few_top"}
_SHORT_NAMES = {
    "cross_entropy": "cross-entropy",
    "smooth_limit": "smooth-limit hinge",
    "entropy": "truncated entropy",
}
_ORDER = ("cross-entropy", "label smoothing", "focal", "LDAM", "smooth", "transition", "noised", "differentiable")
_TUNED = (
    "training.learning_rate", "training.weight_decay", "loss.tau", "loss.epsilon", "loss.width", "loss.margin",
    "loss.gamma", "loss.label_smoothing", "loss.inverse_temperature", "loss.max_margin", "loss.scale", "model.scale",
)  # fmt: skip
_METRIC_NAMES = {
    "nll": "negative log-likelihood",
    "ece": "calibration error",
    **{f"candidates_{share}": f"candidates for {share} %" for share in (90, 95, 99)},
}


# --- runs and their names --------------------------------------------------------------------------------------------


def runs(chapter: str, sweep: str | None = None) -> pd.DataFrame:
    """A chapter's runs of one sweep (None: the chapter's own), with a column `loss` that says which loss in words.

    Every table lists the losses in the order they have here: cross-entropy and its kin, the papers' losses, hinges.
    """
    frame = shipped.load(chapter)
    frame = frame[frame["sweep"] == (sweep or chapter)].copy()
    frame.insert(0, "loss", [loss_name(dict(row)) for _, row in frame.iterrows()])
    return frame.sort_values("loss", key=lambda names: names.map(_place), kind="stable", ignore_index=True)


def _place(loss: str) -> tuple[int, str]:
    words = loss.split(",")[0]
    if words.endswith("hinge"):
        return len(_ORDER) + 1, loss
    return next((place for place, family in enumerate(_ORDER) if family in words), len(_ORDER)), loss


def by_head(frame: pd.DataFrame, heads: Iterable[str] | None = None) -> Iterator[tuple[str, str, pd.DataFrame]]:
    """(model, loss, its runs), head after head where `heads` lists them."""
    if heads is None:
        for (model, loss), group in frame.groupby(["model.name", "loss"], sort=False):
            yield str(model), str(loss), group
    else:
        for model in heads:
            for loss, group in frame[frame["model.name"] == model].groupby("loss", sort=False):
                yield model, str(loss), group


def loss_name(row: Mapping[str, Any]) -> str:
    """A run's loss in words, its tuned settings left out: what readers compare."""
    margins = row["loss.name"] == "ldam" or row.get("loss.margins") == "class"  # they are always used with cosines
    text = _family_name(row)
    if row.get("loss.weight") == "balanced":
        text = f"weighted {text}"
    if "cosine" in (row.get("model.name"), row.get("model.head")) and not margins:
        text += " on cosines"
    return text


def _family_name(row: Mapping[str, Any]) -> str:
    name, k = str(row["loss.name"]), _k(row.get("loss.k"))
    if name == "cross_entropy":
        return "label smoothing" if (_value(row, "loss.label_smoothing") or 0) > 0 else "cross-entropy"
    if name == "hinge":
        variant = str(row["loss.variant"])
        return _with_k(_SHORT_NAMES.get(variant, f"{variant} hinge"), k)
    if name == "differentiable":
        over_all = row.get("loss.top1") == "cross_entropy" and row.get("loss.cross_entropy_over") == "all"
        return f"differentiable {shares(k)}" + (", cross-entropy over all" if over_all else "")
    if name == "noised" and row.get("loss.margins") == "class":
        return _with_k("imbalanced noised", k)
    return {"ldam": "LDAM"}.get(name, _with_k(name, k))


def _value(row: Mapping[str, Any], name: str) -> float | None:
    value = row.get(name)
    return None if value is None or (isinstance(value, float) and math.isnan(value)) else float(value)


def _k(text: Any) -> dict[int, float]:
    """{k: weight} from a column's text, `5` or `0.5*1+0.5*5`; empty where the loss has no k."""
    if text is None or (isinstance(text, float) and math.isnan(text)):
        return {}
    if "*" not in str(text):
        return {int(float(text)): 1.0}
    return {int(k): float(weight) for weight, k in (part.split("*") for part in str(text).split("+"))}


def shares(k: Mapping[int, float]) -> str:
    """P_K as the papers write it: [.5, 0, 0, 0, .5]."""
    return "[" + ", ".join(f"{k.get(place, 0):g}".replace("0.", ".") for place in range(1, max(k) + 1)) + "]"


def _with_k(text: str, k: Mapping[int, float]) -> str:
    if len(k) > 1:
        return f"{text}, k = {' and '.join(map(str, k))}"
    return text if not k or 5 in k else f"{text}, k = {next(iter(k))}"


def metric_name(metric: str) -> str:
    """A column's name in words."""
    if metric in _METRIC_NAMES:
        return _METRIC_NAMES[metric]
    return metric.replace(".", " ").replace("_", " ").replace("top", "top-")


def _factor(metric: str) -> float:
    """Accuracies are shown in per cent."""
    return 100.0 if metric.rstrip("0123456789") in _POINTS or metric.startswith("training.top") else 1.0


# --- what is there ---------------------------------------------------------------------------------------------------


def pending(chapter: str) -> list[dict[str, Any]]:
    """A table of the chapter's sweeps: how many runs each asks for, how many have a record, and the command."""
    return [
        {
            "sweep": sweep["sweep"],
            "runs": sweep["runs"],
            "recorded": sweep["recorded"],
            "pending": sweep["runs"] - sweep["recorded"] or "none",
            "command for what is pending": f"`{sweep['command']}`" if sweep["recorded"] < sweep["runs"] else "",
        }
        for sweep in shipped.expected(chapter)
    ]


def show_pending(chapter: str) -> None:
    """The table of `pending`, as markdown."""
    notebook.table(pending(chapter))


def provenance(frame: pd.DataFrame) -> str:
    """Where a figure's numbers come from, in one line."""
    if frame.empty:
        return "no records yet"
    commits = sorted({str(commit)[:10] + ("+" if str(commit).endswith("dirty") else "") for commit in frame["commit"]})
    dates = sorted({str(date)[:10] for date in frame["date"]})
    machines = sorted(set(frame["processor"].astype(str)))
    versions = sorted(set(frame["torch"].astype(str)))
    when = dates[0] if len(dates) == 1 else f"{dates[0]} to {dates[-1]}"
    return (
        f"{len(frame)} records, {_count(frame['seed'].nunique(), 'seed')}, "
        f"sweep {', '.join(sorted(set(frame['sweep'])))}; "
        f"commit {', '.join(commits)}; {when}; {', '.join(machines)}; torch {', '.join(versions)}"
    )


def _count(number: int, thing: str) -> str:
    return f"{number} {thing}{'s' * (number != 1)}"


def show(figure: Figure, alt: str, data: Mapping[str, Sequence[Any]], frame: pd.DataFrame) -> None:
    """A figure with its data and, under it, its provenance."""
    figures.show(figure, alt, data)
    notebook.say(f"*Measured: {provenance(frame)}.*")


# --- intervals -------------------------------------------------------------------------------------------------------


def accuracy_rows(frame: pd.DataFrame, metrics: Sequence[str], by: Sequence[str] = ("loss",)) -> list[dict[str, Any]]:
    """For every group the mean and half the 95 % t interval over seeds of each metric, as text."""
    rows = []
    for values, group in frame.groupby(list(by), sort=False, dropna=False):
        row: dict[str, Any] = dict(zip(by, values, strict=True)) | {"seeds": group["seed"].nunique()}
        for metric in metrics:
            found = statistics.t_interval((group[metric].astype(float) * _factor(metric)).tolist())
            half = found.high - found.mean
            row[metric_name(metric)] = f"{found.mean:.2f}" + ("" if math.isnan(half) else f" ± {half:.2f}")
        rows.append(row)
    return rows


def accuracy_table(frame: pd.DataFrame, metrics: Sequence[str], by: Sequence[str] = ("loss",)) -> None:
    """The rows of `accuracy_rows`, as markdown."""
    if frame.empty:
        notebook.say("*No records yet.*")
    else:
        notebook.table(accuracy_rows(frame, metrics, by))


def differences(
    frame: pd.DataFrame,
    metric: str,
    settings: Sequence[str] = (),
    baseline: str = BASELINE,
    confidence: float = 0.95,
) -> pd.DataFrame:
    """A loss and setting a row: the interval of its difference to the baseline over their common seeds.

    Accuracies in percentage points.
    """
    renamed = frame.assign(**{"label": frame["loss"], "loss.name": frame["loss"]})
    found = statistics.paired(renamed, metric, settings, baseline, confidence)
    columns = ["mean", "low", "high"]
    return found.assign(**{name: found[name] * _factor(metric) for name in columns}).rename(columns={"label": "loss"})


def apart(frame: pd.DataFrame, metric: str, baseline: str = BASELINE, lists: int = 1) -> tuple[list[str], list[str]]:
    """The losses surely above the baseline and those surely below, largest difference first.

    "Surely": the paired t interval excludes zero at a confidence of 1 - 0.05 / (number of comparisons), so that all
    statements together are wrong with a probability of 5 % at most (Bonferroni). The comparisons are the other losses,
    in each of `lists` such pairs of lists that are read together.
    """
    others = frame["loss"].nunique() - 1
    if others < 1:
        return [], []
    found = differences(frame, metric, baseline=baseline, confidence=1 - 0.05 / (others * lists))
    above = found[found["low"] > 0].sort_values("mean", ascending=False)
    below = found[found["high"] < 0].sort_values("mean")
    return above["loss"].tolist(), below["loss"].tolist()


def listed(items: Iterable[str], otherwise: str = "none") -> str:
    """`a, b and c`."""
    *first, last = [*items] or [otherwise]
    return f"{', '.join(first)} and {last}" if first else last


# --- figures ---------------------------------------------------------------------------------------------------------


def style(loss: str) -> dict[str, Any]:
    """How a loss is drawn everywhere; a family shares its look."""
    for name, look in figures.LOSSES.items():
        if loss == name:
            return look
    for name in ("differentiable", "smooth", "noised", "transition"):
        if name in loss.split(",")[0].split() and not loss.endswith("hinge"):
            return figures.LOSSES[name]
    return {"color": "#777777"}


def forest(
    frame: pd.DataFrame, metrics: Sequence[str], baseline: str = BASELINE
) -> tuple[Figure, dict[str, list[Any]]]:
    """One panel a metric, one line a loss: the difference to the baseline with its 95 % interval over paired seeds."""
    order = differences(frame, metrics[0], baseline=baseline).sort_values("mean")["loss"].tolist()
    figure, axes = plt.subplots(1, len(metrics), figsize=(8.0, 0.9 + 0.24 * len(order)), sharey=True, squeeze=False)
    data: dict[str, list[Any]] = {"loss": order[::-1]}
    for panel, metric in zip(axes[0], metrics, strict=True):
        found = differences(frame, metric, baseline=baseline).set_index("loss").loc[order]
        height = np.arange(len(order))
        panel.axvline(0, color="black", linewidth=1, linestyle="solid")
        for place, (loss, row) in zip(height, found.iterrows(), strict=True):
            panel.plot([row["low"], row["high"]], [place, place], **{**style(str(loss)), "linestyle": "solid"})
            panel.plot(row["mean"], place, marker="o", markersize=4, color=style(str(loss))["color"])
        panel.set(
            title=metric_name(metric), yticks=height, yticklabels=order, xlabel="points" if _factor(metric) > 1 else ""
        )
        data[metric_name(metric)] = [
            f"{row['mean']:+.2f} [{row['low']:+.2f}, {row['high']:+.2f}]" for _, row in found[::-1].iterrows()
        ]
    return figure, data


def against(
    panel: Axes, frame: pd.DataFrame, setting: str, metric: str, losses: Sequence[str] | None = None
) -> dict[str, list[Any]]:
    """Lines of a metric against a numeric setting, one a loss, with the 95 % t interval over seeds as a band."""
    data: dict[str, list[Any]] = {setting: sorted(frame[setting].astype(float).unique())}
    for loss in losses or list(dict.fromkeys(frame["loss"])):
        own = frame[frame["loss"] == loss]
        places = sorted(own[setting].astype(float).unique())
        values = [own[own[setting].astype(float) == place][metric].astype(float) * _factor(metric) for place in places]
        intervals = [statistics.t_interval(list(value)) for value in values]
        look = style(loss)
        panel.plot(places, [item.mean for item in intervals], label=loss, marker="o", markersize=3, **look)
        panel.fill_between(
            places,
            [item.low for item in intervals],
            [item.high for item in intervals],
            alpha=0.18,
            color=look["color"],
            linewidth=0,
        )
        known = dict(zip(places, intervals, strict=True))
        data[loss] = [_text(known.get(place)) for place in data[setting]]
    panel.set(ylabel=metric_name(metric) + (" (%)" if _factor(metric) > 1 else ""))
    return data


def _text(found: statistics.Interval | None) -> str:
    if found is None:
        return "pending"
    half = found.high - found.mean
    return f"{found.mean:.2f}" + ("" if math.isnan(half) else f" ± {half:.2f}")


def curves(frame: pd.DataFrame) -> dict[str, np.ndarray[Any, Any]]:
    """For every loss the accuracies for k = 1, 2, ...: an array (seeds, k)."""
    return {
        str(loss): np.array([[float(x) for x in text.split()] for text in group.sort_values("seed")["curve"]])
        for loss, group in frame.groupby("loss", sort=False)
    }


def tuned_rows(
    tuning: pd.DataFrame, final: pd.DataFrame, metric: str = "top5", heads: Mapping[str, str] | None = None
) -> list[dict[str, Any]]:
    """What was chosen for every loss of a sweep, of how many candidates, and how far the candidates lay apart.

    heads: how to call the models, {model.name: words}, where there are several.
    """
    rows = []
    for model, loss, group in by_head(final, heads):
        tried = _candidates(tuning, model, loss)
        reached = [float(value) * _factor(metric) for value in tried.get(f"validation.{metric}", [])]
        chosen = {name: group[name].iloc[0] for name in _TUNED if name in tried and tried[name].nunique() > 1}
        rows.append({
            **({"head": heads[model]} if heads else {}),
            "loss": loss,
            "candidates": len(reached),
            "chosen": ", ".join(f"{_setting(name)} {_plain(value)}" for name, value in chosen.items()),
            f"validation {metric_name(metric)}, best": f"{max(reached):.2f}" if reached else "pending",
            "worst": f"{min(reached):.2f}" if reached else "pending",
        })  # fmt: skip
    return rows


def show_tuning(
    tuning: pd.DataFrame, final: pd.DataFrame, metric: str = "top5", heads: Mapping[str, str] | None = None
) -> None:
    """The table of `tuned_rows`, which learning rates lie at an edge, and where the numbers come from."""
    if len(final):
        notebook.table(tuned_rows(tuning, final, metric, heads))
        notebook.say(f"{rates_at_an_edge(tuning, final)} *{provenance(tuning)}.*")
    else:
        notebook.say("*No records yet.*")


def rates_at_an_edge(tuning: pd.DataFrame, final: pd.DataFrame) -> str:
    """A sentence that names the losses whose chosen learning rate is the smallest or the largest that was tried."""
    rate, found = "training.learning_rate", {"smallest": list[str](), "largest": list[str]()}
    for model, loss, group in by_head(final):
        tried = _candidates(tuning, model, loss)[rate].astype(float)
        name = loss if final["model.name"].nunique() == 1 else f"{loss} ({model})"
        for end, value in (("smallest", tried.min()), ("largest", tried.max())):
            found[end] += [name] * bool((group[rate].astype(float) == value).any())
    if not any(found.values()):
        return "Every chosen learning rate lies inside the range that was tried."
    ends = " and ".join(f"the {end} that was tried for {listed(names)}" for end, names in found.items() if names)
    return f"The chosen learning rate is {ends}: there a wider range might find a little more."


def _candidates(tuning: pd.DataFrame, model: str, loss: str) -> pd.DataFrame:
    return tuning[(tuning["model.name"] == model) & (tuning["loss"] == loss)]


def _setting(column: str) -> str:
    return column.split(".")[-1].replace("_", " ")


def _plain(value: Any) -> str:
    try:
        return f"{float(value):g}"
    except (TypeError, ValueError):
        return str(value)
