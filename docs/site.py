"""Gathers the pages of the repository in build/pages, as they lie here, for `make site`.

    python docs/site.py

MkDocs wants all pages below one folder, and ours link to each other across the repository.
"""

from __future__ import annotations

import re
import shutil
from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]
PAGES = ROOT / "build" / "pages"
TOP = ("README.md", "ARCHITECTURE.md", "CHANGELOG.md", "CONTRIBUTING.md", "SECURITY.md")


def gather() -> list[Path]:
    """Copy every page, and every file that one of them links to; the pages."""
    shutil.rmtree(PAGES, ignore_errors=True)
    pages = [ROOT / name for name in TOP]
    for folder in ("docs", "deploy", "examples", "benchmarks"):
        pages += sorted((ROOT / folder).rglob("*.md"))
    pages = [page for page in pages if "out" not in page.relative_to(ROOT).parts]
    for page in pages:
        text = re.sub(r"^```.*?^```", "", page.read_text(), flags=re.S | re.M)
        links = re.findall(r"\]\(([^)#\s]+)(?:#[^)]*)?\)", text)
        files = [(page.parent / link).resolve() for link in links if "://" not in link]
        for file in [page, *(file for file in files if file.is_file())]:
            place = PAGES / file.relative_to(ROOT)
            place.parent.mkdir(parents=True, exist_ok=True)
            shutil.copy(file, place)
    return pages


if __name__ == "__main__":
    print(f"{len(gather())} pages in {PAGES.relative_to(ROOT)}")
