"""What every vLLM test needs: one OpenMP thread, and the plugin's entry point visible to vLLM's processes."""

from __future__ import annotations

import os
import sys
from collections.abc import Iterator
from importlib.metadata import entry_points
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[4]


@pytest.fixture(scope="session", autouse=True)
def vllm_environment(tmp_path_factory: pytest.TempPathFactory) -> Iterator[None]:
    """A checkout that is not installed has no entry points: its metadata is laid beside it for these tests."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("OMP_NUM_THREADS", "1")
        patch.setenv("HF_HUB_OFFLINE", "1")
        paths = [str(ROOT)]
        if "grape_scoring_head" not in {entry.name for entry in entry_points(group="vllm.general_plugins")}:
            folder = tmp_path_factory.mktemp("metadata")
            metadata = folder / "grape_service-0.0.0.dist-info"
            metadata.mkdir()
            (metadata / "METADATA").write_text("Metadata-Version: 2.1\nName: grape-service\nVersion: 0.0.0\n")
            (metadata / "entry_points.txt").write_text(
                "[vllm.general_plugins]\ngrape_scoring_head = workers.engines.vllm.head:register\n"
            )
            paths.append(str(folder))
        patch.setattr(sys, "path", [*paths, *sys.path])
        patch.setenv("PYTHONPATH", os.pathsep.join([*paths, os.environ.get("PYTHONPATH", "")]))
        yield
