"""Tags that move by compare-and-swap."""

from __future__ import annotations

from pathlib import Path

import orjson
import pytest

from grape_service.cli.dataset_commands import list_versions
from grape_service.errors import UserError
from grape_service.release.load import load
from grape_service.release.tags import list_tags, move_tag, read_tag
from grape_service.storage.storage import Storage
from tests.grape_service.release.made_up import publish_version, rows


def test_moves_are_kept_in_order(any_storage: Storage) -> None:
    for _ in range(3):
        publish_version(any_storage, parts=[rows(0, 2)])
    assert move_tag(any_storage, "math-sft", "best", "v0002", who="ann", reason="evaluated")
    assert move_tag(any_storage, "math-sft", "best", "v0001", who="bob", expected="v0002")
    tag = read_tag(any_storage, "math-sft", "best")
    assert tag is not None
    assert [(m.previous, m.version, m.who, m.reason) for m in tag.history] == [
        (None, "v0002", "ann", "evaluated"),
        ("v0002", "v0001", "bob", ""),
    ]
    assert [(t.name, t.version) for t in list_tags(any_storage, "math-sft")] == [("best", "v0001"), ("latest", "v0003")]
    assert load(f"{any_storage.root}/math-sft@best").version == "v0001"
    assert not move_tag(any_storage, "math-sft", "latest", "v0002", only_forward=True)
    assert load(f"{any_storage.root}/math-sft").version == "v0003"


def test_moves_that_cannot_be_are_refused(any_storage: Storage) -> None:
    publish_version(any_storage, parts=[rows(0, 2)])
    with pytest.raises(UserError, match="has no version v0009 that tag 'best'"):
        move_tag(any_storage, "math-sft", "best", "v0009")
    with pytest.raises(UserError, match=r"points to v0001 \(by grape\), not to v0004"):
        move_tag(any_storage, "math-sft", "latest", "v0001", expected="v0004")
    with pytest.raises(UserError, match="reads like a version"):
        move_tag(any_storage, "math-sft", "v0001", "v0001")
    with pytest.raises(UserError, match="is not a version"):
        move_tag(any_storage, "math-sft", "best", "../../x")
    any_storage.write("math-sft/tags/broken.json", b'{"version": "../../etc", "history": []}')
    with pytest.raises(UserError, match=r"broken\.json is not a tag"):
        load(f"{any_storage.root}/math-sft@broken")


def test_references_to_nothing_say_what_there_is(any_storage: Storage) -> None:
    with pytest.raises(UserError, match="there is no dataset 'math-sft'"):
        load(f"{any_storage.root}/math-sft")
    publish_version(any_storage, parts=[rows(0, 2)])
    with pytest.raises(UserError, match="has no tag 'best': its tags are latest"):
        load(f"{any_storage.root}/math-sft@best")
    any_storage.write("math-sft/tags/broken.json", b"{")
    with pytest.raises(UserError, match="has no tag 'best': its tags are broken, latest"):
        load(f"{any_storage.root}/math-sft@best")
    with pytest.raises(UserError, match="has no version v0002"):
        load(f"{any_storage.root}/math-sft@v0002")


def test_a_broken_tag_hides_no_dataset(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    storage = Storage(str(tmp_path))
    for name in ("one", "two"):
        publish_version(storage, name, tags=("latest",))
    storage.write("one/tags/broken.json", b"{")
    list_versions(str(tmp_path), None, as_json=True)
    told = orjson.loads(capsys.readouterr().out)
    assert [(entry["name"], entry["tags"]) for entry in told["versions"]] == [("one", ["latest"]), ("two", ["latest"])]
    assert "one/tags/broken.json is not a tag: restore or delete it" in told["problems"][0]
    list_versions(str(tmp_path), None, as_json=False)
    assert "broken.json is not a tag" in capsys.readouterr().err
    assert load(f"{tmp_path}/one@v0001").tags() == ["latest"]
