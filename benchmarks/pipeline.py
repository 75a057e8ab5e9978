"""The pipeline without an engine: a made-up pool through prepare, score, select, weigh and release.

    python benchmarks/pipeline.py --candidates 1000000

Prints seconds and rows/s of each stage, the largest memory of any process, and what the bare tokenizer
alone would need for the same texts on the same cores. The engine answers in constant time (constant_engine.py).
"""

from __future__ import annotations

import argparse
import os
import random
import shutil
import subprocess
import sys
import threading
import time
from pathlib import Path

import orjson
import yaml

ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT))
MARK = "GRAPE_BENCHMARK_MARK"
CANDIDATES = 8
SOURCES = ("teacher", "student", "forum", "book")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--candidates", type=int, nargs="+", default=[1_000_000])
    parser.add_argument("--out", type=Path, default=ROOT / "benchmarks" / "out" / "pipeline")
    parser.add_argument("--cpus", type=int, default=None)
    arguments = parser.parse_args()
    results = [run_size(size, arguments.out / str(size), arguments.cpus) for size in arguments.candidates]
    show(results)


def make_pool(folder: Path, candidates: int) -> Path:
    """A pool of words that a tokenizer knows, about 150 tokens a row; made once."""
    path = folder / "pool.jsonl"
    done = folder / "pool.done"
    if done.exists():
        return path
    folder.mkdir(parents=True, exist_ok=True)
    rng = random.Random(0)
    words = [word for line in (ROOT / "README.md").read_text().split("\n") for word in line.split() if word.isalpha()]
    words = sorted(set(words)) or ["word"]
    with path.open("wb") as file:
        for prompt in range(candidates // CANDIDATES):
            question = f"Question {prompt}: " + " ".join(rng.choices(words, k=28)) + "?"
            for place in range(CANDIDATES):
                answer = " ".join(rng.choices(words, k=rng.randint(50, 90))) + "."
                row = {
                    "prompt": question,
                    "response": answer,
                    "source": SOURCES[place % len(SOURCES)],
                    "score": rng.random(),
                    "topic": f"topic-{prompt % 50}",
                }
                file.write(orjson.dumps(row, option=orjson.OPT_APPEND_NEWLINE))
    done.touch()
    return path


def make_model(folder: Path) -> Path:
    """A tokenizer and a config without real weights: nothing is computed with them."""
    from tests import tiny_models

    target = folder / "model"
    if not (target / "config.json").exists():
        tiny_models.make_model(target, arch="llama")
    return target


def run_size(candidates: int, folder: Path, cpus: int | None) -> dict[str, object]:
    pool = make_pool(folder, candidates)
    model = make_model(folder)
    shutil.rmtree(folder / "datasets", ignore_errors=True)
    config = {
        "name": "pipeline",
        "pool": {"path": str(pool)},
        "target": {"model": str(model), "dtype": "float32"},
        "behavior": {"model": str(model), "dtype": "float32", "system_prompt": "Answer well."},
        "weights": {"method": "pear"},
        "output": {"path": str(folder / "datasets")},
        "workers": {"cpus": cpus},
    }
    (folder / "config.yaml").write_text(yaml.safe_dump(config))
    bare = bare_tokenizer_seconds(pool, model)
    environment = {
        **os.environ,
        "GRAPE_ENGINE_CLASS": "benchmarks.constant_engine:ConstantEngine",
        "PYTHONPATH": str(ROOT),
        "PREFECT_HOME": str(folder / "prefect"),
        MARK: str(folder),
    }
    command = [sys.executable, "-m", "grape_service.cli", "run", str(folder / "config.yaml"), "--json"]
    started = time.monotonic()
    process = subprocess.Popen(command, env=environment, stdout=subprocess.PIPE, cwd=ROOT)
    peaks: dict[str, int] = {}
    watcher = threading.Thread(target=watch_memory, args=(process, str(folder), peaks))
    watcher.start()
    out, _ = process.communicate()
    watcher.join()
    if process.returncode != 0:
        raise SystemExit(f"grape run ended with {process.returncode}")
    outcome = orjson.loads(out)
    version = folder / "datasets" / "pipeline" / "versions" / outcome["version"]
    manifest = orjson.loads((version / "manifest.json").read_bytes())
    return {
        "candidates": candidates,
        "seconds": time.monotonic() - started,
        "stages": manifest["statistics"]["stage_seconds"],
        "peaks": peaks,
        "bare_tokenizer_seconds": bare,
        "rows": outcome["rows"],
        "tokens": manifest["counts"]["pool"]["tokens"],
    }


def bare_tokenizer_seconds(pool: Path, model: Path) -> float:
    """Seconds in which the fast tokenizer alone, on all cores, encodes the pool's texts once (from a sample)."""
    from tokenizers import Tokenizer

    tokenizer = Tokenizer.from_file(str(model / "tokenizer.json"))
    texts: list[str] = []
    total = 0
    with pool.open("rb") as file:
        for number, line in enumerate(file):
            total += 1
            if number < 20_000:
                row = orjson.loads(line)
                texts.append(row["response"])
                if number % CANDIDATES == 0:
                    texts.append(row["prompt"])
    started = time.monotonic()
    for start in range(0, len(texts), 4096):
        tokenizer.encode_batch_fast(texts[start : start + 4096], add_special_tokens=False)
    return (time.monotonic() - started) * total / min(total, 20_000)


def watch_memory(process: subprocess.Popen[bytes], mark: str, peaks: dict[str, int]) -> None:
    """Largest resident bytes of the driver and of any other process of the run (shared memory left out)."""
    wanted = f"{MARK}={mark}".encode()
    while process.poll() is None:
        for entry in Path("/proc").iterdir():
            if not entry.name.isdigit():
                continue
            try:
                if wanted not in (entry / "environ").read_bytes().split(b"\0"):
                    continue
                status = (entry / "status").read_text()
                command = (entry / "cmdline").read_bytes().replace(b"\0", b" ").decode()
            except (FileNotFoundError, ProcessLookupError, PermissionError):
                continue
            resident = sum(
                int(line.split()[1]) for line in status.splitlines() if line.startswith(("RssAnon", "RssFile"))
            )
            kind = "driver" if int(entry.name) == process.pid else ("worker" if "ray::" in command else "other")
            peaks[kind] = max(peaks.get(kind, 0), resident * 1024)
        time.sleep(0.5)


def show(results: list[dict[str, object]]) -> None:
    from rich.console import Console
    from rich.table import Table

    stages = list(dict.fromkeys(stage for result in results for stage in result["stages"]))  # type: ignore[attr-defined]
    table = Table(title="pipeline, constant-time engine")
    for column in ["candidates", *(f"{stage} s (rows/s)" for stage in stages), "all s", "bare tokenizer s"]:
        table.add_column(column, justify="right")
    for kind in ("driver", "worker", "other"):
        table.add_column(f"peak {kind} MiB", justify="right")
    for result in results:
        seconds: dict[str, float] = result["stages"]  # type: ignore[assignment]
        peaks: dict[str, int] = result["peaks"]  # type: ignore[assignment]
        candidates = int(result["candidates"])  # type: ignore[call-overload]
        table.add_row(
            f"{candidates:,}",
            *(f"{seconds.get(s, 0):.1f} ({candidates / max(seconds.get(s, 0), 1e-9):,.0f})" for s in stages),
            f"{result['seconds']:.1f}",
            f"{result['bare_tokenizer_seconds']:.1f}",
            *(f"{peaks.get(kind, 0) / 2**20:.0f}" for kind in ("driver", "worker", "other")),
        )
    Console(width=200).print(table)


if __name__ == "__main__":
    main()
