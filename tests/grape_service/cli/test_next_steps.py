"""What a run ends with works when it is pasted."""

from __future__ import annotations

import shlex
import shutil
import subprocess
from pathlib import Path

import pytest

from grape_service.cli.next_steps import grape_command, next_steps, python_command
from grape_service.storage.storage import Storage
from tests.grape_service.release.made_up import publish_version, rows

REFERENCE = "s3://team/datasets/math-sft@v0003"


def test_each_step_is_one_command_with_its_words_quoted() -> None:
    steps = dict(next_steps("/a b/math-sft@v0003", "it's $1", "my config.yaml", ["name=a b"]))
    assert list(steps) == ["look", "explain", "export", "train", "load it"]
    assert shlex.split(steps["explain"])[-2:] == ["/a b/math-sft@v0003", "it's $1"]
    assert shlex.split(steps["look"])[-2:] == ["ui", "/a b"]
    train = shlex.split(steps["train"])
    assert train[train.index("--config") + 1] == "my config.yaml"
    assert train[-4:] == ["--set", "name=a b", "--set", "train.sft.epochs=1"]


def test_a_config_that_trains_and_an_id_like_an_option_are_left_out() -> None:
    steps = dict(next_steps(REFERENCE, "-x", "config.yaml", has_train=True))
    assert list(steps) == ["look", "export", "load it"]


def test_a_secret_of_the_command_line_is_not_repeated() -> None:
    assert "train" not in dict(next_steps(REFERENCE, "q", "c.yaml", ["notify.webhook=https://u:secret@host/"]))


def test_what_is_not_on_path_has_its_path(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("PATH", "/nowhere")
    assert Path(shlex.split(python_command())[0]).exists()
    assert shlex.split(grape_command())[0] != "grape"


def test_pasted_commands_run(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    folder = tmp_path / "a folder"
    publish_version(Storage(str(folder)), parts=[rows(0, 8)], tags=("latest",))
    steps = dict(next_steps(f"{folder}/math-sft@v0001", None, "config.yaml"))
    bash = shutil.which("bash") or "sh"
    for name in ("export", "load it"):
        done = subprocess.run([bash, "-c", steps[name]], cwd=tmp_path, capture_output=True, text=True, timeout=120)
        assert done.returncode == 0, done.stderr
    assert (tmp_path / "math-sft-v0001-trl" / "README.md").is_file()
