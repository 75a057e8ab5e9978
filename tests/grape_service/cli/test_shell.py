"""What makes the command line pleasant: -h, completion in a real bash, the folder that was used last."""

from __future__ import annotations

import inspect
import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
from typer.testing import CliRunner

from grape_service.cli.app import app
from grape_service.cli.completion import complete_reference
from grape_service.storage.storage import Storage
from tests.grape_service.release.made_up import publish_version, rows


@pytest.fixture
def datasets(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A folder with math-sft v0001 (stable) and v0002 (latest), and code-sft v0001."""
    monkeypatch.setenv("GRAPE_CACHE", str(tmp_path / "cache"))
    monkeypatch.delenv("GRAPE_DATASETS", raising=False)
    storage = Storage(str(tmp_path / "datasets"))
    publish_version(storage, parts=[rows(0, 2)], tags=("stable",))
    publish_version(storage, parts=[rows(0, 3)])
    publish_version(storage, "code-sft", parts=[rows(0, 2)])
    return tmp_path / "datasets"


def test_every_command_has_a_short_help() -> None:
    runner = CliRunner()
    for command in ([], ["run"], ["datasets"], ["datasets", "list"], ["jobs", "list"]):
        done = runner.invoke(app, [*command, "-h"])
        assert done.exit_code == 0
        assert "Usage" in done.stdout


def test_every_command_with_a_config_takes_overrides() -> None:
    commands = [app, *(group.typer_instance for group in app.registered_groups)]
    with_config = [
        command.callback
        for group in commands
        for command in group.registered_commands
        if command.callback and "config" in inspect.signature(command.callback).parameters
    ]
    assert len(with_config) >= 7
    kinds = {f.__name__: [p.annotation for p in inspect.signature(f).parameters.values()] for f in with_config}
    assert [name for name, annotations in kinds.items() if "SetOption" not in annotations] == []


def test_references_are_completed(datasets: Path) -> None:
    assert complete_reference(f"{datasets}/") == [f"{datasets}/code-sft", f"{datasets}/math-sft"]
    expected = [f"{datasets}/math-sft@{end}" for end in ("latest", "stable", "v0002", "v0001")]
    assert complete_reference(f"{datasets}/ma") == expected
    assert complete_reference(f"{datasets}/math-sft@v0002") == [f"{datasets}/math-sft@v0002"]
    assert complete_reference(f"{datasets}/nothing@") == []
    assert complete_reference("/no/such/folder/") == []
    assert complete_reference("http://nothing/here") == []


@pytest.mark.skipif(shutil.which("bash") is None, reason="bash is not installed")
def test_bash_completes_a_tag(datasets: Path, tmp_path: Path) -> None:
    """With the script that --install-completion installs, and bash's own way of cutting words at ':' and '@'."""
    grape = tmp_path / "grape"
    grape.write_text(f'#!/bin/sh\nexec "{sys.executable}" -m grape_service.cli "$@"\n')
    grape.chmod(0o755)
    environment = {**os.environ, "PATH": f"{tmp_path}:{os.environ['PATH']}"}
    script = tmp_path / "completion.bash"
    made = {**environment, "_GRAPE_COMPLETE": "source_bash"}
    script.write_text(subprocess.run(["grape"], env=made, capture_output=True, text=True, timeout=120).stdout)
    reference = f"{datasets}/math-sft"
    for end, expected in (
        ([reference, "@", "st"], "stable"),
        ([reference, "@"], "latest stable v0002 v0001"),
        ([f"{datasets}/c"], f"{datasets}/code-sft@latest {datasets}/code-sft@v0001"),
    ):
        words = ["grape", "datasets", "show", *end]
        quoted = " ".join(f"'{word}'" for word in words)
        asked = f"source {script}; COMP_WORDS=({quoted}); COMP_CWORD={len(words) - 1}; _grape_completion grape; "
        done = subprocess.run(
            ["bash", "--norc", "-c", asked + 'echo "${COMPREPLY[*]}"'],
            env=environment,
            capture_output=True,
            text=True,
            timeout=120,
        )
        assert done.stdout.split() == expected.split(), done.stderr


def test_a_list_without_a_folder_takes_the_last_one_or_says_how(
    datasets: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    runner = CliRunner()
    done = runner.invoke(app, ["datasets", "list"])
    assert "set GRAPE_DATASETS=s3://team/datasets" in str(done.exception)
    assert runner.invoke(app, ["datasets", "list", str(datasets)]).exit_code == 0
    assert '"name": "code-sft"' in runner.invoke(app, ["datasets", "list", "--json"]).stdout
    monkeypatch.setenv("GRAPE_DATASETS", str(datasets / "math-sft"))
    assert "code-sft" not in runner.invoke(app, ["datasets", "list", "--json"]).stdout
