"""The clocks of stages and of a whole run."""

from __future__ import annotations

import pytest

from grape_service.progress import reporter as reporter_module
from grape_service.progress.reporter import RunClock, Upcoming, duration

pytestmark = pytest.mark.quick


class Clock:
    """A time that tests move."""

    def __init__(self) -> None:
        self.now = 1000.0

    def monotonic(self) -> float:
        return self.now


@pytest.fixture
def clock(monkeypatch: pytest.MonkeyPatch) -> Clock:
    made = Clock()
    monkeypatch.setattr(reporter_module, "time", made)
    return made


AHEAD = [
    Upcoming("prepare", seconds=10),
    Upcoming("score target", tokens=8000),
    Upcoming("select", seconds=2),
    Upcoming("score winners under behavior policy x", tokens=1000),
    Upcoming("weigh", seconds=1),
]


def test_nothing_is_promised_before_the_rate_of_scoring_is_known(clock: Clock) -> None:
    run = RunClock(started=clock.now)
    run.expect(AHEAD)
    stage = run.begin("prepare", 4, "pieces")
    clock.now += 5
    stage.done = 2
    assert stage.eta == pytest.approx(5)
    assert (run.token_rate, run.eta) == (None, None)


def test_what_is_left_is_the_stage_at_work_and_those_ahead(clock: Clock) -> None:
    run = RunClock(started=clock.now)
    run.expect(AHEAD)
    run.begin("prepare", 4, "pieces").done = 4
    clock.now += 9
    run.end("prepare")
    scoring = run.begin("score target", 8000, "tokens")
    assert run.eta is None
    clock.now += 20
    scoring.done = 2000
    assert run.token_rate == pytest.approx(100)
    assert run.eta == pytest.approx(6000 / 100 + 2 + 1000 / 100 + 1)
    clock.now += 60
    scoring.done = 8000
    run.end("score target")
    clock.now += 100  # time between stages does not slow scoring down
    assert run.token_rate == pytest.approx(100)
    assert run.eta == pytest.approx(2 + 10 + 1)
    assert run.seconds == pytest.approx(189)


def test_the_rate_of_an_earlier_run_serves_until_this_one_has_its_own(clock: Clock) -> None:
    run = RunClock(started=clock.now)
    run.expect(AHEAD, token_rate=200)
    run.begin("prepare", 4, "pieces").done = 1
    clock.now += 3
    assert run.eta == pytest.approx(9 + 8000 / 200 + 2 + 1000 / 200 + 1)
    run.expect(AHEAD[1:])
    assert run.token_rate == 200
    run.end("prepare")
    scoring = run.begin("score target", 8000, "tokens")
    clock.now += 10
    scoring.done = 500
    assert run.token_rate == pytest.approx(50)


def test_stages_that_had_nothing_to_do_are_not_waited_for(clock: Clock) -> None:
    run = RunClock(started=clock.now)
    run.expect(AHEAD)
    weigh = run.begin("weigh", 2, "partitions")  # everything had its scores
    clock.now += 1
    weigh.done = 1
    assert run.eta == pytest.approx(1)
    run.end("weigh")
    assert run.eta == 0


def test_durations() -> None:
    assert [duration(seconds) for seconds in (7.6, 250, 11_100)] == ["8 s", "4 min 10 s", "3 h 05 min"]
