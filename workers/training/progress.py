"""Where a job of our own trainers is, told while it runs: step, loss, effective sample size, reward, time left."""

from __future__ import annotations

import time
from collections.abc import Callable
from typing import Any

from grape_service.progress.reporter import duration
from grape_service.storage.storage import Storage
from workers.training.trainers.checkpoints import PROGRESS_FILE

LOOK_SECONDS = 2.0
SAY_SECONDS = 10.0


class JobProgress:
    """Reads the progress file of a job's output and says a line when it has moved, every SAY_SECONDS at most."""

    def __init__(self, output: Storage, stage: str, started: float, say: Callable[[str], None]):
        self.output, self.stage, self.started, self.say = output, stage, started, say
        self.looked = self.said = 0.0
        self.step = -1

    def look(self, last: bool = False) -> None:
        """Look, unless that was just done; `last`: the job has ended, and its last step is told."""
        now = time.time()
        if not last and now - max(self.looked, self.said - LOOK_SECONDS + SAY_SECONDS) < LOOK_SECONDS:
            return
        self.looked = now
        if not self.output.exists(PROGRESS_FILE):
            return
        known = self.output.read_json(PROGRESS_FILE)
        if known["time"] >= self.started and known["step"] != self.step:
            self.step, self.said = known["step"], now
            self.say(progress_line(self.stage, known))


def progress_line(stage: str, known: dict[str, Any]) -> str:
    """What a progress file says, as one line."""
    words = [f"{stage}: step {known['step']:,} of {known['steps']:,}"]
    words += [
        f"{label} {known[name]:.4g}"
        for name, label in (("loss", "loss"), ("ess", "effective sample size"), ("reward", "reward"))
        if known.get(name) is not None
    ]
    if known.get("seconds_left"):
        words.append(f"ETA {duration(known['seconds_left'])}")
    return ", ".join(words)
