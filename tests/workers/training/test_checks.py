"""What a training job would fail on is refused before it costs anything, in one sentence that names the key."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import yaml

import grape_service
from grape_service.config.loading import parse_config
from grape_service.config.training import TrainConfig
from grape_service.errors import UserError
from grape_service.webhooks import STATE_WORDS
from tests.workers.training.tiny_release import make_rows, write_release
from workers.cluster.ray import private_ray
from workers.stages.train import check_cluster, check_prompts, checked_jobs
from workers.training.checks import packed_bytes, refuse_release
from workers.training.trainers.prompts import rl_prompts

pytestmark = pytest.mark.alone

REWARDS = """
def judge(prompt, response, row):
    return 1.0
def short(prompt, response):
    return 1.0
number = 3
"""


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    """A job's working folder: 150 MiB of which are ignored, and a module with rewards."""
    made = tmp_path / "code"
    (made / "data").mkdir(parents=True)
    with (made / "data" / "rows.bin").open("wb") as file:
        file.truncate(150 * 2**20)
    (made / ".gitignore").write_text("data/\n")
    (made / "rewards_of_a_test.py").write_text(REWARDS)
    return made


def sections(folder: Path) -> dict[str, tuple[dict[str, Any], str, str]]:
    """By name: a train section, the Ray's address, the sentence."""
    rl: dict[str, Any] = {"steps": 1, "working_dir": str(folder)}

    def reward(path: str) -> dict[str, Any]:
        return {"rl": {**rl, "rewards": [{"type": "function", "function": path}]}}

    gone = str(folder / "gone")
    return {
        "gpus": (
            {"sft": {"resources": {"gpus": 99}}},
            "auto",
            r"train\.sft\.resources\.gpus: 99 GPUs of one node are asked for, and this machine has",
        ),
        "gpus of a command": (
            {"rl": {"command": ["a"], "resources": {"gpus": 99}}},
            "auto",
            r"train\.rl\.resources\.gpus: 99",
        ),
        "cores": ({"sft": {"resources": {"cpus": 9999}}}, "auto", r"train\.sft\.resources\.cpus: 9,999 CPUs"),
        "memory": (
            {"sft": {"resources": {"memory_gb": 1e6}}},
            "auto",
            r"train\.sft\.resources\.memory_gb: 1,000,000 GiB of memory of one node are asked for, .* has [\d,.]+: ",
        ),
        "custom": (
            {"rl": {"command": ["a"], "resources": {"custom": {"TPU": 1}}}},
            "auto",
            r"train\.rl\.resources\.custom\.TPU: 1 of 'TPU'",
        ),
        "batch": (
            {"sft": {"batch_size": 6, "micro_batch_size": 4, "resources": {"gpus": 0}}},
            "auto",
            r"train\.sft: a batch of 6 cannot be split evenly",
        ),
        "answers": (
            {"rl": {"prompts_per_step": 1, "num_generations": 3, "resources": {"gpus": 2}}},
            "http://h:8265",
            r"train\.rl: a batch of 3 cannot be split evenly over 2 processes",
        ),
        "optimizer": (
            {"sft": {"optimizer": "adamw_toch"}},
            "auto",
            r"train\.sft\.optimizer: .* did you mean 'adamw_torch'",
        ),
        "package": (
            {"rl": {**rl, "optimizer": "paged_adamw_8bit"}},
            "auto",
            r"train\.rl\.optimizer: paged_adamw_8bit needs the package bitsandbytes",
        ),
        "attention": (
            {"sft": {"attention": "flash_attention_2", "device": "cpu"}},
            "auto",
            r"train\.sft\.attention: flash_attention_2 needs a GPU",
        ),
        "rollouts": (
            {"rl": {**rl, "rollouts": "vllm", "device": "cpu"}},
            "auto",
            r"train\.rl\.rollouts: vllm needs a GPU",
        ),
        "extra": ({"rl": {**rl, "extra": {"epsilom": 0.1}}}, "auto", r"train\.rl\.extra: .* did you mean 'epsilon"),
        "output": (
            {"sft": {}, "rl": {**rl, "output": f"{folder}/rewards_of_a_test.py/x"}},
            "auto",
            r"train\.rl\.output: .*rewards_of_a_test\.py",
        ),
        "adapter": (
            {"sft": {"lora": {"merge": False}}, "rl": {"rewards": [{"type": "exact"}]}},
            "auto",
            r"train\.sft\.lora\.merge: false",
        ),
        "no folder": (
            {"sft": {"command": ["a"], "working_dir": gone}},
            "auto",
            r"train\.sft\.working_dir: there is no '.*gone'",
        ),
        "large folder": (
            {"sft": {"command": ["a"], "working_dir": f"{folder}/data"}},
            "auto",
            r"train\.sft\.working_dir: .* holds 150 MiB, and Ray takes 100",
        ),
        "no archive": (
            {"sft": {"command": ["a"], "working_dir": f"{folder}/rewards_of_a_test.py"}},
            "auto",
            r"train\.sft\.working_dir: '.*rewards_of_a_test\.py' is a file: give a folder, or one of \.zip, ",
        ),
        "relative": (
            {"sft": {"output": "ckpt", "resources": {"gpus": 1}}},
            "http://h:8265",
            r"train\.sft\.output: 'ckpt' is relative, and the job runs on http://h:8265",
        ),
        "gpus on a cluster": ({"sft": {}}, "http://h:8265", r"train\.sft\.resources\.gpus: say how many"),
        "no module": (
            reward("rewards_of_no_test:judge"),
            "auto",
            "'rewards_of_no_test:judge': there is no module",
        ),
        "no name": (
            reward("rewards_of_a_test:jugde"),
            "auto",
            "'rewards_of_a_test:jugde': rewards_of_a_test has no function 'jugde'",
        ),
        "no function": (
            reward("rewards_of_a_test:number"),
            "auto",
            "'rewards_of_a_test:number': rewards_of_a_test has no function 'number'",
        ),
        "arguments": (
            reward("rewards_of_a_test:short"),
            "auto",
            r"is called as function\(prompt, response, row\): too many",
        ),
    }


