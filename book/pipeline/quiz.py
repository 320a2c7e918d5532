"""A quiz question as a chapter's text has it, and as plain markdown.

    :::{quiz}
    Which loss has a gradient on every class of a row?

    - [ ] The calibrated hinge
      It has a gradient on two classes at most.
    - [x] Cross-entropy
      Its gradient is $p - e_y$, and no probability is 0.
    :::

First the question, then two answers or more, one line each, and below it why it is right or wrong. One carries the x.
On the site a reader chooses and is told at once (book/_ext/quiz.py); Colab, paper and pages without scripts fold the
explanations.
"""

from __future__ import annotations

import re
from collections.abc import Iterator
from itertools import pairwise
from typing import NamedTuple

LETTERS = "ABCDEF"
VERDICT = {True: "Right.", False: "Not this one."}
FOLD = "Which one is right, and why"
_ANSWER = re.compile(r"^- \[([ x])\] (\S.*)$")


class Answer(NamedTuple):
    """An answer that may be chosen, and what is said when it has been."""

    text: str
    why: str
    right: bool

    @property
    def verdict(self) -> str:
        """What is said, in markdown."""
        return f"**{VERDICT[self.right]}** {self.why}"


class Question(NamedTuple):
    """The text of a question, and its answers in order."""

    text: str
    answers: list[Answer]


def parse(lines: list[str]) -> Question:
    """The question between the fences. Raises ValueError that says what is missing."""
    starts = [at for at, line in enumerate(lines) if _ANSWER.match(line)]
    question = "\n".join(lines[: starts[0] if starts else None]).strip()
    answers = []
    for at, end in pairwise([*starts, len(lines)]):
        mark, text = _ANSWER.match(lines[at]).groups()  # type: ignore[union-attr]
        why = "\n".join(line.removeprefix("  ") for line in lines[at + 1 : end]).strip()
        answers.append(Answer(text, why, mark == "x"))
    _check(question, answers)
    return Question(question, answers)


def _check(question: str, answers: list[Answer]) -> None:
    if not question:
        raise ValueError("a quiz begins with its question")
    if not 2 <= len(answers) <= len(LETTERS):
        raise ValueError(
            f"a quiz has 2 to {len(LETTERS)} answers, '- [ ] text' and one '- [x] text', got {len(answers)}"
        )
    if sum(answer.right for answer in answers) != 1:
        raise ValueError(f"one answer of a quiz is right, got {sum(answer.right for answer in answers)}")
    for answer in answers:
        if not answer.why:
            raise ValueError(f"the answer {answer.text!r} of a quiz has no explanation below it")


def plain(lines: list[str]) -> Iterator[str]:
    """The question in plain markdown, its explanations folded."""
    question = parse(lines)
    lettered = list(zip(LETTERS, question.answers, strict=False))
    yield from (f"**Question.** {question.text}", "")
    yield from (f"- **{letter}** {answer.text}" for letter, answer in lettered)
    yield from ("", "<details>", f"<summary>{FOLD}</summary>", "")
    for letter, answer in lettered:
        yield f"- **{letter}** {answer.verdict}".replace("\n", "\n  ")
    yield from ("", "</details>")
