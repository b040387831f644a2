"""The frame of every HTML page that rayllm writes: one file, no script, no network, readable in light and in dark.

Knows nothing of what a page says: that is the template of whoever writes it, which extends `frame.html.j2` by the
blocks `title`, `style` and `main`.
"""

from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

from rayllm.core.errors import ConfigError


def render_page(package: str, filters: Mapping[str, Callable[..., str]], **values: Any) -> str:
    """`page.html.j2` of `package` with `values`; whatever these hold is text and never markup."""
    from jinja2 import ChoiceLoader, Environment, PackageLoader, StrictUndefined

    environment = Environment(
        loader=ChoiceLoader([PackageLoader(package, ""), PackageLoader("rayllm.core", "")]),
        autoescape=True,
        undefined=StrictUndefined,
        trim_blocks=True,
        lstrip_blocks=True,
    )
    environment.filters.update(filters)
    return environment.get_template("page.html.j2").render(values)


def write_page(html: str, path: Path) -> None:
    """Makes the folders above it. ConfigError where it cannot be written."""
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(html, encoding="utf-8")
    except OSError as error:
        raise ConfigError(f"{path}: cannot be written ({error.strerror})") from error
