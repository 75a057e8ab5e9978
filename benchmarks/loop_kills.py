"""Three rounds, killed again and again with SIGKILL: releases and checkpoints are those of a job that was not.

    python benchmarks/loop_kills.py --kills 20                 # on the quickstart's model
    python benchmarks/loop_kills.py --kills 20 --model tiny    # on a random one of a few thousand weights

Every process of the job is killed after a random time: `grape run`, its Ray, its engines, its trainer. The same command
is given again, until the job has come to its end and enough kills were made; a job that ends before begins anew. What
the rounds made is compared by content: every column of every row, each step of the metrics, the weights of each
checkpoint. Versions may be called otherwise, as a claim that was killed keeps its number. Ends with status 1 where
something is missing, there twice, or differs in a bit.
"""

from __future__ import annotations

import argparse
import json
import os
import random
import shutil
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT))

import pyarrow as pa
import pyarrow.compute as pc
import pyarrow.parquet as pq
from safetensors.numpy import load_file

from benchmarks.training_kills import metrics
from grape_service.release.catalog import read_catalog
from grape_service.release.manifest import read_manifest
from grape_service.release.rounds import round_name
from grape_service.release.tags import list_tags
from grape_service.storage.local import TEMPORARY
from grape_service.storage.storage import Storage
from tests.jobs import Job, pool_rows, tiny_job
from tests.smollm2 import smollm2_folder
from tests.tiny_models import make_model

ROUNDS = 3
PROMPTS = 16


class Made:
    """What a job left."""

    def __init__(self, folder: Path):
        self.dataset = folder / "datasets" / "tiny"
        output = Storage(str(folder / "datasets"))
        self.versions = [entry.version for entry in read_catalog(output, "tiny")]
        self.tags = {tag.name: tag.version for tag in list_tags(output, "tiny")}
        paths = [path for path in sorted(self.dataset.glob("runs/*.json")) if TEMPORARY not in path.name]
        self.runs = {record["version"]: record for record in (json.loads(path.read_text()) for path in paths)}
        self.num_runs = len(paths)
        self.files = {version: read_manifest(output, "tiny", version).files for version in self.versions}

    def rows(self, name: str) -> pa.Table:
        """The rows of a round in the order of their ids."""
        version = self.tags[name]
        folder = self.dataset / "versions" / version
        table = pa.concat_tables(pq.read_table(folder / entry.path) for entry in self.files[version])
        return table.sort_by([("prompt_id", "ascending"), ("candidate_id", "ascending")]).combine_chunks()

    def sft(self, name: str) -> Path:
        """The folder of a round's training."""
        return Path(self.runs[self.tags[name]]["stages"]["sft"]["checkpoint"]).parent

    def outline(self) -> dict[str, Any]:
        """How much there is of everything, and which round each tag stands for."""
        names = {version: name for name, version in self.tags.items() if name.startswith("round-")}
        tags = {name: names.get(version) for name, version in self.tags.items()}
        states = [record["stages"]["sft"]["state"] for record in self.runs.values()]
        return {"versions": len(self.versions), "tags": tags, "training runs": self.num_runs, "states": states}


def differences(straight: Made, killed: Made) -> list[str]:
    """What is not the same in two jobs, in words."""
    one, other = straight.outline(), killed.outline()
    found = [f"{key} {other[key]}, not {one[key]}" for key in one if one[key] != other[key]]
    if found:
        return found
    for name in map(round_name, range(1, ROUNDS + 1)):
        before, after = straight.rows(name), killed.rows(name)
        if before.schema != after.schema or len(before) != len(after):
            found.append(
                f"{name}: {len(after)} rows of {after.schema.names}, not {len(before)} of {before.schema.names}"
            )
            continue
        found += [
            f"{name}: column '{column}'{_largest(before[column], after[column])}"
            for column in before.schema.names
            if not before[column].equals(after[column])
        ]
        if metrics(straight.sft(name)) != metrics(killed.sft(name)):
            found.append(f"{name}: metrics {metrics(killed.sft(name))}, not {metrics(straight.sft(name))}")
        weights = [load_file(made.sft(name) / "model" / "model.safetensors") for made in (straight, killed)]
        changed = [key for key in weights[0] if (weights[0][key] != weights[1][key]).any()]
        if changed or weights[0].keys() != weights[1].keys():
            found.append(f"{name}: {len(changed)} of {len(weights[0])} tensors of the model")
    return found


def _largest(one: pa.ChunkedArray, other: pa.ChunkedArray) -> str:
    """In words, how far numbers are off."""
    flat = [pc.list_flatten(column) if pa.types.is_list(column.type) else column for column in (one, other)]
    if not pa.types.is_floating(flat[0].type) or len(flat[0]) != len(flat[1]):
        return ""
    return f" by up to {pc.max(pc.abs(pc.subtract(*flat))).as_py():.3g}"


def attempt(job: Job, seconds: float | None) -> bool:
    """One `grape run`, killed after some seconds if it has not ended by then; whether it was killed."""
    return job.run_or_kill(seconds, "run", str(job.config_path), "--json")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--kills", type=int, default=20)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--latest", type=float, default=0.5, help="the latest kill, as a share of the time without one")
    parser.add_argument("--model", choices=("quickstart", "tiny"), default="quickstart")
    options = parser.parse_args()
    dice = random.Random(options.seed)
    rate = 1e-5 if options.model == "quickstart" else 0.05
    sft = {"batch_size": 8, "learning_rate": rate, "device": "cpu", "save_steps": 1}
    train = {"sft": sft, "rounds": ROUNDS, "refresh": {"max_churn": 1.0}}
    with tempfile.TemporaryDirectory(prefix="loop-kills-") as name:
        os.environ["GRAPE_CACHE"] = f"{name}/cache"
        model = make_model(Path(name) / "model") if options.model == "tiny" else str(smollm2_folder())
        behavior = {"model": model, "system_prompt": "Be brief.", "dtype": "float32", "engine": "transformers"}
        if options.model == "tiny":
            del behavior["system_prompt"]
        settings: dict[str, Any] = {"train": train, "behavior": behavior, "weights": {"method": "pear"}}
        folder = Path(name) / "straight"
        started = time.monotonic()
        with tiny_job(folder, model, pool_rows(PROMPTS), **settings) as job:
            attempt(job, None)
        seconds, expected = time.monotonic() - started, Made(folder)
        print(f"{ROUNDS} rounds on the {options.model} model without a kill: {seconds:.0f} s", flush=True)
        killed = jobs = 0
        differ: list[str] = []
        while killed < options.kills or jobs == 0:
            folder = Path(name) / f"killed-{jobs}"
            with tiny_job(folder, model, pool_rows(PROMPTS), **settings) as job:
                while attempt(job, None if killed >= options.kills else dice.uniform(0.05, options.latest) * seconds):
                    killed += 1
            jobs += 1
            found = differences(expected, Made(folder))
            differ += found
            said = "; ".join(found) or "the same"
            print(f"job {jobs}, {killed} kills, {time.monotonic() - started:.0f} s: {said}", flush=True)
            shutil.rmtree(folder)
        print(
            f"{killed} kills in {jobs} jobs of {ROUNDS} rounds, {time.monotonic() - started:.0f} s "
            f"({seconds:.0f} s without a kill): "
            + ("; ".join(differ) or "rows, metrics and checkpoints are those of the job that was not killed")
        )
    raise SystemExit(1 if differ else 0)


if __name__ == "__main__":
    main()
