"""A small job that runs for real in its own process, and the means to kill all of it.

Every process that a job starts inherits a mark in its environment, however it is re-parented, so a test
can say that none is left behind, and can end all of them and no others.
"""

from __future__ import annotations

import os
import pty
import select
import signal
import subprocess
import sys
import time
import uuid
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import orjson
import yaml

ROOT = Path(__file__).resolve().parent.parent
MARK = "GRAPE_TEST_MARK"
SOURCES = ("teacher", "student", "forum", "book")


def pool_rows(num_prompts: int, candidates: int = 4, start: int = 0) -> list[dict[str, Any]]:
    """Questions and answers with a source each; the same for the same numbers."""
    rows = []
    for number in range(start, start + num_prompts):
        prompt = f"What is {number} plus {number % 7}? Show how you got there."
        for place in range(candidates):
            words = " ".join(["so", "we", "add", str(number), "and", str(number % 7)][: 2 + (number + place) % 5])
            answer = f"{words}. The answer is {number + number % 7 + (place == 3)}."
            rows.append({"prompt": prompt, "response": answer, "source": SOURCES[place % 4], "correct": place != 3})
    return rows


def write_jsonl(path: Path, rows: list[dict[str, Any]]) -> Path:
    """Rows as a .jsonl file."""
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_bytes(b"".join(orjson.dumps(row, option=orjson.OPT_APPEND_NEWLINE) for row in rows))
    return path


@dataclass
class Job:
    """A config in its own folder, and `grape` on it."""

    folder: Path
    config: dict[str, Any]
    environment: dict[str, str] = field(default_factory=dict)
    mark: str = field(default_factory=lambda: uuid.uuid4().hex)

    @property
    def config_path(self) -> Path:
        path = self.folder / "config.yaml"
        path.write_text(yaml.safe_dump(self.config))
        return path

    def environ(self) -> dict[str, str]:
        """The environment of the job's processes."""
        home = self.folder / "prefect"  # empty: no profile names a server
        base = {**os.environ, MARK: self.mark, "PREFECT_HOME": str(home), "OMP_NUM_THREADS": "1"}
        base |= {"OMP_WAIT_POLICY": "PASSIVE", "PYTHONPATH": str(ROOT)}
        return {**base, **self.environment}

    def start(self, *arguments: str) -> subprocess.Popen[str]:
        """`grape ARGUMENTS` in its own session, so that a test can signal it alone."""
        return subprocess.Popen(
            [sys.executable, "-m", "grape_service.cli", *arguments],
            env=self.environ(),
            cwd=self.folder,
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            text=True,
            start_new_session=True,
        )

    def grape(self, *arguments: str, timeout: float = 240) -> subprocess.CompletedProcess[str]:
        """`grape ARGUMENTS` to its end."""
        process = self.start(*arguments)
        try:
            out, err = process.communicate(timeout=timeout)
        except subprocess.TimeoutExpired:
            self.kill_all()
            raise
        return subprocess.CompletedProcess(arguments, process.returncode, out, err)

    def run(self, *arguments: str, timeout: float = 240) -> dict[str, Any]:
        """`grape run CONFIG --json`, which must succeed; its JSON object."""
        done = self.grape("run", str(self.config_path), "--json", *arguments, timeout=timeout)
        assert done.returncode == 0, done.stderr[-4000:]
        return orjson.loads(done.stdout)

    def run_or_kill(self, seconds: float | None, *arguments: str) -> bool:
        """`grape ARGUMENTS`, SIGKILL to all its processes if it has not ended after some seconds; whether it was
        killed. One that ends by itself must succeed."""
        process = self.start(*arguments)
        try:
            _, errors = process.communicate(timeout=seconds)
        except subprocess.TimeoutExpired:
            self.kill_all()
            process.communicate()
            return True
        assert process.returncode == 0, f"it was not killed, and ended with {process.returncode}:\n{errors[-3000:]}"
        return False

    def processes(self) -> dict[int, str]:
        """Pids and command lines of every living process of this job."""
        found = {}
        for entry in Path("/proc").iterdir():
            if not entry.name.isdigit():
                continue
            try:
                if f"{MARK}={self.mark}".encode() not in (entry / "environ").read_bytes().split(b"\0"):
                    continue
                if (entry / "stat").read_text().rsplit(")", 1)[1].split()[0] == "Z":
                    continue
                found[int(entry.name)] = (entry / "cmdline").read_bytes().replace(b"\0", b" ").decode()[:200]
            except (FileNotFoundError, ProcessLookupError, PermissionError):
                continue
        return found

    def kill_all(self) -> int:
        """SIGKILL to every process of this job; how many there were."""
        killed: set[int] = set()
        for _ in range(50):
            living = self.processes()
            if not living:
                break
            for pid in living:
                try:
                    os.kill(pid, signal.SIGKILL)
                    killed.add(pid)
                except ProcessLookupError:
                    continue
            time.sleep(0.05)
        return len(killed)

    def wait_gone(self, seconds: float) -> dict[int, str]:
        """Wait until no process of this job lives, at most `seconds`; those that do."""
        deadline = time.monotonic() + seconds
        while (living := self.processes()) and time.monotonic() < deadline:
            time.sleep(0.2)
        return living


