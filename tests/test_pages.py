"""Every command of README, docs and examples runs as it stands, in a copy of the repository.

The copy has a small pool and a tiny model; s3://team is a bucket of an S3 server that is there for the test. Words in
capitals (REF, CONFIG) are put in. What is not run is listed in tests/pages.py, with the reason.
"""

from __future__ import annotations

import contextlib
import json
import os
import re
import shutil
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import pytest
import yaml

from tests.jobs import Job, pool_rows, write_jsonl
from tests.pages import LEFT_OUT, ROOT, Command, commands, left_out
from tests.seaweed import SeaweedServer
from tests.smollm2 import smollm2_folder
from tests.tiny_models import make_model

pytestmark = [pytest.mark.alone, pytest.mark.timeout(600)]

CONFIG = {
    "name": "math-sft",
    "pool": {"path": "s3://team/pools/math/"},
    "target": {"model": "model", "dtype": "float32", "engine": "transformers"},
    "output": {"path": "s3://team/datasets"},
    "train": {"sft": {"batch_size": 4, "max_steps": 1, "device": "cpu"}},
}
LATER = {**CONFIG, "target": {**CONFIG["target"], "model": "later"}, "weights": {"method": "probability"}}
GATHER = {**CONFIG, "gather": {"policies": {"self": {"model": "model", "samples": 1, "sampling": {"max_tokens": 4}}}}}
LOCAL = {**CONFIG, "pool": {"path": "../pool.jsonl"}, "train": None}
NOT_COPIED = (
    ".git",
    ".venv*",
    "__pycache__",
    "out",
    "build",
    "dist",
    "mutants",
    "*.egg-info",
    ".*_cache",
    ".hypothesis",
)


@dataclass
class Place:
    """The copy, and what is put in for words in capitals."""

    folder: Path
    environment: dict[str, str]
    words: dict[str, str]

    @property
    def out(self) -> Path:
        return self.folder.parent / "stdout"

    @property
    def err(self) -> Path:
        return self.folder.parent / "stderr"

    def begin(self, command: str) -> None:
        """The configs as the pages have them, whatever the command before made of them."""
        config = GATHER if "gather" in command else LOCAL if "weed server" in command else CONFIG
        for name, value in (("config.yaml", config), ("later-checkpoint.yaml", LATER)):
            (self.folder / name).write_text(yaml.safe_dump(value))
        shutil.rmtree(self.folder / "out", ignore_errors=True)

    def start(self, command: str) -> subprocess.Popen[bytes]:
        """What it prints goes to files beside the copy: a server in the background would hold a pipe open."""
        for word, value in self.words.items():
            command = re.sub(rf"\b{word}\b(?![=_])", value, command)
        return subprocess.Popen(
            ["bash", "-e", "-c", command],
            cwd=self.folder,
            env=self.environment,
            stdin=subprocess.DEVNULL,
            stdout=self.out.open("w"),
            stderr=self.err.open("w"),
            start_new_session=True,
        )

    def run(self, command: str, seconds: float = 300) -> str:
        """What a command prints, which has to succeed."""
        self.begin(command)
        process = self.start(command)
        try:
            status = process.wait(seconds)
        finally:
            end(process)
        out = self.out.read_text()
        assert status == 0, out[-2000:] + self.err.read_text()[-4000:]
        return out


def end(process: subprocess.Popen[bytes]) -> None:
    """SIGKILL to what a command has left, such as a server in the background."""
    with contextlib.suppress(ProcessLookupError):
        os.killpg(process.pid, signal.SIGKILL)
    process.wait()


def make_environment(folder: Path) -> None:
    """The copy's .venv: the programs of this environment, its Python with the copy's code behind PYTHONPATH."""
    programs = folder / ".venv" / "bin"
    programs.mkdir(parents=True)
    (folder / ".venv" / ".ready").touch()
    for program in Path(sys.executable).parent.iterdir():
        if program.name not in ("python", "grape"):
            (programs / program.name).symlink_to(program)
    for name, arguments in (("python", ""), ("grape", "-m grape_service.cli")):
        line = f'PYTHONPATH="$PYTHONPATH:{folder}" exec {sys.executable} {arguments} "$@"'
        (programs / name).write_text(f"#!/bin/sh\n{line}\n")
        (programs / name).chmod(0o755)


