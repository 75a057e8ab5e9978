"""A drill of single kills over S3: one process of a run is killed, at any moment, and nothing is lost or hangs.

    python benchmarks/soak.py --single-kills 30

Each time a run without earlier scores begins, one process of it (or the S3 server) gets SIGKILL, and the run has to
end by itself within HANG_SECONDS. If it failed, the same command is run once more and has to succeed. The release has
to hold the rows that an undisturbed run chose, no stored score may have been recomputed, and no process may be left.
A line for each kill as it is done, all of them as a table at the end.
"""

from __future__ import annotations

import contextlib
import os
import random
import signal
import subprocess
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import orjson
import psutil
import pyarrow as pa

import grape_service
from grape_service.release.verify import verify
from grape_service.score.store import REPEAT_SUFFIX
from grape_service.storage.parquet import open_parquet
from grape_service.storage.storage import Storage
from tests import tiny_models
from tests.jobs import Job, pool_rows, tiny_job
from tests.seaweed import BUCKET, SeaweedServer, running_server

AGENTS = ("ray::DashboardAgent", "ray::RuntimeEnvAgent")
VICTIMS = {
    "driver": ("grape_service.cli",),
    "engine": ("ray::ScoringActor",),
    "worker": ("ray::",),
    "raylet": ("raylet/raylet",),
    "gcs": ("gcs_server",),
    "agent": AGENTS,
    "s3": (),
}
"""What is killed, and how its command line is known; of several, one."""
HANG_SECONDS = 300.0
"""A run that takes longer hangs: the raylet's end shows within 30 s, and a busy machine is slow."""
LEFT_SECONDS = 60.0
PROMPTS = 20
COLUMNS = ["prompt_id", "candidate_id", "grape_score", "input_ids"]


def single_kills(kills: int, seed: int, out: Path, scratch: Path) -> dict[str, Any]:
    """Do `kills` of them, each kind in turn; counts, and what went wrong."""
    draw = random.Random(seed)
    model = str(tiny_models.make_model(out / "model", arch="llama"))
    done: list[dict[str, Any]] = []
    problems: list[str] = []
    with running_server(out / "s3") as s3:
        os.environ.update(s3.environment)
        with _job(out, model, "whole", scratch) as job:
            began = time.monotonic()
            expected = _rows(job.run(timeout=HANG_SECONDS)["reference"])
            seconds = time.monotonic() - began
        hits = 0
        for number in range(2 * kills):
            if hits == kills:
                break
            kind = list(VICTIMS)[hits % len(VICTIMS)]
            with _job(out, model, f"kill-{number:02d}", scratch) as job:
                found = _one(job, s3, kind, draw.uniform(0, 0.8 * seconds), expected)
            problems += [f"{job.config['name']} ({kind}): {problem}" for problem in found.pop("problems")]
            done.append({"kill": number, "kind": kind, **found})
            hits += found["at"] is not None
            if found["at"] is None:  # it had ended before: a fair sample of how long a run takes
                seconds = min(seconds, found["seconds"])
            print(orjson.dumps(done[-1]).decode(), flush=True)
    print(table_of(done))
    counts = {kind: sum(one["kind"] == kind and one["at"] is not None for one in done) for kind in VICTIMS}
    if hits < kills:
        problems.append(f"{hits} of {kills} were killed: the other runs had ended before")
    return {"undisturbed_seconds": round(seconds, 1), "kills": counts, "problems": problems}


def table_of(done: list[dict[str, Any]]) -> str:
    """What was killed and after how many seconds, how that run ended, the run after it, and what was found."""
    lines = ["kill  process    at s   status  after s  scores kept  next run s  release"]
    for one in done:
        at = "  none" if one["at"] is None else f"{one['at']:6.1f}"
        again = "         -" if one["again"] is None else f"{one['again']:10.1f}"
        status = "hangs" if one["status"] is None else one["status"]
        lines.append(
            f"{one['kill']:4}  {one['kind']:8} {at}  {status:>6}  {one['seconds']:7.1f}  {one['kept']:>11}  {again}  "
            f"{one['release']}"
        )
    return "\n".join(lines)


