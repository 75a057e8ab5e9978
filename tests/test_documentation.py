"""README and docs: what they link to is there, what they name exists, and they stay short."""

from __future__ import annotations

import re
from pathlib import Path

import pytest

from grape_service.cli.app import app

pytestmark = pytest.mark.quick

ROOT = Path(__file__).resolve().parents[1]
PAGES = [ROOT / "README.md", ROOT / "ARCHITECTURE.md", ROOT / "CONTRIBUTING.md", *sorted((ROOT / "docs").glob("*.md"))]


@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.name)
def test_every_link_leads_to_a_file(page: Path) -> None:
    links = re.findall(r"\]\(([^)#\s]+)(?:#[^)]*)?\)", re.sub(r"```.*?```", "", page.read_text(), flags=re.S))
    files = [link for link in links if not link.startswith("http")]
    missing = [link for link in files if not (page.parent / link).exists()]
    assert missing == []


def test_every_module_that_is_named_exists() -> None:
    folders = ("grape_service", "workers", "flows", "tests", "benchmarks", "examples")
    there = ["/" + path.relative_to(ROOT).as_posix() for name in folders for path in (ROOT / name).rglob("*.py")]
    for page in PAGES:
        for name in re.findall(r"`([a-z0-9_/]+\.py)`", page.read_text()):
            assert any(path.endswith("/" + name) for path in there), f"{page.name}: {name}"


def test_every_command_that_is_named_exists() -> None:
    known = {command.name or command.callback.__name__ for command in app.registered_commands if command.callback}
    groups = {group.name: group.typer_instance for group in app.registered_groups}
    for page in PAGES:
        for word, rest in re.findall(r"`(?:\.venv/bin/)?grape ([a-z]+)([^`\n]*)", page.read_text()):
            assert word in known | set(groups), f"{page.name}: grape {word}"
            if word in groups:
                inner = {c.name or c.callback.__name__ for c in groups[word].registered_commands if c.callback}
                for name in re.findall(r"[a-z]+", rest.replace("\\|", "|").split()[0]):
                    assert name in inner, f"{page.name}: grape {word} {name}"


def test_the_readme_is_short_and_its_pictures_are_small() -> None:
    readme = (ROOT / "README.md").read_text()
    assert len(readme.splitlines()) <= 110
    pictures = re.findall(r"!\[[^]]+\]\(([^)]+)\)", readme)
    assert {"docs/images/report.png", "docs/images/catalogue.png"} <= set(pictures)
    for picture in pictures:
        data = (ROOT / picture).read_bytes()
        assert data.startswith(b"\x89PNG")
        assert len(data) < 150_000


def test_the_site_has_every_page_of_docs() -> None:
    named = set(re.findall(r"(\S+\.md)$", (ROOT / "mkdocs.yml").read_text(), re.M))
    assert [name for name in named if not (ROOT / name).is_file()] == []
    pages = {f"docs/{page.name}" for page in (ROOT / "docs").glob("*.md")} - {"docs/README.md"}
    assert pages - named == set()
