"""A run without Prefect keeps the time limit too."""

import time

import pytest

from grape_service.errors import StageError, UserError, best_effort
from workers.time_limit import time_limit


def test_a_block_ends_when_its_time_is_over(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("GRAPE_FLOW_TIMEOUT_SECONDS", "0.2")
    started = time.monotonic()
    with pytest.raises(StageError, match=r"GRAPE_FLOW_TIMEOUT_SECONDS allows, 0\.2 seconds"), time_limit():
        _wait()
    assert time.monotonic() - started < 5


def _wait() -> None:
    with best_effort("wait"):  # which gives up errors, but not this
        time.sleep(30)
    raise AssertionError


@pytest.mark.parametrize("value", ["soon", "-1", "nan", "0"])
def test_a_limit_that_is_none(value: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("GRAPE_FLOW_TIMEOUT_SECONDS", value)
    with pytest.raises(UserError, match="GRAPE_FLOW_TIMEOUT_SECONDS is"), time_limit():
        pass
