"""What a replica that samples keeps from one unit to the next."""

from __future__ import annotations

import multiprocessing
from dataclasses import replace
from pathlib import Path

import pytest

from grape_service.config.gather import VerifyConfig
from grape_service.gather.verdicts import Verifier
from grape_service.storage.storage import Storage
from tests import tiny_models
from tests.sampling_kills import actor_of, units_of


def verifier_processes() -> list[int | None]:
    return [child.pid for child in multiprocessing.active_children()]


def test_units_are_judged_by_one_process_until_one_fails(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    storage = Storage(str(tmp_path / "workspace"))
    units, actor = units_of(storage), actor_of(tiny_models.make_model(tmp_path / "model"), storage)
    actor.sampling = replace(actor.sampling, verify=VerifyConfig(method="regex", pattern="[0-9]"))
    before = set(verifier_processes())
    for call in range(3):
        actor.score(call, units[call], actor.sampling.sampler)
    (judge,) = set(verifier_processes()) - before
    assert actor.judged == 3 * actor.sampling.samples

    def fails(*_: object) -> None:
        raise OSError("the disk is full")

    with monkeypatch.context() as broken:
        broken.setattr("grape_service.gather.samples.write_parquet", fails)
        with pytest.raises(OSError, match="the disk is full"):
            actor.score(3, units[3], actor.sampling.sampler)
    assert judge not in verifier_processes()
    actor.score(4, units[3], actor.sampling.sampler)
    (other,) = set(verifier_processes()) - before
    assert other != judge
    (idle,) = actor.idle_verifiers
    assert isinstance(idle, Verifier)
    idle.__exit__()
    assert set(verifier_processes()) == before
