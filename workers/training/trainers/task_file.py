"""Command line of the trainers: one JSON file in, exit status out."""

from __future__ import annotations

import argparse
import os
import sys
from collections.abc import Callable
from typing import Any, TypeVar

import orjson
from pydantic import ValidationError

from grape_service.config.loading import explain
from grape_service.config.training import RlTask, SftTask
from grape_service.errors import StageError, UserError
from grape_service.storage.storage import Storage

Task = TypeVar("Task", SftTask, RlTask)


def read_task(path: str, task_type: type[Task], storage_options: dict[str, Any]) -> Task:
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


def main(task_type: type[Task], run: Callable[[Task], Any]) -> None:
    """Read --settings and run it. A user's mistake ends with one sentence and status 2, a failed stage with 1."""
    parser = argparse.ArgumentParser()
    parser.add_argument("--settings", required=True, help="JSON file with the task, local or s3://")
    options = orjson.loads(os.environ.get("GRAPE_STORAGE_OPTIONS", "{}"))
    try:
        run(read_task(parser.parse_args().settings, task_type, options))
    except (UserError, StageError) as error:
        print(error, file=sys.stderr)
        raise SystemExit(2 if isinstance(error, UserError) else 1) from None
