"""Kept scores stay right: canary rows of every engine version, and versions file by file."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import numpy as np
import pyarrow as pa
import pytest

from grape_service.errors import StageError, UserError
from grape_service.score.store import ScoreStore
from grape_service.storage.storage import Storage
from workers.engines.base import EngineDescription
from workers.engines.canary import canary_rows, check_canary


class Made:
    """An engine whose scores are given."""

    def __init__(self, version: str, shift: float = 0.0, torch: str | None = None):
        extra = {} if torch is None else {"torch": torch}
        self.description = EngineDescription(
            "transformers", version, "m", "float32", None, "shared_prefix", "cpu", extra
        )
        self.shift = shift

    def score(self, batch: Any, temperature: float = 1.0) -> Any:
        return np.full(int(batch.mask.sum()), -1.0 + self.shift, dtype=np.float32)


@pytest.fixture
def model(tmp_path: Any) -> str:
    (tmp_path / "config.json").write_text('{"vocab_size": 50}')
    assert len(canary_rows(str(tmp_path))) == 4
    return str(tmp_path)


def test_a_replica_is_compared_with_every_version_that_made_scores(model: str, tmp_path: Any) -> None:
    workspace = Storage(str(tmp_path / "work"))

    def check(version: str, shift: float = 0.0, reuse: str = "compatible") -> None:
        engine: Any = Made(version, shift)
        check_canary(engine, model, workspace, "p", reuse)

    check("1")
    check("2", 1.5e-4)  # each step is within the tolerance, two are not
    with pytest.raises(StageError, match="differ from the stored ones"):
        check("3", 3e-4)
    with pytest.raises(StageError, match="differ from the stored ones"):
        check("3", -1e-4)  # near to the first alone
    check("2", 1e-4)
    with pytest.raises(StageError, match="made by transformers 1 and this replica has transformers 2"):
        check("2", 1e-4, "exact")
    with pytest.raises(UserError, match="not finite"):
        check("4", float("nan"))


def test_a_replica_with_another_torch_is_another(model: str, tmp_path: Any) -> None:
    workspace = Storage(str(tmp_path / "work"))

    def check(torch: str, shift: float = 0.0, reuse: str = "exact") -> None:
        engine: Any = Made("1", shift, torch)
        check_canary(engine, model, workspace, "p", reuse)

    check("2.13.0+cpu")
    check("2.13.0+cpu")
    with pytest.raises(StageError, match=r"with torch 2.13.0\+cpu and this replica has .* torch 2.13.0\+cu126"):
        check("2.13.0+cu126")
    with pytest.raises(StageError, match=r"; torch 2.13.0\+cpu there, 2.14.0 here$"):
        check("2.14.0", 1.0, "compatible")
    check("2.14.0", reuse="compatible")
    with pytest.raises(StageError, match=r"by transformers 1 with torch 2.14.0 and this replica has"):
        check("2.13.0+cpu")


def test_versions_are_told_of_the_files_that_rows_are_read_from(tmp_path: Any) -> None:
    store = ScoreStore(Storage(str(tmp_path)), "p")
    keys = [bytes([value]) * 16 for value in range(3)]
    description = Made("1").description
    for version, rows in (("1", keys[:2]), ("2", keys[1:])):
        made = replace(description, version=version)
        offsets = np.arange(len(rows) + 1)
        metadata = {"engine": made.engine, "version": made.version}
        store.write("b", pa.array(rows, pa.binary(16)), offsets, np.zeros(len(rows), np.float32), metadata)
    assert store.versions("b", pa.array(keys[:2], pa.binary(16))) == {"transformers 1"}
    assert store.versions("b", pa.array(keys, pa.binary(16))) == {"transformers 1", "transformers 2"}
    first, zero = pa.array(keys[:1], pa.binary(16)), np.zeros(1, np.float32)
    metadata = {"engine": "transformers", "version": "3"}
    store.write("b", first, np.arange(2), zero, metadata, statistics={"entropy": zero})
    assert store.versions("b", first) == {"transformers 1"}
    assert store.versions("b", first, ["entropy"]) == {"transformers 1", "transformers 3"}