class Terminal:
    """`grape ARGUMENTS` of a job, or another Python `program`, in a terminal of its own, whose Ctrl-C goes to the whole
    foreground group."""

    def __init__(self, job: Job, *arguments: str, program: Sequence[str] = ("-m", "grape_service.cli")):
        command = [sys.executable, *program, *arguments]
        environment = job.environ()
        self.pid, self.descriptor = pty.fork()
        if self.pid == 0:
            os.chdir(job.folder)
            os.execvpe(command[0], command, environment)
        self.output = b""

    def press_ctrl_c(self) -> None:
        """What the key sends."""
        os.write(self.descriptor, b"\x03")

    def read(self, seconds: float) -> bool:
        """Take what is shown within some seconds; whether the command has closed the terminal."""
        deadline = time.monotonic() + seconds
        while (left := deadline - time.monotonic()) > 0:
            if select.select([self.descriptor], [], [], left)[0]:
                try:
                    found = os.read(self.descriptor, 65_536)
                except OSError:  # Linux says so when nobody has the other end
                    found = b""
                if not found:
                    return True
                self.output += found
        return False

    def read_until(self, words: bytes, seconds: float = 60) -> None:
        """Take what is shown until it holds `words`."""
        deadline = time.monotonic() + seconds
        while words not in self.output:
            assert time.monotonic() < deadline, self.output
            self.read(0.05)

    def wait(self, seconds: float) -> tuple[int, str]:
        """Exit status and all that was shown; SIGKILL after some seconds."""
        if not self.read(seconds):
            os.kill(self.pid, signal.SIGKILL)
        status = os.waitstatus_to_exitcode(os.waitpid(self.pid, 0)[1])
        os.close(self.descriptor)
        return status, self.output.decode(errors="replace").replace("\r\n", "\n")


@contextmanager
def tiny_job(folder: Path, model: str | Path, rows: list[dict[str, Any]] | None = None, **over: Any) -> Iterator[Job]:
    """A job on a tiny model in float32; `over` replaces keys of the config. All its processes end with the block."""
    if rows is not None:
        write_jsonl(folder / "pool" / "pool.jsonl", rows)
    config = {
        "name": "tiny",
        "pool": {"path": str(folder / "pool")},
        "target": {"model": str(model), "dtype": "float32", "engine": "transformers"},
        "output": {"path": str(folder / "datasets")},
        "workers": {"shard_tokens": 400},
        **over,
    }
    job = Job(folder, config)
    try:
        yield job
    finally:
        job.kill_all()
