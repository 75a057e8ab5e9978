"""Where a job is, told while it runs: in words until there are steps, then step, loss, reward and time left."""

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
    """Reads the progress file of a job's output and says a line when it has moved, every SAY_SECONDS at most.

    `is_ours`: only our own trainers write that file; of other jobs it is told that they wait or run.
    """

    def __init__(self, output: Storage, stage: str, started: float, say: Callable[[str], None], is_ours: bool = True):
        self.output, self.stage, self.started, self.say, self.is_ours = output, stage, started, say, is_ours
        self.looked = self.said = 0.0
        self.step = -1
        self.words = ""
        self.notes: list[str] = []

    def look(self, last: bool = False, waits_for: str | None = None) -> None:
        """Look, unless that was just done; `last`: the job has ended, and its last step is told; `waits_for`: what the
        job is not started for yet."""
        if waits_for is not None:
            self._say_words(f"waits for {waits_for}")
            return
        if not self.is_ours:
            self._say_words("" if last else "runs")
            return
        now = time.time()
        if not last and now - self.looked < LOOK_SECONDS:
            return
        self.looked = now
        known: dict[str, Any] = {"time": 0.0}
        if self.output.exists(PROGRESS_FILE):
            known = self.output.read_json(PROGRESS_FILE)
        if known["time"] < self.started:
            self._say_words("" if last else "starts")
            return
        for note in known.get("notes", []):
            if note not in self.notes:
                self.notes.append(note)
                self.say(f"{self.stage}: {note}")
        if "step" not in known:
            self._say_words("" if last else known.get("doing", ""))
        elif known["step"] != self.step and (last or now - self.said >= SAY_SECONDS):
            self.step, self.said = known["step"], now
            self.say(progress_line(self.stage, known))

    def _say_words(self, words: str) -> None:
        if words and words != self.words:
            self.words = words
            self.say(f"{self.stage}: {words}")


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
