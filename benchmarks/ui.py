"""How fast `grape ui` answers on S3: the list of all datasets, a dataset of many versions, the first page of rows.

    python -m benchmarks.ui --versions 1000 --rows 1000000

Made-up releases go to a SeaweedFS server of its own; the application is a process of its own, whose memory is its
peak (VmHWM). Each page is asked for three times after the start; the first is the cold one.
"""

from __future__ import annotations

import argparse
import hashlib
import os
import re
import subprocess
import sys
import tempfile
import time
import urllib.request
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

from grape_service.release.claim import claim_version
from grape_service.release.manifest import ManifestFields
from grape_service.release.writer import publish, write_part
from grape_service.storage.storage import Storage
from tests.grape_service.release.made_up import SCHEMA, publish_version, rows
from tests.seaweed import BUCKET, running_server

PART_ROWS = 100_000
ROWS_AT_ONCE = 10_000


def make_versions(storage: Storage, versions: int, names: int) -> None:
    """`versions` small versions over `names` datasets."""
    part = [rows(0, 4)]

    def make(place: int) -> None:
        for number in range(place, versions, names):
            digest = hashlib.sha256(str(number).encode()).hexdigest()
            name = f"set-{place:04d}"
            publish_version(storage, name, parts=part, digest=digest, config={"target": {"model": "made/up"}})

    with ThreadPoolExecutor(16) as pool:
        list(pool.map(make, range(names)))


def make_large(storage: Storage, count: int) -> None:
    """One version of `count` rows."""
    with claim_version(storage, "large") as claim:
        entries = []
        for index, start in enumerate(range(0, count, PART_ROWS)):
            stop = min(count, start + PART_ROWS)
            tables = (rows(at, min(ROWS_AT_ONCE, stop - at)) for at in range(start, stop, ROWS_AT_ONCE))
            entries.append(write_part(storage, claim.folder, index, SCHEMA, tables))
        publish(storage, claim, SCHEMA, entries, ManifestFields(content_digest="large", tags=["latest"]))


def measure(url: str, pages: dict[str, str]) -> None:
    """Start the application, ask for pages, print seconds and memory."""
    command = [sys.executable, "-m", "grape_service.cli", "ui", url, "--port", "0"]
    with subprocess.Popen(command, stdout=subprocess.PIPE, text=True) as process:
        try:
            assert process.stdout is not None
            address = re.search(r"http://\S+", process.stdout.readline() + process.stdout.readline())
            assert address is not None
            deadline = time.monotonic() + 60
            while True:
                try:
                    urllib.request.urlopen(f"{address[0]}static/ui.css", timeout=10).read()
                    break
                except OSError:
                    assert time.monotonic() < deadline, "the application does not start"
                    time.sleep(0.1)
            for what, path in pages.items():
                seconds = []
                for _ in range(3):
                    started = time.monotonic()
                    size = len(urllib.request.urlopen(f"{address[0]}{path}", timeout=60).read())
                    seconds.append(time.monotonic() - started)
                status = Path(f"/proc/{process.pid}/status").read_text()
                peak = int(re.search(r"VmHWM:\s+(\d+)", status)[1]) // 1024  # type: ignore[index]
                shown = ", ".join(f"{value:.2f}" for value in seconds)
                print(f"{what}: {shown} s; {size / 1024:,.0f} KiB of page; peak memory so far {peak} MiB", flush=True)
        finally:
            process.terminate()
            process.wait(30)


def main() -> None:
    """Make, measure."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--versions", type=int, default=1000)
    parser.add_argument("--names", type=int, default=40, help="datasets that the versions belong to")
    parser.add_argument("--rows", type=int, default=1_000_000)
    arguments = parser.parse_args()
    with tempfile.TemporaryDirectory() as folder, running_server(Path(folder) / "s3") as server:
        os.environ.update(server.environment)
        url = f"s3://{BUCKET}/datasets"
        storage = Storage(url)
        started = time.monotonic()
        make_versions(storage, arguments.versions, arguments.names)
        print(f"{arguments.versions:,} versions made in {time.monotonic() - started:.0f} s", flush=True)
        make_large(storage, arguments.rows)
        print(f"{arguments.rows:,} rows made in {time.monotonic() - started:.0f} s", flush=True)
        middle = arguments.rows // 2
        measure(
            url,
            {
                "all datasets": "",
                "a dataset": "datasets/set-0000",
                "first page of rows": "datasets/large/latest/rows",
                "rows from the middle": f"datasets/large/v0001/rows?start={middle}",
                "rows with a text": "datasets/large/v0001/rows?text=answer+p00020",
                "a row": f"datasets/large/v0001/rows/{middle}",
            },
        )


if __name__ == "__main__":
    main()
