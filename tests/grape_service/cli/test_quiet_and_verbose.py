"""--quiet and --verbose of commands that run."""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
from typer.testing import CliRunner

from grape_service.cli.app import app
from grape_service.errors import UserError
from grape_service.progress.bars import shown
from grape_service.progress.reporter import reporter
from tests.jobs import pool_rows, tiny_job
from tests.tiny_models import make_model

ROOT = Path(__file__).resolve().parents[3]


def test_both_together_are_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("GRAPE_PROGRESS", "")
    done = CliRunner().invoke(app, ["run", "config.yaml", "--quiet", "--verbose"])
    assert isinstance(done.exception, UserError)
    assert "--quiet and --verbose exclude one another" in str(done.exception)


def test_nothing_is_told_where_nothing_is_wanted(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setenv("GRAPE_PROGRESS", "none")
    with shown():
        reporter().begin("score target", 10, "tokens")
        reporter().event("something")
        reporter().end("score target")
    assert capsys.readouterr() == ("", "")


def test_a_quiet_run_prints_its_reference_alone(tmp_path: Path) -> None:
    model = make_model(tmp_path / "model")
    with tiny_job(tmp_path, model, pool_rows(3)) as job:
        done = job.grape("run", str(job.config_path), "--quiet")
    assert (done.returncode, done.stderr) == (0, "")
    assert done.stdout == f"{tmp_path}/datasets/tiny@v0001\n"


def test_an_old_python_is_told_before_anything_is_installed(tmp_path: Path) -> None:
    for name in ("Makefile", "pyproject.toml"):
        shutil.copy(ROOT / name, tmp_path)
    shutil.copytree(ROOT / "requirements", tmp_path / "requirements")
    old = tmp_path / "python3.10"  # this Python, which says that it is another
    old.write_text(f'#!/bin/sh\nexec {sys.executable} -c "import sys; sys.version_info = (3, 10, 12)\n$2"\n')
    old.chmod(0o755)
    command = ["make", "-C", str(tmp_path), "install", f"PYTHON={old}"]
    done = subprocess.run(command, env={**os.environ, "MAKEFLAGS": ""}, capture_output=True, text=True, timeout=60)
    assert done.returncode != 0
    assert f"grape-service needs 3.11 or newer, and {old} is Python 3.10" in done.stderr
    assert not (tmp_path / ".venv").exists()
