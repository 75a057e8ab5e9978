"""A job's output folder: checkpoints to resume from, metrics, progress, and what all of it was made of.

The inputs of a job (content of the release, settings, digest of the model) are written first, to inputs.json. Where
the folder holds the work of other inputs, that is moved to a folder of its own, and nothing of it is resumed.
"""

from __future__ import annotations

import contextlib
import json
import math
import os
import shutil
import sys
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from accelerate import PartialState
from transformers import TrainerCallback

from grape_service.errors import UserError
from grape_service.json_types import JsonObject
from grape_service.keys import digest_of
from grape_service.models.whole import CheckpointFacts
from grape_service.storage.options import wait_for_first_answer
from grape_service.storage.storage import Storage
from grape_service.storage.temporary import temporary_folder
from workers.training.trainers import checkpoints
from workers.training.trainers.checkpoints import PROGRESS_FILE

PROGRESS_SECONDS = 2.0
"""How often progress is written, at most."""
INPUTS_FILE = "inputs.json"
METRICS_FILE = "metrics.jsonl"
TRACKING_FILE = "tracking.json"
"""The runs of trackers that a job reports to, by package."""
WANDB_FOLDER = "wandb"
"""Where wandb puts what it has not sent, and all that it is told offline."""
JOB_FILES = ("model", "adapter", METRICS_FILE, PROGRESS_FILE, INPUTS_FILE, TRACKING_FILE, WANDB_FOLDER)
"""What a job leaves in its output beside checkpoint-<step> folders."""


class Output:
    """A job's output folder, and the local folder where it works: the same, or a copy of an s3:// one.

    `inputs`: all that the job's result depends on, as a JSON value.
    """

    def __init__(self, url: str, options: JsonObject, inputs: JsonObject):
        wait_for_first_answer()
        self.storage = Storage(url, options)
        self.inputs = digest_of(inputs)
        self.notes: list[str] = []
        if self.storage.is_s3:
            name = digest_of([self.storage.root, self.inputs], 16)
            self.folder = temporary_folder(f"grape-train-{name}")
        else:
            self.folder = Path(self.storage.root)
            self.folder.mkdir(parents=True, exist_ok=True)
        with PartialState().main_process_first():
            if PartialState().is_main_process:
                self._claim(inputs)
        for path in (self.folder / "model", self.folder / "adapter"):
            if path.is_file():
                raise UserError(f"{path} is a file where the job writes a folder: move it away")

    def _claim(self, inputs: JsonObject) -> None:
        known = self.storage.read_json(INPUTS_FILE) if self.storage.exists(INPUTS_FILE) else {}
        if known.get("digest") == self.inputs:
            return
        names = [*checkpoints.step_folders(self.storage), *JOB_FILES]
        there = {info.path for info in self.storage.list() if info.path.split("/")[0] in names}
        if there - {PROGRESS_FILE}:
            self._move_away(there, known.get("digest") or "unknown")
        self.storage.write_json(INPUTS_FILE, {"digest": self.inputs, **inputs})

    def _move_away(self, paths: set[str], whose: str) -> None:
        taken = set(self.storage.folders())
        names = (f"earlier-{whose[:12]}" + (f"-{number}" if number else "") for number in range(len(taken) + 1))
        place = next(name for name in names if name not in taken)
        if self.storage.is_s3:
            for path in sorted(paths):
                self.storage.fs.copy(self.storage.full(path), self.storage.full(f"{place}/{path}"))
                self.storage.delete(path)
        else:
            (self.folder / place).mkdir()
            for top in sorted({path.split("/")[0] for path in paths}):
                os.replace(self.folder / top, self.folder / place / top)
        self.note(f"{self.storage.root} held a job of other inputs, which is in {place}/ now: training from the start")

    def note(self, sentence: str) -> None:
        """Say something that whoever started the job has to know: in the log, the progress file and the final facts."""
        if PartialState().is_main_process:
            print(sentence, file=sys.stderr, flush=True)
        self.notes.append(sentence)

    def doing(self, words: str) -> None:
        """Write what the job does before it has steps to count."""
        if PartialState().is_main_process:
            self.write_progress({"doing": words})

    def write_progress(self, known: JsonObject) -> None:
        """Write the progress file, with the notes until now."""
        write_progress(self.storage, {**known, "notes": self.notes})

    def publish(self, name: str) -> None:
        """Copy a whole folder or a file of the local folder to where the output is."""
        path = self.folder / name
        if not self.storage.is_s3 or not path.exists():
            return
        if path.is_dir():
            checkpoints.upload(path, self.storage.sub(name))
        else:
            self.storage.write(name, path.read_bytes())

    def resume_from(self) -> str | None:
        """The newest whole checkpoint of these inputs, brought to the local folder; None to start from the beginning.

        A local copy counts where its marker, which lists every file's size and digest, is the one in the output.
        """
        with one_process_first():
            name = checkpoints.last_whole(self.storage, self.inputs)
            if name is not None and self.storage.is_s3:
                local, published = Storage(str(self.folder / name)), self.storage.sub(name)
                if not checkpoints.is_whole(local) or _marker(local) != _marker(published):
                    shutil.rmtree(self.folder / name, ignore_errors=True)
                    checkpoints.download(published, self.folder / name)
        return str(self.folder / name) if name is not None else None


