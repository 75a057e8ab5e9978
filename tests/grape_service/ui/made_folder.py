"""A folder of datasets for the pages: real releases with a workspace, and text that wants to break the pages."""

from __future__ import annotations

import time
from pathlib import Path

import pyarrow as pa
from starlette.testclient import TestClient

from grape_service.release.load import Release
from grape_service.release.manifest import Parents, PolicyUse, PoolFile
from grape_service.rows.columns import REJECT
from grape_service.storage.parquet import write_parquet
from grape_service.storage.storage import Storage
from grape_service.ui.app import create_app
from grape_service.ui.folder import Folder
from tests.grape_service.release.made_up import SCHEMA, publish_version, rows
from tests.grape_service.report.made_releases import make_release

HOSTILE = "<script>window.hacked=1</script><img src=x onerror='window.hacked=1'>"
POOL = "/datasets/pool/v0001"
TABS = ["", "/report", "/report.html", "/rows", "/rows/0", "/left-out", "/card", "/files", "/config"]
"""Pages of a version, below its own."""
HIDDEN = "\u202egnp.exe\u200b"


def client_of(folder: Folder, token: str | None = None, host: str = "127.0.0.1:8765") -> TestClient:
    """A browser of a folder's pages, without JavaScript."""
    return TestClient(create_app(folder, token), base_url=f"http://{host}", raise_server_exceptions=False)


def make_folder(folder: Path) -> Path:
    """`datasets` with pool v0001 and v0002 (candidates in the workspace) and hostile v0001; a run under way."""
    first_wins(folder)
    last_wins(folder)
    datasets, workspace = Storage(str(folder / "datasets")), Storage(str(folder / "workspace"))
    hostile(datasets)
    known: dict[str, list[object]] = {
        "file": [HOSTILE, "b.jsonl"],
        "row": [3, 4],
        "prompt_id": [HOSTILE, None],
        "candidate_id": ["c", None],
        "reason": ["empty", "not JSON"],
        "detail": [HIDDEN, "x" * 5_000],
    }
    rejects = pa.table({name: known.get(name, [None, None]) for name in REJECT.names}, REJECT)
    write_parquet(workspace, "prepared/prepared-1/rejects/b.parquet", REJECT, [rejects])
    beat = {"run_id": "r1", "time": time.time(), "pid": 1, "name": HOSTILE, "started": time.time() - 70}
    beat |= {"stage": "score", "done": 30, "total": 120, "unit": "tokens", "eta": 75.0}
    workspace.write_json("runs/20260101T000000-aaaaaaaa/heartbeat.json", beat)
    workspace.write_json("runs/20260101T000001-bbbbbbbb/heartbeat.json", {**beat, "time": time.time() - 600})
    workspace.write("runs/20260101T000002-cccccccc/heartbeat.json", b"{")
    workspace.write_json("runs/20250101T000000-dddddddd/config.json", {})
    return folder / "datasets"


def first_wins(folder: Path) -> Release:
    return make_release(folder, "one", lambda prompt, place: -1.0 - place - 0.01 * prompt)


def last_wins(folder: Path) -> Release:
    return make_release(folder, "two", lambda prompt, place: -1.0 - (2 - place if prompt % 3 == 0 else place))


def hostile(datasets: Storage) -> None:
    """A version in which every text comes from somebody who means harm."""
    table = rows(0, 30)
    messages = [
        [{"role": "user", "content": f"{HOSTILE}{HIDDEN}{i}"}, {"role": "assistant", "content": HOSTILE}]
        for i in range(30)
    ]
    for name, values in (("messages", messages), ("source", [HOSTILE] * 30), ("topic", [HIDDEN] * 30)):
        index = SCHEMA.get_field_index(name)
        table = table.set_column(index, SCHEMA.field(name), pa.array(values, SCHEMA.field(name).type))
    pool = [PoolFile(path=f"/pool/{HOSTILE}{i}", size=3) for i in range(20)]
    publish_version(
        datasets,
        "hostile",
        parts=[table],
        parents=Parents(
            pool=pool,
            prompts=pool[:1],
            policies=[PolicyUse(role="target", policy_id="p", model=HOSTILE)],
            workspace="/etc",
            prepare_id="../../../etc/passwd",
        ),
        config={"target": {"model": HOSTILE, "trust_remote_code": True}, "storage": {"secret": "hunter2"}, "x": HIDDEN},
        counts={"pool": {"rows_in": 40, "rows": 30, "rejected": 10, "rejected_by_reason": {HOSTILE: 10}}},
    )