NAMES = list(sections(Path()))


@pytest.mark.parametrize("name", NAMES)
def test_what_is_known_beforehand_is_refused_beforehand(name: str, folder: Path) -> None:
    section, address, sentence = sections(folder)[name]
    with pytest.raises(UserError, match=sentence):
        checked_jobs(TrainConfig.model_validate(section), address)


def test_what_is_right_is_taken(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("HOME", str(folder.parent))
    at_home = {"working_dir": "~/code", "rewards": [{"type": "function", "function": "rewards_of_a_test:judge"}]}
    checked_jobs(TrainConfig.model_validate({"rl": at_home}), "auto")
    good = {"working_dir": str(folder), "rewards": [{"type": "function", "function": "rewards_of_a_test:judge"}]}
    checked_jobs(TrainConfig.model_validate({"sft": {"lora": {}}, "rl": good}), "auto")
    assert packed_bytes(folder) < 2**20, "what .gitignore names is not packed"
    adapter = {"sft": {"lora": {"merge": False}}, "rl": {"command": ["a"]}}
    checked_jobs(TrainConfig.model_validate(adapter), "auto")


def test_the_page_on_training_holds_an_example_that_is_a_config_and_every_word_of_a_state() -> None:
    page = (Path(__file__).parents[3] / "docs" / "training.md").read_text()
    example = yaml.safe_load(page.partition("```yaml\n")[2].partition("```")[0])
    config = parse_config(example)
    assert config.train is not None
    assert [reward.type for reward in config.train.jobs["rl"].rewards] == ["math", "function"]
    for state, words in STATE_WORDS.items():
        assert f"| {state} | {', '.join(words.split())} |" in page


def test_a_pattern_that_is_none_is_a_mistake_in_the_config() -> None:
    train = {"rl": {"rewards": [{"type": "exact", "pattern": "answer: (\\d+"}]}}
    values = {"name": "a", "pool": {"path": "p"}, "target": {"model": "m"}, "output": {"path": "o"}, "train": train}
    with pytest.raises(UserError, match="is not a regular expression"):
        parse_config(values)


def test_the_answer_column_has_to_be_there_and_hold_answers(tmp_path: Path) -> None:
    rows = make_rows(4)
    rows[1]["answer"] = None
    release = grape_service.load(write_release(tmp_path, rows, {}))
    wrong = TrainConfig.model_validate({"sft": {}, "rl": {"rewards": [{"type": "exact", "answer_column": "solution"}]}})
    with pytest.raises(UserError, match=r"has no column 'solution' with the right answer: .* its columns are .*answer"):
        refuse_release(wrong.jobs, release)
    right = TrainConfig.model_validate({"rl": {"rewards": [{"type": "exact"}]}})
    refuse_release(right.jobs, release)
    assert right.rl is not None
    with pytest.raises(UserError, match=r"1 of 4 prompts of .* have no answer in the column 'answer'"):
        rl_prompts(release, right.rl.own_settings(), {})


def test_a_pool_without_answers_or_prompts_is_refused_before_it_is_scored(tmp_path: Path) -> None:
    (tmp_path / "a.jsonl").write_text('{"prompt": "1+1?", "response": "2", "solution": "2"}\n' * 3)
    pool = [str(tmp_path / "a.jsonl")]

    def check(**rl: Any) -> None:
        check_prompts(TrainConfig.model_validate({"rl": rl}), pool, {})

    check(rewards=[{"type": "exact", "answer_column": "solution"}])
    with pytest.raises(
        UserError, match=r"train\.rl\.rewards: no row at the beginning of .*a\.jsonl has a column 'answer'"
    ):
        check(rewards=[{"type": "exact"}])
    check(prompts={"path": pool[0]}, rewards=[{"type": "exact", "answer_column": "solution"}])
    with pytest.raises(UserError, match=r"train\.rl\.prompts\.column: no row .* has a column 'question'"):
        check(prompts={"path": pool[0], "column": "question"}, rewards=[{"type": "function", "function": "math:sqrt"}])
    with pytest.raises(UserError, match="nothing"):
        check(prompts={"path": str(tmp_path / "nothing")})


def test_gpus_that_no_node_of_a_cluster_has_are_refused() -> None:
    section = TrainConfig.model_validate({"sft": {"command": ["a"], "resources": {"gpus": 2}}})
    with private_ray(2, with_jobs=True) as private:
        check_cluster(TrainConfig.model_validate({"sft": {"command": ["a"]}}), str(private.jobs))
        with pytest.raises(UserError, match=r"2 GPUs of one node are asked for, and the largest node of .* has 0"):
            check_cluster(section, str(private.jobs))
        for resources, sentence in (
            ({"cpus": 3}, r"resources\.cpus: 3 CPUs of one node are asked for, and the largest node of .* has 2"),
            ({"memory_gb": 1e6}, r"resources\.memory_gb: "),
            ({"custom": {"TPU": 1}}, r"resources\.custom\.TPU: 1 of 'TPU'"),
        ):
            job = TrainConfig.model_validate({"rl": {"command": ["a"], "resources": resources}})
            with pytest.raises(UserError, match=sentence):
                check_cluster(job, str(private.jobs))
