"""Writes and reads a release on local disk and on an S3 server, beside plain pyarrow; lists a thousand versions.

    python -m benchmarks.releases --gb 2
    python -m benchmarks.releases --objects 100000

Plain pyarrow writes and reads the same rows, streamed, with the same compression, through the same file system object.
Files are written and read in turns, each in its own process, which tells its peak memory. The S3 server is
SeaweedFS, started here.
"""

from __future__ import annotations

import argparse
import json
import os
import resource
import signal
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

from grape_service.release.catalog import read_catalog
from grape_service.release.claim import claim_version
from grape_service.release.load import Release, load
from grape_service.release.manifest import FileEntry, ManifestFields, read_manifest
from grape_service.release.writer import publish, write_part
from grape_service.rows.columns import release_schema
from grape_service.storage.storage import Storage
from tests.seaweed import BUCKET, running_server

SCHEMA = release_schema([], [])
TABLE_ROWS = 2000
TABLES = 4  # that differ; a file repeats them
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


def file_plan(gigabytes: float) -> tuple[int, int]:
    """Number of files, and of tables in each, for about so much on disk."""
    tables = [made_up_table(seed) for seed in range(TABLES)]
    sink = pa.BufferOutputStream()
    pq.write_table(pa.concat_tables(tables), sink, compression="zstd", compression_level=3)
    bytes_a_table = sink.getvalue().size / TABLES
    files = max(1, round(gigabytes * 1e9 / FILE_BYTES))
    return files, max(1, round(gigabytes * 1e9 / files / bytes_a_table))


def write_ours(storage: Storage, task: dict[str, Any]) -> dict[str, Any]:
    """One data file of a version."""
    tables = [made_up_table(seed) for seed in range(TABLES)]
    clock = Clock()
    entry = write_part(storage, task["folder"], task["file"], SCHEMA, stream(tables, task["tables"]))
    return {**clock.stop(), "bytes": entry.size, "rows": entry.rows, "entry": entry.model_dump()}


def write_plain(storage: Storage, task: dict[str, Any]) -> dict[str, Any]:
    """The same rows by pyarrow alone."""
    tables = [made_up_table(seed) for seed in range(TABLES)]
    path, rows = f"plain/part-{task['file']:05d}.parquet", 0
    if not storage.is_s3:
        os.makedirs(storage.full("plain"), exist_ok=True)
    clock = Clock()
    with pq.ParquetWriter(
        storage.full(path), SCHEMA, filesystem=storage.arrow, compression="zstd", compression_level=3
    ) as writer:
        for table in stream(tables, task["tables"]):
            writer.write_table(table)
            rows += table.num_rows
    return {**clock.stop(), "bytes": storage.info(path).size, "rows": rows}


def read_ours(storage: Storage, task: dict[str, Any]) -> dict[str, Any]:
    """One data file of the version, as a release of that file alone."""
    clock = Clock()
    manifest = load(task["reference"]).manifest
    release = Release(storage, manifest.model_copy(update={"files": [manifest.files[task["file"]]]}))
    rows = sum(batch.num_rows for batch in release.batches())
    return {**clock.stop(), "bytes": release.manifest.num_bytes, "rows": rows}


def read_plain(storage: Storage, task: dict[str, Any]) -> dict[str, Any]:
    """The file of pyarrow alone, by pyarrow alone."""
    path = f"plain/part-{task['file']:05d}.parquet"
    clock = Clock()
    dataset = pads.dataset([storage.full(path)], filesystem=storage.arrow, format="parquet")
    rows = sum(batch.num_rows for batch in dataset.to_batches())
    return {**clock.stop(), "bytes": storage.info(path).size, "rows": rows}


def list_versions(storage: Storage, task: dict[str, Any]) -> dict[str, Any]:
    """List versions from their manifests alone, then from the catalog."""
    count = task["versions"]
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


def list_objects(storage: Storage, task: dict[str, Any]) -> dict[str, Any]:
    """List many small objects; memory is what the process grew by at its peak, the listing itself included."""
    count, chunk = task["objects"], 500
    for start in range(0, count, chunk):
        names = [f"objects/{i // 1000:04d}/part-{i:06d}.parquet" for i in range(start, min(start + chunk, count))]
        if storage.is_s3:
            storage.fs.pipe({storage.full(name): b"x" for name in names})
        else:
            os.makedirs(storage.full(names[0].rpartition("/")[0]), exist_ok=True)
            for name in names:
                Path(storage.full(name)).write_bytes(b"x")
    before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    clock = Clock()
    found = storage.list("objects")
    result = clock.stop()
    assert len(found) == count
    grown = (resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before) / 2**10
    return {**result, "objects": count, "grown_mib": grown}


STEPS = {
    "plain write": write_plain,
    "write": write_ours,
    "plain read": read_plain,
    "read": read_ours,
    "list": list_versions,
    "list objects": list_objects,
}


class Clock:
    """Seconds that passed, and seconds that all cores worked, in this process."""

    def __init__(self) -> None:
        self._start = (time.perf_counter(), time.process_time())

    def stop(self) -> dict[str, float]:
        return {"seconds": time.perf_counter() - self._start[0], "cpu": time.process_time() - self._start[1]}


