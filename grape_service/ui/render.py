"""Templates, and how figures, ages and texts are written on a page."""

from __future__ import annotations

import datetime
import time
from functools import cache
from pathlib import Path
from typing import Annotated, Any
from urllib.parse import quote, urlencode

import jinja2
import yaml
from annotated_types import Interval
from fastapi.responses import HTMLResponse
from markdown_it import MarkdownIt
from rich import filesize

from grape_service.display import counted, visible
from grape_service.progress.reporter import duration
from grape_service.report.page import environment as report_environment
from grape_service.ui.guard import root

FILES = Path(__file__).resolve().parent
Place = Annotated[int, Interval(ge=0, le=2**53)]
"""The number of a row, a version or a dataset in an address."""


@cache
def environment() -> jinja2.Environment:
    """The templates, which escape all that they are given."""
    environment = report_environment().overlay(loader=jinja2.FileSystemLoader(FILES / "templates"), trim_blocks=True)
    environment.filters = {
        **environment.filters,
        "age": age,
        "size": filesize.decimal,
        "duration": duration,
        "quoted": lambda text: quote(str(text), safe=""),
        "query": urlencode,
        "counted": counted,
    }
    environment.globals = {**environment.globals, "root": root}
    return environment


def page(template: str, status: int = 200, **values: Any) -> HTMLResponse:
    """A page out of its template."""
    return HTMLResponse(environment().get_template(f"{template}.html.j2").render(**values), status)


def age(created: str, now: float | None = None) -> str:
    """How long ago an ISO time was, in words: '3 days ago'."""
    try:
        then = datetime.datetime.fromisoformat(created).timestamp()
    except ValueError:
        return created
    seconds = max(0.0, (time.time() if now is None else now) - then)
    for limit, unit, word in (
        (60, 1, "second"),
        (3600, 60, "minute"),
        (86_400, 3600, "hour"),
        (60 * 86_400, 86_400, "day"),
    ):
        if seconds < limit:
            return f"{counted(int(seconds / unit), word)} ago"
    if seconds < 2 * 365 * 86_400:
        return f"{counted(int(seconds / (30.4 * 86_400)), 'month')} ago"
    return f"{counted(int(seconds / (365.25 * 86_400)), 'year')} ago"


def card_html(text: str) -> str:
    """A dataset card as HTML: markup of Markdown alone, no HTML of its own, no images."""
    if text.startswith("---\n"):
        text = text[4:].partition("\n---\n")[2]
    markdown = MarkdownIt("commonmark", {"html": False}).enable("table").disable("image")
    html: str = markdown.render(visible(text))
    first, *tables = html.split("<table>")
    regions = [
        f'<div class="scroll" tabindex="0" role="region" aria-label="Table {number}"><table>'
        + table.replace("</table>", "</table></div>")
        for number, table in enumerate(tables, start=1)
    ]
    return "".join([first, *regions])


def yaml_text(value: Any) -> str:
    """A value as YAML."""
    return visible(yaml.safe_dump(value, sort_keys=False, allow_unicode=True, width=100))
