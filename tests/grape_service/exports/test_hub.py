"""A version on the Hub and back, against a local server that speaks the Hub's API."""

from __future__ import annotations

import hashlib
import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
import yaml

from grape_service.storage.storage import Storage
from tests.grape_service.release.made_up import publish_version, rows
from tests.hub_server import TOKEN, Hub, running_hub

REPO = "team/math-sft"

READ = """
import sys, json
from datasets import load_dataset
table = load_dataset(sys.argv[1], revision=sys.argv[2], split="train").with_format("arrow")[:]
some = table.select(["prompt_id", "input_ids", "loss_weights"])
json.dump([table.num_rows, table.column_names, some.to_pylist()], sys.stdout)
"""


def environment(address: str, home: Path, token: str = TOKEN) -> dict[str, str]:
    """What a user would set, with caches of its own."""
    own = {"HF_ENDPOINT": address, "HF_TOKEN": token, "HF_HOME": str(home), "HF_HUB_DISABLE_XET": "1"}
    return {**os.environ, **own, "HF_HUB_DISABLE_TELEMETRY": "1", "GRAPE_CACHE": str(home / "grape")}


def export(reference: str, address: str, home: Path, token: str = TOKEN) -> subprocess.CompletedProcess[str]:
    command = [sys.executable, "-m", "grape_service.cli", "export", reference, "--to", "hub", REPO, "--json"]
    return subprocess.run(command, env=environment(address, home, token), capture_output=True, text=True, timeout=240)


def uploads(hub: Hub) -> list[str]:
    return [line for line in hub.log if line.startswith("PUT /lfs/")]


def test_a_version_is_a_commit_with_a_tag_and_reads_back_as_the_same_rows(any_storage: Storage, tmp_path: Path) -> None:
    parts = [rows(0, 50), rows(50, 30)]
    version = publish_version(any_storage, parts=parts)
    reference = f"{any_storage.root}/math-sft@{version.version}"
    with running_hub(REPO) as (address, hub):
        done = export(reference, address, tmp_path)
        assert done.returncode == 0, done.stderr
        assert len(uploads(hub)) == len(parts)
        made = json.loads(done.stdout)
        assert hub.tags == {"v0001": made["commit"]} == {"v0001": hub.refs["main"]}
        tree = hub.commits[made["commit"]]
        folder = any_storage.sub("math-sft/versions/v0001")
        for path in (
            "manifest.json",
            "README.md",
            "croissant.json",
            "data/part-00000.parquet",
            "data/part-00001.parquet",
        ):
            assert tree[path][1] == folder.read(path), path
        header = yaml.safe_load(tree["README.md"][1].decode().split("---")[1])
        assert header["configs"][0]["data_files"] == [{"split": "train", "path": "data/part-*.parquet"}]

        command = [sys.executable, "-c", READ, REPO, "v0001"]
        read = subprocess.run(
            command, env=environment(address, tmp_path), capture_output=True, text=True, timeout=240, cwd=tmp_path
        )
        assert read.returncode == 0, read.stderr[-3000:]
        number, names, found = json.loads(read.stdout)
        assert number == 80
        assert names == parts[0].column_names
        expected = [
            row for part in parts for row in part.select(["prompt_id", "input_ids", "loss_weights"]).to_pylist()
        ]
        assert found == expected

        # Once more: nothing is sent. A later version makes room for itself, and the tag keeps the first.
        hub.log.clear()
        again = export(reference, address, tmp_path)
        assert (again.returncode, json.loads(again.stdout)["is_new"]) == (0, False)
        assert not any("commit" in line or "PUT" in line for line in hub.log)
        later = publish_version(any_storage, parts=[rows(0, 20)])
        assert export(f"{any_storage.root}/math-sft@{later.version}", address, tmp_path).returncode == 0
        assert "data/part-00001.parquet" not in hub.commits[hub.refs["main"]]
        assert "data/part-00001.parquet" in hub.commits[hub.tags["v0001"]]

        # A tag that is another version's, and a token that may not write.
        hub.tags["v0001"] = hub.tags["v0002"]
        other = export(reference, address, tmp_path)
        assert (other.returncode, "the tag v0001 of team/math-sft is another version" in other.stderr) == (2, True)
        refused = export(reference, address, tmp_path, token="wrong")
        assert (refused.returncode, "set HF_TOKEN to a token that may" in refused.stderr) == (2, True)
        assert "wrong" not in refused.stderr


def test_an_upload_that_was_broken_off_goes_on(tmp_path: Path) -> None:
    """The connection breaks after one data file; the next try sends only what is missing."""
    storage = Storage(str(tmp_path / "out"))
    reference = f"{storage.root}/math-sft@{publish_version(storage, parts=[rows(0, 50), rows(50, 30)]).version}"
    with running_hub(REPO) as (address, hub):
        hub.uploads_until_broken = 1
        broken = export(reference, address, tmp_path)
        assert broken.returncode == 1, broken.stderr
        assert "run again to go on" in broken.stderr
        assert hub.tags == {}
        assert len(hub.objects) == 1
        hub.uploads_until_broken = None
        hub.log.clear()
        done = export(reference, address, tmp_path)
        assert done.returncode == 0, done.stderr
        assert len(uploads(hub)) == 1
        assert list(hub.tags) == ["v0001"]


def test_a_commit_whose_tag_was_not_made_gets_it(tmp_path: Path) -> None:
    storage = Storage(str(tmp_path / "out"))
    publish_version(storage)
    with running_hub(REPO) as (address, hub):
        assert export(f"{storage.root}/math-sft@v0001", address, tmp_path).returncode == 0
        commit = hub.tags.pop("v0001")
        again = export(f"{storage.root}/math-sft@v0001", address, tmp_path)
        assert again.returncode == 0, again.stderr
        assert hub.tags == {"v0001": commit}


def test_a_damaged_file_does_not_go_up(tmp_path: Path) -> None:
    storage = Storage(str(tmp_path / "out"))
    publish_version(storage)
    path = "math-sft/versions/v0001/data/part-00001.parquet"
    storage.write(path, storage.read(path)[:-1])
    with running_hub(REPO) as (address, hub):
        done = export(f"{storage.root}/math-sft@v0001", address, tmp_path)
        assert (done.returncode, "is not what the manifest names" in done.stderr) == (2, True)
        assert hub.tags == {}
        assert hashlib.sha256(storage.read(path)).hexdigest() not in hub.objects


@pytest.mark.parametrize("repo", ["math-sft", "a/b/c", "https://huggingface.co/a/b"])
def test_a_repository_has_an_owner_and_a_name(tmp_path: Path, repo: str) -> None:
    from grape_service.errors import UserError
    from grape_service.exports.hub import export_to_hub
    from grape_service.release.load import load

    storage = Storage(str(tmp_path))
    publish_version(storage)
    with pytest.raises(UserError, match="write owner/name"):
        export_to_hub(load(f"{storage.root}/math-sft@v0001"), repo)