@pytest.fixture(scope="module")
def place(tmp_path_factory: pytest.TempPathFactory, s3_server: SeaweedServer) -> Iterator[Place]:
    folder = tmp_path_factory.mktemp("pages") / "grape-service"
    shutil.copytree(ROOT, folder, ignore=shutil.ignore_patterns(*NOT_COPIED))
    for path in folder.rglob("*"):  # older than the environment, which make would install again
        os.utime(path, (0, 0))
    make_environment(folder)
    (folder / "examples" / "quickstart" / "out").mkdir()
    (folder / "examples" / "quickstart" / "out" / "model").symlink_to(smollm2_folder())
    make_model(folder / "model")
    make_model(folder / "later", seed=1)
    client = s3_server.client()
    client.create_bucket(Bucket="team")
    pool = write_jsonl(folder.parent / "pool.jsonl", pool_rows(6))
    client.upload_file(str(pool), "team", "pools/math/pool.jsonl")
    job = Job(folder, {})
    environment = {
        **job.environ(),
        **s3_server.environment,
        "PYTHONPATH": str(folder),
        "PATH": f"{folder}/.venv/bin:{os.environ['PATH']}",
        "GRAPE_CACHE": str(folder.parent / "cache"),
        "GRAPE_DATASETS": "s3://team/datasets",
    }
    made = Place(folder, environment, {})
    try:
        outcome = made.run("grape run config.yaml --json")
        checkpoint = json.loads(outcome)["training"]["stages"]["sft"]["checkpoint"]
        for more in ("select.keep=2", "select.method=longest"):
            made.run(f"grape run config.yaml --set train=null --set {more}")
        runs = json.loads(made.run("grape runs list s3://team/datasets --json"))["runs"]
        made.words = {
            "REF": "s3://team/datasets/math-sft@v0001",
            "A": "s3://team/datasets/math-sft@v0001",
            "B": "s3://team/datasets/math-sft@v0002",
            "CONFIG": "config.yaml",
            "FILE": "later-checkpoint.yaml",
            "POOL": "s3://team/pools/math/",
            "PROMPTS": "s3://team/pools/math/",
            "M": "model",
            "MODEL": "model",
            "PATH": "s3://team/datasets",
            "FOLDER": "s3://team/datasets",
            "CHECKPOINT": checkpoint,
            "RUN": runs[0]["run_id"],
            "PROMPT": '"1 plus 1"',
            "NAME": "teacher",
            "FORMAT": "jsonl",
            "DIR": "out/",
        }
        yield made
    finally:
        job.kill_all()


COMMANDS = [
    Command(command.page, "\n".join(lines), command.is_block)
    for command in commands()
    if (lines := [line for line in command.text.splitlines() if left_out(line) is None])
]


def test_what_is_not_run_is_listed_with_its_reason(capsys: pytest.CaptureFixture[str]) -> None:
    found = {
        (command.page, line): reason
        for command in commands()
        for line in command.text.splitlines()
        if (reason := left_out(line)) is not None
    }
    with capsys.disabled():
        print("\nCommands of pages that are not run here:")
        for (page, line), reason in found.items():
            print(f"  {page}: {line.strip()}  ({reason})")
    assert set(LEFT_OUT.values()) == set(found.values()), "a reason for which nothing is left out"
    assert len(COMMANDS) > 25


IN_ORDER = ("docs/tutorial.md", "examples/gather/README.md")  # the second is long: minutes, with two models
"""Pages whose commands need what those before them made."""
ALONE = [command for command in COMMANDS if command.page not in IN_ORDER]


@pytest.mark.parametrize("command", ALONE, ids=[command.name for command in ALONE])
def test_a_command_of_a_page_runs(command: Command, place: Place) -> None:
    run_as_typed(command, place)


@pytest.mark.parametrize("page", [IN_ORDER[0], pytest.param(IN_ORDER[1], marks=pytest.mark.long)])
def test_a_page_runs_from_its_first_command_to_its_last(page: str, place: Place) -> None:
    steps = [command for command in COMMANDS if command.page == page]
    assert len(steps) > 1
    for command in steps:
        run_as_typed(command, place)


def run_as_typed(command: Command, place: Place) -> None:
    if " ui " in command.text:
        place.begin(command.text)
        process = place.start(command.text)
        try:
            shown = read_until(place.out, "is shown at http://127.0.0.1")
        finally:
            end(process)
        assert "?token=" in shown
        return
    if "weed server" in command.text and (taken := [port for port in WEED_PORTS if is_taken(port)]):
        pytest.skip(f"another program of this machine listens on {taken[0]}")
    place.run(command.text)


WEED_PORTS = (8080, 8333, 8888, 9333, 18080, 18333, 18888, 19333)


def is_taken(port: int) -> bool:
    with socket.socket() as probe:
        return probe.connect_ex(("127.0.0.1", port)) == 0


def read_until(path: Path, words: str, seconds: float = 120) -> str:
    """What a command has printed once `words` are in it."""
    deadline = time.monotonic() + seconds
    while words not in (seen := path.read_text()):
        assert time.monotonic() < deadline, seen
        time.sleep(0.1)
    return seen
