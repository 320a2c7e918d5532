"""A Sphinx extension: below a page, a link that suggests an edit and comments by giscus, each where it is switched on.

Both need a repository that exists, so both are off in `_config.yml` until its address is that of one:

    feedback: {edit: true, giscus: {repo_id: R_..., category: Comments, category_id: DIC_...}}

giscus.app tells the three identifiers of a repository that has discussions and the giscus app. A chapter is edited in
its text twin, `notebooks/NN_name.md`; pages that are generated have nothing to edit.
"""

from __future__ import annotations

import html
from typing import Any
from urllib.parse import urlsplit

from sphinx.application import Sphinx

_GISCUS = ("repo_id", "category", "category_id")
_GENERATED = ("book/api", "book/equations", "book/status")


def edit_link(repository: str, branch: str, page: str) -> str:
    """A link to the editor of the text that `page` is made of."""
    return f'<p class="suggest"><a href="{repository}/edit/{branch}/{page}.md">Suggest an edit of this page</a></p>'


def comments(repository: str, giscus: dict[str, str]) -> str:
    """The element that giscus fills with the page's comments. Raises ValueError where an identifier is missing."""
    missing = [name for name in _GISCUS if not giscus.get(name)]
    if missing:
        raise ValueError(f"feedback.giscus needs {', '.join(_GISCUS)}; missing: {', '.join(missing)}")
    settings = {"repo": urlsplit(repository).path.strip("/")}
    settings |= {name.replace("_", "-"): giscus[name] for name in _GISCUS}
    settings |= {"mapping": "pathname", "reactions-enabled": "0", "theme": "preferred_color_scheme", "lang": "en"}
    data = " ".join(f'data-{name}="{html.escape(value, quote=True)}"' for name, value in settings.items())
    return f'<script src="https://giscus.app/client.js" {data} crossorigin="anonymous" async></script>'


def _add(app: Sphinx, pagename: str, templatename: str, context: dict[str, Any], doctree: object) -> None:
    feedback, theme = app.config.feedback, app.config.html_theme_options
    if doctree is None or not pagename.startswith(("notebooks/", "book/")):
        return
    repository = str(theme.get("repository_url", "")).rstrip("/")
    if feedback.get("edit") and pagename not in _GENERATED:
        context["body"] += edit_link(repository, theme.get("repository_branch", "main"), pagename)
    if feedback.get("giscus"):
        context["body"] += comments(repository, feedback["giscus"])


def setup(app: Sphinx) -> dict[str, Any]:
    """Called by Sphinx."""
    app.add_config_value("feedback", {}, "html", [dict])
    app.connect("html-page-context", _add)
    return {"parallel_read_safe": True}
