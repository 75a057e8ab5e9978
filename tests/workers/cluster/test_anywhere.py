"""A run of a user without name and home, in folders with spaces and other letters, behind a proxy that is dead."""

from __future__ import annotations

import json
import os
import shutil
import subprocess
import sys
import tempfile
from collections.abc import Iterator
from pathlib import Path

import pytest
import yaml

from tests import tiny_models

pytestmark = [pytest.mark.alone, pytest.mark.long, pytest.mark.timeout(300)]
NOBODY = 54321
"""A uid that no passwd file names."""


@pytest.fixture
def folder() -> Iterator[Path]:
    """A folder that every user may enter, as pytest's own is not."""
    made = Path(tempfile.mkdtemp(prefix="grape-anywhere-"))
    made.chmod(0o755)
    inside = made / "müde Daten 東京"
    inside.mkdir()
    yield inside
    shutil.rmtree(made)


def as_nobody(command: list[str]) -> list[str]:
    """The command as NOBODY, who may still read what root may: the interpreter may lie in root's home."""
    if os.getuid() != 0:
        return command
    read = ["--inh-caps=+dac_read_search", "--ambient-caps=+dac_read_search"]
    return ["setpriv", f"--reuid={NOBODY}", f"--regid={NOBODY}", "--clear-groups", *read, *command]


def test_a_run_without_home_name_and_temporary_folder(folder: Path) -> None:
    tiny_models.make_model(folder / "das Modell")
    rows = [{"prompt": "What is 3 + 4?", "response": response} for response in ("7", "Seven.")]
    (folder / "der Pool").mkdir()
    (folder / "der Pool" / "Zeilen 1.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    config = {
        "name": "t",
        "pool": {"path": "der Pool"},
        "target": {"model": "das Modell", "engine": "transformers", "dtype": "float32"},
        "output": {"path": "die Ausgabe ü"},
        "workers": {"replicas": 1},
    }
    (folder / "eine Config.yaml").write_text(yaml.safe_dump(config, allow_unicode=True))
    if os.getuid() == 0:
        for path in (folder, *folder.rglob("*")):
            os.chown(path, NOBODY, NOBODY)
    environment = {
        "PATH": os.environ["PATH"],
        "PYTHONPATH": os.getcwd(),
        "PYTHONDONTWRITEBYTECODE": "1",
        "TMPDIR": "/nonexistent",
        "http_proxy": "http://127.0.0.1:9",
        "https_proxy": "http://127.0.0.1:9",
    }
    done = subprocess.run(
        as_nobody([sys.executable, "-m", "grape_service.cli", "run", "eine Config.yaml", "--json"]),
        cwd=folder,
        env=environment,
        capture_output=True,
        text=True,
        timeout=200,
    )
    assert done.returncode == 0, done.stderr
    outcome = json.loads(done.stdout)
    assert (outcome["rows"], outcome["scored"]) == (1, 2)
    assert outcome["reference"] == f"{folder}/die Ausgabe ü/t@v0001"
