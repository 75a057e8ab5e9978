"""What commands load before they do anything: imports, tokenizers and models made, not seconds."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import yaml

from tests import tiny_models

HEAVY = {"torch", "transformers", "ray", "prefect", "pandas", "scipy", "s3fs", "boto3", "matplotlib", "jinja2", "peft"}

LOADED = """
import atexit, json, sys
heavy = sys.argv.pop(1).split(",")
atexit.register(lambda: print(json.dumps(sorted({name.split(".")[0] for name in sys.modules} & set(heavy)))))
made = {}
if sys.argv[1] == "check":
    from grape_service.models.imports import import_without_extras
    import_without_extras()
    from transformers import AutoTokenizer
    def counted(where, name, found):
        def count(*arguments, **more):
            made[name] = made.get(name, 0) + 1
            return found(*arguments, **more)
        setattr(where, name, count)
    counted(AutoTokenizer, "from_pretrained", AutoTokenizer.from_pretrained)
    from grape_service.models import weights
    from grape_service.render import encoding
    counted(weights, "_empty_model", weights._empty_model)
    counted(encoding, "_new", encoding._new)
    atexit.register(lambda: print(json.dumps(made)))
from grape_service.cli import main
main()
"""


def loaded(folder: Path, *arguments: str) -> tuple[int, list[Any]]:
    """(exit status, what LOADED printed last) of `grape ARGUMENTS` in a process of its own."""
    done = subprocess.run(
        [sys.executable, "-c", LOADED, ",".join(sorted(HEAVY)), *arguments],
        cwd=folder,
        env={**os.environ, "PYTHONPATH": os.getcwd()},
        capture_output=True,
        text=True,
        timeout=120,
    )
    lines = [json.loads(line) for line in done.stdout.splitlines() if line.startswith(("[", "{"))]
    assert "Traceback" not in done.stderr, done.stderr
    return done.returncode, lines


@pytest.mark.parametrize("arguments", [["--help"], ["run", "--help"], ["datasets", "list", "."], ["run", "none.yaml"]])
def test_commands_that_need_no_model_load_nothing_large(tmp_path: Path, arguments: list[str]) -> None:
    _, (modules,) = loaded(tmp_path, *arguments)
    assert modules == []


def test_check_loads_each_model_once(tmp_path: Path) -> None:
    """Target and three behavior policies share a folder, and one of them scores recorded rows again."""
    folder = tiny_models.make_model(tmp_path / "model")
    rows = [
        {"prompt": "What is 3 + 4?", "response": "7", "response_ids": [22], "behavior_logprobs": [-1.0], "source": "a"},
        {"prompt": "What is 3 + 5?", "response": "Eight.", "source": "b"},
    ]
    (tmp_path / "pool.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    policy = {"model": folder, "dtype": "float32"}
    brief, polite = ({**policy, "system_prompt": words} for words in ("Be brief.", "Be polite."))
    config = {
        "name": "x",
        "pool": {"path": "pool.jsonl"},
        "target": policy,
        "behavior": {
            "sources": {
                "a": {"column": "behavior_logprobs", "recorded": "raw", "policy": brief},
                "b": polite,
                "c": policy,
            }
        },
        "weights": {"method": "pear"},
        "output": {"path": "out"},
    }
    (tmp_path / "config.yaml").write_text(yaml.safe_dump(config))
    status, (made, modules) = loaded(tmp_path, "check", "config.yaml")
    assert status == 0
    assert made == {"from_pretrained": 1, "_empty_model": 1, "_new": 1}
    assert not {"ray", "prefect", "pandas", "scipy", "boto3", "s3fs"} & set(modules)
