"""A run is named by all that it is made of, and mistakes in a train section are told."""

from __future__ import annotations

import os
import sys
from pathlib import Path
from typing import Any

import pytest

import grape_service
from grape_service.config.loading import parse_config
from grape_service.config.training import SftJob, TrainConfig
from grape_service.errors import UserError
from tests.tiny_models import make_model
from tests.workers.training.tiny_release import make_rows, write_release
from workers.training import runs
from workers.training.request import NO_TARGET, Target, starting_model


def test_a_run_is_named_by_all_that_it_is_made_of(reference: str, model: str, tmp_path: Path) -> None:
    base = {"command": ["a"], "working_dir": str(tmp_path / "code")}
    (tmp_path / "code").mkdir()
    (tmp_path / "code" / "train.py").write_text("1")
    other = make_model(tmp_path / "other", seed=5)

    def id_of(section: dict[str, Any], release: str = reference, key: str | None = None, target: str = model) -> str:
        opened = grape_service.load(release)
        return runs.run_id_of(runs.inputs_of(opened, TrainConfig(sft=section).jobs, key, runs.Target(target)))

    ids = [id_of(base)]
    assert [
        id_of({**base, **over}) for over in ({"attempts": 3}, {"timeout_seconds": 9}, {"resources": {"cpus": 2}})
    ] == (ids * 3), "what has no effect on the result names no other run"
    ids += [id_of({**base, "environment": {"A": "b"}}), id_of({**base, "resources": {"gpus": 2}}), id_of(base, key="b")]
    ids += [id_of(base, target=other), id_of({**base, "output": "x"}), id_of({"model": other}), id_of({})]
    ids += [id_of({"learning_rate": 0.5}), id_of({}, target=other)]
    ids.append(id_of(base, write_release(tmp_path / "out", make_rows(3), {"target": {"model": model}})))
    (tmp_path / "code" / "train.py").write_text("2")
    ids.append(id_of(base))
    tokenizer = Path(other) / "tokenizer_config.json"
    tokenizer.write_text(tokenizer.read_text() + " ")
    ids.append(id_of(base, target=other))
    (Path(other) / "additional_chat_templates").mkdir()
    (Path(other) / "additional_chat_templates" / "rag.jinja").write_text("{{ 1 }}")
    ids.append(id_of(base, target=other))
    assert len(set(ids)) == len(ids)


def test_rl_alone_starts_from_the_revision_that_was_scored(tmp_path: Path) -> None:
    target = {"model": "team/m", "revision": "r1"}
    release = grape_service.load(write_release(tmp_path, make_rows(3), {"target": target}))
    section: dict[str, Any] = {"rewards": [{"type": "math"}]}

    def start(target: Target = NO_TARGET, **over: Any) -> tuple[str, str | None] | None:
        return starting_model(release, TrainConfig(rl={**section, **over}).jobs["rl"], target)

    assert start() == ("team/m", "r1")
    assert start(Target("team/m", "r2")) == ("team/m", "r2")
    assert start(model="team/n") == ("team/n", None)


def test_prompts_and_rewards_name_a_run_by_their_content(reference: str, model: str, tmp_path: Path) -> None:
    (tmp_path / "code" / "judges").mkdir(parents=True)
    (tmp_path / "code" / "judges" / "__init__.py").write_text("from judges.short import score\n")
    judge, prompts = tmp_path / "code" / "judges" / "short.py", tmp_path / "p.jsonl"
    helper = tmp_path / "code" / "judges_helper.py"
    judge.write_text("def score(prompt, response, row): return 1.0\n")
    prompts.write_text('{"prompt": "1+1?"}\n')
    section = {
        "model": model,
        "prompts": {"path": str(prompts)},
        "rewards": [{"type": "function", "function": "judges:score"}],
    }

    def id_of(place: str) -> str:
        given = {**section, "working_dir": str(tmp_path / "code")} if place == "working_dir" else section
        jobs = TrainConfig(rl=given).jobs
        return runs.run_id_of(runs.inputs_of(grape_service.load(reference), jobs, None, runs.Target(model)))

    for place in ("working_dir", "path"):
        with pytest.MonkeyPatch.context() as patch:
            if place == "path":
                patch.syspath_prepend(str(tmp_path / "code"))
            ids = [id_of(place)]
            os.utime(prompts)
            assert id_of(place) == ids[0], "the same content is the same run"
            prompts.write_text('{"prompt": "2+2?"}\n')
            ids.append(id_of(place))
            judge.write_text("from judges_helper import score\n")
            for value in (0.5, 0.7):
                helper.write_text(f"def score(prompt, response, row): return {value}\n")
                ids.append(id_of(place))
            assert len(set(ids)) == 4, place
            assert "judges" not in sys.modules
        prompts.write_text('{"prompt": "1+1?"}\n')
        judge.write_text("def score(prompt, response, row): return 1.0\n")


@pytest.mark.parametrize(
    ("section", "sentence"),
    [
        ({"sft": {"learnin_rate": 1}}, "unknown key 'train.sft.learnin_rate'; did you mean 'learning_rate'?"),
        ({"rl": {"num_generation": 1}}, "unknown key 'train.rl.num_generation'; did you mean 'num_generations'"),
        ({"sft": {"command": ["a", "{dataset_pth}"]}}, "'{dataset_pth}' is not filled in; known are {dataset_path}"),
        ({"sft": {"command": ["a"], "learning_rate": 1}}, "'learning_rate' is for the built-in trainer"),
        ({"sft": {"command": ["a"], "webhook": "http://b"}}, "not command and webhook"),
        ({"sft": {"trainer": "command"}}, "trainer: command does not fit"),
        ({"sft": {"packing": True}}, "packing needs max_length"),
        ({"sft": {"resources": {"gpu": 1}}}, "unknown key 'train.sft.resources.gpu'; did you mean 'gpus'"),
        ({"rl": {"rewards": [{"type": "function"}]}}, "type: function needs `function`"),
        ({}, "there is nothing to do"),
    ],
)
def test_mistakes_in_a_train_section_are_named(section: dict[str, Any], sentence: str) -> None:
    values = {"name": "a", "pool": {"path": "p"}, "target": {"model": "m"}, "output": {"path": "o"}, "train": section}
    with pytest.raises(UserError) as raised:
        parse_config(values)
    assert sentence in str(raised.value)


def test_a_section_holds_the_jobs_keys_and_the_trainers() -> None:
    section = {"learning_rate": 2e-5, "lora": {"r": 8}, "resources": {"gpus": 2}, "pip": ["x"]}
    job = TrainConfig(sft=section).jobs["sft"]
    assert isinstance(job, SftJob)
    assert (job.resources.gpus, job.own_settings().learning_rate, job.own_settings().batch_size) == (2, 2e-5, 32)


def test_a_section_that_was_written_out_whole_is_the_same_request(reference: str) -> None:
    given = TrainConfig(sft={"command": ["a"], "resources": {"gpus": 2}})
    again = TrainConfig.model_validate(given.model_dump(mode="json"))
    release = grape_service.load(reference)
    ids = [runs.inputs_of(release, config.jobs, None, runs.Target()) for config in (given, again)]
    assert ids[0] == ids[1]
