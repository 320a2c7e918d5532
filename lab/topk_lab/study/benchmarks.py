"""The benchmark's table and its figures (chapter 13).

`bench/` in the repository measures; `python -m bench ship` packs its records, with bandwidths and ratios worked out,
into the table that `load` reads.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import numpy as np
import pandas as pd

from topk_lab import figures, records
from topk_lab.figures import Band, Panel
from topk_lab.page import say, table

CHAPTER, EXPECTED = "13_benchmarks", "13_benchmarks_expected"
PROBLEM = ["family", "batch", "classes", "k", "spread", "epsilon", "samples", "method", "m", "dtype", "features"]
FAMILIES = ("smooth", "transition", "hinge", "noised", "differentiable")
CROSS_ENTROPY, PLAIN_COPY = "cross_entropy", "plain copy"
_STACKED = (4.9, 6.2)  # two panels, one below the other: a phone shows a figure of this width whole
_SCORES = r"scores in the batch: rows $\times$ classes"
_AXIS = {"classes": "number of classes $n$", "k": "guesses $k$", "batch": "rows"}


# --- the table ---


def load() -> pd.DataFrame:
    """All records of losses of given scores, a row a problem and contender."""
    frame: pd.DataFrame = records.load(CHAPTER)
    return frame[frame["features"] == 0].reset_index(drop=True)


def last_layers() -> pd.DataFrame:
    """All records of last layers with their losses (chapter "A million classes")."""
    frame: pd.DataFrame = records.load(CHAPTER)
    return frame[frame["features"] > 0].reset_index(drop=True)


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


def usual(frame: pd.DataFrame) -> pd.DataFrame:
    """A row a machine and loss of ours: 256 rows of 1000 classes in float32, k = 5, and the loss's defaults."""
    asked = {
        "batch": 256,
        "classes": 1000,
        "k": 5,
        "dtype": "float32",
        "samples": 5,
        "epsilon": 1,
        "method": "odd_even",
    }
    mine = frame if "faster" in frame else ours(frame)  # rows of `against_peers` are ours already
    for name, value in asked.items():
        mine = mine[mine[name] == value]
    return mine.drop_duplicates(["machine", "family"])


def by_machine(frame: pd.DataFrame) -> list[dict[str, Any]]:
    """A row for every machine that has the usual problem: each loss's time over cross-entropy's, and when."""
    rows = []
    for name, mine in usual(frame[frame["p50_ms"].notna()]).groupby("machine"):
        first, times = mine.iloc[0], mine.set_index("family")["times_ce"]
        machine = str(first["processor"] or name)
        threads = "" if first["device"] == "cuda" else f", threads: {first['threads']:.0f}"
        found = {_named(family): f"{times[family]:.1f}" for family in FAMILIES if family in times}
        rows.append({"machine": machine + threads} | found | {"measured": f"{first['date']}, {first['commit'][:7]}"})
    return rows


def against_peers(frame: pd.DataFrame) -> pd.DataFrame:
    """A row for every problem that a peer solves too: `faster`, its time over ours, and `less_memory` likewise.

    `warm_faster` is the same from warm caches, where the record has these times.
    """
    peers = frame[frame["contender"].str.startswith(("difftopk ", "pytopk "))]
    both = ours(frame).merge(peers, on=["machine", *PROBLEM], suffixes=("", "_peer"))
    for clock in ("", "warm_"):
        both[f"{clock}faster"] = both[f"{clock}p50_ms_peer"] / both[f"{clock}p50_ms"]
    return both.assign(less_memory=both["peak_bytes_peer"] / both["peak_bytes"])


def slower(frame: pd.DataFrame) -> pd.DataFrame:
    """Where ours loses: a row for every problem and every other contender but the copies that is faster than ours."""
    others = frame[~frame["contender"].str.startswith("topk ") & ~frame["contender"].str.endswith("copy")]
    both = ours(frame).merge(others, on=["machine", *PROBLEM], suffixes=("", "_other"))
    both["times"] = both["p50_ms"] / both["p50_ms_other"]
    return both[both["times"] > 1].sort_values("times", ascending=False).reset_index(drop=True)


