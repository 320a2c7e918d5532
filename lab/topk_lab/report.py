"""Tables, figures and sentences that follow from records; no number without a record (chapters 14 to 19).

runs = report.runs("14_cifar100")                       # one row a run, with a column `loss` to read
report.accuracies(runs, ["top1", "top5"])               # means and intervals, in a table
report.differences(runs, "top5")                        # {loss: its interval above cross-entropy, on the same seeds}
report.apart(runs, "top5")                              # those surely above it, and those surely below
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping, Sequence
from typing import Any

import numpy as np
import pandas as pd

from topk_lab import figures, sweep, train
from topk_lab import records as tables
from topk_lab.figures import Band, Panel
from topk_lab.page import say, table, tell_failed_assertions
from topk_lab.study.statistics import Interval, paired, t_interval

BASELINE = "cross-entropy"
PENDING = "*No records yet: this is pending.*"
HEADS = {"linear": "linear head", "mlp": "512 hidden units", "cosine": "cosine head"}
"""{model.name: how chapters call it}."""
_SHORT_NAMES = {
    "cross_entropy": "cross-entropy", "smooth_limit": "smooth-limit hinge", "entropy": "truncated entropy",
    "ldam": "LDAM", "balanced_softmax": "balanced softmax",
}  # fmt: skip
_ORDER = ("cross-entropy", "label smoothing", "focal", "LDAM", "smooth", "transition", "noised", "differentiable")
_TUNED = (
    "training.learning_rate", "training.weight_decay", "loss.tau", "loss.epsilon", "loss.width", "loss.margin",
    "loss.gamma", "loss.label_smoothing", "loss.inverse_temperature", "loss.max_margin", "loss.scale", "model.scale",
)  # fmt: skip


# --- names ---


def runs(chapter: str, profile: str = "full", records: str = "committed", **options: Any) -> pd.DataFrame:
    """A chapter's runs, committed or run now (`sweep.records_of`), with a column `loss` that says the loss in words.

    Every table lists the losses in the order they have here: cross-entropy and its kin, the papers' losses, hinges.
    Of a smaller run the page tells what fails of the full records' assertions (`page.tell_failed_assertions`).
    """
    if records == "run" and profile != "full":
        tell_failed_assertions()
    frame = sweep.records_of(chapter, profile=profile, records=records, **options)
    naming: Any = frame[[name for name in frame if str(name).startswith(("loss.", "model."))]].to_dict("records")
    frame.insert(0, "loss", [loss_name(row) for row in naming])
    return frame.sort_values("loss", key=lambda names: names.map(_place), kind="stable", ignore_index=True)


def of_sweep(frame: pd.DataFrame, name: str) -> pd.DataFrame:
    """The runs of one sweep, without the columns that none of them has."""
    return frame[frame["sweep"] == name].dropna(axis="columns", how="all").reset_index(drop=True)


def _place(loss: str) -> tuple[int, str]:
    words = loss.split(",")[0]
    if words.endswith("hinge"):
        return len(_ORDER) + 1, loss
    return next((place for place, family in enumerate(_ORDER) if family in words), len(_ORDER)), loss


def loss_name(row: Mapping[str, Any]) -> str:
    """A run's loss in words, its tuned settings left out: what readers compare."""
    margins = row["loss.name"] == "ldam" or row.get("loss.margins") == "class"  # they are always used with cosines
    text = _family(row)
    if row.get("loss.weight") == "balanced":
        text = f"weighted {text}"
    if "cosine" in (row.get("model.name"), row.get("model.head")) and not margins:
        text += " on cosines"
    return text


def _family(row: Mapping[str, Any]) -> str:
    name, text = str(row["loss.name"]), row.get("loss.k")
    k = tables.k_of(text) if isinstance(text, str) else 5
    if name == "cross_entropy" and (row.get("loss.label_smoothing") or 0) > 0:
        return "label smoothing"
    if name == "differentiable":
        over_all = row.get("loss.top1") == "cross_entropy" and row.get("loss.cross_entropy_over") == "all"
        return f"differentiable {shares(k)}" + (", cross-entropy over all" if over_all else "")
    if name == "hinge":
        name = _SHORT_NAMES.get(row["loss.variant"], f"{row['loss.variant']} hinge")
    elif name == "noised" and row.get("loss.margins") == "class":
        name = "imbalanced noised"
    name = _SHORT_NAMES.get(name, name)
    if isinstance(k, int):
        return name if k == 5 else f"{name}, k = {k}"
    return f"{name}, k = {' and '.join(map(str, k))}"


