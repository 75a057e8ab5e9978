"""Rounds: each selects, weighs, releases and trains under the checkpoint of the one before, whatever is killed."""

from __future__ import annotations

import itertools
import json
import os
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from grape_service.config.schema import Config
from grape_service.config.training import TrainConfig
from grape_service.models.newest import resolved
from grape_service.release.changes import changes_of_versions
from grape_service.release.load import load
from grape_service.release.manifest import read_manifest
from grape_service.release.rounds import Rounds, all_rounds, read_rounds, write_rounds
from grape_service.release.tags import read_tag
from grape_service.storage.local import TEMPORARY
from grape_service.storage.storage import Storage
from tests.jobs import Job, pool_rows, tiny_job
from tests.tiny_models import make_model
from tests.workers.training.tiny_release import make_rows, write_release
from workers import run
from workers.outcome import Outcome
from workers.rounds import jobs_on, round_config, round_jobs

pytestmark = [pytest.mark.alone, pytest.mark.timeout(1500)]

TRAINER = """
import pathlib, shutil, sys
from safetensors.numpy import load_file, save_file
output, checkpoint, base = sys.argv[1:4]
folder = pathlib.Path(output)
if (folder.parent.parent / "fail").exists():
    sys.exit("no quota")
shutil.copytree(base, folder / "model", dirs_exist_ok=True)
weights = load_file(folder / "model" / "model.safetensors")
weights = {name: value * 1.5 if value.ndim > 1 else value for name, value in weights.items()}
save_file(weights, folder / "model" / "model.safetensors", metadata={"format": "pt"})
"""


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> str:
    return make_model(tmp_path_factory.mktemp("model"))


def wait_for(job: Job, arguments: tuple[str, ...], seen: Callable[[], bool], timeout: float = 600) -> None:
    """Start `grape`, and kill all its processes as soon as something is seen."""
    process = job.start(*arguments)
    deadline = time.monotonic() + timeout
    while not seen():
        assert process.poll() is None or seen(), process.communicate()[1][-3000:]
        assert time.monotonic() < deadline, "what was waited for did not come"
        time.sleep(0.05)
    job.kill_all()
    process.communicate()


def stages_of(dataset: Path) -> list[dict[str, Any]]:
    """The SFT stage of each training run."""
    paths = sorted(path for path in dataset.glob("runs/*.json") if not path.name.startswith(TEMPORARY))
    return [json.loads(path.read_text())["stages"]["sft"] for path in paths]


def test_three_rounds_that_are_killed_go_on_where_they_were(tmp_path: Path, model: str) -> None:
    sft = {"batch_size": 8, "learning_rate": 0.05, "device": "cpu", "save_steps": 1}
    train = {"sft": sft, "rounds": 3, "refresh": {"max_churn": 1.0}}
    behavior = {"model": model, "dtype": "float32", "engine": "transformers"}
    with tiny_job(tmp_path, model, pool_rows(8), train=train, behavior=behavior, weights={"method": "pear"}) as job:
        run, dataset = ("run", str(job.config_path), "--json"), tmp_path / "datasets" / "tiny"
        wait_for(job, run, lambda: bool(stages_of(dataset)))
        wait_for(job, run, lambda: (dataset / "versions" / "v0002" / "manifest.json").exists())
        outcome = job.run(timeout=900)
        again = job.run(timeout=600)
        job.config["train"] = {**train, "refresh": {"max_churn": 0.0}}
        stopped = job.grape("run", str(job.config_path), "--json", timeout=600)
    output = Storage(str(tmp_path / "datasets"))
    rounds = outcome["rounds"]
    assert [one["name"] for one in rounds] == ["round-1", "round-2", "round-3"]
    versions = [one["version"] for one in rounds]
    assert versions == ["v0001", "v0002", "v0003"]
    assert [one["target"] for one in rounds] == [model, *(one["checkpoint"] for one in rounds[:2])]
    assert len({one["checkpoint"] for one in rounds}) == 3
    assert len(stages_of(dataset)) == 3  # nothing was trained twice
    for one in rounds:
        manifest = read_manifest(output, "tiny", one["version"])
        assert manifest.parents.round == one["name"]
        assert manifest.config["target"]["model"] == one["target"]
        facts = json.loads((Path(one["checkpoint"]) / "complete.json").read_text())
        assert (facts["model"], facts["dataset"]) == (one["target"], one["reference"])
        assert {use.role: use.model for use in manifest.parents.policies} == {
            "target": one["target"],
            "behavior": model,
        }
    for before, one in itertools.pairwise(rounds):
        changes = read_manifest(output, "tiny", one["version"]).counts["changes"]
        assert changes["since"] == before["version"]
        assert one["churn"] == changes["churn"]
        assert changes_of_versions(output, "tiny", before["version"], one["version"]).churn == one["churn"]
    assert rounds[1]["churn"] > 0, "the test needs a training that changes choices"

    def tags() -> dict[str, str]:
        found = [read_tag(output, "tiny", name) for name in ("latest", "round-1", "round-2", "round-3")]
        return {tag.name: tag.version for tag in found if tag is not None}

    assert tags() == {"latest": "v0003", "round-1": "v0001", "round-2": "v0002", "round-3": "v0003"}
    assert (again["rounds"], again["is_new"], again["scored"]) == (rounds, False, 0)
    # A limit that does not hold stops the job before anything is trained, also where it held once.
    assert stopped.returncode == 1
    assert f"round-2: {rounds[1]['churn']:.0%} of the rows are others than in round-1, more than" in stopped.stderr
    assert [(job.state, job.planned) for job in all_rounds(output, "tiny")] == [("stopped", 3)]
    assert tags()["round-3"] == "v0003"