def write_progress(storage: Storage, known: JsonObject) -> None:
    """Write the progress file of a job whose output is `storage`."""
    storage.write_json(PROGRESS_FILE, {**known, "time": time.time()})


def _marker(storage: Storage) -> bytes:
    return storage.read(checkpoints.MARKER)


@contextlib.contextmanager
def one_process_first() -> Iterator[None]:
    """The first process of each machine runs the block before the others."""
    with PartialState().local_main_process_first():
        yield


def callbacks(output: Output, facts: CheckpointFacts) -> list[TrainerCallback]:
    """What a trainer calls to keep its checkpoints, metrics and progress in the output."""
    return [Diverged(), WholeCheckpoints(output, facts), MetricsFile(output), Progress(output)]


class Diverged(TrainerCallback):
    """Ends a job whose figures are no longer numbers: so are its weights, and no checkpoint of them is written."""

    def on_log(self, args: Any, state: Any, control: Any, logs: JsonObject | None = None, **_: Any) -> None:
        for name in ("loss", "grad_norm", "nll", "eval_loss"):
            value = (logs or {}).get(name, 0.0)
            if not math.isfinite(value):
                raise UserError(
                    f"training has diverged: {name} is {value} at step {state.global_step}: lower learning_rate, or "
                    "see whether the model and the weights of its rows are sound"
                )


class EndsAtLastStep:
    """Mixed into a transformers Trainer: resumed from the checkpoint of its last step, it takes no further one."""

    state: Any
    control: Any

    def _run_epoch(self, *arguments: Any, **named: Any) -> None:
        if self.state.global_step >= self.state.max_steps:
            self.control.should_training_stop = True
            return
        super()._run_epoch(*arguments, **named)  # type: ignore[misc]


class WholeCheckpoints(TrainerCallback):
    """Marks each checkpoint when it is written, publishes it, and removes old ones."""

    def __init__(self, output: Output, facts: CheckpointFacts):
        self.output = output
        self.facts = facts

    def on_step_end(self, args: Any, state: Any, control: Any, **_: Any) -> None:
        # The figures since the last line of metrics are kept in no checkpoint: each checkpoint begins a line.
        if control.should_save:
            control.should_log = True

    def on_save(self, args: Any, state: Any, control: Any, **_: Any) -> None:
        PartialState().wait_for_everyone()
        if state.is_world_process_zero:
            name = f"checkpoint-{state.global_step}"
            checkpoints.mark_whole(self.output.folder / name, {**self.facts, "step": state.global_step})
            self.output.publish(METRICS_FILE)
            self.output.publish(name)
            if self.output.storage.is_s3:
                for old in checkpoints.step_folders(self.output.storage)[args.save_total_limit :]:
                    self.output.storage.sub(old).delete(checkpoints.MARKER)
                    self.output.storage.delete_folder(old)
        PartialState().wait_for_everyone()


class MetricsFile(TrainerCallback):
    """Writes each line of metrics to metrics.jsonl in the output folder: each step once, also after a resume."""

    def __init__(self, output: Output):
        self.path = output.folder / METRICS_FILE

    def on_train_begin(self, args: Any, state: Any, control: Any, **_: Any) -> None:
        # What a checkpoint remembers is what happened until it; the file may be another machine's, or go on beyond.
        if state.is_world_process_zero:
            lines = [_metrics_line(logs["step"], logs) for logs in state.log_history if is_of_a_step(logs)]
            self.path.write_text("".join(lines), encoding="utf-8")

    def on_log(self, args: Any, state: Any, control: Any, logs: JsonObject | None = None, **_: Any) -> None:
        if state.is_world_process_zero and logs and is_of_a_step(logs):
            with self.path.open("a", encoding="utf-8") as file:
                file.write(_metrics_line(state.global_step, logs))


def is_of_a_step(logs: JsonObject) -> bool:
    """The trainer's summary at the end is not: after a resume it covers a part of the steps."""
    return "loss" in logs or "eval_loss" in logs


def _metrics_line(step: int, logs: JsonObject) -> str:
    return json.dumps({"step": step, **{key: logs[key] for key in sorted(logs) if key != "step"}}) + "\n"


class Progress(TrainerCallback):
    """Writes where training is to progress.json in the output, for whoever follows the job."""

    def __init__(self, output: Output):
        self.output = output
        self.started, self.first_step, self.written = 0.0, 0, 0.0

    def on_train_begin(self, args: Any, state: Any, control: Any, **_: Any) -> None:
        self.started, self.first_step = time.time(), state.global_step
        begun = f"goes on after step {state.global_step:,}" if state.global_step else "the first step"
        self.output.doing(f"{begun} of {state.max_steps:,}")

    def on_log(self, args: Any, state: Any, control: Any, logs: JsonObject | None = None, **_: Any) -> None:
        now, step = time.time(), state.global_step
        is_last = step >= state.max_steps
        if not state.is_world_process_zero or not logs or "loss" not in logs:
            return
        if now - self.written < PROGRESS_SECONDS and not is_last:
            return
        done = step - self.first_step
        left = (state.max_steps - step) * (now - self.started) / done if done else None
        figures: dict[str, float] = {name: float(logs[name]) for name in ("loss", "ess", "reward") if name in logs}
        self.output.write_progress({"step": step, "steps": state.max_steps, **figures, "seconds_left": left})
        self.written = now
