"""Ctrl-C while something does not end: after a while the command leaves all the same, and the terminal is whole."""

from __future__ import annotations

from pathlib import Path

import pytest

from tests.jobs import Job, Terminal
from tests.workers.training.tiny_release import make_rows, write_release
from tests.workers.training.webhook import Webhook

PROGRAM = """
import time
import grape_service.cli as cli
from grape_service.progress.bars import shown

def stuck():
    with shown():
        print("shown", flush=True)
        while True:
            try:
                time.sleep(60)
            except KeyboardInterrupt:
                pass

cli.END_SECONDS = 1.0
cli._run = stuck
cli.main()
"""


ABORTED = """
import os, time
import grape_service.cli as cli

def aborted():
    print("shown", flush=True)
    try:
        time.sleep(60)
    except KeyboardInterrupt:
        {before}
        os.abort()

cli._run = aborted
cli.main()
"""


@pytest.mark.parametrize("before", ["pass", "cli._tell()"])
def test_an_abort_on_the_way_out_is_the_same_end(tmp_path: Path, before: str) -> None:
    """Ray aborts a process whose Ray ends while it connects to it."""
    terminal = Terminal(Job(tmp_path, {}), program=("-c", ABORTED.format(before=before)))
    terminal.read_until(b"shown")
    terminal.press_ctrl_c()
    status, text = terminal.wait(60)
    assert status == 130
    assert text.count("error: stopped; run the same command again to resume\n") == 1, text


def test_the_sentence_comes_last_and_the_cursor_is_back_where_the_end_does_not_come(tmp_path: Path) -> None:
    terminal = Terminal(Job(tmp_path, {}), program=("-c", PROGRAM))
    terminal.read_until(b"shown")
    terminal.press_ctrl_c()
    status, text = terminal.wait(60)
    assert status == 130
    assert text.endswith("error: stopped; run the same command again to resume\n"), text
    assert text.count("error: ") == 1
    assert 0 <= text.rfind("\x1b[?25l") < text.rfind("\x1b[?25h"), "the cursor was hidden and is shown again"


def test_a_training_job_that_runs_elsewhere_is_said_to_go_on(tmp_path: Path) -> None:
    reference = write_release(tmp_path / "out", make_rows(3), {})
    config = {
        "name": "tiny",
        "pool": {"path": "p"},
        "target": {"model": "m"},
        "output": {"path": str(tmp_path / "out")},
    }
    with Webhook([{"state": "queued"}]).running() as service:
        job = Job(tmp_path, {**config, "train": {"sft": {"webhook": service.url}}})
        terminal = Terminal(job, "train", reference, "--config", str(job.config_path))
        terminal.read_until(b"says 'queued'")
        terminal.press_ctrl_c()
        status, text = terminal.wait(60)
    assert status == 130
    assert text.endswith(
        "error: no longer followed: a job that runs elsewhere goes on; the same command follows it, and ends it with "
        "--cancel\n"
    ), text
