"""Runs that are under way, from the heartbeats in the workspaces."""

from __future__ import annotations

import time
from dataclasses import dataclass
from typing import Any

from grape_service.errors import StageError, UserError
from grape_service.release.claim import STALE_SECONDS
from grape_service.storage.storage import Storage
from grape_service.ui.folder import Folder

LATE_SECONDS = 90.0
"""A run that gave no sign of life for so long is stuck or gone."""
MAX_ENDED = 20


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
            paths = [info.path for info in workspace.list("runs")]
        except (UserError, StageError, OSError) as error:
            problem = str(error)
            continue
        beats = {path.split("/")[1] for path in paths if path.endswith("/heartbeat.json") and path.count("/") == 2}
        alive += [run for run in (_read(workspace, run_id, now) for run_id in sorted(beats)) if run is not None]
        ended += sorted({path.split("/")[1] for path in paths if path.count("/") >= 2} - beats)
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
