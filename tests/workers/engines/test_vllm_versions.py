"""The vLLM versions that the extra allows are those whose source has what the engine uses; no vLLM is imported."""

from __future__ import annotations

import tomllib
import zipfile
from importlib.util import find_spec
from pathlib import Path

import pytest

from tests.workers.engines.vllm_names import of_folder, of_wheel
from workers.engines.vllm.available import CHECKED, version_sentence

ROOT = Path(__file__).resolve().parents[3]
ENVIRONMENT = ROOT / ".venv-vllm"


def test_the_extra_allows_the_versions_that_were_checked() -> None:
    extras = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]["optional-dependencies"]
    first, last = (one.split(".") for one in CHECKED)
    assert extras["vllm"] == ["grape-service[run]", f"vllm>={first[0]}.{first[1]},<{last[0]}.{int(last[1]) + 1}"]


def site_packages() -> Path | None:
    """Where a vLLM is installed: with these tests, or in the environment of `make test-vllm`."""
    spec = find_spec("vllm")
    if spec is not None and spec.origin is not None:
        return Path(spec.origin).parents[1]
    if not (ENVIRONMENT / ".ready").exists():
        return None
    return next((path.parent for path in ENVIRONMENT.glob("lib/python*/site-packages/vllm")), None)


def test_an_installed_version_has_every_name() -> None:
    place = site_packages()
    if place is None:
        pytest.skip("vLLM is not installed: run make install-vllm")
    assert of_folder(place) == []


def test_a_wheel_that_lacks_a_name_or_a_parameter_is_told(tmp_path: Path) -> None:
    path = tmp_path / "vllm-9.0.0-py3-none-any.whl"
    with zipfile.ZipFile(path, "w") as wheel:
        wheel.writestr("vllm/__init__.py", "from .params import *\n__version__ = '9'\n")
        wheel.writestr("vllm/params.py", "class PoolingParams(Base):\n    task: str\nclass SamplingParams: ...\n")
        wheel.writestr("vllm/base.py", "class Base:\n    extra_kwargs: dict\n")
        wheel.writestr(
            "vllm/v1/kv.py",
            "class KVCacheManager:\n"
            "    def __init__(self):\n        self.coordinator = 1\n"
            "    def get_computed_blocks(self, other): ...\n",
        )
    missing = of_wheel(path)
    assert "PoolingParams.skip_reading_prefix_cache" in missing
    assert "vllm.engine.arg_utils.EngineArgs" in missing
    assert "KVCacheManager.get_computed_blocks(request)" in missing
    has = {"vllm.PoolingParams", "vllm.SamplingParams", "PoolingParams.task", "PoolingParams.extra_kwargs"}
    assert not has & set(missing)
    assert "KVCacheManager.coordinator" not in missing


def test_a_version_that_was_not_checked_is_told_in_a_sentence() -> None:
    assert version_sentence("0.32.0+cpu") == "vLLM 0.32.0+cpu, one of the versions 0.26.0 to 0.32.0 that were checked"
    assert version_sentence("0.33.0").startswith("vLLM 0.33.0 was not checked: 0.26.0 to 0.32.0 were")
