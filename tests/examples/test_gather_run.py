"""examples/gather for real: two models are made, sampled from and weighed in the commands of its page."""

from __future__ import annotations

import json
import subprocess
import sys
from collections import Counter
from pathlib import Path

import pytest

import grape_service

pytestmark = [pytest.mark.alone, pytest.mark.long, pytest.mark.timeout(900)]

ROOT = Path(__file__).resolve().parents[2]


def test_one_command_makes_a_training_set_of_two_models_samples(tmp_path: Path) -> None:
    subprocess.run([sys.executable, "examples/gather/prepare_models.py"], cwd=ROOT, check=True, timeout=300)
    grape = [str(Path(sys.executable).parent / "grape"), "run", "examples/gather/grape.yaml"]
    subprocess.run([*grape, "--set", f"output.path={tmp_path}"], cwd=ROOT, check=True, timeout=600)

    release = grape_service.load(f"{tmp_path}/sums@latest")
    assert release.manifest.rows == 8
    smollm, smaller = (
        json.loads((ROOT / "examples" / path / "config.json").read_text())
        for path in ("quickstart/out/model", "gather/out/smaller")
    )
    assert (smollm["num_hidden_layers"], smaller["num_hidden_layers"]) == (30, 26)
    gathered = release.manifest.counts["gather"]
    assert {name: counts["samples"] for name, counts in gathered.items()} == {"smollm": 24, "smaller": 24}
    rows = release.to_table().to_pylist()
    assert Counter(row["weight_source"] for row in rows) == {"pear": 8}
    assert {row["source"] for row in rows} <= {"smollm", "smaller"}
