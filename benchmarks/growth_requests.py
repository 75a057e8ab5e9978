"""Requests to storage that prepare makes for each partition, as pool and partitions grow together; no model, no Ray.

    python benchmarks/growth_requests.py [--partitions 16 64 256 1024] [--plot docs/growth.svg]

The same rows in as many pieces as partitions, each piece a map task and each partition a reduce task, in this process.
Every read, range, listing and write counts as one request. `--before` adds earlier figures to the plot.
"""

from __future__ import annotations

import argparse
import os
import sys
import tempfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT))

from benchmarks.log_plot import log_plot
from grape_service.prepare import plan as planning
from grape_service.storage.storage import Storage
from tests.prepared_pools import make_config, prepare, write_jsonl

REQUESTS = ("read_with_etag", "read_range", "open", "info", "list", "folders", "open_write", "delete_folder")


class CountingStorage(Storage):
    """A storage that counts its requests."""

    def __init__(self, root: str):
        super().__init__(root)
        self.requests = 0
        for name in REQUESTS:
            setattr(self._files, name, self._counted(getattr(self._files, name)))

    def _counted(self, function: Callable[..., Any]) -> Callable[..., Any]:
        def call(*arguments: Any) -> Any:
            self.requests += 1
            return function(*arguments)

        return call


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rows", type=int, default=8192)
    parser.add_argument("--partitions", type=int, nargs="+", default=[16, 64, 256, 1024])
    parser.add_argument("--before", nargs="*", default=[], metavar="PARTITIONS:REQUESTS")
    parser.add_argument("--plot", type=Path, default=None)
    arguments = parser.parse_args()
    os.fsync = lambda _: None  # type: ignore[assignment]  # what is counted does not depend on it
    planning.PIECE_BYTES = 1
    found = [(float(partitions), requests_of(arguments.rows, partitions)) for partitions in arguments.partitions]
    before = [(float(x), float(y)) for x, _, y in (pair.partition(":") for pair in arguments.before)]
    if arguments.plot is not None:
        lines = {"now": found, **({"before": before} if before else {})}
        title = "requests of prepare for each partition"
        arguments.plot.write_text(log_plot(lines, title, "partitions, and pieces"))


def requests_of(rows: int, partitions: int) -> float:
    """Requests for each partition."""
    with tempfile.TemporaryDirectory(prefix="growth-") as folder:
        words = ["word " * (row % 5) for row in range(rows)]
        made = [{"prompt": f"question {row // 2}", "response": f"answer {row} {words[row]}"} for row in range(rows)]
        path = write_jsonl(Path(folder) / "pool.jsonl", made)
        storage = CountingStorage(f"{folder}/workspace")
        config = make_config(path, workers={"partition_bytes": -(-path.stat().st_size // partitions)})
        plan, _ = prepare(config, storage)
        each = storage.requests / plan.num_partitions
    print(f"{plan.num_partitions:6,} partitions, {len(plan.pieces):6,} pieces: {each:7.1f} requests each", flush=True)
    return each


if __name__ == "__main__":
    main()