def sweep(frame: pd.DataFrame, family: str, along: str, fixed_batch: bool = True) -> pd.DataFrame:
    """The records in which only `along` changes: the family's longest such series, the larger problems where two tie.

    Along the classes, `fixed_batch` False asks instead for problems of about the same number of elements.
    """
    mine = frame[frame["family"] == family]
    constant = [name for name in (*PROBLEM, "machine") if name not in (along, "family")]
    if along == "classes" and not fixed_batch:
        mine = mine.assign(volume=np.log2(mine["batch"] * mine["classes"]).round())
        constant = [name for name in constant if name != "batch"] + ["volume"]
    groups = [group for _, group in mine.groupby(constant) if group[along].nunique() > 2] if len(mine) else []
    if not groups:
        return mine.iloc[:0]
    chosen = max(groups, key=lambda group: (group[along].nunique(), group["score_bytes"].max()))
    return chosen.sort_values([along, "contender"])


def largest_problems(frame: pd.DataFrame) -> pd.DataFrame:
    """Of every family all contenders at its largest float32 problem, k = 5 where there is one."""
    chosen = frame["dtype"] == "float32"
    for family in FAMILIES:
        mine = chosen & (frame["family"] == family)
        mine &= (frame["k"] == 5) if (frame["k"][mine] == 5).any() else True
        if mine.any():
            problems = frame[[*PROBLEM, "machine"]]
            largest = problems.iloc[int(np.argmax(frame["score_bytes"].where(mine)))]
            chosen &= (frame["family"] != family) | (problems == largest).all(axis=1)
    return frame[chosen].sort_values("family", key=lambda names: names.map(FAMILIES.index), kind="stable")


def describe(row: Any) -> str:
    """A problem in words."""
    text = f"{row['family']} {row['batch']} x {row['classes']}, k = {row['k']}"
    if row["family"] == "noised":
        text += f", {row['samples']} samples" + (f", epsilon {row['epsilon']:g}" if row["epsilon"] != 1 else "")
    if row["family"] == "differentiable":
        text += f", {row['method'].replace('_', '-')}"
    return text + ("" if row["dtype"] == "float32" else f", {row['dtype']}")


def provenance(frame: pd.DataFrame) -> str:
    """Where these numbers come from: one line a machine."""
    lines = []
    for machine, rows in frame.groupby("machine"):
        about = [", ".join(sorted({str(v) for v in rows[name] if str(v)})) for name in ("torch", "commit", "date")]
        processor = next((name for name in rows["processor"] if name), str(machine))
        count = int(rows["threads"].iloc[0])
        threads = "" if rows["device"].iloc[0] == "cuda" else f", {count} thread{'s' * (count > 1)}"
        lines.append(
            f"{processor}{threads}: {len(rows)} record{'s' * (len(rows) > 1)}, torch {about[0]}, "
            f"commit {about[1]}, {about[2]}, load {rows['load'].min():g} to {rows['load'].max():g}"
        )
    return "\n\n".join(lines)


def source_of(frame: pd.DataFrame) -> str:
    """The line below a figure."""
    return f"*Source: {provenance(frame)}.*"


# --- figures and tables, each with where its numbers come from ---


def look(contender: str) -> dict[str, Any]:
    """A contender looks the same in every figure: colour and dash by who it is, the marker by its backend."""
    who, _, family = contender.removesuffix(" compiled").removesuffix(" triton").partition(" ")
    marker = "s" if contender.endswith(" triton") else "^" if contender.endswith(" compiled") else "o"
    if contender in ("copy", PLAIN_COPY):
        style: dict[str, Any] = {"color": "#AAAAAA" if family else figures.GREY, "linestyle": "dotted"}
    elif who == "topk":
        style = dict(figures.LOSSES.get(family, figures.LOSSES["calibrated hinge"]))
    elif who == CROSS_ENTROPY:
        style = dict(figures.LOSSES["cross-entropy"])
    else:
        style = {"color": figures.ORANGE if family == "hinge" else figures.SKY, "linestyle": (0, (9, 2))}
    return {**style, "marker": marker, "markersize": 4}


