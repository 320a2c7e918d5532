"""What the fair comparison found (chapter 26), as tables for the decision page and for the written-down sentences."""

from __future__ import annotations

from functools import cache
from typing import Any

from topk_lab.report import low_to_high, signed
from topk_lab.study import fair

_CHAPTER = "../notebooks/26_fair.ipynb#every-loss-in-every-condition"
_SIGNS = {"ahead": "**ahead**", "behind": "behind", "level": "level"}


@cache
def verdict_table() -> str:
    """Condition after condition a row per loss, top-5 and top-1 side by side."""
    final = fair.final_runs(fair.runs())
    first = {(row["sweep"], row["loss"]): row for row in fair.verdicts(final, "top1")}
    lines = ["| | top-5 | top-1 |", "|---|---|---|"]
    before = ""
    for row in fair.verdicts(final, "top5"):
        condition = fair.CONDITIONS[row["sweep"]]
        if condition != before:
            lines.append(f"| **{condition}** | | |")
        cells = " | ".join(_cell(found) for found in (row, first[row["sweep"], row["loss"]]))
        lines.append(f"| {row['loss']} | {cells} |")
        before = condition
    return "\n".join(lines) + "\n"


def _cell(row: dict[str, Any]) -> str:
    """Verdict, linked to where it comes from, difference in points, both intervals."""
    both, seeds = (
        low_to_high(around).replace(" ", "\u00a0") for around in (row["over seeds and images"], row["over seeds"])
    )
    return f"[{_SIGNS[row['verdict']]}]({_CHAPTER}) {signed(row['difference'])} <small>({both}; {seeds})</small>"


@cache
def answer_table() -> str:
    """A row per sentence: its answer, the difference and its interval, the p-value."""
    lines = ["| | answer | difference | interval | p | seeds |", "|---|---|---|---|---|---|"]
    for row in fair.answers({**fair.final_runs(fair.runs()), **fair.elsewhere()}):
        found = row.get("difference")
        numbers = " | | | "
        if found:
            numbers = f"{signed(found.mean)} | {low_to_high(found)} | {fair.p_value(row['p'])} | {row['seeds']}"
        lines.append(f"| {row['sentence']} | {row['answer']} | {numbers} |")
    return "\n".join(lines) + "\n"


@cache
def counted() -> str:
    """How many runs the answers stand on."""
    runs = fair.runs()
    final = fair.final_runs(runs)
    tuning = sum(len(frame) for name, frame in runs.items() if name.endswith(".tuning"))
    return f"{sum(map(len, final.values()))} final runs and {tuning:,} tuning runs, in {len(final)} conditions.\n"
