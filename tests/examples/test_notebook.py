"""The notebook of the quickstart in a real Jupyter kernel, on a pool and a model of the test's own."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import yaml

from tests.jobs import pool_rows, write_jsonl
from tests.tiny_models import make_model

ROOT = Path(__file__).resolve().parents[2]
NOTEBOOK = ROOT / "examples" / "quickstart" / "notebook.ipynb"


def test_the_notebook_runs_in_jupyter(tmp_path: Path) -> None:
    write_jsonl(tmp_path / "pool.jsonl", pool_rows(8))
    model = make_model(tmp_path / "model", seed=0)
    config = {
        "name": "notebook",
        "pool": {"path": str(tmp_path / "pool.jsonl")},
        "target": {"model": str(model), "dtype": "float32", "engine": "transformers"},
        "output": {"path": str(tmp_path / "datasets")},
        "workers": {"cpus": 1},
    }
    (tmp_path / "grape-test.yaml").write_text(yaml.safe_dump(config))
    environment = {**os.environ, "GRAPE_CONFIG": str(tmp_path / "grape-test.yaml"), "JUPYTER_PLATFORM_DIRS": "1"}
    environment |= {"JUPYTER_RUNTIME_DIR": str(tmp_path / "runtime"), "IPYTHONDIR": str(tmp_path / "ipython")}
    command = [sys.executable, "-m", "jupyter", "nbconvert", "--to", "notebook", "--execute", str(NOTEBOOK)]
    command += ["--output-dir", str(tmp_path), "--output", "done.ipynb"]
    done = subprocess.run(command, env=environment, cwd=tmp_path, capture_output=True, text=True, timeout=240)
    assert done.returncode == 0, done.stderr[-4000:]
    cells = json.loads((tmp_path / "done.ipynb").read_text())["cells"]
    outputs = ["".join(map(text_of, cell["outputs"])) for cell in cells if cell["cell_type"] == "code"]
    reference = f"{tmp_path}/datasets/notebook@v0001"
    assert f"Release {reference}" in outputs[0]
    assert "columns: prompt_id (string)" in outputs[0]
    assert "score" in outputs[0], "no progress was shown"
    assert "grape_margin" in outputs[1]
    assert "teacher" in outputs[2]
    assert "unknown key 'select.kep'; did you mean 'keep'?" in outputs[4]
    assert outputs[5].strip() == "8"


def text_of(output: dict[str, Any]) -> str:
    """What an output shows as text."""
    if output["output_type"] == "stream":
        return "".join(output["text"])
    return "".join(output.get("data", {}).get("text/plain", ""))
