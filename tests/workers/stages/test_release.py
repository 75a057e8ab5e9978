"""Data files of a version, as a worker writes them."""

from __future__ import annotations

import json
from pathlib import Path

import pyarrow as pa
import pytest

from grape_service.config.policy import PolicyConfig
from grape_service.config.schema import RenderConfig
from grape_service.errors import StageError, UserError
from grape_service.models.files import PolicyFiles
from grape_service.release.load import load
from grape_service.rows.columns import SHARD, kept_columns
from grape_service.storage.parquet import write_parquet
from grape_service.storage.storage import Storage
from tests.grape_service.release.made_up import publish_version
from tests.prepared_pools import make_config
from tests.seaweed import SeaweedServer
from tests.tiny_models import make_model
from workers.scoring.work import ScoreTotals
from workers.stages.release import Columns, Version, check_failed_share, write_part_task
from workers.stages.reweigh import kept_paths
from workers.stages.weigh import WeighedFile


def test_a_release_of_which_two_files_are_of_one_partition_is_not_weighed_again(tmp_path: Path) -> None:
    """Their kept rows would be one file, and those of the first be lost."""
    storage = Storage(str(tmp_path))
    publish_version(storage)
    release = load(f"{tmp_path}/math-sft")
    with pytest.raises(UserError, match="which prompts each of its data files holds"):
        kept_paths(release, "kept")
    release.manifest.files[:] = [
        entry.model_copy(update={"partition": f"b{place}"}) for place, entry in enumerate(release.manifest.files)
    ]
    assert kept_paths(release, "kept") == {"b0": "kept/b0.parquet", "b1": "kept/b1.parquet"}


def test_a_target_with_an_adapter_on_s3_of_which_the_config_alone_has_the_endpoint(
    tmp_path: Path, s3_server: SeaweedServer, s3_url: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.delenv("AWS_ENDPOINT_URL")
    monkeypatch.setenv("GRAPE_CACHE", str(tmp_path / "cache"))
    options = {"endpoint_url": s3_server.endpoint, "retry_seconds": 5}
    adapter = Storage(f"{s3_url}/adapter", options)
    adapter.write("adapter_config.json", json.dumps({"r": 4}).encode())
    adapter.write("adapter_model.safetensors", b"weights")

    model = make_model(tmp_path / "model")
    workspace, output = (Storage(f"{s3_url}/{name}", options) for name in ("workspace", "datasets"))
    write_parquet(workspace, "weighed.parquet", pa.schema([*SHARD, *kept_columns([])]), [])
    target = PolicyConfig(model=str(model), adapter=f"{s3_url}/adapter")
    renderer = PolicyFiles(target, str(model), options), RenderConfig()
    version = Version(workspace, output, "d/versions/v0001", Columns([], []), 1.0, frozenset(), renderer)
    entry = write_part_task(version, 0, WeighedFile("b", "weighed.parquet", "0" * 64))
    assert (entry.rows, entry.proven_rows) == (0, 0)
    assert output.sha256("d/versions/v0001/data/part-00000.parquet") == entry.sha256


def test_failures_are_a_share_of_the_rows_that_their_policy_scores() -> None:
    config = make_config("pool", workers={"max_failed_share": 0.01})
    check_failed_share(config, [ScoreTotals(rows=900, reused=90, failed=10), ScoreTotals(), ScoreTotals(rows=9)])
    with pytest.raises(StageError, match="1 of 9 rows could not be scored"):
        check_failed_share(config, [ScoreTotals(rows=1000), ScoreTotals(rows=6, reused=2, failed=1)])
