"""A pool in the JSON type of Arrow, which datasets write as Json()."""

from __future__ import annotations

import json
from pathlib import Path

import pyarrow as pa
import pyarrow.parquet as pq

from tests.published_pools import ANSWER, CALL, TOOL, USER, Expected


def write_json_type(path: Path) -> list[Expected]:
    """A .parquet file of datasets' Json() type, whole and inside lists; what it becomes."""
    inside = pa.array([json.dumps(message) for message in (TOOL, ANSWER)], pa.string())
    lists = pa.ListArray.from_arrays(
        pa.array([0, 1], pa.int32()), pa.ExtensionArray.from_storage(pa.json_(), inside[1:])
    )
    schema = pa.struct([pa.field("name", pa.string()), pa.field("parameters", pa.json_())])
    parameters = pa.ExtensionArray.from_storage(pa.json_(), pa.array(['{"a": {"type": "integer"}}'], pa.string()))
    tool = pa.StructArray.from_arrays([pa.array(["add"]), parameters], fields=list(schema))
    table = pa.table(
        {
            "prompt": pa.ExtensionArray.from_storage(pa.json_(), pa.array([json.dumps([USER, CALL, TOOL])])),
            "response": lists,
            "tools": pa.ListArray.from_arrays(pa.array([0, 1], pa.int32()), tool),
            "meta": pa.ExtensionArray.from_storage(pa.json_(), pa.array(['{"level": 3}'])),
        }
    )
    path.parent.mkdir(parents=True, exist_ok=True)
    pq.write_table(table, path)
    prompt = [USER, CALL, TOOL]
    return [(prompt, "Hello.", None, {"meta": {"level": 3}})]
