"""Where the seconds of a run go that are neither prepare nor scoring: a first run, the same again, and `grape check`.

    .venv/bin/python benchmarks/startup.py [--config examples/quickstart/grape.yaml]

Each command runs in a process of its own, as a user starts it; the first run has a folder of its own and scores all.
"""

from __future__ import annotations

import argparse
import os
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

import orjson
import psutil

ROOT = Path(__file__).resolve().parent.parent


def grape(*arguments: str) -> tuple[float, dict[str, Any]]:
    """Seconds on the wall of `grape ARGUMENTS --json`, and its object."""
    began = time.monotonic()
    done = subprocess.run(
        [sys.executable, "-m", "grape_service.cli", *arguments, "--json"],
        cwd=ROOT,
        env={**os.environ, "PYTHONPATH": str(ROOT)},
        stdout=subprocess.PIPE,
        check=True,
    )
    return time.monotonic() - began, orjson.loads(done.stdout)


def show(what: str, wall: float, outcome: dict[str, Any]) -> None:
    """One run by its stages, and what is left: start, Ray, reading and ending."""
    stages = dict(outcome["stage_seconds"])
    inside = stages.pop("engine start", 0.0), stages.pop("report", 0.0)  # parts of score and release
    print(f"{what}: {wall:.1f} s, of which it says {outcome['seconds']:.1f} s")
    for name, seconds in stages.items():
        print(f"    {name:<20}{seconds:8.1f}")
    print(f"    {'  (engine start)':<20}{inside[0]:8.1f}")
    scoring = sum(stages.get(name, 0.0) for name in ("prepare", "score", "score behavior"))
    print(f"    {'other':<20}{wall - sum(stages.values()):8.1f}")
    print(f"    beyond prepare, engine start and scoring: {wall - scoring:.1f} s")


def main() -> None:
    """Print the parts of each command."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--config", default="examples/quickstart/grape.yaml")
    config = parser.parse_args().config
    print(f"{os.cpu_count()} cores, load {os.getloadavg()[0]:.1f}, {psutil.virtual_memory().total / 2**30:.0f} GiB")
    with tempfile.TemporaryDirectory(prefix="grape-startup-") as folder:
        place = ["--set", f"output.path={folder}/datasets"]
        show("first run", *grape("run", config, *place))
        show("nothing to do", *grape("run", config, *place))
        print(f"check: {grape('check', config)[0]:.1f} s")


if __name__ == "__main__":
    main()
