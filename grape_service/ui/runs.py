"""Runs that are under way, from the heartbeats in the workspaces."""

from __future__ import annotations

import re
import time
from dataclasses import dataclass
from typing import Any

from grape_service.display import in_order, short
from grape_service.errors import StageError, UserError
from grape_service.release.claim import LATE_SECONDS, STALE_SECONDS
from grape_service.storage.storage import Storage
from grape_service.storage.workspace import refuse_newer
from grape_service.ui.folder import Folder

MAX_ENDED = 20
RUN_ID = re.compile(r"[0-9A-Za-z-]{1,64}")
OF_A_RUN = ("end.json", "heartbeat.json", "config.json")
"""Files of a run's folder that say what it is; a folder of a workspace's runs with none of them is no run."""


@dataclass(frozen=True)
class RunUnderWay:
    """One run by its heartbeat."""

    run_id: str
    name: str
    state: str  # running, silent, dead
    stage: str
    done: int
    total: int
    unit: str
    eta: float | None  # seconds
    seconds: float | None  # since it began
    silent: float  # seconds since the last sign of life


def runs_of(folder: Folder, now: float | None = None) -> tuple[list[RunUnderWay], list[str], str]:
    """Runs with a heartbeat, newest first; ids of the last that ended; a sentence where they cannot be read, or ""."""
    now = time.time() if now is None else now
    alive: list[RunUnderWay] = []
    ended: list[str] = []
    problem = ""
    for workspace in folder.workspaces:
        try:
            refuse_newer(workspace)
            paths = [info.path for info in workspace.list("runs")]
        except (UserError, StageError, OSError) as error:
            problem = str(error)
            continue
        parts = [path.split("/") for path in paths if path.count("/") == 2]
        files = {(run_id, name) for _, run_id, name in parts if RUN_ID.fullmatch(run_id) and name in OF_A_RUN}
        beats = {run_id for run_id, name in files if name == "heartbeat.json"}
        alive += [run for run in (_read(workspace, run_id, now) for run_id in sorted(beats)) if run is not None]
        ended += {run_id for run_id, _ in files} - beats
    alive.sort(key=lambda run: run.run_id, reverse=True)
    return alive, sorted(ended, reverse=True)[:MAX_ENDED], problem


def _read(workspace: Storage, run_id: str, now: float) -> RunUnderWay | None:
    try:
        value: Any = workspace.read_json(f"runs/{run_id}/heartbeat.json")
        beat = float(value["time"])
        started = value.get("started")
        silent = max(0.0, now - beat)
        return RunUnderWay(
            run_id=run_id,
            name=str(value.get("name") or ""),
            state="running" if silent < LATE_SECONDS else "silent" if silent < STALE_SECONDS else "dead",
            stage=str(value.get("stage") or ""),
            done=int(value.get("done") or 0),
            total=int(value.get("total") or 0),
            unit=str(value.get("unit") or ""),
            eta=float(value["eta"]) if value.get("eta") is not None else None,
            seconds=now - float(started) if started is not None else None,
            silent=silent,
        )
    except FileNotFoundError:  # it ended just now
        return None
    except (UserError, KeyError, TypeError, ValueError, AttributeError):
        return RunUnderWay(run_id, "", "damaged heartbeat", "", 0, 0, "", None, None, 0.0)


def run_record(folder: Folder, run_id: str) -> dict[str, Any]:
    """What is known of a run: how it ended, or for one under way its last sign of life, with `state` and `events`.

    Raises UserError where there is no such run, or a newer grape-service has written there.
    """
    for workspace in folder.workspaces:
        check_run_id(run_id)
        for name in OF_A_RUN:
            try:
                value = workspace.read_json(f"runs/{run_id}/{name}")
            except FileNotFoundError:
                continue
            except UserError as error:
                value = {"error": str(error)}
            refuse_newer(workspace)
            if not isinstance(value, dict) or value.keys() == {"error"}:
                return {"run_id": run_id, "state": "damaged record", **(value if isinstance(value, dict) else {})}
            if name == "end.json":
                return {**value, "run_id": run_id, "stage_seconds": in_order(value.get("stage_seconds") or {})}
            if name == "heartbeat.json":
                alive = _read(workspace, run_id, time.time())
                return {**value, "run_id": run_id, "state": alive.state if alive else "ended"}
            return {"run_id": run_id, "name": value.get("name", ""), "state": "ended without a word"}
    raise UserError(f"there is no run '{run_id}' in {folder.address}: see `grape runs list {folder.address}`")


def log_files(folder: Folder, run_id: str) -> list[tuple[str, int]]:
    """(address, bytes) of the log files that tasks and engines of a run have left."""
    check_run_id(run_id)
    found = [(workspace, info) for workspace in folder.workspaces for info in workspace.list(f"runs/{run_id}/logs")]
    return [(workspace.url(info.path), info.size) for workspace, info in found]


def check_run_id(run_id: str) -> None:
    """Raises UserError for what is not the id of a run."""
    if not RUN_ID.fullmatch(run_id):
        raise UserError(f"{short(run_id, 60)!r} is not a run: ids are those of `grape runs list`")
