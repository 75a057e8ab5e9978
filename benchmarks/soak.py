"""Small runs over and over on S3 while actors, workers, the Prefect server and the S3 server are killed at random.

    python benchmarks/soak.py --minutes 20
    python benchmarks/soak.py --minutes 20 --select rsr
    python benchmarks/soak.py --single-kills 30     # one kill in each run, see single_kills.py

Each round lets the pool grow, runs `grape run` until it succeeds (a killed run resumes from its scores), verifies
the release (digests, one row for each prompt, every candidate scored) and collects garbage. At the end a run
without kills and without earlier scores has to choose the same rows. Ends with status 1 if a row is lost or
doubled, a release does not verify, or processes, files or memory grow.
"""

from __future__ import annotations

import argparse
import os
import random
import resource
import signal
import subprocess
import sys
import tempfile
import threading
import time
import urllib.request
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import orjson

ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT))

import numpy as np

import grape_service
from benchmarks.single_kills import single_kills
from grape_service.release.catalog import list_datasets, read_catalog
from grape_service.release.claim import CLAIM
from grape_service.release.gc import collect
from grape_service.release.manifest import read_manifest
from grape_service.release.verify import verify
from grape_service.storage.storage import Storage
from tests import tiny_models
from tests.jobs import Job, pool_rows, tiny_job, write_jsonl
from tests.ray_cluster import free_port
from tests.seaweed import BUCKET, SeaweedServer, running_server

KINDS = ("actor", "worker", "prefect", "s3")
AGENTS = ("ray::DashboardAgent", "ray::RuntimeEnvAgent")
"""Of the node itself: with one of them the whole node ends."""
PROMPTS = 20
"""By which the pool grows in a round."""
ATTEMPTS = 6
GROWTH = {
    "processes": 0,
    "temporary_files": 0,
    "stray_objects": 0,
    "run_memory_mb": 200,
    "open_files": 10,
    "memory_mb": 200,
}
"""What is compared between rounds, and how much more is not called growth."""
RUN_SECONDS = 600


@dataclass
class Tally:
    """What happened."""

    rounds: int = 0
    attempts: int = 0
    rows: int = 0
    kills: dict[str, int] = field(default_factory=lambda: dict.fromkeys(KINDS, 0))
    problems: list[str] = field(default_factory=list)
    samples: list[dict[str, int]] = field(default_factory=list)  # after each round


class PrefectServer:
    """A server whose database stays over restarts."""

    def __init__(self, folder: Path):
        self.folder, self.port = folder, free_port()
        self.process: subprocess.Popen[bytes] | None = None
        self.start()

    def start(self) -> None:
        """Start it; runs wait for it themselves."""
        environment = {**os.environ, "PREFECT_HOME": str(self.folder), "PREFECT_SERVER_ANALYTICS_ENABLED": "false"}
        command = [sys.executable, "-m", "prefect", "server", "start", "--host", "127.0.0.1", "--port", str(self.port)]
        log = (self.folder / "server.log").open("ab")
        self.process = subprocess.Popen(command, env=environment, stdout=log, stderr=log, start_new_session=True)
        log.close()
        self._wait()

    def _wait(self) -> None:
        deadline = time.monotonic() + 180
        while time.monotonic() < deadline:
            try:
                with urllib.request.urlopen(f"http://127.0.0.1:{self.port}/api/health", timeout=5):
                    return
            except OSError:
                time.sleep(0.5)
        raise SystemExit("the Prefect server does not start")

    def kill(self) -> None:
        """SIGKILL to it and its children, which are in its session."""
        if self.process is not None:
            os.killpg(self.process.pid, signal.SIGKILL)
            self.process.wait()
            self.process = None


class Killer:
    """Kills one thing every so often while a run goes on, and starts servers again."""

    def __init__(self, job: Job, prefect: PrefectServer, s3: SeaweedServer, pause: float, draw: random.Random):
        self.job, self.prefect, self.s3, self.pause, self.draw = job, prefect, s3, pause, draw
        self.stopped = threading.Event()
        self.kills = dict.fromkeys(KINDS, 0)
        self.problem: BaseException | None = None
        self.thread = threading.Thread(target=self._loop, daemon=True)
        self.thread.start()

    def _loop(self) -> None:
        try:
            while not self.stopped.wait(self.draw.uniform(0.5, 1.5) * self.pause):
                kind = self.draw.choice(KINDS)
                if self._kill(kind):
                    self.kills[kind] += 1
        except BaseException as error:
            self.problem = error

    def _kill(self, kind: str) -> bool:
        if kind == "prefect":
            self.prefect.kill()
            self.prefect.start()
        elif kind == "s3":
            self.s3.kill()
            self.s3.start()
        else:
            return self._kill_process("ray::ScoringActor" if kind == "actor" else "ray::")
        return True

    def _kill_process(self, prefix: str) -> bool:
        """Wait for such a process, then a little, and kill one."""
        while not self._processes(prefix):
            if self.stopped.wait(0.5):
                return False
        self.stopped.wait(self.draw.uniform(0, 3))
        if not (found := self._processes(prefix)):
            return False
        try:
            os.kill(self.draw.choice(found), signal.SIGKILL)
        except ProcessLookupError:
            return False
        return True

    def _processes(self, prefix: str) -> list[int]:
        found = self.job.processes().items()
        return [pid for pid, line in found if line.startswith(prefix) and not line.startswith(AGENTS)]

    def close(self) -> dict[str, int]:
        """Stop killing; what was killed. Raises what went wrong with a server."""
        self.stopped.set()
        self.thread.join()
        if self.problem is not None:
            raise self.problem
        return self.kills


