"""Two tensor-parallel worker processes, started by the engine itself, give what one gives."""

from __future__ import annotations

import time
from pathlib import Path

import pytest

pytest.importorskip("vllm", reason="vLLM is not installed: run make test-vllm")

import psutil

from tests.workers.engines.vllm.reference import assert_exact, engine_of, load_reference, random_ids, row, tiny_model

pytestmark = pytest.mark.vllm


@pytest.mark.timeout(240)
def test_two_workers_equal_one(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Spawned, as on a GPU, so that the workers know the scoring model through the plugin alone."""
    monkeypatch.setenv("VLLM_WORKER_MULTIPROC_METHOD", "spawn")
    folder = tiny_model(tmp_path, num_key_value_heads=2)
    rows = [row(random_ids(length, length), random_ids(n, 1 + 20 * n)) for length in (1, 33, 64) for n in range(4)]
    before = set(psutil.Process().children(recursive=True))
    with engine_of(folder, max_batch_tokens=60, tensor_parallel=2) as engine:
        assert engine.description.path == "head"
        assert engine.description.extra["tensor_parallel"] == 2
        assert len(set(psutil.Process().children(recursive=True)) - before) >= 2
        assert_exact(engine, load_reference(folder), rows)
        assert engine.stats()["cached_tokens"] > 0
    deadline = time.monotonic() + 20
    while (left := set(psutil.Process().children(recursive=True)) - before) and time.monotonic() < deadline:
        time.sleep(0.2)
    assert not [process for process in left if "resource_tracker" not in " ".join(process.cmdline())]
