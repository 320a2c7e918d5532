"""The benchmark's records as one table, and their figures (chapter 13).

`bench/` in the repository measures and writes `bench/results/<machine>/<suite>.csv`. `python -m bench ship` packs what
is there into `shipped/benchmarks.csv.xz` in this package, so that the chapter draws it wherever it runs; a test packs
again and compares.
"""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Any

import matplotlib.pyplot as plt
import numpy as np
import pandas as pd
from matplotlib.ticker import LogLocator, NullFormatter

from topk_lab import figures
from topk_lab.study.timing import gigabytes_per_second

if TYPE_CHECKING:
    from matplotlib.axis import XAxis, YAxis
    from matplotlib.figure import Figure

SHIPPED = Path(__file__).parent / "shipped" / "benchmarks.csv.xz"
PROBLEM = ("family", "batch", "classes", "k", "spread", "epsilon", "samples", "method", "m", "dtype")
FAMILIES = ("smooth", "transition", "hinge", "noised", "differentiable")
CROSS_ENTROPY, PLAIN_COPY = "cross_entropy", "plain copy"
_TEXT = (
    "machine", "suite", "family", "method", "dtype", "contender", "graph_note", "note", "kernels", "device",
    "processor", "driver", "torch", "triton", "topk", "python", "commit", "date",
)  # fmt: skip
_NUMBERS = (
    "batch", "classes", "k", "spread", "epsilon", "samples", "m", "p20_ms", "p50_ms", "p80_ms", "warm_p20_ms",
    "warm_p50_ms", "warm_p80_ms", "graph_p20_ms", "graph_p50_ms", "graph_p80_ms", "peak_bytes", "score_bytes",
    "rounds", "load", "threads",
)  # fmt: skip
_WHOLE = ("batch", "classes", "k", "samples", "m")


# --- the table -------------------------------------------------------------------------------------------------------


def load() -> pd.DataFrame:
    """All records that the package carries; empty where it carries none."""
    return read(SHIPPED) if SHIPPED.is_file() else _with_columns(pd.DataFrame())


def read(path: Path) -> pd.DataFrame:
    """One CSV of records; `machine` is its folder's name unless a column says it."""
    frame = pd.read_csv(path, dtype=str, keep_default_na=False)
    if "machine" not in frame:
        frame.insert(0, "machine", path.parent.name)
    return _with_columns(frame)


def _with_columns(frame: pd.DataFrame) -> pd.DataFrame:
    """Numbers as numbers; what an older record does not have is empty; bandwidths and ratios worked out."""
    frame = frame.assign(**dict.fromkeys((name for name in _TEXT if name not in frame), ""))
    frame = frame.reindex(columns=pd.Index([*_TEXT, *_NUMBERS]))
    for name in _NUMBERS:
        frame[name] = pd.to_numeric(frame[name], errors="coerce")
    frame[list(_WHOLE)] = frame[list(_WHOLE)].astype("int64")
    frame["score_copies"] = frame["peak_bytes"] / frame["score_bytes"]
    moved = frame["score_bytes"] * np.where(frame["contender"] == PLAIN_COPY, 2, 3)
    for clock in ("", "warm_", "graph_"):
        frame[f"{clock}gbps"] = gigabytes_per_second(moved, frame[f"{clock}p50_ms"])  # type: ignore[arg-type]
        frame[f"{clock}copy_gbps"] = _beside(frame, PLAIN_COPY, f"{clock}gbps")
        frame[f"{clock}times_ce"] = frame[f"{clock}p50_ms"] / _beside(frame, CROSS_ENTROPY, f"{clock}p50_ms")
    return frame


def _beside(frame: pd.DataFrame, contender: str, column: str) -> Any:
    """For every row what `contender` has in that column for the same problem, measured in the same run."""
    keys = ["machine", "suite", *PROBLEM]
    theirs = frame[frame["contender"] == contender].drop_duplicates(keys, keep="last")
    return frame[keys].merge(theirs[[*keys, column]], on=keys, how="left")[column].to_numpy()


def tidy(results: Path) -> pd.DataFrame:
    """Every record under a results folder."""
    paths = sorted(results.glob("*/*.csv"))
    return pd.concat([read(path) for path in paths], ignore_index=True) if paths else _with_columns(pd.DataFrame())


