"""Tables and figures from the records, nothing else."""

from __future__ import annotations

from collections import defaultdict
from pathlib import Path

from bench.runner import CELL, read


def table(path: Path) -> str:
    """The records of one suite as aligned text: time, ratio to cross-entropy, memory beyond the scores."""
    lines = [f"{'problem':44} {'contender':24} {'p50 ms':>10} {'x CE':>8} {'peak / scores':>14}"]
    for row in read(path):
        problem = f"{row['family']} {row['batch']}x{row['classes']} k={row['k']}"
        if row["family"] == "noised":
            problem += f" eps={row['epsilon']} S={row['samples']} sd={row['spread']}"
        if row["family"] == "differentiable":
            problem += f" {row['method']} m={row['m']}"
        share = int(row["peak_bytes"]) / int(row["score_bytes"])
        lines.append(
            f"{problem:44} {row['contender']:24} {float(row['p50_ms']):10.3f} "
            f"{float(row['times_cross_entropy']):8.2f} {share:14.2f}"
        )
    return "\n".join(lines)


def summary(path: Path) -> str:
    """The headline problems, 256 x 1000 and k = 5, as a Markdown table: ours against cross-entropy and the peers."""
    cells: dict[tuple[str, ...], dict[str, dict[str, str]]] = defaultdict(dict)
    for row in read(path):
        if (row["batch"], row["classes"], row["k"]) == ("256", "1000", "5"):
            cells[tuple(row[column] for column in CELL)][row["contender"]] = row
    lines = [
        "| loss | times cross-entropy | times faster than the peer | peak memory, in scores |",
        "|---|---|---|---|",
    ]
    for rows in cells.values():
        ours = next(row for name, row in rows.items() if name.startswith("topk "))
        peer = next((row for name, row in rows.items() if name.startswith(("difftopk ", "pytopk "))), None)
        faster = f"{float(peer['p50_ms']) / float(ours['p50_ms']):.1f} ({peer['contender'].split()[0]})" if peer else ""
        share = int(ours["peak_bytes"]) / int(ours["score_bytes"])
        lines.append(f"| {_described(ours)} | {float(ours['times_cross_entropy']):.1f} | {faster} | {share:.1f} |")
    return "\n".join(lines)


def _described(row: dict[str, str]) -> str:
    if row["family"] == "noised":
        return f"noised, {row['samples']} samples, epsilon {row['epsilon']}, scores of deviation {row['spread']}"
    if row["family"] == "differentiable":
        return f"differentiable, {row['method']}, m = {row['m']}"
    return row["family"]


def draw(path: Path) -> Path:
    """Time against the number of classes and against k, beside the CSV; returns the picture's path."""
    import matplotlib

    matplotlib.use("Agg")
    import matplotlib.pyplot as plt

    rows = read(path)
    figure, axes = plt.subplots(1, 2, figsize=(11, 4.2), layout="constrained")
    for axis, along, fixed in ((axes[0], "classes", "k"), (axes[1], "k", "classes")):
        series: dict[str, dict[int, float]] = defaultdict(dict)
        for row in rows:
            if row["family"] == "smooth":
                series[f"{row['contender']}, {row['batch']} rows, {fixed}={row[fixed]}"][int(row[along])] = float(
                    row["p50_ms"]
                )
        longest = sorted(((name, points) for name, points in series.items() if len(points) > 2), key=lambda s: s[0])
        styles = zip(longest, "os^vDPX*<>", strict=False)
        for (name, points), marker in styles:
            xs = sorted(points)
            axis.loglog(xs, [points[x] for x in xs], marker=marker, label=name)
        axis.set_xlabel(along)
        axis.set_ylabel("forward and backward, ms (median)")
        axis.grid(alpha=0.3)
        if longest:
            axis.legend(fontsize=7)
    picture = path.with_suffix(".png")
    figure.savefig(picture, dpi=130)
    plt.close(figure)
    return picture