def in_prose(contender: str) -> str:
    """A contender as a figure calls it: our losses by their names alone."""
    who, _, family = contender.removesuffix(" compiled").removesuffix(" triton").partition(" ")
    name = {CROSS_ENTROPY: "cross-entropy", "topk": _named(family), "plain": PLAIN_COPY}.get(
        who, f"{who} {family}".strip()
    )
    return name + "".join(f", {word}" for word in ("triton", "compiled") if contender.endswith(f" {word}"))


def time_and_memory(frame: pd.DataFrame, family: str, along: str, clock: str = "", fixed_batch: bool = True) -> None:
    """Two panels against `along`: median time with its 20 to 80 % band, and peak memory in copies of the scores.

    The figure leaves out what is compiled and the plain copy; its table has all contenders.
    """
    rows = sweep(frame, family, along, fixed_batch)
    if rows.empty:
        say(f"No record over this axis yet for the {family} loss ({along}).")
        return
    what = _held(rows.iloc[-1], along, fixed_batch)
    wide = rows.pivot(index=along, columns="contender")
    columns = [f"{clock}{column}" for column in ("p50_ms", "p20_ms", "p80_ms")]
    data: dict[str, list[Any]] = {_words(along): list(wide.index)}
    for name in wide["p50_ms"]:
        data[f"time, ms: {name}"] = [
            "not run" if np.isnan(mean) else f"{mean:.4g} [{low:.4g}, {high:.4g}]"
            for mean, low, high in zip(*(wide[column][name] for column in columns), strict=True)
        ]
        data[f"peak memory, in copies of the scores: {name}"] = list(wide["score_copies"][name])
    names = [name for name in wide["p50_ms"] if name != PLAIN_COPY and not name.endswith(" compiled")]
    times = {in_prose(name): Band(*(wide[column][name] for column in columns)) for name in names}
    memory = {in_prose(name): wide["score_copies"][name] for name in names}
    looks = {in_prose(name): look(name) for name in names}
    common: dict[str, Any] = {"x_label": _AXIS[along], "scale": "log", "looks": looks}
    panels = [Panel(wide.index, times, "time, ms", **common),
              Panel(wide.index, memory, "peak memory, in copies of the scores", **common)]  # fmt: skip
    alt = f"Time and peak memory of the {family} loss and its rivals against the {_words(along)}; {what}."
    figures.lines(*panels, alt=alt, size=_STACKED, columns=1, data=data)
    say(f"The {family} loss, {what}. {source_of(rows)}")


def _named(family: str) -> str:
    """A family as other chapters call its loss."""
    return "calibrated hinge" if family == "hinge" else family


def _held(row: Any, along: str, fixed_batch: bool) -> str:
    """What a sweep keeps, in words."""
    if along == "classes" and not fixed_batch:
        return f"about {row['batch'] * row['classes']:.2g} scores"
    parts = {"batch": f"{row['batch']} rows", "classes": f"{row['classes']} classes", "k": f"k = {row['k']}"}
    return ", ".join(text for name, text in parts.items() if name != along)


def _words(along: str) -> str:
    return _AXIS[along].split(" $")[0]