def shares(k: int | Mapping[int, float]) -> str:
    """P_K as the papers write it: [.5, 0, 0, 0, .5]."""
    weights = {k: 1.0} if isinstance(k, int) else k
    return "[" + ", ".join(f"{weights.get(at, 0):g}".replace("0.", ".") for at in range(1, max(weights) + 1)) + "]"


def metric_name(metric: str) -> str:
    """A column's name in words."""
    known = {"nll": "negative log-likelihood", "ece": "calibration error"}
    if metric.startswith("candidates_"):
        return f"guesses for {metric.removeprefix('candidates_')} %"
    words = metric.replace("train.", "training ").replace(".", " ").replace("_", " ").replace("top", "top-")
    group, _, rest = words.partition(" ")
    return f"{_GROUPS[group]} {rest}" if group in _GROUPS else known.get(metric, words)


_GROUPS = {"many": "head", "medium": "middle", "few": "tail"}  # of classes by their training images (chapter 17)


def factor(metric: str) -> float:
    """Accuracies are shown in per cent."""
    return 100.0 if "top" in metric else 1.0


def listed(items: Iterable[str], otherwise: str = "none") -> str:
    """`a, b and c`."""
    *first, last = [*items] or [otherwise]
    return f"{', '.join(first)} and {last}" if first else last


def signed(value: float) -> str:
    """Two digits with their sign; what rounds to zero has none."""
    return f"{value:+.2f}" if round(value, 2) else "0.00"


def low_to_high(interval: Interval) -> str:
    """The ends of an interval: `-0.51 to -0.09`."""
    return f"{signed(interval.low)} to {signed(interval.high)}"


# --- where numbers come from ---


def pending(chapter: str) -> None:
    """A table of the chapter's sweeps: how many runs each asks for, how many have a record, and the command."""
    rows = []
    for about in tables.sweeps(chapter):
        missing = about["runs"] - about["recorded"]
        command = f"`{about['command']}`" if missing else ""
        rows.append({**{name: about[name] for name in ("sweep", "runs", "recorded")}, "pending": missing or "none",
                     "command for what is pending": command})  # fmt: skip
    table(rows)


def provenance(frame: pd.DataFrame) -> str:
    """Where a figure's numbers come from, in one line."""
    if frame.empty:
        return "no records yet"
    commits = {str(commit)[:10] + ("+" if str(commit).endswith("dirty") else "") for commit in frame["commit"]}
    dates = sorted({str(date)[:10] for date in frame["date"]})
    processors = frame["hardware.cpu"]
    if "hardware.gpu" in frame:
        processors = frame["hardware.gpu"].where(frame["hardware.gpu"].fillna("") != "", processors)
    rows, seeds = len(frame), frame["seed"].nunique()
    return "; ".join([
        f"{rows} record{'s' * (rows != 1)}, {seeds} seed{'s' * (seeds != 1)}, sweep {_joined(frame['sweep'].dropna())}",
        f"commit {_joined(commits)}", " to ".join(dict.fromkeys((dates[0], dates[-1]))), _joined(processors),
        f"torch {_joined(frame['versions.torch'])}",
    ])  # fmt: skip


def machine(row: Mapping[str, Any]) -> str:
    """Where one record comes from."""
    processor = row.get("hardware.gpu") or row["hardware.cpu"]
    return (
        f"{str(row['date'])[:10]} on {processor} with torch {row['versions.torch']}, "
        f"{row['threads']} thread{'s' * (row['threads'] != 1)}, commit `{str(row['commit'])[:10]}`"
    )


def _joined(values: Iterable[Any]) -> str:
    return ", ".join(sorted({str(value) for value in values}))


def measured(frame: pd.DataFrame) -> None:
    """The line under a figure or table."""
    say(f"*Measured: {provenance(frame)}.*")


# --- tables ---


