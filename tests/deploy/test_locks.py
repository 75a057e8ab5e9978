"""The locks have what pyproject.toml asks for, at the versions of constraints.txt, each file with its hash."""

from __future__ import annotations

import re
import tomllib

import pytest
from packaging.requirements import Requirement
from packaging.utils import canonicalize_name

from tests.jobs import ROOT

PROJECT = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]
FOLDER = ROOT / "requirements"


def locked(*names: str) -> dict[str, str]:
    """Package -> version of some locks; every one has a hash."""
    found = {}
    for name in names:
        for entry in re.split(r"\n(?=\S)", (FOLDER / name).read_text()):
            if entry.startswith("#"):
                continue
            package, _, version = entry.split()[0].partition("==")
            assert "--hash=sha256:" in entry, f"{name}: {package}"
            found[canonicalize_name(package)] = version
    return found


def wanted(*extras: str) -> list[Requirement]:
    """What the package and its extras ask for, those of extras within them too."""
    found = [Requirement(text) for text in PROJECT["dependencies"]]
    for extra in extras:
        for requirement in map(Requirement, PROJECT["optional-dependencies"][extra]):
            found += wanted(*requirement.extras) if requirement.name == PROJECT["name"] else [requirement]
    return found


@pytest.mark.parametrize(
    ("locks", "extras"),
    [
        (("lock.txt", "lock-torch.txt"), ("quickstart",)),
        (("lock.txt", "lock-torch-cpu.txt", "lock-train.txt"), ("quickstart", "train", "checks")),
        (("lock-cuda.txt",), ("vllm", "prefect", "ui", "train", "checks")),
    ],
)
def test_a_lock_has_all_that_is_asked_for(locks: tuple[str, ...], extras: tuple[str, ...]) -> None:
    found = locked(*locks)
    for requirement in wanted(*extras):
        version = found.get(canonicalize_name(requirement.name))
        assert version is not None, f"{requirement} is not in {locks}: python requirements/lock.py"
        assert version in requirement.specifier, f"{requirement}: {version}: python requirements/lock.py"


def test_locks_have_the_versions_that_are_tested() -> None:
    pins = dict(line.split("==") for line in (FOLDER / "constraints.txt").read_text().splitlines() if "==" in line)
    found = locked("lock.txt", "lock-torch.txt", "lock-torch-cpu.txt", "lock-train.txt")
    differ = {
        name: (pin, found[canonicalize_name(name)])
        for name, pin in pins.items()
        if found.get(canonicalize_name(name), pin) != pin
    }
    assert differ == {}
