"""Memory and time of exports from S3 to S3, by the number of rows.

    python -m benchmarks.exports --rows 20000 100000 1000000 --formats ms-swift verl llamafactory

Made-up releases of files of 100,000 rows go to a SeaweedFS server of its own. Each export is a process of its own; its
memory is its peak (VmHWM), the imports (about 130 MiB) included, and its resident size as it goes.
"""

from __future__ import annotations

import argparse
import os
import re
import subprocess
import sys
import tempfile
import threading
import time
from pathlib import Path

from benchmarks.ui import make_large
from grape_service.exports import export
from grape_service.release.load import load
from grape_service.storage.storage import Storage
from tests.seaweed import BUCKET, running_server


def status(field: str) -> int:
    """MiB of this process: VmRSS now, VmHWM at its peak."""
    text = Path("/proc/self/status").read_text()
    return int(re.search(rf"{field}:\s+(\d+)", text)[1]) // 1024  # type: ignore[index]


def one_export(reference: str, to: str, folder: str) -> None:
    """Export, and print what it took."""
    seen: list[int] = []
    ended = threading.Event()

    def watch() -> None:
        while not ended.wait(0.5):
            seen.append(status("VmRSS"))

    threading.Thread(target=watch, daemon=True).start()
    started = time.monotonic()
    rows = export(load(reference), to, folder).rows
    ended.set()
    quarters = [max(seen[len(seen) * k // 4 : len(seen) * (k + 1) // 4] or [0]) for k in range(4)]
    print(
        f"{to:<16} {rows:>9,} rows  {time.monotonic() - started:5.1f} s  peak {status('VmHWM')} MiB; "
        f"most in each quarter of the time {quarters} MiB",
        flush=True,
    )


def main() -> None:
    """Make, export."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--rows", type=int, nargs="+", default=[20_000, 100_000, 1_000_000])
    parser.add_argument("--formats", nargs="+", default=["ms-swift", "verl", "llamafactory"])
    parser.add_argument("--one", nargs=3, help=argparse.SUPPRESS)
    arguments = parser.parse_args()
    if arguments.one:
        one_export(*arguments.one)
        return
    with tempfile.TemporaryDirectory() as folder, running_server(Path(folder) / "s3") as server:
        os.environ.update(server.environment)
        for count in arguments.rows:
            place = f"s3://{BUCKET}/rows-{count}"
            make_large(Storage(place), count)
            for to in arguments.formats:
                command = [sys.executable, "-m", "benchmarks.exports", "--one"]
                subprocess.run([*command, f"{place}/large@latest", to, f"s3://{BUCKET}/{to}-{count}"], check=True)


if __name__ == "__main__":
    main()
