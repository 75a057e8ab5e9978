"""A version of a pool with more files than a manifest lists: every file is found, also after it is weighed again."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pyarrow.parquet as pq
import pytest

import grape_service
from grape_service.config.schema import Config
from grape_service.errors import UserError
from grape_service.release import pool_files
from grape_service.release.ancestry import Wanted, holders
from grape_service.release.lineage import lineage_tree, short_lineage
from grape_service.release.manifest import Manifest
from grape_service.release.verify import verify
from tests import tiny_models
from tests.jobs import pool_rows, write_jsonl
from workers.pipeline import reweigh, run_pipeline

pytestmark = [pytest.mark.alone, pytest.mark.timeout(300)]

NUM_FILES = 12


def test_every_file_of_a_large_pool_is_found(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(pool_files, "MAX_LISTED", 5)
    monkeypatch.setattr(pool_files, "BATCH_FILES", 7)
    model = tiny_models.make_model(tmp_path / "model")
    for number in range(NUM_FILES):
        write_jsonl(tmp_path / f"pool/part-{number:02}.jsonl", pool_rows(1, start=number))

    def config(**more: Any) -> Config:
        policy = {"model": model, "engine": "transformers", "dtype": "float32"}
        pool = {"path": str(tmp_path / "pool")}
        output = {"path": str(tmp_path / "out")}
        return Config.model_validate({"name": "many", "pool": pool, "target": policy, "output": output, **more})

    first = run_pipeline(config())
    assert first.reference is not None
    assert reweigh(first.reference, config(weights={"method": "probability"})).version == "v0002"
    expected = [f"{tmp_path}/pool/part-{number:02}.jsonl" for number in range(NUM_FILES)]
    for version in ("v0001", "v0002"):
        release = grape_service.load(f"{tmp_path}/out/many@{version}")
        parents = release.manifest.parents
        assert [Path(item.path).name for item in parents.pool] == [f"part-{number:02}.jsonl" for number in range(5)]
        assert (parents.num_files("pool"), list(pool_files.paths_of(release))) == (NUM_FILES, expected)
        assert verify(release) == []
        table = pq.read_table(f"{release.path}/pool-files.parquet")
        assert table.schema.equals(pool_files.SCHEMA)
        assert table["size"].to_pylist() == [Path(path).stat().st_size for path in expected]
        assert "pool: 12 files" in lineage_tree(release).render_text()
        assert "and 11 more files" in short_lineage(release).render_text()
    for wanted in (expected[0], "part-11.jsonl"):
        found = holders(str(tmp_path / "out"), Wanted(file=wanted), {})
        assert [one.reference.rpartition("@")[2] for one in found] == ["v0001", "v0002"]
    assert holders(str(tmp_path / "out"), Wanted(file="part-12.jsonl"), {}) == []

    beside = Path(release.path) / "pool-files.parquet"
    beside.write_bytes(beside.read_bytes()[:-1])
    with pytest.raises(UserError, match=r"v0002/pool-files.parquet is not the file that its manifest names"):
        holders(str(tmp_path / "out"), Wanted(file="part-11.jsonl"), {})
    assert [problem.path for problem in verify(release)] == ["pool-files.parquet"]


def test_the_pool_of_a_small_version_is_in_its_manifest_alone() -> None:
    files = [{"url": f"{n}", "size": n, "version": None, "digest": "x"} for n in range(pool_files.MAX_LISTED + 1)]
    few, every = pool_files.listed(files[:-1])
    assert (len(few), every) == (pool_files.MAX_LISTED, None)
    first, more = pool_files.listed(files)
    assert (first, more and more.files) == (few, pool_files.MAX_LISTED + 1)
    changed = pool_files.listed([*files[:-1], {**files[-1], "digest": "y"}])[1]
    assert changed is not None
    assert changed != more
    assert (
        Manifest.model_fields["parents"].annotation.model_validate({"all_files": {"pool": more}}).num_files("pool") > 1
    )
