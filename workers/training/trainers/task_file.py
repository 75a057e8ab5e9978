"""Command line of the trainers: one JSON file in, exit status out."""

from __future__ import annotations

import argparse
import os
import sys
import time
from collections.abc import Callable
from typing import Any, TypeVar

import orjson
from pydantic import ValidationError

from grape_service.config.loading import explain
from grape_service.config.training import RlTask, SftTask
from grape_service.errors import StageError, UserError, best_effort
from grape_service.storage.options import StorageOptions
from grape_service.storage.storage import Storage
from workers.training.trainers.checkpoints import ERROR_FILE

Task = TypeVar("Task", SftTask, RlTask)


def read_task(path: str, task_type: type[Task], storage_options: StorageOptions) -> Task:
    """The task in a JSON file, local or s3://. Raises UserError that names the key that is wrong."""
    folder, _, name = path.rpartition("/")
    try:
        values = orjson.loads(Storage(folder or ".", storage_options).read(name))
        return task_type.model_validate(values)
    except FileNotFoundError:
        raise UserError(f"there is no settings file '{path}'") from None
    except orjson.JSONDecodeError as error:
        raise UserError(f"{path} is not JSON: {error}") from None
    except ValidationError as error:
        raise UserError(f"{path}: {explain(error, task_type)}") from None


def _run(run: Callable[[Task], Any], task: Task) -> None:
    """Run a task. Raises UserError too where its settings need a package that is not installed."""
    try:
        run(task)
    except ImportError as error:
        lines = str(error).strip().splitlines() or [type(error).__name__]
        raise UserError(f"train.{task.stage}: these settings need a package that is not there: {lines[0]}") from error


def main(task_type: type[Task], run: Callable[[Task], Any]) -> None:
    """Read --settings and run it. A user's mistake ends with one sentence and status 2, a failed stage with 1."""
    parser = argparse.ArgumentParser()
    parser.add_argument("--settings", required=True, help="JSON file with the task, local or s3://")
    options = orjson.loads(os.environ.get("GRAPE_STORAGE_OPTIONS", "{}"))
    task: Task | None = None
    try:
        task = read_task(parser.parse_args().settings, task_type, options)
        _run(run, task)
    except (UserError, StageError) as error:
        print(f"error: {error}", file=sys.stderr)
        if isinstance(error, UserError) and task is not None:
            # torchrun has an exit status of its own, so whoever follows the job is told by a file.
            with best_effort("write down the error"):
                Storage(task.output, task.storage).write_json(ERROR_FILE, {"error": str(error), "time": time.time()})
        raise SystemExit(2 if isinstance(error, UserError) else 1) from None