def ratio_to_cross_entropy(frame: pd.DataFrame, along: str, clock: str = "", fixed_batch: bool = True) -> None:
    """Two panels against `along`: the times of cross-entropy and of every family, and the same over cross-entropy's."""
    rows = pd.concat([ours(sweep(frame, family, along, fixed_batch)) for family in FAMILIES])
    rows = rows[rows[f"{clock}times_ce"].notna()]
    if rows.empty:
        say(f"No record over this axis yet ({along}).")
        return
    wide = rows.pivot(index=along, columns="family")
    own, over = wide[f"{clock}p50_ms"], wide[f"{clock}times_ce"]
    names = {family: _named(family) for family in FAMILIES if family in own}
    base = (own / over).T.median()
    compared = "cross-entropy, to compare"
    times = {compared: base} | {name: own[family] for family, name in names.items()}
    ratios = {compared: base / base} | {name: over[family] for family, name in names.items()}
    common: dict[str, Any] = {"x_label": _AXIS[along], "scale": "log", "markers": True,
                              "looks": {compared: figures.LOSSES["cross-entropy"]}}  # fmt: skip
    panels = [Panel(own.index, times, "time, ms", **common),
              Panel(own.index, ratios, "time over that of cross-entropy", **common)]  # fmt: skip
    alt = f"Time, and time over that of cross-entropy, against the {_words(along)}, for {', '.join(names.values())}."
    data = {_words(along): list(own.index)} | {f"{name}, ms": list(line) for name, line in times.items()}
    figures.lines(*panels, alt=alt, size=_STACKED, columns=1,
                  data=data | {name: list(over[f]) for f, name in names.items()})  # fmt: skip
    say(source_of(rows))


def ratio_to_peers(frame: pd.DataFrame, alt: str) -> None:
    """Every peer's time over ours, a mark for every problem that both solve, against its number of scores."""
    both = against_peers(frame).sort_values("faster", ascending=False)
    if both.empty:
        say("No record with a peer yet.")
        return
    names = [f"{describe(row)} | {row['contender_peer'].split()[0]}" for _, row in both.iterrows()]
    _marks(both, "faster", names, "the peer's time over ours", alt)
    say(source_of(both))


def bandwidth(frame: pd.DataFrame, alt: str, clock: str = "") -> None:
    """GB/s of every contender at its family's largest problem (k = 5 if there is one); of several the median."""
    rows = largest_problems(frame)
    if rows.empty:
        say("No record yet.")
        return
    found = rows.groupby("contender")[f"{clock}gbps"].median().dropna().sort_values(ascending=False)
    rates = {in_prose(str(contender)): float(rate) for contender, rate in found.items()}
    figures.bars({"GB/s": rates}, alt, x_label="effective bandwidth, GB/s", width=4.9)
    say(source_of(rows))


def _marks(rows: pd.DataFrame, ratio: str, names: list[str], label: str, alt: str) -> None:
    """A mark for every problem, against its number of scores; 1 is equally fast."""
    families = [family for family in FAMILIES if family in set(rows["family"])]
    found = {_named(family): rows[ratio].where(rows["family"] == family) for family in families}
    panel = Panel(rows["batch"] * rows["classes"], found, "", _SCORES, label, scale="log", points=True,
                  levels={"equally fast": 1.0})  # fmt: skip
    figures.lines(panel, alt=alt, size=(4.9, 3.6), data={"": names} | {name: list(one) for name, one in found.items()})


def slower_than_cross_entropy(frame: pd.DataFrame, alt: str) -> None:
    """Our time over cross-entropy's, a mark for every problem, and at how many someone else is faster."""
    mine = ours(frame).sort_values("times_ce", ascending=False)
    names = [describe(row) for _, row in mine.iterrows()]
    _marks(mine, "times_ce", names, "our time over that of cross-entropy", alt)
    lost = slower(frame)
    peers = int(lost["contender_other"].str.contains("difftopk|pytopk").sum())
    say(
        f"Of {len(mine)} problems ours is slower than cross-entropy in "
        f"{(lost['contender_other'] == CROSS_ENTROPY).sum()}, and slower than a peer in "
        f"{peers} of the {len(against_peers(frame))} that a peer solves."
    )


