"""Pages from the templates in `locogen/pages/templates/`.

A page is one file that fetches nothing from elsewhere: its style, pictures and data are inside it,
and no script runs but one of ours. A content security policy repeats this to the browser, and names
style and script by their hashes. Only a picture that is enlarged may come from beside the page.

All values are escaped by the templates, except `markupsafe.Markup`: HTML that is known to be safe,
because a template made it or `locogen.pages.cleaning` cleaned it.
"""

from __future__ import annotations

import base64
import hashlib
from functools import cache
from importlib.resources import files
from typing import Any

from markupsafe import Markup

from locogen.markup import environment

PACKAGE = "locogen.pages"
POLICY = "default-src 'none'; img-src data:; base-uri 'none'; form-action 'none'"
POLICY_WITH_FILES = POLICY.replace("img-src data:", "img-src data: 'self'")


def render(template: str, **values: Any) -> Markup:
    """A part of a page.

    Args:
        template: A file of `locogen/pages/templates/`.
        **values: What the template's names stand for. All but `Markup` is escaped.

    Returns:
        The HTML.
    """
    return Markup(environment(PACKAGE).get_template(template).render(values))


def page(
    template: str,
    *,
    title: str,
    script: str = "",
    data: Any = None,
    allow_inline_styles: bool = False,
    source: str = "",
    **values: Any,
) -> str:
    """A whole page, from a template that extends `page.html`.

    Args:
        template: A file of `locogen/pages/templates/`.
        title: What the browser shows as the page's name.
        script: The file of `templates/` that may run in it; empty: none.
        data: What the script reads: plain values, which pictures beside the page may be among.
        allow_inline_styles: Whether elements may have style attributes, as those of notebooks do.
        source: A hash of all that the page is made from, to see whether it is still up to date.
        **values: What the template's names stand for.

    Returns:
        The page's HTML.
    """
    # The style element starts with a line break, which the policy's hash covers as well.
    style = "\n" + read_template("page.css")
    code = read_template(script) if script else ""
    return render(
        template,
        title=title,
        policy=policy(
            style, code, allow_inline_styles=allow_inline_styles, allow_files=data is not None
        ),
        data=data,
        style=Markup(style),  # files of ours
        script=Markup(code),
        source=source,
        **values,
    )


def policy(
    style: str, script: str = "", *, allow_inline_styles: bool = False, allow_files: bool = False
) -> Markup:
    """The content security policy of a page with this style and script, and nothing else."""
    rules = [POLICY_WITH_FILES if allow_files else POLICY, f"style-src {_hash_source(style)}"]
    if allow_inline_styles:
        rules.append("style-src-attr 'unsafe-inline'")
    if script:
        rules.append(f"script-src {_hash_source(script)}")
    return Markup("; ".join(rules))  # only ours; its quotes stay as they are


def _hash_source(text: str) -> str:
    """A text's hash in the words of a content security policy."""
    digest = hashlib.sha256(text.encode()).digest()
    return f"'sha256-{base64.b64encode(digest).decode()}'"


@cache
def read_template(name: str) -> str:
    """The text of a file of `locogen/pages/templates/`."""
    return files(PACKAGE).joinpath("templates", name).read_text(encoding="utf-8")
