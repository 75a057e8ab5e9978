"""What a job reports while it trains: each line of metrics to the trackers that its environment configures.

transformers' own callbacks for them begin a new run at each resume, wait for a server in the training loop, end before
the last evaluation and know of no release; this one goes on with its run, from a thread of its own.
"""

from __future__ import annotations

import contextlib
import os
import queue
import sys
import threading
import time
from collections.abc import Callable, Iterator
from typing import Any

import orjson
from transformers import TrainerCallback

from grape_service.addresses import ask_loopback_directly
from grape_service.models.whole import CheckpointFacts
from grape_service.release.load import Release
from grape_service.release.manifest import without_secrets
from grape_service.release.rounds import all_rounds, round_under_way
from workers.training.tracking import configured, missing
from workers.training.trainers.output import TRACKING_FILE, WANDB_FOLDER, Output, is_of_a_step
from workers.training.trainers.trackers import TRACKERS, About, Line, Tracker, line_of, reason

SEND_SECONDS = 2.0
"""How long lines are gathered for one request."""
RETRY_SECONDS = 30.0
"""How long a server that was away, or refused, is left alone."""
CLOSE_SECONDS = 20.0
"""How long the end of a job waits for what is still to be reported."""


@contextlib.contextmanager
def reported(trainer: Any, output: Output, facts: CheckpointFacts, release: Release) -> Iterator[None]:
    """Inside the block, the trainer's metrics are reported by its first process."""
    wanted = configured(os.environ)
    if not wanted or not trainer.is_world_process_zero():
        yield
        return
    reports = Reports(output, about(facts, release), wanted)
    trainer.add_callback(reports)
    is_finished = False
    try:
        yield
        is_finished = True
    finally:
        reports.end(is_finished)


def about(facts: CheckpointFacts, release: Release) -> About:
    """What a job's trackers are told of it: the release, what it started from, its settings."""
    manifest, stage = release.manifest, facts["stage"]
    target = (manifest.config.get("target") or {}).get("model")
    under_way = round_under_way(all_rounds(release.storage, release.name), release.reference)
    round_ = under_way[1].name if under_way is not None else None
    tags = {
        "stage": stage,
        "dataset": release.reference,
        "version": f"{release.name}@{release.version}",
        "content_digest": manifest.content_digest,
        "target": target,
        "model": facts["model"],
        "run": facts["run"],
        "round": round_,
        "rounds": under_way[0].id if under_way is not None else None,
        "inputs": facts["inputs"],
    }
    return About(
        project=release.name,
        group=f"{release.name}@{release.version}",
        name=" ".join(filter(None, (f"{release.name}@{release.version}", round_, stage))),
        tags={f"grape.{key}": str(value) for key, value in without_secrets(tags).items() if value is not None},
        settings=flat(without_secrets(facts["settings"])),
        dataset={
            "name": f"{release.name}@{release.version}",
            "digest": manifest.content_digest,
            "address": release.reference,
        },
    )


def flat(settings: dict[str, Any], above: str = "") -> dict[str, str]:
    """Settings as text, those in a section by section.key, without those that are null."""
    found: dict[str, str] = {}
    for key, value in settings.items():
        if isinstance(value, dict):
            found |= flat(value, f"{above}{key}.")
        elif value is not None:
            found[above + key] = orjson.dumps(value).decode() if isinstance(value, list) else str(value)
    return found


