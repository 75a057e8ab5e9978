"""Progress of a job elsewhere: lines in its log, replayed to the reporter of whoever follows it."""

from __future__ import annotations

from collections.abc import Iterator, Sequence

import pytest

from grape_service.progress import log_lines
from grape_service.progress.log_lines import Lines, Replay
from grape_service.progress.reporter import Silent, Upcoming, set_reporter

pytestmark = pytest.mark.quick


class Steps:
    """Keeps what it is told."""

    def __init__(self) -> None:
        self.told: list[tuple[object, ...]] = []

    def started(self, run_id: str) -> None:
        self.told.append(("started", run_id))

    def expect(self, upcoming: Sequence[Upcoming], token_rate: float | None = None) -> None:
        self.told.append(("expect", list(upcoming), token_rate))

    def begin(self, stage: str, total: int, unit: str) -> None:
        self.told.append(("begin", stage, total, unit))

    def advance(self, stage: str, amount: int) -> None:
        self.told.append(("advance", stage, amount))

    def end(self, stage: str) -> None:
        self.told.append(("end", stage))

    def event(self, text: str) -> None:
        self.told.append(("event", text))


@pytest.fixture
def steps() -> Iterator[Steps]:
    made = Steps()
    set_reporter(made)
    yield made
    set_reporter(Silent())


def test_steps_arrive_however_the_log_is_cut(
    steps: Steps, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    lines = Lines()
    lines.started("run-1")
    lines.expect([Upcoming("weigh", seconds=1.5), Upcoming("score target", tokens=100)], 50.0)
    lines.begin("score target", 100, "tokens")
    lines.advance("score target", 30)  # too soon to tell
    lines.advance("score target", 20)
    monkeypatch.setattr(log_lines, "LINE_SECONDS", 0.0)
    lines.advance("score target", 10)
    lines.event("shard a/b failed:\n@grape is a word")
    lines.advance("score target", 40)
    lines.end("score target")
    log = "a line of a library\n" + capsys.readouterr().err + "{\n}\n"
    for size in (1, 7, len(log)):
        steps.told.clear()
        written: list[str] = []
        replay = Replay(written.append)
        for start in range(0, len(log), size):
            replay(log[start : start + size])
        assert steps.told == [
            ("started", "run-1"),
            ("expect", [Upcoming("weigh", 1.5), Upcoming("score target", tokens=100)], 50.0),
            ("begin", "score target", 100, "tokens"),
            ("advance", "score target", 60),
            ("event", "shard a/b failed:\n@grape is a word"),
            ("advance", "score target", 40),
            ("end", "score target"),
        ]
        assert "".join(written) == "a line of a library\n{\n}\n"


STEP = ("advance", "weigh", 5)
TORN: list[tuple[str, list[tuple[object, ...]], str]] = [
    ('@grape ["begin", "sc', [], ""),
    ('@grape ["advance", "never begun", 5]', [], ""),
    ('@grape ["advance", "weigh", "many"]', [], ""),
    ('@grape ["frobnicate", 1]', [], ""),
    ("@grape {}", [], ""),
    ('@grape ["advance", "we@grape ["advance", "weigh", 5]', [STEP], ""),
    ('words@grape ["advance", "weigh", 5]more', [STEP], "words\nmore\n"),
    ("words about @grape lines", [], "words about @grape lines\n"),
]


@pytest.mark.parametrize(("line", "told", "words"), TORN)
def test_a_torn_line_is_left_out(line: str, told: list[tuple[object, ...]], words: str, steps: Steps) -> None:
    written: list[str] = []
    replay = Replay(written.append)
    replay('@grape ["begin", "weigh", 9, "files"]\n')
    replay(f"{line}\n" + '@grape ["end", "weigh"]\nlast\n')
    assert steps.told == [("begin", "weigh", 9, "files"), *told, ("end", "weigh")]
    assert "".join(written) == f"{words}last\n"