def run_step(step: str, root: str, **task: Any) -> dict[str, Any]:
    """One step in its own process."""
    command = [sys.executable, "-m", "benchmarks.releases", "--step", step, "--root", root, "--task", json.dumps(task)]
    done = subprocess.run(command, stdout=subprocess.PIPE, check=True, timeout=1200)
    result: dict[str, Any] = json.loads(done.stdout.splitlines()[-1])
    return result


def total(results: list[dict[str, Any]]) -> dict[str, Any]:
    """Files of one step together."""
    summed = {key: sum(result[key] for result in results) for key in ("seconds", "cpu", "bytes", "rows")}
    return {**summed, "peak_gib": max(result["peak_gib"] for result in results)}


def show_listing(place: str, root: str, objects: int) -> None:
    """Print how long a listing of many objects takes."""
    result = run_step("list objects", root, objects=objects)
    print(
        f"{place:6} list         {result['objects']:,} objects {result['seconds']:.2f} s, cores {result['cpu']:.1f} s, "
        f"{result['grown_mib']:.0f} MiB more memory",
        flush=True,
    )


def compare(place: str, root: str, gigabytes: float, versions: int) -> list[str]:
    """Every step on one storage; prints lines and returns what fell short."""
    storage = Storage(root)
    files, tables = file_plan(gigabytes)
    results: dict[str, list[dict[str, Any]]] = {step: [] for step in STEPS}
    with claim_version(storage, "bench") as claim:
        # File by file in turns, so that a busy machine slows both alike.
        for file in range(files):
            for step in ("plain write", "write") if file % 2 else ("write", "plain write"):
                results[step].append(run_step(step, root, folder=claim.folder, file=file, tables=tables))
        clock = Clock()
        entries = [FileEntry(**result["entry"]) for result in results["write"]]
        version = publish(storage, claim, SCHEMA, entries, ManifestFields(content_digest="bench"))
        results["write"].append({**clock.stop(), "bytes": 0, "rows": 0, "peak_gib": 0})
    for file in range(files):
        for step in ("plain read", "read") if file % 2 else ("read", "plain read"):
            results[step].append(run_step(step, root, reference=version.reference, file=file))
    sums = {step: total(found) for step, found in results.items() if found}
    for step, result in sums.items():
        print(
            f"{place:6} {step:12} {result['bytes'] / 1e9:5.2f} GB {result['seconds']:7.1f} s "
            f"{result['bytes'] / 1e6 / result['seconds']:6.0f} MB/s, cores {result['cpu']:6.1f} s, "
            f"peak {result['peak_gib']:.2f} GiB",
            flush=True,
        )
    short = []
    for step in ("write", "read"):
        plain, ours = sums[f"plain {step}"], sums[step]
        assert ours["rows"] == plain["rows"]
        # Seconds for the same rows: a smaller file must not count as a slower writer.
        ratio = plain["seconds"] / ours["seconds"]
        print(f"{place:6} {step:12} {ratio:.0%} of plain pyarrow's speed (wanted: 60%)")
        short += [f"{place} {step}"] if ratio < 0.6 else []
        short += [f"{place} {step} memory"] if ours["peak_gib"] > 1.5 else []
    result = run_step("list", root, versions=versions)
    print(
        f"{place:6} list         {result['versions']} versions {result['seconds']:.2f} s, from manifests alone "
        f"{result['seconds_without_catalog']:.2f} s (wanted: 5 s)",
        flush=True,
    )
    short += [f"{place} list"] if result["seconds"] > 5 else []
    storage.delete_folder("")
    return short


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--gb", type=float, default=2.0, help="size on disk, in GB")
    parser.add_argument("--versions", type=int, default=1000, help="versions to list")
    parser.add_argument("--objects", type=int, default=0, help="list this many small objects, and do nothing else")
    parser.add_argument("--place", choices=["local", "s3", "both"], default="both")
    parser.add_argument("--folder", default=None, help="where to work; default: a temporary folder")
    parser.add_argument("--step", default=None, help=argparse.SUPPRESS)
    parser.add_argument("--root", help=argparse.SUPPRESS)
    parser.add_argument("--task", type=json.loads, help=argparse.SUPPRESS)
    options = parser.parse_args()
    if options.step is not None:
        result = STEPS[options.step](Storage(options.root), options.task)
        peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 2**20
        print(json.dumps({**result, "peak_gib": peak}))
        return 0
    signal.signal(signal.SIGTERM, lambda *_: sys.exit(1))  # so that the S3 server ends too
    with tempfile.TemporaryDirectory(dir=options.folder, prefix="grape-bench-") as folder:
        short = []

        def measure(place: str, root: str) -> None:
            if options.objects:
                show_listing(place, root, options.objects)
            else:
                short.extend(compare(place, root, options.gb, options.versions))

        if options.place != "s3":
            measure("local", f"{folder}/local")
        if options.place != "local":
            with running_server(Path(folder) / "seaweed") as server:
                os.environ.update(server.environment)
                measure("s3", f"s3://{BUCKET}/bench")
    print(f"fell short: {', '.join(short)}" if short else "all as wanted")
    return 1 if short else 0


if __name__ == "__main__":
    sys.exit(main())
