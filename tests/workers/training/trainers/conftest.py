"""A tiny model and a release of twelve weighed rows."""

from __future__ import annotations

import pytest

from tests.tiny_models import make_model
from tests.workers.training.tiny_release import make_rows, write_release
from tests.workers.training.trainers.sft_steps import BLOCK, NUM_ROWS


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> str:
    return make_model(tmp_path_factory.mktemp("model"), arch="llama")


@pytest.fixture(scope="module")
def reference(tmp_path_factory: pytest.TempPathFactory, model: str) -> str:
    config = {"target": {"model": model}, "weights": {"method": "pear", **BLOCK}}
    return write_release(tmp_path_factory.mktemp("out"), make_rows(NUM_ROWS), config)