def pack(results: Path, into: Path = SHIPPED) -> int:
    """Writes the package's file from a results folder; returns the number of rows."""
    frame = tidy(results)[[*_TEXT, *_NUMBERS]]
    into.parent.mkdir(parents=True, exist_ok=True)
    frame.to_csv(into, index=False, float_format="%.6g", compression="xz")
    return len(frame)


def measured(frame: pd.DataFrame, device: str) -> pd.DataFrame:
    """The rows of one kind of device that have a time; of a problem measured in two suites the last."""
    chosen = frame[(frame["device"] == device) & frame["p50_ms"].notna()]
    return chosen.drop_duplicates(["machine", *PROBLEM, "contender"], keep="last").reset_index(drop=True)


def one_machine(frame: pd.DataFrame) -> pd.DataFrame:
    """The rows of the machine that has most of them: ratios are taken within one machine."""
    return frame if frame.empty else frame[frame["machine"] == frame["machine"].value_counts().idxmax()]


def ours(frame: pd.DataFrame) -> pd.DataFrame:
    """What a user gets who chooses nothing: the Triton kernel where there is one, else the torch path."""
    mine = frame[frame["contender"].str.startswith("topk ") & ~frame["contender"].str.endswith(" compiled")]
    mine = mine.sort_values("contender")  # "topk smooth" before "topk smooth triton"
    return mine.drop_duplicates(["machine", *PROBLEM], keep="last").sort_index()


def against_peers(frame: pd.DataFrame) -> pd.DataFrame:
    """A row for every problem that a peer solves too: `faster`, its time over ours, and `less_memory` likewise.

    `warm_faster` is the same from warm caches, where the record has these times.
    """
    peers = frame[frame["contender"].str.startswith(("difftopk ", "pytopk "))]
    keys = ["machine", *PROBLEM]
    both = ours(frame).merge(peers, on=keys, suffixes=("", "_peer"))
    for clock in ("", "warm_"):
        both[f"{clock}faster"] = both[f"{clock}p50_ms_peer"] / both[f"{clock}p50_ms"]
    both["less_memory"] = both["peak_bytes_peer"] / both["peak_bytes"]
    return both[[*keys, "contender", "contender_peer", "p50_ms", "p50_ms_peer", "faster", "warm_faster", "less_memory"]]


def slower(frame: pd.DataFrame) -> pd.DataFrame:
    """Where ours loses: a row for every problem and every other contender but the copies that is faster than ours."""
    others = frame[~frame["contender"].str.startswith("topk ") & ~frame["contender"].str.endswith("copy")]
    keys = ["machine", *PROBLEM]
    both = ours(frame).merge(others, on=keys, suffixes=("", "_other"))
    both["times"] = both["p50_ms"] / both["p50_ms_other"]
    lost = both[both["times"] > 1].sort_values("times", ascending=False)
    return lost[[*keys, "contender", "contender_other", "p50_ms", "p50_ms_other", "times"]].reset_index(drop=True)


def sweep(frame: pd.DataFrame, family: str, along: str, fixed_batch: bool = True) -> pd.DataFrame:
    """The records in which only `along` changes: the family's longest such series, the larger problems where two tie.

    Along the classes, `fixed_batch` False asks instead for problems of about the same number of elements.
    """
    mine = frame[frame["family"] == family]
    constant = [name for name in (*PROBLEM, "machine") if name not in (along, "family")]
    if along == "classes" and not fixed_batch:
        mine = mine.assign(volume=np.log2(mine["batch"] * mine["classes"]).round())
        constant = [name for name in constant if name != "batch"] + ["volume"]
    if mine.empty:
        return mine
    groups = [group for _, group in mine.groupby(constant) if group[along].nunique() > 2]
    if not groups:
        return mine.iloc[:0]
    chosen = max(groups, key=lambda group: (group[along].nunique(), group["score_bytes"].max()))
    return chosen.sort_values([along, "contender"])


# --- figures ---------------------------------------------------------------------------------------------------------

Drawn = tuple["Figure", dict[str, list[Any]]]
_AXIS = {"classes": "number of classes $n$", "k": "guesses $k$", "batch": "rows"}


