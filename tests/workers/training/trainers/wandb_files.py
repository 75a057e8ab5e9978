"""W&B's offline files, read without its server."""

from __future__ import annotations

import json
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

HEAD_BYTES = 7


def offline_run(folder: Path, run_id: str) -> tuple[list[dict[str, Any]], dict[str, Any], dict[str, Any]]:
    """The rows, the config and the summary of wandb's offline files below a folder, in wandb's own messages."""
    from wandb.proto import wandb_internal_pb2

    rows: list[dict[str, Any]] = []
    config: dict[str, Any] = {}
    summary: dict[str, Any] = {}
    files = sorted(folder.rglob(f"run-{run_id}.wandb"))
    assert files
    deadline = time.monotonic() + 30
    while any(file.stat().st_size <= HEAD_BYTES for file in files):  # wandb's own process writes after `finish` too
        assert time.monotonic() < deadline
        time.sleep(0.1)
    for data in (data for file in files for data in records(file.read_bytes())):
        record = wandb_internal_pb2.Record()
        record.ParseFromString(data)
        if record.WhichOneof("record_type") == "run":
            config |= {key_of(entry): json.loads(entry.value_json) for entry in record.run.config.update}
        if record.WhichOneof("record_type") == "summary":
            summary |= {key_of(entry): json.loads(entry.value_json) for entry in record.summary.update}
        if record.WhichOneof("record_type") == "history":
            rows.append({key_of(item): json.loads(item.value_json) for item in record.history.item})
    return rows, config, summary


def key_of(item: Any) -> str:
    return item.key or "/".join(item.nested_key)


def records(data: bytes) -> Iterator[bytes]:
    """The records of a file of wandb's: LevelDB's log format in blocks of 32 KiB, after a head."""
    position, parts = HEAD_BYTES, b""
    while position < len(data):
        if 2**15 - position % 2**15 < 7:
            position += 2**15 - position % 2**15
            continue
        length, kind = int.from_bytes(data[position + 4 : position + 6], "little"), data[position + 6]
        parts += data[position + 7 : position + 7 + length]
        position += 7 + length
        if kind in (1, 4):  # whole, or the last part
            yield parts
            parts = b""
