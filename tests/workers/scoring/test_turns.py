"""Seconds of an engine that units share."""

from __future__ import annotations

import threading
import time

import pytest

from workers.scoring.turns import Turns

pytestmark = pytest.mark.quick


def test_units_that_share_an_engine_have_its_seconds_between_them() -> None:
    turns = Turns()
    seconds: list[float] = []
    both = threading.Barrier(2)

    def work(alone: float) -> None:
        with turns.turn() as turn:
            both.wait()
            time.sleep(0.3)
            both.wait()
            time.sleep(alone)
        seconds.append(turn.seconds)

    threads = [threading.Thread(target=work, args=(alone,)) for alone in (0.0, 0.3)]
    started = time.monotonic()
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    whole = time.monotonic() - started
    assert sum(seconds) == pytest.approx(whole, abs=0.05)
    assert seconds[1] - seconds[0] == pytest.approx(0.3, abs=0.1)  # the second had the engine for itself at the end
    time.sleep(0.2)
    with turns.turn() as turn:  # what nobody had the engine for is nobody's
        pass
    assert turn.seconds < 0.05