def slower_table(frame: pd.DataFrame) -> None:
    """The worst problem of each loss against cross-entropy, and against a peer for each number of rows."""
    lost = slower(frame)
    against_peer = lost[lost["contender_other"].str.contains("difftopk|pytopk")]
    against_ce = lost[lost["contender_other"] == CROSS_ENTROPY]
    worst = pd.concat([against_ce.drop_duplicates("family"), against_peer.drop_duplicates(["family", "batch"])])
    if len(worst):
        table([
            {"problem": describe(row), "who is faster": row["contender_other"], "ours, ms": row["p50_ms"],
             "theirs, ms": row["p50_ms_other"], "ours over theirs": row["times"]}
            for _, row in worst.iterrows()
        ])  # fmt: skip


# --- last layers (chapter "A million classes") ---

_LAYERS = {"F.linear + ": "scores held", "topk linear_loss ": "in chunks", "topk two processes ": "two processes"}
_LAYER_LOOKS = {"scores held": figures.BLACK, "in chunks": figures.BLUE, "two processes": figures.GREEN}


def _layer(contender: str) -> str:
    """How the chapter calls who computes a last layer."""
    return next((words for start, words in _LAYERS.items() if contender.startswith(start)), contender)


def layers_along_classes(frame: pd.DataFrame, family: str) -> None:
    """Time, and peak memory with the gradients, of a last layer and its loss against the number of classes."""
    rows = sweep(frame, family, "classes")
    if rows.empty:
        say(f"No record over the classes yet for the {family} loss.")
        return
    wide = rows.assign(contender=rows["contender"].map(_layer)).pivot(index="classes", columns="contender")
    names = list(wide["p50_ms"])
    times = {name: Band(*(wide[column][name] / 1e3 for column in ("p50_ms", "p20_ms", "p80_ms"))) for name in names}
    memory = {name: wide["peak_bytes"][name] / 1e9 for name in names}
    looks = {name: {"color": _LAYER_LOOKS.get(name, figures.VERMILION)} for name in names}
    common: dict[str, Any] = {"x_label": _AXIS["classes"], "scale": "log", "looks": looks, "markers": True}
    what = f"{rows['batch'].iloc[0]} rows of {rows['features'].iloc[0]} features"
    panels = [Panel(wide.index, times, "time, s", **common), Panel(wide.index, memory, "peak memory, GB", **common)]
    alt = f"Time and peak memory of a last layer with {_spoken(family)} against the number of classes; {what}."
    figures.lines(*panels, alt=alt, size=(4.9, 3.6))
    say(f"A last layer with {_spoken(family)}, {what}. {source_of(rows)}")


def _spoken(family: str) -> str:
    return {CROSS_ENTROPY: "cross-entropy", "hinge": "the calibrated hinge"}.get(family, f"the {family} loss")


def chunked_against_held(frame: pd.DataFrame) -> pd.DataFrame:
    """A row for every problem: the chunked layer's `time` over the plain one's, and by what its `memory` is divided.

    Memory is what both hold beyond the gradients that they return.
    """
    kinds = frame["contender"].map(_layer)
    both = frame[kinds == "in chunks"].merge(
        frame[kinds == "scores held"], on=["machine", *PROBLEM], suffixes=("", "_held")
    )
    gradients = 4 * both["features"] * (both["batch"] + both["classes"])
    both["time"] = both["p50_ms"] / both["p50_ms_held"]
    both["memory"] = (both["peak_bytes_held"] - gradients) / (both["peak_bytes"] - gradients)
    return both


# --- what is expected of a GPU ---


def expected() -> pd.DataFrame:
    """What `python -m bench expect` worked out: a row a kernel, and one, "together", a problem."""
    frame: pd.DataFrame = records.load(EXPECTED)
    return frame


def in_floors(frame: pd.DataFrame, problem: Mapping[str, Any]) -> list[float]:
    """Times the floor, graphs replayed, of our float32 runs of such a problem with 64 million scores or more."""
    mine = ours(frame)
    chosen = (mine["batch"] * mine["classes"] >= 64e6) & (mine["dtype"] == "float32")
    for name, value in problem.items():
        chosen &= mine[name] == value
    return list((mine["graph_copy_gbps"] / mine["graph_gbps"])[chosen].dropna())
