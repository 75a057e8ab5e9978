"""The pipeline without an engine: a made-up pool through prepare, score, select, weigh and release.

    python benchmarks/pipeline.py --candidates 1000000

Prints seconds and rows/s of each stage, the largest memory of any process, what the bare tokenizer alone would
need for the same texts on the same cores (from a sample, before and after, since a machine's speed changes), and
what the report adds: the seconds in which its page is made, and the CPU seconds of its statistics
(benchmarks/report.py), all of them counted as if on one core.
The engine answers in constant time (constant_engine.py).
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
from dataclasses import dataclass
from pathlib import Path

import orjson
import yaml

ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT))
MARK = "GRAPE_BENCHMARK_MARK"
CANDIDATES = 8
REPORT_ROWS = 50_000
BARE_ROWS = 200_000
KEPT_STAGES = ("score behavior", "weigh", "release")
SOURCES = ("teacher", "student", "forum", "book")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--candidates", type=int, nargs="+", default=[1_000_000])
    parser.add_argument("--out", type=Path, default=ROOT / "benchmarks" / "out" / "pipeline")
    parser.add_argument("--cpus", type=int, default=None)
    arguments = parser.parse_args()
    from benchmarks.report import made_partition

    with made_partition(REPORT_ROWS, tokens=150) as made:
        statistics = made.costs.statistics / REPORT_ROWS
    results = []
    for size in arguments.candidates:
        results.append(run_size(size, arguments.out / str(size), arguments.cpus))
        show(results[-1], statistics)
    if len(results) > 1:
        first, last = results[0].peaks["driver"], results[-1].peaks["driver"]
        print(f"\nthe driver's peak memory at the last size is {last / first:.2f} times that at the first")


def make_pool(folder: Path, candidates: int) -> Path:
    """A pool of English words, about 150 tokens a row with the template; made once."""
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
            question = f"Question {prompt}: " + " ".join(rng.choices(words, k=25)) + "?"
            for place in range(CANDIDATES):
                answer = " ".join(rng.choices(words, k=rng.randint(55, 115))) + "."
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
    """SmolLM2's tokenizer and template beside tiny random weights: nothing is computed with them."""
    from transformers import AutoTokenizer

    from examples.quickstart.prepare_model import GGUF_FILE, gguf_folder
    from tests import tiny_models

    target = folder / "model"
    if not (target / "config.json").exists():
        tokenizer = AutoTokenizer.from_pretrained(gguf_folder(), gguf_file=GGUF_FILE)
        tiny_models.make_model(target, vocab_size=len(tokenizer), max_position_embeddings=8192)
        tokenizer.save_pretrained(target)
    return target


@dataclass(frozen=True)
class Result:
    """One run of the pipeline."""

    candidates: int
    kept: int
    tokens: int
    seconds: float  # of the whole command, start and end included
    stages: dict[str, float]
    bare_tokenizer: tuple[float, float]  # seconds, measured before and after
    peaks: dict[str, int]  # kind of process -> bytes


def run_size(candidates: int, folder: Path, cpus: int | None) -> Result:
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
    counts = orjson.loads((version / "manifest.json").read_bytes())["counts"]
    return Result(
        candidates=candidates,
        kept=outcome["rows"],
        tokens=counts["pool"]["tokens"],
        seconds=time.monotonic() - started,
        stages=outcome["stage_seconds"],
        bare_tokenizer=(bare, bare_tokenizer_seconds(pool, model)),
        peaks=peaks,
    )


def bare_tokenizer_seconds(pool: Path, model: Path) -> float:
    """Seconds in which the fast tokenizer alone, on all cores, encodes the pool's texts once (from a sample)."""
    from tokenizers import Tokenizer

    tokenizer = Tokenizer.from_file(str(model / "tokenizer.json"))
    texts: list[str] = []
    total = 0
    with pool.open("rb") as file:
        for number, line in enumerate(file):
            total += 1
            if number < BARE_ROWS:
                row = orjson.loads(line)
                texts.append(row["response"])
                if number % CANDIDATES == 0:
                    texts.append(row["prompt"])
    started = time.monotonic()
    for start in range(0, len(texts), 4096):
        tokenizer.encode_batch_fast(texts[start : start + 4096], add_special_tokens=False)
    return (time.monotonic() - started) * total / min(total, BARE_ROWS)


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


def show(result: Result, statistics: float) -> None:
    """A line per stage; `statistics` are the CPU seconds per candidate that the report adds to select and weigh."""
    print(f"\n{result.candidates:,} candidates, {result.tokens:,} tokens, {result.kept:,} rows kept")
    for stage, seconds in result.stages.items():
        rows = result.kept if stage in KEPT_STAGES else result.candidates
        rate = f"{rows / max(seconds, 1e-9):10,.0f} rows/s" if stage != "report" else "(part of release)"
        print(f"  {stage:<16}{seconds:8.1f} s {rate}")
    print(f"  {'whole command':<16}{result.seconds:8.1f} s {result.candidates / result.seconds:10,.0f} rows/s")
    before, after = result.bare_tokenizer
    times = result.seconds / ((before + after) / 2)
    print(
        f"  bare tokenizer alone, all cores: {before:.1f} s before, {after:.1f} s after; the whole: {times:.2f} times"
    )
    added = statistics * result.candidates
    share = (added + result.stages["report"]) / (result.seconds - added - result.stages["report"])
    print(
        f"  report: {added:.1f} CPU s of statistics and {result.stages['report']:.1f} s for the page: {share:.1%} more"
    )
    peaks = ", ".join(f"{kind} {size / 2**20:,.0f} MiB" for kind, size in sorted(result.peaks.items()))
    print(f"  peak memory of a process: {peaks}", flush=True)


if __name__ == "__main__":
    main()
