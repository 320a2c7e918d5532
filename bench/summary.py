"""Tables in text from the records; chapter 13 draws them."""

from __future__ import annotations

from collections import defaultdict
from pathlib import Path

from bench.runner import CELL, read, timed

_SUMMARY = ("256", "1000", "5", "float32")


def table(path: Path) -> str:
    """The records of one suite as aligned text: time, ratio to cross-entropy, memory beyond the scores.

    The columns after the times of eager calls are those of replayed graphs, where the device has them.
    """
    lines = [
        f"{'problem':44} {'contender':28} {'p50 ms':>10} {'x CE':>8} {'GB/s':>8} {'graph ms':>10} {'x CE':>8} "
        f"{'peak / scores':>14}"
    ]
    for row in read(path):
        start = f"{_problem(row):44} {row['contender']:28} "
        if not row["p50_ms"]:
            lines.append(f"{start}{row['note']}")
            continue
        share = int(row["peak_bytes"]) / int(row["score_bytes"])
        lines.append(
            f"{start}{float(row['p50_ms']):10.3f} {_number(row['times_cross_entropy'], 8, 2)} "
            f"{_number(row['gbps'], 8, 1)} {_number(row['graph_p50_ms'], 10, 3)} "
            f"{_number(row['graph_times_cross_entropy'], 8, 2)} {share:14.2f}"
        )
    return "\n".join(lines)


def _problem(row: dict[str, str]) -> str:
    problem = f"{row['family']} {row['batch']}x{row['classes']} k={row['k']}"
    if row["family"] == "noised":
        problem += f" eps={row['epsilon']} S={row['samples']} sd={row['spread']}"
    if row["family"] == "differentiable":
        problem += f" {row['method']} m={row['m']}"
    return problem + ("" if row["dtype"] == "float32" else f" {row['dtype']}")


def _number(text: str, width: int, digits: int) -> str:
    return f"{float(text):{width}.{digits}f}" if text else " " * width


def summary(path: Path) -> str:
    """The headline problems, 256 x 1000 and k = 5, as a Markdown table: ours against cross-entropy and the peers.

    Two numbers are those from cold and from warm caches.
    """
    cells: dict[tuple[str, ...], dict[str, dict[str, str]]] = defaultdict(dict)
    for row in timed(read(path)):
        if (row["batch"], row["classes"], row["k"], row["dtype"]) == _SUMMARY:
            cells[tuple(row[column] for column in CELL)][row["contender"]] = row
    lines = [
        "| loss | times cross-entropy | times faster than the peer | peak memory, in copies of the scores |",
        "|---|---|---|---|",
    ]
    families = list(dict.fromkeys(cell[CELL.index("family")] for cell in cells))
    for cell in sorted(cells, key=lambda cell: families.index(cell[CELL.index("family")])):
        rows, family = cells[cell], cell[CELL.index("family")]
        ours = rows.get(f"topk {family} triton", rows[f"topk {family}"])
        peer = next((row for name, row in rows.items() if name.startswith(("difftopk ", "pytopk "))), None)
        clocks = [clock for clock in ("", "warm_") if ours[f"{clock}p50_ms"]]
        dearer = " / ".join(f"{float(ours[f'{clock}times_cross_entropy']):.1f}" for clock in clocks)
        faster = "no peer"
        if peer:
            ratios = [float(peer[f"{clock}p50_ms"]) / float(ours[f"{clock}p50_ms"]) for clock in clocks]
            faster = f"{' / '.join(f'{ratio:.1f}' for ratio in ratios)} ({peer['contender'].split()[0]})"
        share = int(ours["peak_bytes"]) / int(ours["score_bytes"])
        lines.append(f"| {_described(ours)} | {dearer} | {faster} | {share:.1f} |")
    return "\n".join(lines)


def _described(row: dict[str, str]) -> str:
    if row["family"] == "noised":
        return f"noised, {row['samples']} samples, epsilon {row['epsilon']}, scores of deviation {row['spread']}"
    if row["family"] == "differentiable":
        return f"differentiable, {row['method']}, m = {row['m']}"
    return row["family"]
