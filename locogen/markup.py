"""HTML from templates: every value is escaped, except `markupsafe.Markup`.

The templates of a package stand in its folder `templates/`. Those in `locogen/templates/` are what
objects show of themselves in a notebook.
"""

from __future__ import annotations

from functools import cache
from typing import Any

from jinja2 import Environment, PackageLoader, StrictUndefined
from markupsafe import Markup


@cache
def environment(package: str) -> Environment:
    """What renders the templates of a package: values are escaped, a missing one is an error.

    Args:
        package: Its dotted name, such as "locogen.pages".

    Returns:
        The environment, the same one for each call.
    """
    return Environment(
        loader=PackageLoader(package),
        autoescape=True,
        undefined=StrictUndefined,
        # Lines that hold only a statement of the template leave no blank line in the HTML.
        trim_blocks=True,
        lstrip_blocks=True,
        auto_reload=False,
    )


@cache
def macros(package: str, template: str) -> Any:
    """The macros of a template, as functions: values in, HTML out.

    Args:
        package: The package that has it.
        template: A file of the package's folder `templates/`.

    Returns:
        The template as a module.
    """
    return environment(package).get_template(template).module


def shown(kind: str, **values: Any) -> str:
    """What an object shows of itself in a notebook.

    Args:
        kind: The macro of `locogen/templates/objects.html` that shows it.
        **values: The macro's arguments.

    Returns:
        The HTML.

    Example:
        >>> print(shown("facts", facts={"prompt": "<b>", "seed": 0}))
        <p>prompt &lt;b&gt; · seed 0</p>
    """
    return str(getattr(macros("locogen", "objects.html"), kind)(**values))


def table_html(table: Any) -> Markup:
    """A pandas table as notebooks show it: pandas escapes what is in it."""
    return Markup(table._repr_html_())
