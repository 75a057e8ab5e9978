"""What a terminal, and a log, shows of a run."""

from __future__ import annotations

import io
import re
import time

import pytest
from rich.console import Console

from grape_service.progress import bars
from grape_service.progress.bars import Bars
from grape_service.progress.reporter import StageClock

pytestmark = pytest.mark.quick


@pytest.mark.parametrize("width", [60, 80, 120])
def test_no_word_is_broken_and_nothing_is_cut(width: int) -> None:
    shown = Bars()
    console = Console(file=io.StringIO(), width=width)
    shown.progress = type(shown.progress)(*bars._columns(width), console=console)
    for name in ("score winners under behavior policy smollm2-brief", "prepare"):
        clock = StageClock(1000, "tokens", started=time.monotonic() - 10, done=500)
        shown.progress.add_task(name, total=1000, completed=500, clock=clock)
    shown.progress.add_task("score target", total=None, clock=StageClock(1000, "tokens", started=time.monotonic()))
    console.print(shown.progress.get_renderable())
    text = console.file.getvalue()  # type: ignore[attr-defined]
    assert "…" not in text
    assert {"winners", "behavior", "smollm2-brief", "50", "tokens/s", "ETA", "10", "s"} <= set(
        re.findall(r"[\w/-]+", text)
    )
    assert "at the first shard" in text
    assert max(len(line) for line in text.splitlines()) <= width


def test_a_log_tells_of_a_stage_before_anything_is_done(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(bars, "LOG_SECONDS", 0.1)
    with Bars() as shown:
        shown.begin("score target", 9477, "tokens")
        deadline = time.monotonic() + 20
        seen = ""
        while "for " not in seen and time.monotonic() < deadline:
            time.sleep(0.05)
            seen += capsys.readouterr().err
        shown.end("score target")
    assert "score target: 9,477 tokens, at the first shard\n" in seen
    assert re.search(r"score target: at the first shard, for \d+ s now\n", seen)


def test_a_slow_rate_is_how_long_one_takes() -> None:
    assert StageClock(5, "pieces", started=time.monotonic() - 22, done=2).rate_text == "11 s a piece"
    assert StageClock(5, "pieces", started=time.monotonic() - 1, done=2).rate_text == "2 pieces/s"
    assert StageClock(5, "tokens", started=time.monotonic() - 1, done=5000).rate_text == "5,000 tokens/s"