def _one(job: Job, s3: SeaweedServer, kind: str, moment: float, expected: pa.Table) -> dict[str, Any]:
    """One run with one kill, and the run after it where it failed."""
    problems: list[str] = []
    began = time.monotonic()
    process = job.start("run", str(job.config_path), "--json")
    at = _kill(job, s3, kind, process, began + moment)
    status, output, error = _ended(job, process)
    ended = time.monotonic()
    facts: dict[str, Any] = {
        "at": None if at is None else round(at - began, 1),
        "status": status,
        "seconds": round(ended - (at or began), 1),  # from the kill to the end
        "kept": len(_stored_keys(job)),
        "again": None,
        "release": "none",
    }
    if status is None:
        problems.append(f"it hangs: {error[-500:]}")
    if status != 0:
        began = time.monotonic()
        again = job.grape("run", str(job.config_path), "--json", timeout=HANG_SECONDS)
        facts["again"] = round(time.monotonic() - began, 1)
        status, output, error = again.returncode, again.stdout, again.stderr
    if status == 0:
        keys = _stored_keys(job)
        if len(keys) != len(set(keys)):
            problems.append(f"{len(keys) - len(set(keys))} stored scores were recomputed")
        differences = _differences(orjson.loads(output)["reference"], expected)
        facts["release"] = "other" if differences else "the same"
        problems += differences
    else:
        problems.append(f"the run after it ended with {status}: {error[-500:]}")
    left = job.wait_gone(LEFT_SECONDS)
    if left:
        problems.append(f"processes are left: {list(left.values())[:5]}")
    return {**facts, "problems": problems}


@contextlib.contextmanager
def _job(out: Path, model: str, name: str, scratch: Path) -> Iterator[Job]:
    folder = out / name
    folder.mkdir()
    paths = {"output": {"path": f"s3://{BUCKET}/datasets"}, "workspace": f"s3://{BUCKET}/workspace-{name}"}
    with tiny_job(folder, model, pool_rows(PROMPTS), name=name, **paths) as job:
        job.environment |= {
            "GRAPE_ENGINE_CLASS": "tests.drill_engines:SlowEngine",
            "DRILL_SECONDS": "0.5",
            "TMPDIR": str(scratch),
        }
        yield job


def _kill(job: Job, s3: SeaweedServer, kind: str, process: subprocess.Popen[str], moment: float) -> float | None:
    """SIGKILL to a process of that kind at a moment, or as soon after it as there is one; when, or None."""
    time.sleep(max(0.0, moment - time.monotonic()))
    if kind == "s3":
        at = time.monotonic()
        s3.kill()
        s3.start()
        return at
    while process.poll() is None:
        found = [pid for pid, line in _processes(job).items() if _is_kind(line, kind)]
        found = [process.pid] if kind == "driver" else found
        if found:
            try:
                os.kill(random.choice(found), signal.SIGKILL)
                return time.monotonic()
            except ProcessLookupError:
                continue
        time.sleep(0.05)
    return None


def _processes(job: Job) -> dict[int, str]:
    """Those of the job, and what its raylet has started: titles are written over the environment that tells whose."""
    found = job.processes()
    for pid in [pid for pid, line in found.items() if "raylet/raylet" in line]:
        with contextlib.suppress(psutil.Error):
            for child in psutil.Process(pid).children():
                found.setdefault(child.pid, " ".join(child.cmdline()))
    return found


def _is_kind(line: str, kind: str) -> bool:
    other = AGENTS if kind == "worker" else ()
    return any(part in line for part in VICTIMS[kind]) and not any(part in line for part in other)


def _ended(job: Job, process: subprocess.Popen[str]) -> tuple[int | None, str, str]:
    """Exit status, standard output and error; None for one that hangs, which is ended."""
    try:
        output, error = process.communicate(timeout=HANG_SECONDS)
        return process.returncode, output, error
    except subprocess.TimeoutExpired:
        job.kill_all()
        output, error = process.communicate()
        return None, output, error


def _stored_keys(job: Job) -> list[tuple[str, bytes]]:
    """Policy and key of every stored score; those of the control, which scores rows once more, are left out."""
    workspace = Storage(job.config["workspace"])
    found = []
    for info in workspace.list("scores"):
        policy, _, rest = info.path.removeprefix("scores/").partition("/")
        if rest.startswith("b") and rest.endswith(".parquet") and not policy.endswith(REPEAT_SUFFIX):
            with open_parquet(workspace, info.path) as file:
                found += [(policy, key) for key in file.read(columns=["row_key"])["row_key"].to_pylist()]
    return found


def _rows(reference: str) -> pa.Table:
    return grape_service.load(reference).dataset.to_table(COLUMNS).sort_by("prompt_id").combine_chunks()


def _differences(reference: str, expected: pa.Table) -> list[str]:
    rows = _rows(reference)
    problems = [str(problem) for problem in verify(grape_service.load(reference))]
    names = [name for name in COLUMNS if name != "grape_score" and rows[name] != expected[name]]
    problems += [f"other {name} than without the kill" for name in names]
    if not names and not np.allclose(rows["grape_score"], expected["grape_score"], rtol=0, atol=1e-4):
        problems.append("other grape_score than without the kill")
    return problems
