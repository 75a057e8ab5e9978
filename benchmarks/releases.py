"""Writes and reads a release on local disk and on an S3 server, beside plain pyarrow; lists a thousand versions.

    python -m benchmarks.releases --gb 2

Plain pyarrow writes and reads the same rows, streamed, with the same compression, through the same file system object.
Each step runs in a process of its own, which tells its peak memory. The S3 server is SeaweedFS, started here.
"""

from __future__ import annotations

import argparse
import json
import os
import resource
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.dataset as pads
import pyarrow.parquet as pq

from grape_service.releases.catalog import read_catalog
from grape_service.releases.claim import claim_version
from grape_service.releases.load import load
from grape_service.releases.manifest import ManifestFields, read_manifest
from grape_service.releases.writer import publish, write_part
from grape_service.schemas import release_schema
from grape_service.storage import Storage
from tests.seaweed import BUCKET, running_server

SCHEMA = release_schema([], [])
TABLE_ROWS = 2000
FILE_BYTES = 256 * 2**20  # on disk, about
WORDS = [f"word{i}" for i in range(2000)]


def made_up_table(seed: int) -> pa.Table:
    """Rows of about 800 tokens that compress about as real ones do."""
    random = np.random.default_rng(seed)
    lengths = random.integers(400, 1200, TABLE_ROWS)
    offsets = np.concatenate([[0], np.cumsum(lengths)]).astype(np.int32)
    total = int(offsets[-1])
    mask = (np.arange(total) - np.repeat(offsets[:-1], lengths)) > np.repeat(lengths // 4, lengths)
    ids = np.minimum(random.zipf(1.2, total), 150_000).astype(np.int32)
    weights = np.exp(np.cumsum(random.normal(0, 0.01, total)) % 1).astype(np.float32)

    def lists(values: np.ndarray[Any, Any]) -> pa.Array:
        return pa.ListArray.from_arrays(pa.array(offsets), pa.array(values))

    words = random.integers(0, len(WORDS), (TABLE_ROWS, 300))
    prompts = [f"{seed:04d}-{i:08d}" for i in range(TABLE_ROWS)]
    logprobs = lists(np.where(mask, -random.exponential(0.7, total), 0).astype(np.float32))
    columns: dict[str, Any] = {
        "prompt_id": prompts,
        "candidate_id": [f"{prompt}-1" for prompt in prompts],
        "source": ["gen-a"] * TABLE_ROWS,
        "messages": [
            [{"role": "user", "content": text[:400]}, {"role": "assistant", "content": text[400:]}]
            for text in (" ".join(WORDS[i] for i in row) for row in words)
        ],
        "input_ids": lists(ids),
        "loss_mask": lists(mask),
        "labels": lists(np.where(mask, ids, -100).astype(np.int32)),
        "target_logprobs": logprobs,
        "behavior_logprobs": logprobs,
        "loss_weights": lists(np.where(mask, weights, 0).astype(np.float32)),
        "weight_source": ["pear"] * TABLE_ROWS,
        "grape_score": random.normal(-1, 0.3, TABLE_ROWS),
        "grape_rank": np.ones(TABLE_ROWS, np.int32),
        "grape_margin": random.exponential(0.1, TABLE_ROWS),
        "num_candidates": np.full(TABLE_ROWS, 8, np.int32),
        "truncated": [False] * TABLE_ROWS,
    }
    return pa.table(columns, schema=SCHEMA)


def stream(tables: list[pa.Table], count: int) -> Iterator[pa.Table]:
    for i in range(count):
        yield tables[i % len(tables)]


def file_plan(gigabytes: float, tables: list[pa.Table]) -> tuple[int, int]:
    """Number of files, and of tables in each, for about so much on disk."""
    sink = pa.BufferOutputStream()
    pq.write_table(pa.concat_tables(tables), sink, compression="zstd", compression_level=3)
    bytes_a_table = sink.getvalue().size / len(tables)
    files = max(1, round(gigabytes * 1e9 / FILE_BYTES))
    return files, max(1, round(gigabytes * 1e9 / files / bytes_a_table))


def write_ours(storage: Storage, gigabytes: float) -> dict[str, Any]:
    tables = [made_up_table(seed) for seed in range(4)]
    files, count = file_plan(gigabytes, tables)
    started = time.perf_counter()
    with claim_version(storage, "bench") as claim:
        entries = [write_part(storage, claim.folder, i, SCHEMA, stream(tables, count)) for i in range(files)]
        version = publish(storage, claim, SCHEMA, entries, ManifestFields(content_digest="bench"))
    return {
        "seconds": time.perf_counter() - started,
        "bytes": version.manifest.num_bytes,
        "rows": version.manifest.rows,
    }


def write_plain(storage: Storage, gigabytes: float) -> dict[str, Any]:
    tables = [made_up_table(seed) for seed in range(4)]
    files, count = file_plan(gigabytes, tables)
    rows = 0
    started = time.perf_counter()
    for i in range(files):
        path = storage.full(f"plain/part-{i:05d}.parquet")
        if not storage.is_s3:
            os.makedirs(os.path.dirname(path), exist_ok=True)
        with pq.ParquetWriter(
            path, SCHEMA, filesystem=storage.arrow, compression="zstd", compression_level=3
        ) as writer:
            for table in stream(tables, count):
                writer.write_table(table)
                rows += table.num_rows
    seconds = time.perf_counter() - started
    return {"seconds": seconds, "bytes": sum(info.size for info in storage.list("plain")), "rows": rows}


def read_ours(storage: Storage, gigabytes: float) -> dict[str, Any]:
    started = time.perf_counter()
    release = load(f"{storage.root}/bench@v0001")
    rows = sum(batch.num_rows for batch in release.batches())
    return {"seconds": time.perf_counter() - started, "bytes": release.manifest.num_bytes, "rows": rows}


def read_plain(storage: Storage, gigabytes: float) -> dict[str, Any]:
    files = storage.list("plain")
    started = time.perf_counter()
    dataset = pads.dataset([storage.full(info.path) for info in files], filesystem=storage.arrow, format="parquet")
    rows = sum(batch.num_rows for batch in dataset.to_batches())
    return {"seconds": time.perf_counter() - started, "bytes": sum(info.size for info in files), "rows": rows}


def list_versions(storage: Storage, count: int) -> dict[str, Any]:
    """List versions from their manifests alone, then from the catalog."""
    with claim_version(storage, "many") as claim:
        entry = write_part(storage, claim.folder, 0, SCHEMA, [made_up_table(0).slice(0, 10)])
        publish(storage, claim, SCHEMA, [entry], ManifestFields(content_digest="1"))
    manifest = read_manifest(storage, "many", "v0001")
    data = storage.read("many/versions/v0001/data/part-00000.parquet")

    def copy(number: int) -> None:
        version = f"v{number:04d}"
        folder = f"many/versions/{version}"
        storage.write(f"{folder}/claim.json", b"{}")
        storage.write(f"{folder}/data/part-00000.parquet", data)
        storage.write(f"{folder}/README.md", b"# many")
        storage.write(f"{folder}/manifest.json", manifest.model_copy(update={"version": version}).to_json())

    with ThreadPoolExecutor(8) as pool:
        list(pool.map(copy, range(2, count + 1)))
    started = time.perf_counter()
    cold = read_catalog(storage, "many")
    cold_seconds = time.perf_counter() - started
    with claim_version(storage, "many") as claim:
        publish(storage, claim, SCHEMA, [], ManifestFields(content_digest="2"))
    started = time.perf_counter()
    warm = read_catalog(storage, "many")
    seconds = time.perf_counter() - started
    assert len(cold) == count
    assert len(warm) == count + 1
    return {"versions": count, "seconds": seconds, "seconds_without_catalog": cold_seconds}


STEPS = {"plain write": write_plain, "write": write_ours, "plain read": read_plain, "read": read_ours}


def run_step(step: str, root: str, amount: float) -> dict[str, Any]:
    """One step in a process of its own."""
    command = [sys.executable, "-m", "benchmarks.releases", "--step", step, "--root", root, "--amount", str(amount)]
    done = subprocess.run(command, stdout=subprocess.PIPE, check=True, timeout=1200)
    result: dict[str, Any] = json.loads(done.stdout.splitlines()[-1])
    return result


def compare(place: str, root: str, gigabytes: float, versions: int) -> list[str]:
    """Every step on one storage; prints lines and returns what fell short."""
    short = []
    results = {}
    for step in STEPS:
        results[step] = result = run_step(step, root, gigabytes)
        rate = result["bytes"] / 1e6 / result["seconds"]
        result["rate"] = rate
        print(
            f"{place:6} {step:12} {result['bytes'] / 1e9:5.2f} GB {result['seconds']:7.1f} s {rate:7.0f} MB/s "
            f"peak {result['peak_gib']:.2f} GiB",
            flush=True,
        )
    for step in ("write", "read"):
        # Seconds for the same rows: a smaller file must not count as a slower writer.
        ratio = results[f"plain {step}"]["seconds"] / results[step]["seconds"]
        assert results[step]["rows"] == results[f"plain {step}"]["rows"]
        print(f"{place:6} {step:12} {ratio:.0%} of plain pyarrow's speed (wanted: 60%)")
        short += [f"{place} {step}"] if ratio < 0.6 else []
        short += [f"{place} {step} memory"] if results[step]["peak_gib"] > 1.5 else []
    result = run_step("list", root, versions)
    print(
        f"{place:6} list         {result['versions']} versions {result['seconds']:.2f} s, from manifests alone "
        f"{result['seconds_without_catalog']:.2f} s (wanted: 5 s)"
    )
    short += [f"{place} list"] if result["seconds"] > 5 else []
    Storage(root).delete_folder("")
    return short


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--gb", type=float, default=2.0, help="size on disk, in GB")
    parser.add_argument("--versions", type=int, default=1000, help="versions to list")
    parser.add_argument("--place", choices=["local", "s3", "both"], default="both")
    parser.add_argument("--folder", default=None, help="where to work; default: a temporary folder")
    parser.add_argument("--step", default=None, help=argparse.SUPPRESS)
    parser.add_argument("--root", help=argparse.SUPPRESS)
    parser.add_argument("--amount", type=float, help=argparse.SUPPRESS)
    options = parser.parse_args()
    if options.step is not None:
        storage = Storage(options.root)
        if options.step == "list":
            result = list_versions(storage, int(options.amount))
        else:
            result = STEPS[options.step](storage, options.amount)
        peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 2**20
        print(json.dumps({**result, "peak_gib": peak}))
        return 0
    with tempfile.TemporaryDirectory(dir=options.folder, prefix="grape-bench-") as folder:
        short = []
        if options.place != "s3":
            short += compare("local", f"{folder}/local", options.gb, options.versions)
        if options.place != "local":
            with running_server(Path(folder) / "seaweed") as server:
                os.environ.update(server.environment)
                short += compare("s3", f"s3://{BUCKET}/bench", options.gb, options.versions)
    print(f"fell short: {', '.join(short)}" if short else "all as wanted")
    return 1 if short else 0


if __name__ == "__main__":
    sys.exit(main())