def soak(minutes: float, pause: float, seed: int, select: str, out: Path, scratch: Path) -> Tally:
    """Rounds until the time is over, then the run that the last release is compared with."""
    tally, draw = Tally(), random.Random(seed)
    model = str(tiny_models.make_model(out / "model", arch="llama"))
    (out / "prefect-server").mkdir()
    with running_server(out / "s3") as s3:
        os.environ.update(s3.environment)
        prefect = PrefectServer(out / "prefect-server")
        try:
            paths = {"output": {"path": f"s3://{BUCKET}/datasets"}, "workspace": f"s3://{BUCKET}/workspace"}
            with tiny_job(out, model, **paths, select={"method": select}) as job:
                job.environment |= {
                    "PREFECT_API_URL": f"http://127.0.0.1:{prefect.port}/api",
                    "GRAPE_ENGINE_CLASS": "tests.drill_engines:SlowEngine",
                    "DRILL_SECONDS": "1",
                    "TMPDIR": str(scratch),
                }
                deadline = time.monotonic() + 60 * minutes
                reference = None
                while time.monotonic() < deadline and not tally.problems:
                    reference = one_round(tally, job, prefect, s3, pause, draw)
                    print(orjson.dumps({"round": tally.rounds, **tally.samples[-1]}).decode(), flush=True)
                if reference is not None:
                    tally.problems += compare_with_peace(job, reference)
        finally:
            prefect.kill()
    check_growth(tally)
    return tally


def one_round(
    tally: Tally, job: Job, prefect: PrefectServer, s3: SeaweedServer, pause: float, draw: random.Random
) -> str | None:
    """The pool grows, a run goes through kills to its end, its release is verified; its reference."""
    number = tally.rounds
    write_jsonl(job.folder / "pool" / f"day-{number:04d}.jsonl", pool_rows(PROMPTS, start=PROMPTS * number))
    outcome: dict[str, Any] | None = None
    started = time.monotonic()
    for attempt in range(ATTEMPTS):
        killer = Killer(job, prefect, s3, pause, draw) if attempt < ATTEMPTS - 1 else None  # the last one uninterrupted
        try:
            done = job.grape("run", str(job.config_path), "--json", timeout=RUN_SECONDS)
        finally:
            for kind, count in (killer.close() if killer else {}).items():
                tally.kills[kind] += count
        tally.attempts += 1
        if done.returncode == 0:
            outcome = orjson.loads(done.stdout)
            break
        print(f"attempt {attempt} of round {number}: {done.stderr[-600:].strip()}", file=sys.stderr, flush=True)
    tally.rounds += 1
    if outcome is None:
        tally.problems.append(f"round {number} did not end well: {done.stderr[-500:]}")
    else:
        tally.problems += problems_of(outcome, PROMPTS * tally.rounds)
        tally.rows += outcome["rows"]
    left = job.wait_gone(40)
    if left:
        tally.problems.append(f"processes are left after round {number}: {list(left.values())[:5]}")
    output, workspace = Storage(job.config["output"]["path"]), Storage(job.config["workspace"])
    if list_datasets(output):
        collect(output, workspace, keep_days=0, keep_versions=2, dry_run=False, stale_seconds=60)
    tally.samples.append({"seconds": round(time.monotonic() - started), **sample(job, output, workspace)})
    return outcome["reference"] if outcome else None


