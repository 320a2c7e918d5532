"""Chapter 25's keyboard in the page: two next-word models small enough to travel with it, and no kernel.

    python -m topk_lab.study.suggestions        # trains two of the chapter's runs again and writes suggestions.npz

The hidden layer reads each of the three tokens through a table of its own, E U_p' (tokens, units): embedding and layer
are one matrix a position. These tables and the last layer are kept as one of 85 levels a number, with one scale a
column, and travel as one character a number, which a web server's compression likes better than base64.
"""

from __future__ import annotations

import html
import json
import sys
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import pandas as pd
from torch import Tensor

from topk_lab import data, figures, records, report, train
from topk_lab.data import Array
from topk_lab.study import keyboard
from topk_lab.train import Config

LEVELS = 42
ALPHABET = "".join(chr(code) for code in range(35, 127) if chr(code) not in "&'<>\\")[: 2 * LEVELS + 1]
CONTEXT = 3


class Packed(NamedTuple):
    """A matrix (rows, columns): whole numbers from -LEVELS to LEVELS, and what one of them is worth in each column."""

    whole: Array  # int8
    scale: Array  # float32 (columns,)

    @property
    def values(self) -> Array:
        """The matrix."""
        return self.whole * self.scale

    def text(self) -> str:
        """One character a number, row after row."""
        return "".join(ALPHABET[value + LEVELS] for value in self.whole.ravel().tolist())


def packed(matrix: Array) -> Packed:
    """The nearest levels; a column's largest number is its last level."""
    scale = np.abs(matrix).max(0) / LEVELS + 1e-12
    return Packed(np.rint(matrix / scale).astype(np.int8), scale.astype(np.float32))


class Model(NamedTuple):
    """`tables` (tokens, positions * units), the layer's bias in the last of them, and `last` (words, units + 1)."""

    tables: Packed
    last: Packed

    def scores(self, tokens: Array) -> Array:
        """Token numbers (rows, context) to scores (rows, words): a position's columns are side by side."""
        tables, last = self.tables.values, self.last.values
        units = last.shape[1] - 1
        parts = [tables[row, at * units : (at + 1) * units] for at, row in enumerate(tokens.T)]
        found: Array = np.tanh(sum(parts)) @ last[:, :-1].T + last[:, -1]
        return found


def model_of(state: Mapping[str, Tensor]) -> Model:
    """The weights of a `topk_lab.models.NextWordNet`."""
    weights = {name: value.double().numpy() for name, value in state.items()}
    embedding, layer = weights["embedding.weight"], weights["hidden.weight"]
    tables = [embedding @ part.T for part in np.split(layer, layer.shape[1] // embedding.shape[1], axis=1)]
    tables[-1] = tables[-1] + weights["hidden.bias"]
    last = np.column_stack([weights["head.weight"], weights["head.bias"]])
    return Model(packed(np.column_stack(tables)), packed(last))


# --- the file ---


def path() -> Path:
    """The models that the page shows."""
    return Path(__file__).resolve().parents[1] / "suggestions.npz"


def trained_again(row: Mapping[str, Any]) -> Mapping[str, Tensor]:
    """The weights of a record's run, which is run once more; its ranks must be the record's."""
    kept = list[Mapping[str, Tensor]]()
    config, threads = Config.of_record(row["config"]), int(row["threads"])
    again = train.train(config, threads=threads, keep=lambda model: kept.append(model.state_dict()))
    same = np.mean(np.frombuffer(again["ranks"], np.uint8) == np.frombuffer(row["ranks"], np.uint8))
    print(f"{row['key']}: {same:.2%} of the test rows have the rank of the record")
    if same < 0.99:
        raise ValueError(f"the run of record {row['key']} came out differently: only {same:.1%} of its ranks agree")
    return kept[0]


def write(runs: pd.DataFrame) -> None:
    """Of 16 units and 3,000 words: cross-entropy, and the loss with the largest mean top-3 accuracy beside it."""
    small = (runs["data.vocabulary"] == 3000) & (runs["model.hidden"] == 16)
    here = keyboard.latest(keyboard.registered_first(runs[small])).sort_values("seed")
    reached = report.means(here, f"top{keyboard.SHOWN}").drop(report.BASELINE)
    arrays, about = dict[str, Any](), list[dict[str, Any]]()
    for number, loss in enumerate((report.BASELINE, str(reached.idxmax()))):
        row = dict(here[here["loss"] == loss].iloc[0])
        model = model_of(trained_again(row))
        for name, matrix in model._asdict().items():
            arrays |= {f"{number}.{name}.whole": matrix.whole, f"{number}.{name}.scale": matrix.scale}
        about.append({"loss": loss} | {name: row[name] for name in ("key", "commit", "date", "top1", "top3")})
    arrays["about"] = np.array(json.dumps(about))
    records.write_whole(path(), lambda file: np.savez_compressed(file, **arrays))


def read() -> tuple[dict[str, Model], list[dict[str, Any]]]:
    """{loss: its model}, and where each comes from."""
    with np.load(path(), allow_pickle=False) as stored:
        arrays = {name: stored[name] for name in stored.files}
    about: list[dict[str, Any]] = json.loads(str(arrays["about"]))
    models = {
        source["loss"]: Model(*(
            Packed(arrays[f"{number}.{name}.whole"], arrays[f"{number}.{name}.scale"]) for name in Model._fields
        ))
        for number, source in enumerate(about)
    }  # fmt: skip
    return models, about


# --- what is suggested ---


def context_of(words: str, number: Mapping[str, int]) -> Array:
    """The last tokens of a text as the models know them, (1, context); where there are fewer, no word comes before."""
    tokens = [number.get(token, len(number)) for token in data.tokens(words)]
    return np.array([([len(number) + 1] * CONTEXT + tokens)[-CONTEXT:]])


def suggested(model: Model, words: str, names: Sequence[str], begun: str = "") -> list[str]:
    """The three words with the largest scores after `words`, of those that begin so."""
    scores = model.scores(context_of(words, {name: place for place, name in enumerate(names)}))[0]
    order = np.argsort(-scores, kind="stable")
    return [names[place] for place in order if names[place].startswith(begun)][: keyboard.SHOWN]


def show(examples: Sequence[str]) -> None:
    """The keyboard. Readers without scripts see a table of what the models suggest after these beginnings."""
    models, _ = read()
    names = data.load({"name": "words", "vocabulary": 3000, "rows": 1}).classes
    spec = {
        "words": names, "context": CONTEXT, "shown": keyboard.SHOWN, "levels": LEVELS, "alphabet": ALPHABET,
        "examples": list(examples),
        "models": [
            {"name": loss}
            | {name: {"text": part.text(), "scale": part.scale.tolist()} for name, part in model._asdict().items()}
            for loss, model in models.items()
        ],
    }  # fmt: skip
    head = "".join(f"<th>{html.escape(loss)}</th>" for loss in models)
    body = "".join(
        f"<tr><td>{html.escape(words)}</td>"
        + "".join(f"<td>{html.escape(', '.join(suggested(m, words, names)))}</td>" for m in models.values())
        + "</tr>"
        for words in examples
    )
    still = f"<table><thead><tr><th>after</th>{head}</tr></thead><tbody>{body}</tbody></table>"
    figures.show_scripted(
        "topk-keyboard", "keyboard.js", spec, still, "A keyboard with three suggestions of two models"
    )


if __name__ == "__main__":
    write(report.runs(keyboard.CHAPTER).query("not sweep.str.endswith('.tuning')"))
    sys.exit(0)
