"""How cost grows: the same rows cut into more and more partitions, through prepare, score, select, weigh and release.

    python benchmarks/growth.py [--rows 64000] [--partitions 16 256 1024 4096] [--s3] [--plot docs/growth-seconds.svg]

Prints the seconds of each stage for each number of partitions, the largest memory of the driver and of a worker, and
with `--s3` the requests that a real S3 server (SeaweedFS, this machine) counted. The engine answers in constant time
(constant_engine.py), so what is left is the pipeline's own cost. Figures go to <out>/growth.json.
"""

from __future__ import annotations

import argparse
import contextlib
import os
import re
import shutil
import subprocess
import sys
import tempfile
import threading
import time
import urllib.request
from collections.abc import Iterator
from dataclasses import asdict, dataclass, field
from pathlib import Path

import orjson
import yaml

ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT))

from benchmarks.log_plot import log_plot
from benchmarks.pipeline import MARK, make_model, make_pool, watch_memory
from tests.seaweed import BUCKET, SeaweedServer, running_server

SHARD_TOKENS = 65_536


@dataclass
class Growth:
    """One run."""

    partitions: int
    stages: dict[str, float]
    seconds: float  # of the whole command
    peaks: dict[str, int]  # kind of process -> bytes
    requests: dict[str, int] = field(default_factory=dict)  # S3 action -> number


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rows", type=int, default=64_000)
    parser.add_argument("--partitions", type=int, nargs="+", default=[16, 256, 1024, 4096])
    parser.add_argument("--s3", action="store_true", help="on an S3 server on this machine, which counts the requests")
    parser.add_argument("--plot", type=Path, default=None, help="an SVG of the seconds")
    parser.add_argument("--out", type=Path, default=ROOT / "benchmarks" / "out" / "growth")
    parser.add_argument("--code", type=Path, default=ROOT, help="the checkout that is measured")
    arguments = parser.parse_args()
    pool = make_pool(arguments.out / str(arguments.rows), arguments.rows)
    model = make_model(arguments.out)
    results = []
    for count in arguments.partitions:
        with places(arguments.s3, arguments.out) as (folder, server):
            results.append(run(arguments.code, pool, model, count, folder, server))
        show(results)
        (arguments.out / "growth.json").write_bytes(orjson.dumps([asdict(one) for one in results]))
    if arguments.plot is not None:
        arguments.plot.write_text(plot(results))


def plot(results: list[Growth]) -> str:
    """Seconds of each stage and of the whole command."""
    lines = {stage: [(float(one.partitions), one.stages[stage]) for one in results] for stage in results[0].stages}
    del lines["engine start"]
    lines["whole command"] = [(float(one.partitions), one.seconds) for one in results]
    return log_plot(lines, "seconds for the same rows", "partitions")


@contextlib.contextmanager
def places(s3: bool, out: Path) -> Iterator[tuple[str, SeaweedServer | None]]:
    """An empty folder for a run's files, on S3 with the server that holds it; gone after the block."""
    scratch = Path(tempfile.mkdtemp(prefix="growth-", dir=out))
    try:
        if not s3:
            yield str(scratch / "files"), None
            return
        with running_server(scratch / "weed") as server:
            yield f"s3://{BUCKET}/growth", server
    finally:
        shutil.rmtree(scratch, ignore_errors=True)


def run(code: Path, pool: Path, model: Path, partitions: int, folder: str, server: SeaweedServer | None) -> Growth:
    """`grape run` of a config that cuts the pool into so many partitions."""
    config = {
        "name": "growth",
        "pool": {"path": str(pool)},
        "target": {"model": str(model), "dtype": "float32"},
        "behavior": {"model": str(model), "dtype": "float32", "system_prompt": "Answer well."},
        "weights": {"method": "pear"},
        "output": {"path": f"{folder}/datasets"},
        "workspace": f"{folder}/workspace",
        "workers": {"partition_bytes": -(-pool.stat().st_size // partitions), "shard_tokens": SHARD_TOKENS},
    }
    with tempfile.TemporaryDirectory(prefix="growth-") as scratch:
        path = Path(scratch) / "config.yaml"
        path.write_text(yaml.safe_dump(config))
        environment = {
            **os.environ,
            **(server.environment if server else {}),
            "GRAPE_ENGINE_CLASS": "benchmarks.constant_engine:ConstantEngine",
            "PYTHONPATH": str(code),
            "PREFECT_HOME": f"{scratch}/prefect",
            MARK: scratch,
        }
        before = requests(server)
        started = time.monotonic()
        command = [sys.executable, "-m", "grape_service.cli", "run", str(path), "--json"]
        process = subprocess.Popen(command, env=environment, stdout=subprocess.PIPE, cwd=code)
        peaks: dict[str, int] = {}
        watcher = threading.Thread(target=watch_memory, args=(process, scratch, peaks))
        watcher.start()
        out, _ = process.communicate()
        watcher.join()
    if process.returncode != 0:
        raise SystemExit(f"grape run ended with {process.returncode}")
    after = requests(server)
    counted = {action: number - before.get(action, 0) for action, number in after.items()}
    stages = {name: seconds for name, seconds in orjson.loads(out)["stage_seconds"].items() if name != "report"}
    seconds = time.monotonic() - started
    return Growth(partitions, stages, seconds, peaks, {name: number for name, number in counted.items() if number})


def requests(server: SeaweedServer | None) -> dict[str, int]:
    """Requests that the server has answered so far, by action."""
    if server is None:
        return {}
    with urllib.request.urlopen(f"http://127.0.0.1:{server.metrics_port}/metrics", timeout=30) as answer:
        text = answer.read().decode()
    found: dict[str, int] = {}
    for line in text.splitlines():
        if match := re.match(r'SeaweedFS_s3_request_total\{.*?type="(\w+)".*?\} ([\d.e+]+)', line):
            found[match[1]] = found.get(match[1], 0) + int(float(match[2]))
    return found


def show(results: list[Growth]) -> None:
    """A column for each number of partitions; in brackets how many times the first."""
    first = results[0]
    print(f"\n{'partitions':<18}" + "".join(f"{one.partitions:>18,}" for one in results))
    for stage in [*first.stages, "whole command"]:
        row = [one.seconds if stage == "whole command" else one.stages[stage] for one in results]
        print(f"{stage + ', s':<18}" + "".join(f"{value:10.1f} ({value / row[0]:4.1f})" for value in row))
    for kind in ("driver", "worker"):
        row = [one.peaks.get(kind, 0) / 2**20 for one in results]
        print(f"{kind + ', MiB':<18}" + "".join(f"{value:>18,.0f}" for value in row))
    if any(one.requests for one in results):
        for action in sorted({action for one in results for action in one.requests}):
            row = [one.requests.get(action, 0) for one in results]
            print(f"{action:<18}" + "".join(f"{value:>18,}" for value in row))
        row = [sum(one.requests.values()) for one in results]
        print(f"{'requests':<18}" + "".join(f"{value:>18,}" for value in row))
        each = [total / one.partitions for total, one in zip(row, results, strict=True)]
        print(f"{'... a partition':<18}" + "".join(f"{value:>18,.1f}" for value in each), flush=True)


if __name__ == "__main__":
    main()