def problems_of(outcome: dict[str, Any], num_prompts: int) -> list[str]:
    """What is wrong with a release of `num_prompts` prompts with 4 candidates each."""
    release = grape_service.load(outcome["reference"])
    problems = [f"{outcome['reference']}: {problem}" for problem in verify(release)]
    rows = release.dataset.to_table(["prompt_id", "num_candidates"])
    if rows.num_rows != num_prompts or len(rows["prompt_id"].unique()) != num_prompts:
        problems.append(f"{outcome['reference']} has {rows.num_rows} rows of {num_prompts} prompts")
    if rows["num_candidates"].unique().to_pylist() != [4]:
        problems.append(f"{outcome['reference']}: a candidate is lost or doubled")
    if outcome["failed"]:
        problems.append(f"{outcome['reference']}: {outcome['failed']} rows failed")
    return problems


def compare_with_peace(job: Job, reference: str) -> list[str]:
    """What differs between a release and one that a fresh run makes from the same pool, without kills or scores."""
    quiet = Job(job.folder, {**job.config, "workspace": f"s3://{BUCKET}/quiet", "name": "quiet"}, job.environment)
    columns = ["prompt_id", "candidate_id", "grape_score", "input_ids"]
    tables = []
    for name in (reference, quiet.run(timeout=RUN_SECONDS)["reference"]):
        tables.append(grape_service.load(name).dataset.to_table(columns).sort_by("prompt_id"))
    here, there = tables
    problems = [
        f"{reference} and a run without kills differ in {name}"
        for name in ("prompt_id", "candidate_id", "input_ids")
        if here[name].combine_chunks() != there[name].combine_chunks()
    ]
    if not problems and not np.allclose(here["grape_score"], there["grape_score"], rtol=0, atol=1e-4):
        problems.append(f"{reference} and a run without kills differ in grape_score")
    return problems


def sample(job: Job, output: Storage, workspace: Storage) -> dict[str, int]:
    """What must not grow: living processes and temporary files of the job, memory of the largest process that was
    waited for until now (a run, or the Prefect server), open files and memory of this process, objects on S3 of
    unfinished versions and of runs that made no release."""
    status = Path("/proc/self/status").read_text()
    rss = next(int(line.split()[1]) for line in status.splitlines() if line.startswith("VmRSS"))
    finished = {entry.version for entry in read_catalog(output, job.config["name"])}
    versions = [info.path.split("/") for info in output.list(f"{job.config['name']}/versions")]
    unfinished = [path for path in versions if path[2] not in finished and path[-1] != CLAIM]  # claims stay for ever
    needed = {read_manifest(output, job.config["name"], version).parents.run_id for version in finished}
    stray = [info for info in workspace.list("runs") if info.path.split("/")[1] not in needed]
    return {
        "processes": len(job.processes()),
        "temporary_files": len(list(Path(job.environment["TMPDIR"]).iterdir())),
        "stray_objects": len(stray) + len(unfinished),
        "run_memory_mb": resource.getrusage(resource.RUSAGE_CHILDREN).ru_maxrss // 1024,
        "open_files": len(os.listdir("/proc/self/fd")),
        "memory_mb": rss // 1024,
    }


def check_growth(tally: Tally) -> None:
    """A later round may not need more than the third one did, but for some slack."""
    if len(tally.samples) < 5:
        return
    early, late = tally.samples[2], tally.samples[-1]
    for name, slack in GROWTH.items():
        if late[name] > early[name] + slack:
            tally.problems.append(f"{name} grew from {early[name]} to {late[name]}")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--minutes", type=float, default=20)
    parser.add_argument("--pause", type=float, default=10, help="seconds between kills, about")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--single-kills", type=int, default=0, help="instead: so many runs, one kill in each")
    parser.add_argument("--select", default="grape", help="the select method, such as rsr")
    arguments = parser.parse_args()
    signal.signal(signal.SIGTERM, lambda *_: sys.exit(143))  # nothing is left behind
    with (
        tempfile.TemporaryDirectory(prefix="grape-soak-", ignore_cleanup_errors=True) as out,
        tempfile.TemporaryDirectory(prefix="soak", ignore_cleanup_errors=True) as scratch,  # short: socket paths
    ):
        if arguments.single_kills:
            found = single_kills(arguments.single_kills, arguments.seed, Path(out), Path(scratch))
            print(orjson.dumps(found, option=orjson.OPT_INDENT_2).decode(), flush=True)
            sys.exit(1 if found["problems"] else 0)
        tally = soak(arguments.minutes, arguments.pause, arguments.seed, arguments.select, Path(out), Path(scratch))
    summary = {"rounds": tally.rounds, "attempts": tally.attempts, "rows_verified": tally.rows, "kills": tally.kills}
    summary |= {"first": tally.samples[0], "last": tally.samples[-1], "problems": tally.problems}
    print(orjson.dumps(summary, option=orjson.OPT_INDENT_2).decode())
    sys.exit(1 if tally.problems else 0)


if __name__ == "__main__":
    main()