class Reports(TrainerCallback):
    """Hands each line of metrics to the trackers, which never hold up a step."""

    def __init__(self, output: Output, about: About, wanted: dict[str, str]):
        self.output = output
        self.reporters: list[Reporter] = []
        ask_loopback_directly()
        self._known = output.storage.read_json(TRACKING_FILE) if output.storage.exists(TRACKING_FILE) else {}
        self._lock = threading.Lock()
        for package, variable in wanted.items():
            if problem := missing(package, variable):
                output.note(problem)
                continue
            tracker = TRACKERS[package](about, output.folder)
            run_id = self._known.get(package, {}).get("run")
            self.reporters.append(Reporter(tracker, run_id, self._opened(package), output.note))

    def _opened(self, package: str) -> Callable[[dict[str, str]], None]:
        def opened(where: dict[str, str]) -> None:
            with self._lock:
                if self._known.get(package) != where:
                    self._known[package] = where
                    self.output.storage.write_json(TRACKING_FILE, self._known)

        return opened

    def on_train_begin(self, args: Any, state: Any, control: Any, **_: Any) -> None:
        lines = [line_of(logs["step"], logs) for logs in state.log_history if is_of_a_step(logs)]
        for reporter in self.reporters:
            reporter.start(lines, state.global_step)

    def on_log(self, args: Any, state: Any, control: Any, logs: dict[str, Any] | None = None, **_: Any) -> None:
        if logs and is_of_a_step(logs):
            for reporter in self.reporters:
                reporter.put(line_of(state.global_step, logs))

    def end(self, is_finished: bool) -> None:
        """End the runs, and say what was not reported; takes CLOSE_SECONDS at most."""
        for reporter in self.reporters:
            reporter.put(is_finished)
        deadline = time.monotonic() + CLOSE_SECONDS
        for reporter in self.reporters:
            reporter.wait(deadline - time.monotonic())
        for path in (self.output.folder / WANDB_FOLDER).glob("offline-run-*/*.wandb"):
            self.output.publish(path.relative_to(self.output.folder).as_posix())


class Reporter:
    """One tracker and the thread that asks it. What it has not taken is kept, and sent when it answers again."""

    def __init__(
        self,
        tracker: Tracker,
        run_id: str | None,
        opened: Callable[[dict[str, str]], None],
        note: Callable[[str], None],
    ):
        self.tracker, self.run_id, self.opened, self.note = tracker, run_id, opened, note
        self._news: queue.SimpleQueue[Line | bool] = queue.SimpleQueue()
        self._unsent: list[Line] = []
        self._num_lines = self._num_sent = 0
        self._is_told = self._is_closed = False
        self._first_step = 0
        self._thread = threading.Thread(target=self._report, name=f"reports to {tracker.label}", daemon=True)

    def start(self, lines: list[Line], step: int) -> None:
        """Begin: `lines` is what the checkpoint remembers of the steps until `step`."""
        self._unsent = list(lines)
        self._num_lines += len(lines)
        self._first_step = step
        self._thread.start()

    def put(self, news: Line | bool) -> None:
        """A line, or last of all whether the job has ended well."""
        self._num_lines += not isinstance(news, bool)
        self._news.put(news)

    def wait(self, seconds: float) -> None:
        """Wait for the end; say what is missing then."""
        if not self._thread.ident:  # training ended before its first step
            return
        self._thread.join(max(0.0, seconds))
        if not self._is_closed:
            self._is_told = True  # what the thread still meets is no news
            left = self._num_lines - self._num_sent
            what = f"{left:,} lines of metrics are" if left else "the end of this job is"
            self.note(f"{what} not known to {self.tracker.label}: metrics.jsonl in the job's output has all of them")

    def _report(self) -> None:
        is_open, ended = False, None
        while not self._is_closed:
            try:
                if not is_open:
                    self._open()
                    is_open = True
                self.tracker.send(self._unsent)
                self._num_sent += len(self._unsent)
                self._unsent = []
                if ended is not None:
                    self.tracker.close(ended)
                    self._is_closed = True
            except Exception as error:  # of a library that is no part of training
                is_open = False
                self._tell(error)
                if ended is not None:
                    return
            else:
                self._is_told = False
            if ended is None:
                ended = self._gather(SEND_SECONDS if is_open else RETRY_SECONDS)

    def _open(self) -> None:
        where = self.tracker.open(self.run_id, self._first_step)
        self.opened(where)
        if self.run_id != where["run"]:
            self.run_id = where["run"]
            print(f"reports to {self.tracker.label}: {where}", file=sys.stderr, flush=True)

    def _gather(self, seconds: float) -> bool | None:
        """Take what there is to report for some time; how the job ended, as soon as it has."""
        deadline = time.monotonic() + seconds
        while True:
            try:
                news = self._news.get(timeout=max(0.0, deadline - time.monotonic()))
            except queue.Empty:
                return None
            if isinstance(news, bool):
                return news
            self._unsent.append(news)

    def _tell(self, error: Exception) -> None:
        if not self._is_told:
            self._is_told = True
            self.note(
                f"{self.tracker.label} does not take what this job reports ({reason(error)}): training goes on, and it "
                f"is asked again every {RETRY_SECONDS:.0f} seconds"
            )
