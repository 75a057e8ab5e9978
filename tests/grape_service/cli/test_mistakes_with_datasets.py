"""Mistakes with datasets, files and pools: one plain sentence that says what to do, exit status 2, nothing printed."""

from __future__ import annotations

import sys
from pathlib import Path

import pytest
import yaml

from grape_service.cli import failing, main
from grape_service.storage.storage import Storage
from tests.grape_service.release.made_up import publish_version, rows

pytestmark = pytest.mark.quick


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    made = tmp_path_factory.mktemp("mistakes")
    publish_version(Storage(str(made / "datasets")), parts=[rows(0, 8)], tags=("latest",))
    config = {"name": "x", "pool": {"path": "pool.jsonl"}, "target": {"model": "/nowhere"}, "output": {"path": "out"}}
    (made / "config.yaml").write_text(yaml.safe_dump(config))
    (made / "pool.jsonl").write_text('{"prompt": "q", "response": "a"}\n')
    (made / "text.yaml").write_bytes(b"\xff\xfe\x00")
    return made


MISTAKES = [
    ("datasets show datasets", "datasets is a folder of datasets: name one of them, such as"),
    ("rows datasets", "datasets/math-sft@latest"),
    ("datasets show datasets/math-stf", "there is no dataset 'math-stf'"),
    ("datasets show datasets/math-sft@v9", "versions are v0001, v0002"),
    ("datasets show datasets/math-sft@lates", "its tags are latest"),
    ("datasets show datasets/math-sft@v0007", "v0007"),
    ("datasets show datasets/math-sft/versions/v0001", "is in the folder of a version: write datasets/math-sft@v0001"),
    ("rows datasets/math-sft/versions/v0001/data/part-00000.parquet", "write datasets/math-sft@v0001"),
    ("datasets show s3:/team/datasets/x", "has lost a slash"),
    ("datasets verify config.yaml", "'config.yaml' is a file, not a dataset"),
    ("datasets tag datasets/math-sft@v0001 a_b/c", "is not a tag"),
    ("compare datasets/math-sft pool.jsonl", "'pool.jsonl' is a file, not a dataset"),
    ("rows datasets/math-sft --source taecher", "has no row of the source 'taecher'"),
    ("export datasets/math-sft --to trll out", "--to trll is no export: choose one of trl"),
    ("export datasets/math-sft --to trl out --eval-share 2", "--eval-share 2 is no share"),
    ("report datasets/math-sft --out absent/x.html", "there is no folder"),
    ("train datasets/math-sft --config config.yaml", "config.yaml has no train section: add train"),
    ("gather config.yaml", "the config has no gather section"),
    ("run pool.jsonl", "'pool.jsonl' is a pool: `grape init pool.jsonl --model M > config.yaml` writes a config"),
    ("run datasets", "'datasets' is a folder: give a config file"),
    ("run text.yaml", "'text.yaml' is no text: give a config file"),
    ("check absent.yaml", "there is no config file 'absent.yaml'"),
    ("init pol.jsonl --model /nowhere", "; did you mean 'pool.jsonl'?"),
    ("init absent/pool.jsonl --model /nowhere", "pool.path 'absent/pool.jsonl' does not exist: there is no folder /"),
    ("check config.yaml --set select.keep", "is not key=value: write --set select.keep=2"),
    ("check config.yaml --set select={keep:", "this is not a YAML value"),
    ("check config.yaml --set pool.path.x=2", "has no keys: set 'pool.path' itself"),
    ("check config.yaml --set slect.keep=2", "did you mean 'select'?"),
    ("runs list absent", "there is no folder"),
    ("runs show nope --path datasets", "there is no run 'nope'"),
    ("runs logs ../x --path datasets", "is not a run"),
    ("rejects config.yaml", "has no rejects in"),
    ("rejects datasets/math-sft", "does not say which pool it was made from"),
    ("ui absent", "there is no folder"),
    ("lineage nope", "there is no dataset 'nope'"),
]


@pytest.mark.parametrize(("arguments", "sentence"), MISTAKES, ids=[arguments for arguments, _ in MISTAKES])
def test_a_mistake_has_its_sentence(
    arguments: str,
    sentence: str,
    folder: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    monkeypatch.chdir(folder)
    monkeypatch.setattr(failing, "_said", set())  # which a process says once
    monkeypatch.setattr(sys, "argv", ["grape", *arguments.split()])
    with pytest.raises(SystemExit) as ended:
        main()
    out, err = capsys.readouterr()
    assert (ended.value.code, out) == (2, ""), err
    assert sentence in err
    assert err.startswith("error: ")
    assert len(err.strip().splitlines()) == 1