def style(contender: str) -> dict[str, Any]:
    """A contender looks the same in every figure: colour and dash by who it is, the marker by its backend."""
    name = contender.removesuffix(" compiled").removesuffix(" triton")
    looks: dict[str, dict[str, Any]] = {
        CROSS_ENTROPY: {"color": figures.BLACK, "linestyle": "-"},
        "copy": {"color": "#777777", "linestyle": (0, (1.5, 1.5))},
        PLAIN_COPY: {"color": "#AAAAAA", "linestyle": (0, (3, 1))},
    }
    for family in FAMILIES:
        looks[f"topk {family}"] = figures.LOSSES.get(family, figures.LOSSES["calibrated hinge"])
        looks[f"difftopk {family}"] = looks[f"pytopk {family}"] = {
            "color": figures.SKY if family != "hinge" else figures.BLACK,
            "linestyle": (0, (9, 2)),
        }
    marker = "s" if contender.endswith(" triton") else "^" if contender.endswith(" compiled") else "o"
    return {**looks.get(name, {"color": figures.ORANGE}), "marker": marker, "markersize": 4}


def time_and_memory(frame: pd.DataFrame, family: str, along: str, clock: str = "", fixed_batch: bool = True) -> Drawn:
    """Two panels against `along`: median time with its 20 to 80 % band, and peak memory in copies of the scores."""
    chosen = sweep(frame, family, along, fixed_batch)
    figure, (left, right) = plt.subplots(1, 2, figsize=(7.8, 3.6))
    for contender, rows in chosen.groupby("contender", sort=False):
        name, x = str(contender), rows[along]
        left.plot(x, rows[f"{clock}p50_ms"], label=name, **style(name))
        left.fill_between(
            x, rows[f"{clock}p20_ms"], rows[f"{clock}p80_ms"], color=style(name)["color"], alpha=0.15, linewidth=0
        )
        right.plot(x, rows["score_copies"], **style(name))
    for panel, title in ((left, "time, ms"), (right, "peak memory, in copies of the scores")):
        panel.set(title=title, xlabel=_AXIS[along], xscale="log", yscale="log")
        _plain_ticks(panel.xaxis, panel.yaxis)
    figure.legend(*left.get_legend_handles_labels(), loc="outside lower center", ncol=3, fontsize=8.5)
    return figure, _columns(chosen, (along, "batch", "contender", f"{clock}p50_ms", "score_copies"))


def ratio_to_cross_entropy(frame: pd.DataFrame, along: str, clock: str = "", fixed_batch: bool = True) -> Drawn:
    """Every family's time over cross-entropy's against `along`."""
    figure, axes = plt.subplots(figsize=(6.6, 3.4))
    shown = []
    for family in FAMILIES:
        rows = ours(sweep(frame, family, along, fixed_batch)).sort_values(along)
        rows = rows[rows[f"{clock}times_ce"].notna()]
        if len(rows):
            axes.plot(rows[along], rows[f"{clock}times_ce"], label=family, **style(f"topk {family}"))
            shown.append(rows)
    axes.axhline(1, color=figures.BLACK, linewidth=0.9, linestyle="-")
    axes.set(title="time over that of cross-entropy", xlabel=_AXIS[along], xscale="log", yscale="log")
    _plain_ticks(axes.xaxis, axes.yaxis)
    if shown:
        figure.legend(*axes.get_legend_handles_labels(), loc="outside lower center", ncol=5, fontsize=8.5)
    together = pd.concat(shown) if shown else frame.iloc[:0]
    return figure, _columns(together, (along, "batch", "k", "contender", f"{clock}times_ce"))


def ratio_to_peers(frame: pd.DataFrame) -> Drawn:
    """Every peer's time over ours, a dot for every problem that both solve."""
    both = against_peers(frame).sort_values("faster").reset_index(drop=True)
    figure, axes = plt.subplots(figsize=(7.4, 1.2 + 0.22 * len(both)))
    places = {family: both.index[both["family"] == family] for family in FAMILIES}
    for marker, (family, place) in zip("os^vD", places.items(), strict=True):
        if len(place):
            looks = {**style(f"topk {family}"), "linestyle": "none", "marker": marker}
            axes.plot(both["faster"][place], place, label=family, **looks)
    axes.axvline(1, color=figures.BLACK, linewidth=0.9, linestyle="-")
    axes.set_yticks(both.index, [f"{describe(row)} | {row['contender_peer'].split()[0]}" for _, row in both.iterrows()])
    axes.tick_params(axis="y", labelsize=7.5)
    axes.set(title="times faster than the peer", xscale="log", ylim=(-0.7, len(both) - 0.3))
    _plain_ticks(axes.xaxis)
    axes.legend(fontsize=8.5, loc="lower right")
    told = both.assign(problem=[describe(row) for _, row in both.iterrows()])
    return figure, _columns(told, ("problem", "contender_peer", "faster", "less_memory"))


