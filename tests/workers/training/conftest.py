"""A release of a tiny model, and states that are asked for often."""

from __future__ import annotations

from pathlib import Path

import pytest

from tests.tiny_models import make_model
from tests.workers.training.tiny_release import make_rows, write_release
from workers.training import attempts, runs


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> str:
    return make_model(tmp_path_factory.mktemp("model"))


@pytest.fixture
def reference(tmp_path: Path, model: str) -> str:
    return write_release(tmp_path / "out", make_rows(3), {"target": {"model": model}})


@pytest.fixture
def quick(monkeypatch: pytest.MonkeyPatch) -> None:
    """Ask for states five times a second."""
    for module in (attempts, runs):
        monkeypatch.setattr(module, "POLL_SECONDS", 0.2)
