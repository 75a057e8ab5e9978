"""Runs that are killed once a stage has ended, then one that is not: `python -m tests.killed_after CONFIG STAGE…`.

Each is a process of its own, forked from one that has imported everything and started nothing.
"""

from __future__ import annotations

import os
import signal
import sys
from typing import Any

import prefect  # noqa: F401
import ray  # noqa: F401

from grape_service.config.loading import load_config
from workers.pipeline import run_pipeline


def run(path: str, last: str | None) -> str | None:
    """Run a config, and end in the middle of it once the stage `last` has ended; the reference of its release."""

    def as_stage(name: str, function: Any) -> Any:
        def stage(*arguments: Any) -> Any:
            made = function(*arguments)
            if name == last:
                os.kill(os.getpid(), signal.SIGKILL)
            return made

        return stage

    return run_pipeline(load_config(path), as_stage=as_stage).reference


def main(path: str, *stages: str) -> int:
    """The status of the last run, which prints its reference; 1 where another was not killed."""
    for stage in (*stages, None):
        pid = os.fork()
        if pid == 0:
            print(run(path, stage), flush=True)
            os._exit(0)
        status = os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1])
        if stage is not None and status != -signal.SIGKILL:
            print(f"the run that was to be killed after {stage} ended with {status}", file=sys.stderr)
            return 1
    return status


if __name__ == "__main__":
    sys.exit(main(*sys.argv[1:]))
