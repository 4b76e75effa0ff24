"""Page: what a report says, and the one HTML file that it becomes.

Text comes from data sets (names of classes, samples, joints) and must never become markup: the template escapes every value,
clips travel as JSON in a data block, figures as images, in which nothing runs, and the page's content security policy admits
its own script by its hash and nothing else, from nowhere else.
"""
from __future__ import annotations

import base64
import hashlib
from collections.abc import Sequence
from dataclasses import dataclass, field
from importlib.resources import files
from typing import Any

from ..plots.style import readable

__all__ = ["Headline", "Image", "Page", "Player", "Section", "Table", "render"]


@dataclass(frozen=True)
class Headline:
    """A number at the top: what it is, the number, and what it is of."""

    name: str
    value: str
    note: str = ""


@dataclass(frozen=True)
class Image:
    """A figure: its ``data:`` address, and in words what it shows."""

    source: str
    alternative: str
    kind: str = "image"


@dataclass(frozen=True)
class Table:
    """Cells as text; numbers stand at the right."""

    head: Sequence[str]
    rows: Sequence[Sequence[str]]
    kind: str = "table"

    def numeric(self, column: int) -> bool:
        """Whether every cell of the column begins with a digit, a sign, or is empty."""
        return all(not row[column] or row[column][0] in "+-−0123456789" for row in self.rows)


@dataclass(frozen=True)
class Player:
    """Clips to play, as ``clips.packed`` gives them."""

    clips: Sequence[dict[str, Any]]
    kind: str = "player"


@dataclass(frozen=True)
class Section:
    """A heading, a sentence, and what follows; ``folded`` is shown when it is asked for."""

    title: str
    parts: Sequence[Image | Table | Player]
    text: str = ""
    folded: bool = False


@dataclass
class Page:
    """A report."""

    title: str
    subtitle: str
    headlines: Sequence[Headline] = ()
    sections: list[Section] = field(default_factory=list)


def render(page: Page) -> str:
    """The HTML of the page: one file without any address but ``data:``, in characters that a file can hold."""
    from jinja2 import Environment, StrictUndefined
    from markupsafe import Markup

    assets = files(__package__) / "assets"
    template, style, script = ((assets / name).read_text(encoding="utf-8") for name in ("page.html", "page.css", "player.js"))
    environment = Environment(autoescape=True, undefined=StrictUndefined, trim_blocks=True, lstrip_blocks=True)
    return readable(environment.from_string(template).render(
        page=page, style=Markup(style), script=Markup(script), style_hash=_hash(style), script_hash=_hash(script)))


def _hash(text: str) -> str:
    return "sha256-" + base64.b64encode(hashlib.sha256(text.encode()).digest()).decode()