def accuracies(
    frame: pd.DataFrame, metrics: Sequence[str], by: Sequence[str] = ("loss",), order: str | None = None
) -> None:
    """For every group the mean and half the 95 % t interval over seeds of each metric; largest `order` first."""
    if frame.empty:
        say(PENDING)
        return
    known = [metric for metric in metrics if metric in frame and frame[metric].notna().all()]
    groups = list(frame.groupby(list(by), sort=False, dropna=False))
    if order:
        groups.sort(key=lambda item: -item[1][order].mean())
    table([
        dict(zip(by, values, strict=True)) | {"seeds": group["seed"].nunique()}
        | {metric_name(metric): str(_over_seeds(group, metric)) for metric in known}
        for values, group in groups
    ])  # fmt: skip


def _over_seeds(group: pd.DataFrame, metric: str) -> Interval:
    return t_interval(group[metric].astype(float).to_numpy() * factor(metric))


def means(frame: pd.DataFrame, metric: str, by: Sequence[str] = ("loss",)) -> pd.Series[float]:
    """The metric's mean over seeds, accuracies in per cent, by loss (and more)."""
    found: pd.Series[float] = frame.groupby(list(by), sort=False)[metric].mean() * factor(metric)
    return found


def by_head(frame: pd.DataFrame) -> Iterator[tuple[str, str, pd.DataFrame]]:
    """(head in words, loss, its runs), head after head."""
    for name, words in _heads(frame).items():
        for loss, group in frame[frame["model.name"] == name].groupby("loss", sort=False):
            yield words, str(loss), group


def _heads(frame: pd.DataFrame) -> dict[str, str]:
    """The heads that have runs, {model.name: words}; a single model of another name is its own word."""
    present = list(dict.fromkeys(frame["model.name"])) if len(frame) else []
    known = [name for name in HEADS if name in present]
    return {name: HEADS.get(name, name) for name in (known if len(known) == len(present) else present)}


def averages(frame: pd.DataFrame, metrics: Sequence[str], by: Sequence[str] = ("loss",)) -> None:
    """The means alone, for runs made on the page: an illustration."""
    table([
        dict(zip(by, values, strict=True))
        | {metric_name(metric): f"{group[metric].mean() * factor(metric):.1f}" for metric in metrics}
        for values, group in frame.groupby(list(by), sort=False)
    ])  # fmt: skip


def live(contenders: Mapping[str, Mapping[str, Any]], seeds: int, **common: Any) -> pd.DataFrame:
    """Trains every contender on the sample of real data that comes with the package: rows as records have them.

    Args:
        contenders: {what `loss` says: sections of the configuration that are its own}.
        seeds: 0 to seeds - 1.
        common: sections that all share, `data`, `model` and `training`.
    """
    rows = []
    for name, own in contenders.items():
        config = {"model": {"name": "linear"}, **common, **own}
        config["training"] = {"optimizer": "adamw", "schedule": "one_cycle", "evaluate_every": 0, **config["training"]}
        for seed in range(seeds):
            config["data"] = {"name": "sample", **common.get("data", {}), **own.get("data", {}), "seed": seed}
            rows.append({"loss": name, **train.train({**config, "seed": seed}, progress=False)})
    return pd.DataFrame(rows)


# --- differences to a baseline ---


def differences(
    frame: pd.DataFrame, metric: str, baseline: str = BASELINE, confidence: float = 0.95
) -> dict[str, Interval]:
    """{loss: the interval of its difference to the baseline over their common seeds}, accuracies in points."""
    return paired(frame, metric, baseline, confidence, factor(metric))


def apart(
    frame: pd.DataFrame, metric: str, baseline: str = BASELINE, lists: int = 1
) -> tuple[dict[str, float], dict[str, float]]:
    """The losses surely above the baseline and those surely below, {loss: mean difference}, largest first.

    "Surely": the paired t interval excludes zero at a confidence of 1 - 0.05 / (number of comparisons), so that all
    statements together are wrong with a probability of 5 % at most (Bonferroni). The comparisons are the other losses,
    in each of `lists` such pairs of lists that are read together.
    """
    others = frame["loss"].nunique() - 1
    if others < 1 or baseline not in set(frame["loss"]):
        return {}, {}
    found = differences(frame, metric, baseline, 1 - 0.05 / (others * lists))
    ordered = sorted(found.items(), key=lambda item: -abs(item[1].mean))
    above, below = ({loss: i.mean for loss, i in ordered if i.side == sign} for sign in (1, -1))
    return above, below


