"""A Sphinx extension: the directive `quiz`, a question that tells its reader whether the chosen answer is right.

How a chapter writes one is said in book/pipeline/quiz.py. The page holds question, answers and folded explanations, so
that it is whole without scripts; `_static/quiz.js` makes radio buttons of the answers.
"""

from __future__ import annotations

from typing import Any

from docutils import nodes
from docutils.statemachine import StringList
from sphinx.application import Sphinx
from sphinx.util.docutils import SphinxDirective

from book.pipeline import quiz


class Quiz(SphinxDirective):
    """One question with its answers."""

    has_content = True

    def run(self) -> list[nodes.Node]:
        """The question as nodes of the page."""
        try:
            question = quiz.parse(list(self.content))
        except ValueError as error:
            raise self.error(str(error)) from None
        answers, whys = (nodes.enumerated_list(enumtype="upperalpha", prefix="", suffix=".") for _ in range(2))
        for answer in question.answers:
            answers += self._parsed(nodes.list_item(), answer.text)
            whys += self._parsed(nodes.list_item(classes=["right"] if answer.right else []), answer.verdict)
        answers["classes"].append("answers")
        text = self._parsed(nodes.container(classes=["question"]), question.text)
        opened = nodes.raw("", f"<details><summary>{quiz.FOLD}</summary>", format="html")
        closed = nodes.raw("", "</details>", format="html")
        return [nodes.container("", text, answers, opened, whys, closed, classes=["topk-quiz"])]

    def _parsed(self, node: nodes.Element, text: str) -> nodes.Element:
        self.state.nested_parse(StringList(text.split("\n"), self.env.docname), self.content_offset, node)
        return node


def setup(app: Sphinx) -> dict[str, Any]:
    """Called by Sphinx."""
    app.add_directive("quiz", Quiz)
    return {"parallel_read_safe": True}