def bandwidth(frame: pd.DataFrame, clock: str = "") -> Drawn:
    """GB/s of every contender at its family's largest problem (k = 5 if there is one), the copy as a line."""
    rows = largest_problems(frame)
    figure, panels = plt.subplots(1, len(FAMILIES), figsize=(8.2, 3.4), sharey=True)
    for panel, family in zip(panels, FAMILIES, strict=True):
        mine = rows[rows["family"] == family]
        bars = mine[mine["contender"] != PLAIN_COPY]
        colours = [style(name)["color"] for name in bars["contender"]]
        panel.bar(range(len(bars)), bars[f"{clock}gbps"], color=colours, width=0.7)
        if len(mine):
            panel.axhline(mine[f"{clock}copy_gbps"].iloc[0], color="#777777", linewidth=1, linestyle="--")
        names = [name.replace(f" {family}", "").replace("cross_entropy", "CE") for name in bars["contender"]]
        panel.set_xticks(range(len(bars)), names, rotation=90, fontsize=8)
        panel.set_title(family, fontsize=9)
        panel.set_yscale("log")
        panel.grid(visible=False, axis="x")
    panels[0].set_ylabel("GB/s, least traffic over time")
    return figure, _columns(rows, ("family", "batch", "classes", "k", "contender", f"{clock}gbps", f"{clock}copy_gbps"))


def largest_problems(frame: pd.DataFrame) -> pd.DataFrame:
    """Of every family all contenders at its largest float32 problem, k = 5 where there is one."""
    found = []
    for family in FAMILIES:
        mine = frame[(frame["family"] == family) & (frame["dtype"] == "float32")]
        mine = mine[mine["k"] == 5] if (mine["k"] == 5).any() else mine
        if len(mine):
            problems = mine[[*PROBLEM, "machine"]]
            found.append(mine[(problems == problems.iloc[int(mine["score_bytes"].argmax())]).all(axis=1)])
    return pd.concat(found) if found else frame.iloc[:0]


def describe(row: Any) -> str:
    """A problem in words."""
    told = f"{row['family']} {row['batch']} x {row['classes']}, k = {row['k']}"
    if row["family"] == "noised":
        told += f", {row['samples']} samples" + (f", epsilon {row['epsilon']:g}" if row["epsilon"] != 1 else "")
    if row["family"] == "differentiable":
        told += f", {row['method'].replace('_', '-')}"
    return told + ("" if row["dtype"] == "float32" else f", {row['dtype']}")


def provenance(frame: pd.DataFrame) -> str:
    """Where these numbers come from: one line a machine."""
    lines = []
    for _, rows in frame.groupby("machine"):
        told = {name: ", ".join(sorted({str(v) for v in rows[name] if str(v)})) for name in ("torch", "commit", "date")}
        processor = next((name for name in rows["processor"] if name), str(rows["machine"].iloc[0]))
        threads = "" if rows["device"].iloc[0] == "cuda" else f", {rows['threads'].iloc[0]:.0f} threads"
        lines.append(
            f"{processor}{threads}: {len(rows)} rows, torch {told['torch']}, commit {told['commit']}, {told['date']}, "
            f"load {rows['load'].min():g} to {rows['load'].max():g}"
        )
    return "\n\n".join(lines)


def _columns(rows: pd.DataFrame, names: tuple[str, ...]) -> dict[str, list[Any]]:
    return {name: rows[name].tolist() for name in names}


def _plain_ticks(*axes: XAxis | YAxis) -> None:
    """Plain numbers on a logarithmic axis, at 1, 2, 5 where it spans little."""
    for axis in axes:
        low, high = axis.get_view_interval()
        axis.set_major_locator(LogLocator(subs=(1, 2, 5) if high < 300 * low else (1,)))
        axis.set_major_formatter("{x:g}")
        axis.set_minor_formatter(NullFormatter())
