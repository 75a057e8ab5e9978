"""What is known before a training job starts: the model, its tokenizer; and what is told while it runs."""

from __future__ import annotations

import time
from pathlib import Path
from typing import Any

import pytest

import grape_service
from grape_service.config.local_paths import resolved_model
from grape_service.config.policy import PolicyConfig
from grape_service.config.training import SftSettings
from grape_service.errors import UserError
from grape_service.models.tokenizer import load_tokenizer
from grape_service.models.vocabulary import Vocabulary
from grape_service.release.manifest import Parents, PolicyUse
from grape_service.storage.storage import Storage
from tests.tiny_models import make_model
from tests.workers.training.tiny_release import make_rows, write_release
from workers.training.base_model import base_model, check_local_model
from workers.training.progress import JobProgress
from workers.training.request import with_target

pytestmark = pytest.mark.alone


@pytest.fixture(scope="module")
def models(tmp_path_factory: pytest.TempPathFactory) -> dict[str, str]:
    folder = tmp_path_factory.mktemp("models")
    return {name: make_model(folder / name, template=name) for name in ("chatml", "llama3")}


def release_of(folder: Path, model: str, digest: str) -> Any:
    use = PolicyUse(role="target", policy_id="t", model=model, tokenizer_digest=digest)
    return grape_service.load(
        write_release(folder, make_rows(4), {"target": {"model": model}}, parents=Parents(policies=[use]))
    )


def test_another_models_tokenizer_is_refused(models: dict[str, str], tmp_path: Path) -> None:
    model = models["chatml"]
    digest = Vocabulary(load_tokenizer(model, PolicyConfig(model=model))).digest
    release = release_of(tmp_path, model, digest)
    check_local_model(release, SftSettings())
    with pytest.raises(UserError, match=r"holds tokens of the tokenizer of '.*chatml', which is not that of"):
        check_local_model(release, SftSettings(model=models["llama3"]))


def test_a_model_that_is_not_there_is_named_before_a_job_starts(tmp_path: Path) -> None:
    release = release_of(tmp_path, "./models/gone", "x")
    with pytest.raises(UserError, match=r"models/gone is not the folder of a model: give train\.sft\.model"):
        check_local_model(release, SftSettings())


def test_the_configs_target_counts_and_local_folders_are_resolved(
    models: dict[str, str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(Path(models["chatml"]).parent)
    assert resolved_model("chatml") == str(Path(models["chatml"]))
    assert resolved_model("Qwen/Qwen2.5-7B") == "Qwen/Qwen2.5-7B"
    assert with_target(SftSettings(), "chatml").model == str(Path(models["chatml"]))
    assert with_target(SftSettings(model="a/b"), "chatml").model == "a/b"
    release = release_of(tmp_path, "released", "x")
    assert base_model(release, SftSettings()) == "released"


def test_progress_is_said_once_for_each_step_that_is_seen(tmp_path: Path) -> None:
    storage, said = Storage(str(tmp_path)), []
    progress = JobProgress(storage, "sft", time.time(), said.append)
    progress.look()
    known = {"step": 3, "steps": 12, "loss": 1.23456, "ess": 0.5, "seconds_left": 90.0, "time": time.time() + 1}
    storage.write_json("progress.json", known)
    progress.look(last=True)
    progress.look(last=True)
    assert said[0] == "sft: starts"
    assert len(said) == 2
    assert said[1].startswith("sft: step 3 of 12, loss 1.235, effective sample size 0.5, ETA ")
    earlier = JobProgress(storage, "sft", time.time() + 100, said.append)
    earlier.look(last=True)
    assert len(said) == 2


def test_before_the_first_step_a_job_says_in_words_what_it_does(tmp_path: Path) -> None:
    storage, said = Storage(str(tmp_path)), []
    progress = JobProgress(storage, "rl", time.time() - 1, said.append)
    progress.look(waits_for="2 GPUs")
    for known in ({"doing": "loads the model"}, {"doing": "the first step of 9", "notes": ["7 of 8 answers are cut"]}):
        storage.write_json("progress.json", {**known, "time": time.time()})
        progress.looked = 0.0
        progress.look()
    assert said == [
        "rl: waits for 2 GPUs",
        "rl: loads the model",
        "rl: 7 of 8 answers are cut",
        "rl: the first step of 9",
    ]