# --- figures ---


def along(frame: pd.DataFrame, setting: str, metric: str, **options: Any) -> Panel:
    """The panel of `against` for one head; a loss without runs at a place has a gap there."""
    places = sorted(frame[setting].astype(float).unique())
    found = {}
    for loss, group in frame.groupby("loss", sort=False):
        at = [_over_seeds(group[group[setting].astype(float) == place], metric) for place in places]
        found[str(loss)] = Band([i.mean for i in at], [i.low for i in at], [i.high for i in at])
    unit = " (%)" if factor(metric) > 1 else ""
    looks = {loss: figures.look(loss) for loss in found}
    return Panel(places, found, y_label=metric_name(metric) + unit, looks=looks, markers=True, **options)


def curves(frame: pd.DataFrame, longest: int = 100) -> dict[str, np.ndarray[Any, Any]]:
    """{loss: accuracies for k = 1, 2, ... (seeds, k)}, seeds in order."""
    return {
        str(loss): np.array([list(curve)[:longest] for curve in group.sort_values("seed")["curve"]])
        for loss, group in frame.groupby("loss", sort=False)
    }


# --- tuning ---


def tuning(tried: pd.DataFrame, final: pd.DataFrame, metric: str = "top5") -> None:
    """What was chosen for every loss, of how many candidates; rates at an edge; where the numbers come from."""
    if final.empty:
        say(PENDING)
    else:
        table(tuned(tried, final, metric))
        say(f"{rates_at_an_edge(tried, final)} *{provenance(tried)}.*")


def tuned(tried: pd.DataFrame, final: pd.DataFrame, metric: str = "top5") -> list[dict[str, Any]]:
    """What was chosen for every loss of a sweep, of how many candidates, and how far the candidates lay apart."""
    several, rows = final["model.name"].nunique() > 1, []
    for head, loss, group in by_head(final):
        candidates = _candidates(tried, group)
        column = f"validation.{metric}"
        reached = sorted(factor(metric) * _mean_of_seeds(candidates, column)) if column in candidates else []
        names = [name for name in _TUNED if name in candidates and candidates[name].nunique() > 1]
        rows.append({
            **({"head": head} if several else {}),
            "loss": loss,
            "candidates": len(reached),
            "chosen": ", ".join(f"{_words(name)} {_plain(group[name].iloc[0])}" for name in names),
            f"validation {metric_name(metric)}, best": f"{reached[-1]:.2f}" if reached else "pending",
            "worst": f"{reached[0]:.2f}" if reached else "pending",
        })  # fmt: skip
    return rows


def rates_at_an_edge(tried: pd.DataFrame, final: pd.DataFrame) -> str:
    """A sentence that names the losses whose chosen learning rate is the smallest or the largest that was tried."""
    rate, found = "training.learning_rate", {"smallest": list[str](), "largest": list[str]()}
    several = final["model.name"].nunique() > 1
    for _, loss, group in by_head(final):
        rates = _candidates(tried, group)[rate].astype(float)
        name = f"{loss} ({group['model.name'].iloc[0]})" if several else loss
        for end, value in (("smallest", rates.min()), ("largest", rates.max())):
            found[end] += [name] * bool((group[rate].astype(float) == value).any())
    if not any(found.values()):
        return "Every chosen learning rate lies inside the range that was tried."
    ends = " and ".join(f"the {end} that was tried for {listed(names)}" for end, names in found.items() if names)
    return f"The chosen learning rate is {ends}: there a wider range might find a little more."


def _candidates(tried: pd.DataFrame, group: pd.DataFrame) -> pd.DataFrame:
    found: pd.DataFrame = tried[(tried[["model.name", "loss"]] == group[["model.name", "loss"]].iloc[0]).all(axis=1)]
    return found


def _mean_of_seeds(tried: pd.DataFrame, column: str) -> pd.Series[float]:
    """The means of runs that differ in their seed only."""
    settings = [
        tried[name].map(str) for name in tried if str(name).startswith(("data.", "model.", "loss.", "training."))
    ]
    return tried.groupby(settings)[column].mean()


def _words(column: str) -> str:
    return column.split(".")[-1].replace("_", " ")


def _plain(value: Any) -> str:
    try:
        return f"{float(value):g}"
    except (TypeError, ValueError):
        return str(value)
