"""Where an export goes, and what it says of itself."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

from grape_service.release.load import Release
from grape_service.storage.storage import Storage

LOADERS = Path(__file__).with_name("loaders")
"""Python files that are copied into an export: they run in a trainer's environment, without this package."""


@dataclass(frozen=True)
class Target:
    """Where an export is written."""

    storage: Storage
    drop_weights: bool

    def add_loader(self, name: str) -> None:
        """Put one of LOADERS beside the data."""
        self.storage.write(name, (LOADERS / name).read_bytes())

    def add_readme(self, release: Release, sentence: str, usage: str) -> None:
        """Put a README.md beside the data that says what it is and how to use it."""
        text = f"# {release.name} {release.version}\n\nFrom `{release.reference}`.\n\n{sentence}\n\n{usage}\n"
        self.storage.write("README.md", text.encode())


@dataclass(frozen=True)
class ExportSummary:
    """What was written."""

    to: str
    folder: str
    rows: int
    sentence: str  # one line for the user: what became of the weights
