"""A process may end while Arrow's threads still read ahead over S3: it ends as it should, and soon."""

from __future__ import annotations

import subprocess
import sys
from concurrent.futures import ThreadPoolExecutor

import pyarrow as pa

from grape_service.release.claim import claim_version
from grape_service.release.manifest import ManifestFields
from grape_service.release.writer import publish, write_part
from grape_service.storage.storage import Storage
from tests.workers.training.tiny_release import SCHEMA, make_rows

TIMES = 3
"""Processes for each way to end; without care one in three is aborted or hangs."""

ENDS = {
    "after a few rows": "release.dataset.head(3)",
    "with a reader in hand": "batches = iter(release.dataset.to_batches(batch_size=16)); next(batches)",
    "with a thread that reads": "threading.Thread(target=release.dataset.to_table, daemon=True).start()",
}


def test_processes_end_well(s3_url: str) -> None:
    storage = Storage(s3_url)
    table = pa.Table.from_pylist(make_rows(600, longest=400), schema=SCHEMA)
    with claim_version(storage, "tiny") as claim:
        pieces = [table.slice(start, 100) for start in range(0, 600, 100)]
        entries = [write_part(storage, claim.folder, number, SCHEMA, pieces) for number in range(6)]
        reference = publish(storage, claim, SCHEMA, entries, ManifestFields(content_digest="1")).reference

    def end(way: str) -> tuple[str, int, str]:
        code = (
            f"import threading, grape_service\nrelease = grape_service.load({reference!r})\n{ENDS[way]}\nprint('done')"
        )
        done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, timeout=200)
        return way, done.returncode, done.stdout if done.returncode == 0 else done.stderr[-500:]

    ways = list(ENDS) * TIMES
    with ThreadPoolExecutor(2) as pool:
        assert list(pool.map(end, ways)) == [(way, 0, "done\n") for way in ways]
