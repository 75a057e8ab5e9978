"""The plain loop gives the rows of the service, for GRAPE and PEAR with a policy, recorded numbers and people."""

from __future__ import annotations

import subprocess
import sys
import threading
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import yaml

import grape_service
from tests.jobs import ROOT, pool_rows, write_jsonl
from tests.tiny_models import make_model

pytestmark = [pytest.mark.alone, pytest.mark.timeout(600)]

PROGRAM = ROOT / "examples" / "plain_loop.py"


def test_it_fits_a_reader() -> None:
    lines = PROGRAM.read_text().splitlines()
    assert len(lines) < 150
    imported = [line for line in lines if line.startswith(("import ", "from "))]
    assert not [line for line in imported if "ray" in line.split()[1] or "prefect" in line]


def test_its_rows_are_those_of_the_service(tmp_path: Path) -> None:
    model = {"model": str(make_model(tmp_path / "model")), "dtype": "float32", "engine": "transformers"}
    config: dict[str, Any] = {
        "pool": {"path": str(write_jsonl(tmp_path / "pool.jsonl", pool_rows(12)))},
        "target": model,
        "behavior": {
            "sources": {"teacher": {**model, "system_prompt": "You are terse."}, "student": model},
            "missing": "uniform",
        },
        "weights": {"method": "pear"},
        "output": {"path": str(tmp_path / "datasets")},
    }
    chosen = {"one": {"select": {"keep": 1}}, "two": {"select": {"method": "surprise", "keep": 2}}}
    released: dict[str, Any] = {}

    def run(name: str) -> None:  # two threads at once: they take turns
        released[name] = grape_service.run({"name": name, **config, **chosen[name]})

    threads = [threading.Thread(target=run, args=(name,)) for name in chosen]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert set(released) == set(chosen)
    for name, select in chosen.items():
        path, out = tmp_path / f"{name}.yaml", tmp_path / f"plain-{name}"
        path.write_text(yaml.safe_dump({"name": name, **config, **select}))
        subprocess.run([sys.executable, str(PROGRAM), str(path), str(out)], check=True, timeout=240)
        plain, service = pq.read_table(out / "rows.parquet"), released[name].to_table()
        assert plain.schema.equals(service.schema)
        assert plain.num_rows > 10
        ids = ["prompt_id", "candidate_id"]
        plain, service = (_rounded(table.sort_by([(name, "ascending") for name in ids])) for table in (plain, service))
        assert plain == service


def _rounded(table: pa.Table) -> list[dict[str, Any]]:
    """Rows whose numbers are those of float32 scores: batches of other rows differ in the last digits."""

    def rounded(value: Any) -> Any:
        if isinstance(value, float):
            return pytest.approx(value, abs=1e-4)
        return [rounded(one) for one in value] if isinstance(value, list) else value

    return [{name: rounded(value) for name, value in row.items()} for row in table.to_pylist()]