@pytest.mark.long
def test_rows_that_stay_are_weighed_again_and_an_address_that_moves_stays_while_the_job_lasts(
    tmp_path: Path, model: str, tmp_path_factory: pytest.TempPathFactory
) -> None:
    script = tmp_path / "trainer.py"
    script.write_text(TRAINER)
    command = [sys.executable, str(script), "{output}", "{checkpoint}", model]
    train = {"sft": {"command": command, "resources": {"cpus": 0.1}}, "rounds": 2, "refresh": {"select": "keep"}}
    behavior = {"model": model, "dtype": "float32", "engine": "transformers"}
    training = tmp_path / "training"

    def write_checkpoint(step: int) -> str:
        folder = make_model(training / f"checkpoint-{step}", seed=step)
        (training / f"checkpoint-{step}" / "trainer_state.json").write_text("{}")
        return folder

    first = write_checkpoint(1)
    with tiny_job(
        tmp_path, f"{training}/@latest", pool_rows(4), train=train, behavior=behavior, weights={"method": "pear"}
    ) as job:
        dataset = tmp_path / "datasets" / "tiny"
        (dataset / "runs").mkdir(parents=True)
        (dataset / "runs" / "fail").touch()
        failed = job.grape("run", str(job.config_path), "--json")
        assert (failed.returncode, "no quota" in failed.stderr) == (1, True)
        output = Storage(str(tmp_path / "datasets"))
        (job_before,) = all_rounds(output, "tiny")
        assert (job_before.state, job_before.checkpoints) == ("failed", {f"{training}/@latest": first})
        second = write_checkpoint(2)
        os.remove(dataset / "runs" / "fail")
        outcome = job.run()
        assert [one["target"] for one in outcome["rounds"]] == [first, outcome["rounds"][0]["checkpoint"]]
        one, two = (load(f"{tmp_path}/datasets/tiny@round-{number}") for number in (1, 2))
        assert two.manifest.parents.release == one.reference
        assert one.manifest.parents.checkpoints == {f"{training}/@latest": first}
        ids = [release.dataset.to_table(columns=["candidate_id"])["candidate_id"].to_pylist() for release in (one, two)]
        assert ids[0] == ids[1]
        changes = two.manifest.counts["changes"]
        assert (changes["entered"], changes["left"], outcome["rounds"][1]["churn"]) == (0, 0, 0.0)
        assert changes["weight"] > 0
        # The job has ended: the next one starts from what was trained last.
        after = job.run()
        assert after["rounds"][0]["target"] == second


def values(**train: Any) -> dict[str, Any]:
    return {
        "name": "x",
        "pool": {"path": "pool"},
        "target": {"model": "team/m", "revision": "r1"},
        "gather": {
            "policies": {"own": {"model": "team/m", "revision": "r1", "samples": 2}, "big": {"model": "team/b"}}
        },
        "weights": {"method": "pear"},
        "output": {"path": "out", "tags": ["latest"]},
        "train": {"sft": {}, "rl": {"steps": 3}, "rounds": 3, **train},
    }


def test_a_rounds_config_is_the_jobs_with_the_checkpoint_as_target() -> None:
    config = Config.model_validate(values())
    one, three = round_config(config, []), round_config(config, ["/c1", "/c2"])
    assert (one.target, one.gather, one.train, one.output.tags) == (config.target, config.gather, None, [])
    assert (three.target.model, three.target.revision) == ("/c2", None)
    assert three.gather is not None
    assert {name: policy.model for name, policy in three.gather.policies.items()} == {
        "own": "team/m",
        "big": "team/b",
        "own-round-2": "/c1",
        "own-round-3": "/c2",
    }
    assert three.gather.policies["own-round-3"].samples == 2
    assert three.behavior is not None
    assert set(three.behavior.sources or {}) == set(three.gather.policies)
    assert three.behavior.of_source("own-round-3").policy.model == "/c2"  # type: ignore[union-attr]
    plain = config.model_copy(update={"gather": None})
    assert round_config(plain, ["/c1"]).gather is None


