"""What gc takes, and what it never touches."""

from __future__ import annotations

import os
import shutil
import time
from typing import Any

import pytest

from grape_service.errors import UserError
from grape_service.release.catalog import read_catalog
from grape_service.release.claim import claim_version
from grape_service.release.gc import DAY, PREPARED, RUN, SCORES, UNFINISHED, VERSION, Garbage, collect, render_text
from grape_service.release.load import load
from grape_service.release.manifest import Parents, PolicyUse
from grape_service.release.outputs import register_output
from grape_service.release.tags import move_tag
from grape_service.release.verify import verify
from grape_service.release.writer import write_part
from grape_service.storage.storage import Storage
from tests.grape_service.release.made_up import SCHEMA, publish_version, rows


def parents(policy: str, prepare: str, run: str, release: str | None = None) -> Parents:
    use = PolicyUse(role="target", policy_id=policy, model="m")
    return Parents(policies=[use], prepare_id=prepare, run_id=run, release=release)


def publish_small(storage: Storage, tags: tuple[str, ...] = (), **more: Any) -> str:
    return publish_version(storage, parts=[rows(0, 2)], tags=tags, **more).version


def versions(storage: Storage) -> list[str]:
    return [entry.version for entry in read_catalog(storage, "math-sft")]


def kinds(found: list[Garbage]) -> dict[str, list[str]]:
    result: dict[str, list[str]] = {}
    for item in found:
        result.setdefault(item.kind, []).append(item.path.rsplit("/", 1)[-1])
    return result


def test_old_versions_go_but_none_that_is_needed(any_storage: Storage) -> None:
    for _ in range(4):
        publish_small(any_storage)
    publish_small(any_storage, parents=parents("x", "x", "x", f"{any_storage.root}/math-sft@v0003"))  # v0005
    publish_small(any_storage, parents=parents("x", "x", "x", f"{any_storage.root}/math-sft@v0005"))  # v0006
    publish_small(any_storage)
    move_tag(any_storage, "math-sft", "best", "v0001")
    move_tag(any_storage, "math-sft", "live", "v0006")
    any_storage.write_json("math-sft/runs/sft-1.json", {"version": "v0004", "state": "succeeded"})
    found = collect(any_storage, None, keep_versions=1)
    assert kinds(found) == {VERSION: ["v0002"]}
    assert found[0].num_files == 6
    assert "would delete" in render_text(found, dry_run=True)
    assert versions(any_storage) == [f"v{n:04d}" for n in range(1, 8)]
    assert collect(any_storage, None, keep_versions=1, dry_run=False) == found
    assert versions(any_storage) == ["v0001", "v0003", "v0004", "v0005", "v0006", "v0007"]
    assert all(verify(load(f"{any_storage.root}/math-sft@{version}")) == [] for version in versions(any_storage))
    assert [info.path for info in any_storage.list("math-sft/versions/v0002")] == ["math-sft/versions/v0002/claim.json"]
    with pytest.raises(UserError, match="has no version v0002"):
        move_tag(any_storage, "math-sft", "best", "v0002")
    assert collect(any_storage, None, keep_versions=1) == []
    assert collect(any_storage, None, keep_versions=100) == []


def test_candidates_stay_that_a_kept_version_was_made_from(tmp_path) -> None:
    storage = Storage(str(tmp_path))
    for _ in range(3):
        publish_small(storage, name="sums", tags=())
    asked = {f"{tmp_path}/sums@latest": f"{tmp_path}/sums@v0001"}
    publish_small(storage, parents=Parents(candidates=asked))
    found = collect(storage, None, keep_versions=1)
    assert [item.path for item in found] == [f"{tmp_path}/sums/versions/v0002"]


def test_the_number_of_a_deleted_version_is_never_given_again(tmp_path) -> None:
    storage = Storage(str(tmp_path))
    publish_small(storage)
    publish_small(storage)
    collect(storage, None, keep_versions=0, dry_run=False)
    assert versions(storage) == []
    assert publish_small(storage) == "v0003"


def test_a_claim_that_beats_is_left_alone(any_storage: Storage) -> None:
    with claim_version(any_storage, "math-sft") as claim:
        write_part(any_storage, claim.folder, 0, SCHEMA, [rows(0, 3)])
        assert collect(any_storage, None, dry_run=False) == []
        assert len(any_storage.list(claim.folder)) == 2
    found = collect(any_storage, None, dry_run=False)
    assert kinds(found) == {UNFINISHED: ["v0001"]}
    assert "given up by its writer" in found[0].reason
    assert [info.path for info in any_storage.list(claim.folder)] == [f"{claim.folder}/claim.json"]


def test_scores_and_shards_go_when_no_release_uses_them(tmp_path) -> None:
    output, workspace = Storage(str(tmp_path / "sets")), Storage(str(tmp_path / "work"))
    for policy in ("used", "old", "tagged"):
        workspace.write(f"scores/{policy}/b/1.parquet", b"x" * 100)
        workspace.write(f"scores/{policy}/policy.json", b"{}")
        workspace.write(f"prepared/{policy}/plan.json", b"x" * 10)
        workspace.write(f"runs/{policy}/config.json", b"{}")
    publish_small(output, parents=parents("old", "old", "old"))
    publish_small(output, parents=parents("tagged", "tagged", "tagged"), tags=("best",))
    later = time.time() + 40 * DAY
    assert collect(output, workspace, keep_days=30) == []
    found = collect(output, workspace, keep_days=30, now=later)
    assert kinds(found) == {SCORES: ["old", "used"], PREPARED: ["old", "used"], RUN: ["old", "used"]}
    assert [item.num_bytes for item in found if item.kind == SCORES] == [102, 102]
    assert workspace.exists("scores/old/b/1.parquet")
    for item in [*collect(output, workspace, keep_days=30, now=later, dry_run=False)]:
        assert workspace.list(item.path.removeprefix(f"{workspace.root}/")) == []
    assert workspace.folders("scores") == ["tagged"]


