"""A release in Python: as data frames, and what it says of itself; `grape_service.run` and its sentences."""

from __future__ import annotations

from pathlib import Path

import pyarrow.compute as pc
import pytest

import grape_service
from grape_service.config.schema import Config
from grape_service.errors import StageError, UserError
from grape_service.release.load import load
from grape_service.storage.storage import Storage
from tests.grape_service.release.made_up import publish_version, rows


def test_frames_hold_what_the_files_hold(any_storage: Storage) -> None:
    publish_version(any_storage, parts=[rows(0, 30), rows(30, 20)])
    release = load(f"{any_storage.root}/math-sft")
    table = release.dataset.to_table()
    frame = release.to_pandas()
    assert list(frame.columns) == table.column_names
    assert frame["grape_score"].tolist() == table["grape_score"].to_pylist()
    assert frame["input_ids"][7].tolist() == table["input_ids"][7].as_py()
    polars = release.to_polars(columns=["source", "grape_score"], filter=pc.field("source") == "gen-a")
    wanted = [row["grape_score"] for row in table.to_pylist() if row["source"] == "gen-a"]
    assert polars["grape_score"].to_list() == wanted
    assert release.to_pandas(columns=["source"], filter=pc.field("source") == "nobody").columns.tolist() == ["source"]


def test_what_it_says_of_itself(tmp_path: Path) -> None:
    publish_version(Storage(str(tmp_path)))
    shown = repr(load(f"{tmp_path}/math-sft"))
    assert shown.startswith(f"Release {tmp_path}/math-sft@v0001\n80 rows, ")
    assert "prompt_id (string)" in shown
    assert ".to_pandas()" in shown
    assert max(map(len, shown.split("\n"))) < 140


def test_mistakes_are_sentences(tmp_path: Path) -> None:
    publish_version(Storage(str(tmp_path)))
    release = load(f"{tmp_path}/math-sft")
    with pytest.raises(UserError, match="has no column 'scores'; did you mean 'source' or 'grape_score'"):
        release.to_pandas(columns=["scores"])
    for streaming in (False, True):
        with pytest.raises(UserError, match="has no column 'scores'; did you mean"):
            release.to_hf(streaming, columns=["scores"])
    Storage(str(tmp_path)).write("math-sft/versions/v0001/data/part-00001.parquet", b"nothing")
    with pytest.raises(UserError, match="see `grape datasets verify"):
        release.to_polars()
    for config, sentence in (
        ({"name": "x", "slect": {}}, "unknown key 'slect'; did you mean 'select'"),
        (str(tmp_path / "none.yaml"), "there is no config file"),
        (3, "a config is a dict, the path of a YAML file or a Config, not a int"),
    ):
        with pytest.raises(UserError, match=sentence):
            grape_service.run(config)  # type: ignore[arg-type]


def test_a_config_may_be_a_dict_or_a_config_and_is_left_alone() -> None:
    from grape_service.config.loading import read_config

    values = {"name": "x", "pool": {"path": "p"}, "target": {"model": "m"}, "output": {"path": "o"}}
    config = read_config(values, ["select.keep=2"])
    assert config.select.keep == 2
    assert "select" not in values
    again = read_config(config, ["select.keep=3"])
    assert (again.select.keep, config.select.keep) == (3, 2)
    assert read_config(config) is config
    assert isinstance(config, Config)


@pytest.mark.parametrize("error", [UserError("one sentence"), StageError("one sentence")])
def test_jupyter_shows_the_sentence_alone(error: UserError | StageError) -> None:
    assert error._render_traceback_() == [f"{type(error).__name__}: one sentence"]