def test_a_template_of_the_config_stays_that_of_the_models_that_the_target_came_from() -> None:
    moving = {"model": "f/@latest"}
    policies = {"own": {**moving, "samples": 2}, "big": {"model": "team/b"}}
    given = {**values(), "target": moving, "gather": {"policies": policies}}
    assert round_config(Config.model_validate(given), ["/c1"]).render.chat_template_for == []
    config = Config.model_validate({**given, "render": {"chat_template": "{{ messages[0].content }}"}})
    for checkpoints in ([], ["/c1"], ["/c1", "/c2"]):
        found, _ = resolved(round_config(config, checkpoints), {"f/@latest": "f/checkpoint-1"})
        assert found.gather is not None
        models = {name: found.gather.policy(name) for name in found.gather.policies}
        assert models["own"].model == "f/checkpoint-1"
        own = {name for name, policy in models.items() if found.has_own_template(policy)}
        assert own == {"big"}, f"{models} after {checkpoints}"


def test_rl_comes_after_the_last_round_or_after_each() -> None:
    for after, expected in (("last", [False, False, True]), ("each", [True, True, True])):
        train = Config.model_validate(values(rl={"steps": 3, "after": after})).train
        assert train is not None
        made = [round_jobs(train, number, "/c" if number > 1 else None) for number in (1, 2, 3)]
        assert [one.rl is not None for one in made] == expected
        assert [one.sft.model for one in made if one.sft is not None] == [None, "/c", "/c"]
        assert {one.rounds for one in made} == {1}
    command = TrainConfig.model_validate({"sft": {"command": ["train"]}, "rounds": 2})
    assert round_jobs(command, 2, "/c").sft == command.sft


@pytest.mark.parametrize(
    ("train", "sentence"),
    [
        ({"sft": None}, "rounds need an sft section"),
        ({"sft": {"model": "team/m"}}, r"remove sft\.model"),
        ({"sft": {"lora": {"merge": False}}}, "set sft.lora.merge to true"),
        ({"refresh": {"weights": "keep"}}, "rows that a round chooses have no weights to keep"),
    ],
)
def test_rounds_that_cannot_follow_each_other_are_refused(train: dict[str, Any], sentence: str) -> None:
    with pytest.raises(ValueError, match=sentence):
        Config.model_validate(values(**train))


def test_a_record_is_read_as_it_was_written_and_what_is_none_is_passed_over(tmp_path: Path) -> None:
    storage = Storage(str(tmp_path))
    assert read_rounds(storage, "x", "a") is None
    written = Rounds("a", "x", 3, checkpoints={"f/@latest": "f/checkpoint-1"})
    write_rounds(storage, written)
    assert read_rounds(storage, "x", "a") == written
    for number, value in enumerate(({"rounds": 3}, {**written.to_json(), "updated": "soon"})):
        storage.write_json(f"x/rounds/b{number}.json", value)
    assert all_rounds(storage, "x") == [written]


def test_a_job_that_runs_gives_signs_of_life(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    storage, job = Storage(str(tmp_path)), Rounds("a", "x", 3)
    monkeypatch.setattr(run, "HEARTBEAT_SECONDS", 0.02)
    seen: set[float] = set()
    with run.heartbeat(lambda: write_rounds(storage, job)):
        deadline = time.monotonic() + 30
        while len(seen) < 3 and time.monotonic() < deadline:
            found = read_rounds(storage, "x", "a")
            seen |= {found.updated} if found is not None else set()
            time.sleep(0.01)
    last = read_rounds(storage, "x", "a")
    assert last is not None
    assert len(seen) == 3
    assert last.state_in_words(last.updated + 80) == "running"
    assert last.state_in_words(last.updated + 120) == "no sign of life for 2 min 00 s"


def test_an_equal_release_of_another_target_has_its_own_trained(tmp_path: Path) -> None:
    reference = write_release(tmp_path, make_rows(3), {"target": {"model": "/a"}})
    jobs = TrainConfig.model_validate({"sft": {"epochs": 2}})
    same, other = (jobs_on(jobs, Outcome(reference=reference, target=target)) for target in ("/a", "/b"))
    assert same == jobs
    assert other.sft is not None
    assert (other.sft.model, other.sft.epochs) == ("/b", 2)
    assert jobs_on(jobs, Outcome(reference=reference)) == jobs  # a target with an adapter is no whole model
    alone = TrainConfig.model_validate({"rl": {"rewards": [{"type": "math"}]}})
    started = jobs_on(alone, Outcome(reference=reference, target="/b")).rl
    assert started is not None
    assert started.model == "/b", "RL without SFT starts from the run's own target too"
    commits = ("a" * 40, "b" * 40)
    hub = write_release(tmp_path / "hub", make_rows(3), {"target": {"model": "team/m", "revision": commits[0]}})
    for commit in commits:
        found = jobs_on(jobs, Outcome(reference=hub, target="team/m", target_revision=commit)).sft
        assert found is not None
        assert (found.model, found.revision) == ((None, None) if commit == commits[0] else ("team/m", commit))
    named = TrainConfig.model_validate({"sft": {"model": "/c"}})
    assert jobs_on(named, Outcome(reference=reference, target="/b")) == named
