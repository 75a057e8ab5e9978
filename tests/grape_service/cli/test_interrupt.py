"""Ctrl-C while something does not end: after a while the command leaves all the same, and the terminal is whole."""

from __future__ import annotations

import time
from pathlib import Path

from tests.jobs import Job, Terminal

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


def test_the_sentence_comes_last_and_the_cursor_is_back_where_the_end_does_not_come(tmp_path: Path) -> None:
    terminal = Terminal(Job(tmp_path, {}), program=("-c", PROGRAM))
    deadline = time.monotonic() + 60
    while b"shown" not in terminal.output:
        assert time.monotonic() < deadline, terminal.output
        terminal.read(0.05)
    terminal.press_ctrl_c()
    status, text = terminal.wait(60)
    assert status == 130
    assert text.endswith("error: stopped; run the same command again to resume\n"), text
    assert text.count("error: ") == 1
    assert 0 <= text.rfind("\x1b[?25l") < text.rfind("\x1b[?25h"), "the cursor was hidden and is shown again"
