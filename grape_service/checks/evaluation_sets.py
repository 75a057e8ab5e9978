"""Texts of evaluation sets, which are given as files."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import orjson
import pyarrow.parquet as pq

from grape_service.errors import UserError
from grape_service.storage.options import StorageOptions
from grape_service.storage.storage import Storage


def evaluation_items(files: list[str], options: StorageOptions) -> Iterator[str]:
    """Every text in .jsonl, .json and .parquet rows, every line of .txt. Raises UserError naming a bad file."""
    for address in files:
        folder, _, name = str(address).rpartition("/")
        storage = Storage(folder or ".", options)
        try:
            if name.endswith(".parquet"):
                with storage.open(name) as file:
                    for row in pq.read_table(file, page_checksum_verification=True).to_pylist():
                        yield from _strings(row)
                continue
            data = storage.read(name)
            if name.endswith(".txt"):
                yield from data.decode().splitlines()
            elif name.endswith(".jsonl"):
                for line in data.splitlines():
                    if line.strip():
                        yield from _strings(orjson.loads(line))
            elif name.endswith(".json"):
                yield from _strings(orjson.loads(data))
            else:
                raise UserError(f"{address} is no evaluation set: give .jsonl, .json, .parquet or .txt files")
        except FileNotFoundError as error:
            raise UserError(f"checks.contamination.files names {address}, which does not exist") from error
        except (orjson.JSONDecodeError, UnicodeDecodeError) as error:
            raise UserError(f"the evaluation set {address} cannot be read: {error}") from error


def _strings(value: Any) -> Iterator[str]:
    if isinstance(value, str):
        yield value
    elif isinstance(value, dict):
        for item in value.values():
            yield from _strings(item)
    elif isinstance(value, list):
        for item in value:
            yield from _strings(item)