def test_while_a_run_beats_nothing_it_may_need_goes(tmp_path) -> None:
    output, workspace = Storage(str(tmp_path / "sets")), Storage(str(tmp_path / "work"))
    publish_small(output)
    publish_small(output)
    workspace.write("scores/p/b/1.parquet", b"x")
    workspace.write_json("runs/r/heartbeat.json", {})
    assert collect(output, workspace, keep_days=0, keep_versions=0, dry_run=False, now=time.time() + 60) == []
    found = collect(output, workspace, keep_days=0, keep_versions=0, dry_run=False, now=time.time() + 7200)
    assert set(kinds(found)) == {VERSION, SCORES, RUN}


def test_an_unreadable_manifest_stops_gc(tmp_path) -> None:
    storage = Storage(str(tmp_path))
    publish_small(storage)
    publish_small(storage)
    storage.write("math-sft/versions/v0001/manifest.json", b"broken")
    with pytest.raises(UserError, match=r"v0001/manifest\.json is not JSON"):
        collect(storage, None, keep_versions=0, dry_run=False)
    assert storage.exists("math-sft/versions/v0002/manifest.json")


def test_a_folder_without_datasets_is_refused(tmp_path) -> None:
    """With the wrong folder every score of the workspace would be unused."""
    workspace = Storage(str(tmp_path / "work"))
    workspace.write("scores/p/b/1.parquet", b"x")
    with pytest.raises(UserError, match="there is no dataset in"):
        collect(Storage(str(tmp_path / "nowhere")), workspace, keep_days=0, dry_run=False, now=time.time() + DAY)
    assert workspace.exists("scores/p/b/1.parquet")
    publish_small(Storage(str(tmp_path)))
    with pytest.raises(UserError, match=f"is one dataset.*give the folder of all of them, {tmp_path}"):
        collect(Storage(str(tmp_path / "math-sft")), workspace)


def test_a_claim_is_as_old_as_the_store_says(any_storage: Storage) -> None:
    """The writer's clock is a day behind, and this machine's does not matter."""
    path = "math-sft/versions/v0001/claim.json"
    any_storage.write_json(path, {"writer": "w", "state": "writing", "heartbeat": time.time() - DAY})
    any_storage.write("math-sft/versions/v0001/data/part-00000.parquet", b"x")
    assert collect(any_storage, None) == []
    found = collect(any_storage, None, now=any_storage.now() + 2 * 3600)
    assert kinds(found) == {UNFINISHED: ["v0001"]}
    assert "no sign of life for 2.0 hours" in found[0].reason


def test_gc_says_in_words_what_goes(tmp_path) -> None:
    storage, workspace = Storage(str(tmp_path)), Storage(str(tmp_path / ".grape"))
    publish_small(storage)
    publish_small(storage)
    workspace.write("scores/p/b/1.parquet", b"x")
    left = tmp_path / "math-sft" / ".tmp-killed"
    left.write_bytes(b"xyz")
    os.utime(left, (time.time() - 2 * DAY,) * 2)
    found = collect(storage, workspace, keep_days=0, keep_versions=1, now=time.time() + 2)
    text = render_text(found, dry_run=True)
    assert "would delete old versions, whose rows can then no longer be loaded:" in text
    assert f"  {tmp_path}/math-sft/versions/v0001: 6 files" in text
    assert "no tag, and not among the 1 newest of its dataset" in text
    assert "would delete scores, which a run that needs them has to make again:" in text
    assert "would delete temporary files and unfinished uploads of writers that were killed:" in text
    ending = "1 old version, scores of 1 policy and temporary files, "
    assert text.splitlines()[-1].startswith(ending)
    assert text.endswith("KiB: nothing has been deleted yet; run again with --delete")
    assert render_text(found, dry_run=False).splitlines()[-1].startswith(f"deleted {ending}")
    assert left.exists()
    assert collect(storage, workspace, keep_days=0, keep_versions=1, dry_run=False, now=time.time() + 2) == found
    assert not left.exists()
    workspace.write_json("runs/r-1/heartbeat.json", {})
    told: list[str] = []
    collect(storage, workspace, say=told.append)
    assert told == ["a run is under way (r-1): old versions, scores, shards and runs stay until it has ended"]


def test_scores_that_another_output_uses_stay(tmp_path) -> None:
    one, other, workspace = (Storage(str(tmp_path / name)) for name in ("one", "other", "work"))
    for policy in ("mine", "theirs", "nobodys"):
        workspace.write(f"scores/{policy}/b/1.parquet", b"x")
    publish_small(one, parents=parents("mine", "p", "r"), tags=("best",))
    publish_small(other, parents=parents("theirs", "p", "r"), tags=("best",))
    for output in (one, other):
        register_output(workspace, output)
    later = time.time() + 40 * DAY
    assert kinds(collect(one, workspace, now=later)) == {SCORES: ["nobodys"]}
    shutil.move(tmp_path / "other", tmp_path / "elsewhere")
    with pytest.raises(UserError, match=r"other uses the workspace .* cannot be seen from here .* delete .*outputs"):
        collect(one, workspace, dry_run=False, now=later)
    assert sorted(workspace.folders("scores")) == ["mine", "nobodys", "theirs"]
    with pytest.raises(UserError, match="dataset"):  # the folder of one dataset is no output
        collect(Storage(str(tmp_path / "one" / "math-sft")), workspace, dry_run=False, now=later)
    assert sorted(workspace.folders("scores")) == ["mine", "nobodys", "theirs"]
