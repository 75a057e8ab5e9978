"""Datasets with versions, runs and hostile text, and a browser of them."""

from __future__ import annotations

from pathlib import Path

import pytest
from starlette.testclient import TestClient

from grape_service.ui.folder import Folder
from tests.grape_service.ui.made_folder import client_of, make_folder


@pytest.fixture(scope="module")
def datasets(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return make_folder(tmp_path_factory.mktemp("ui"))


@pytest.fixture
def client(datasets: Path) -> TestClient:
    return client_of(Folder(str(datasets), workspace=str(datasets.parent / "workspace")))
