"""The wheel, installed into an empty environment: a reader without Ray, torch or Prefect."""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
import tomllib
from collections.abc import Iterator
from importlib.metadata import Distribution, PathDistribution
from pathlib import Path

import orjson
import pytest

import grape_service
from grape_service.storage.storage import Storage
from tests.grape_service.release.made_up import publish_version, rows

ROOT = Path(__file__).resolve().parents[1]
PACKAGES = ("grape_service", "workers", "flows")
PROGRAM = """
import sys, grape_service
release = grape_service.load(sys.argv[1])
print(release.version, release.to_table(["source"]).num_rows, grape_service.__version__)
assert not {"torch", "ray", "transformers", "prefect"} & set(sys.modules)
"""


def run(*command: str | Path) -> subprocess.CompletedProcess[str]:
    """A command that sees nothing of this checkout and its packages."""
    environment = {name: value for name, value in os.environ.items() if not name.startswith(("PYTHON", "COV"))}
    return subprocess.run(
        [str(part) for part in command], env=environment, cwd="/", capture_output=True, text=True, timeout=240
    )


def done(*command: str | Path) -> str:
    """What a command that succeeds prints."""
    found = run(*command)
    assert found.returncode == 0, found.stdout + found.stderr
    return found.stdout


@pytest.fixture(scope="module")
def wheel(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("wheel")
    for name in ("pyproject.toml", "README.md", "LICENSE"):
        shutil.copy(ROOT / name, folder)
    for name in PACKAGES:
        shutil.copytree(ROOT / name, folder / name, ignore=shutil.ignore_patterns("__pycache__"))
    pip = (sys.executable, "-m", "pip", "--disable-pip-version-check", "-q")
    done(*pip, "wheel", "--no-deps", "--no-build-isolation", "--no-index", "-w", folder / "dist", folder)
    (found,) = (folder / "dist").iterdir()
    return found


@pytest.fixture(scope="module")
def environment(wheel: Path, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Path]:
    folder = tmp_path_factory.mktemp("environment")
    done(sys.executable, "-m", "venv", "--without-pip", folder)
    pip = (sys.executable, "-m", "pip", "--disable-pip-version-check", "-q", "--python", folder / "bin" / "python")
    done(*pip, "install", "--no-compile", "-c", ROOT / "requirements" / "constraints.txt", wheel)
    yield folder
    shutil.rmtree(folder)


def test_what_the_wheel_says_of_itself(wheel: Path, tmp_path: Path) -> None:
    shutil.unpack_archive(wheel, tmp_path, "zip")
    (information,) = tmp_path.glob("*.dist-info")
    distribution: Distribution = PathDistribution(information)
    metadata = distribution.metadata
    assert metadata["Version"] == grape_service.__version__
    assert metadata["License-Expression"] == "Apache-2.0"
    assert (information / "licenses" / "LICENSE").read_bytes() == (ROOT / "LICENSE").read_bytes()
    assert metadata["Description-Content-Type"] == "text/markdown"
    assert "Typing :: Typed" in metadata.get_all("Classifier")
    assert {"run", "prefect", "vllm", "train", "ui"} <= set(metadata.get_all("Provides-Extra"))
    assert all((tmp_path / name / "py.typed").exists() for name in PACKAGES)
    assert "version" not in tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]
    changes = (ROOT / "CHANGELOG.md").read_text()
    assert f"\n## {grape_service.__version__}" in changes


def test_a_reader_reads_local_and_s3_releases(environment: Path, tmp_path: Path, s3_url: str) -> None:
    for root in (str(tmp_path / "datasets"), s3_url):
        publish_version(Storage(root), parts=[rows(0, 30)], tags=("latest",))
        assert done(environment / "bin" / "python", "-c", PROGRAM, f"{root}/math-sft").split() == [
            "v0001",
            "30",
            grape_service.__version__,
        ]
    grape, reference = environment / "bin" / "grape", f"{tmp_path}/datasets/math-sft@v0001"
    assert orjson.loads(done(grape, "datasets", "list", tmp_path / "datasets", "--json"))
    done(grape, "datasets", "verify", reference)
    done(grape, "export", reference, "--to", "trl", tmp_path / "exported")
    assert list((tmp_path / "exported").rglob("*.parquet"))
    for command, extra in (
        (("ui", tmp_path / "datasets"), "ui"),
        (("check", ROOT / "examples" / "quickstart" / "grape.yaml"), "run"),
        (("run", ROOT / "examples" / "quickstart" / "grape.yaml"), "run"),
    ):
        found = run(grape, *command)
        assert found.returncode == 2, found.stderr
        assert f"pip install 'grape-service[{extra}]'" in found.stderr
        assert found.stderr.count("\n") == 1


@pytest.mark.parametrize("name", ["workers", "flows"])
@pytest.mark.parametrize("place", ["__init__.py", ".py", "folder"])
def test_packages_of_the_same_name_are_told(name: str, place: str, tmp_path: Path) -> None:
    (tmp_path / name).mkdir()
    hidden = {"__init__.py": tmp_path / name / "__init__.py", ".py": tmp_path / f"{name}.py"}
    hidden.get(place, tmp_path / name / "script.py").touch()
    program = "from grape_service.cli.packages import refuse_hidden_packages as refuse; refuse()"
    environment = {**os.environ, "PYTHONPATH": str(ROOT)}
    found = subprocess.run(
        [sys.executable, "-P", "-c", program], cwd=tmp_path, env=environment, capture_output=True, text=True, timeout=60
    )
    if place == "folder":  # hides nothing: ours has an __init__.py
        assert found.returncode == 0, found.stderr
    else:
        assert f"hides the package '{name}' of grape-service: rename it" in found.stderr
