"""For each trainer and level of weights: its own loss's gradient against that of sum(w * nll) / tokens with loss.

`grape_service.exports.effects` says what each is, exports tell the user, and docs/exports.md lists it; here it is
measured. A trainer whose packages do not fit beside ours lies in a folder of its own (`make install-test`) and runs in
a process of its own that has that folder on its path.
"""

from __future__ import annotations

import sys
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from transformers import AutoTokenizer

import grape_service
from grape_service.exports import export
from grape_service.exports.effects import EFFECTS, PLAIN_EFFECTS, Level
from tests.grape_service.exports.gradients import LEVELS, compared, reference_gradient, run_trainer
from tests.tiny_models import make_model
from tests.workers.training.tiny_release import write_release

ANSWERS = ("Paris.", "x = 7, since 7 + 3 = 10.", "No.", "First we add, then we divide by two.", "180")
NUM_ROWS = 9


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> str:
    return make_model(tmp_path_factory.mktemp("model"), template="chatml")


def chat_rows(model: str, level: str) -> list[dict[str, Any]]:
    """Rows whose tokens are the template's rendering of their messages; the last has two turns with loss."""
    tokenizer = AutoTokenizer.from_pretrained(model)
    rng = np.random.default_rng(7)
    rows: list[dict[str, Any]] = []
    for number in range(NUM_ROWS):
        messages, ids, mask = [], [], []
        for turn in range(2 if number == NUM_ROWS - 1 else 1):
            question, answer = f"{number} + {turn}?", ANSWERS[(number + turn) % len(ANSWERS)]
            asked = ("\n" if turn else "") + f"<|im_start|>user\n{question}<|im_end|>\n<|im_start|>assistant\n"
            messages += [{"role": "user", "content": question}, {"role": "assistant", "content": answer}]
            for text, has_loss in ((asked, False), (answer + "<|im_end|>", True)):
                tokens = tokenizer.encode(text, add_special_tokens=False)
                ids += tokens
                mask += [has_loss] * len(tokens)
        has_loss = np.array(mask)
        rows.append(
            {
                "prompt_id": f"prompt-{number}",
                "candidate_id": f"candidate-{number}",
                "source": "gen-a",
                "messages": messages,
                "input_ids": np.array(ids, np.int32),
                "loss_mask": has_loss,
                "labels": np.where(has_loss, ids, -100).astype(np.int32),
                "loss_weights": weights_at(level, has_loss, rng),
                "weight_source": "uniform" if level == "uniform" else "pear",
                "num_candidates": 1,
                "truncated": False,
                "answer": "",
            }
        )
    return rows


def weights_at(level: str, mask: np.ndarray, rng: np.random.Generator) -> np.ndarray:
    """Weights [T], 0 off the mask; blocks are of four tokens; a token's can be 0 on the mask too."""
    count = int(mask.sum())
    if level == "uniform":
        values = np.ones(count)
    elif level == "sequence":
        values = np.full(count, rng.uniform(0.2, 2.0))
    elif level == "block":
        values = np.repeat(rng.uniform(0.1, 2.0, -(-count // 4)), 4)[:count]
    else:
        values = rng.uniform(0.1, 2.0, count)
        values[0] = 0.0
    weights = np.zeros(len(mask), np.float32)
    weights[mask] = values
    return weights


@pytest.fixture(scope="module")
def rows(model: str) -> dict[str, list[dict[str, Any]]]:
    return {level: chat_rows(model, level) for level in LEVELS}


@pytest.fixture(scope="module")
def expected(model: str, rows: dict[str, list[dict[str, Any]]]) -> dict[str, np.ndarray]:
    return {level: reference_gradient(model, rows[level]) for level in LEVELS}


def test_the_reference_is_the_mean_loss_where_weights_are_one(model: str, expected: dict[str, np.ndarray]) -> None:
    assert set(expected) == set(LEVELS)
    assert all(np.linalg.norm(gradient) > 0 for gradient in expected.values())
    assert compared(expected["token"], expected["uniform"])[0] == "changed"


# trainer: module of in_trainers, folder of its packages
TRAINERS = {
    "verl": ("verl", "verl"),
    "tinker": ("tinker", "tinker"),
    "megatron-bridge": ("megatron", "megatron-bridge"),
    "axolotl": ("axolotl", "axolotl"),
    "openrlhf": ("openrlhf", "openrlhf"),
    "ms-swift": ("swift", "ms-swift"),
    "llamafactory": ("llamafactory", "llamafactory"),
    "llamafactory-v1": ("llamafactory_v1", "llamafactory"),
    "trl": ("trl", None),
}


@pytest.mark.parametrize("trainer", TRAINERS)
def test_a_trainers_gradient_is_what_the_export_says(
    trainer: str,
    model: str,
    rows: dict[str, list[dict[str, Any]]],
    expected: dict[str, np.ndarray],
    tmp_path: Path,
) -> None:
    said: dict[str, str] = {}
    for level in LEVELS:
        release = grape_service.load(write_release(tmp_path / "out" / level, rows[level], {}))
        said[level] = export(release, trainer, str(tmp_path / "exports" / level)).sentence
        if trainer in PLAIN_EFFECTS:
            export(release, trainer, str(tmp_path / "exports" / f"{level}-plain"))
    found = gradients_of(trainer, model, tmp_path)
    for name, gradient in found.items():
        level, _, plain = name.partition("-")
        kind: Level = "token" if level == "block" else level  # type: ignore[assignment]
        effect = (PLAIN_EFFECTS if plain else EFFECTS)[trainer][kind]
        measured, factor = compared(gradient, expected[level])
        print(f"{trainer:<16} {name:<15} {measured:<8} {factor:.6f}")
        assert measured == effect.gradient, (name, factor)
        if measured == "factor":
            assert factor == pytest.approx(expected_factor(trainer, rows[level]), rel=1e-4), name
        if not plain and kind != "uniform":
            assert effect.words in said[level]
    assert {name.partition("-")[0] for name in found} == set(LEVELS)


def expected_factor(trainer: str, rows: list[dict[str, Any]]) -> float:
    """What effects.py says in words."""
    tokens = sum(int(row["loss_mask"].sum()) for row in rows)
    weights = [float(row["loss_weights"].sum()) for row in rows]
    if trainer == "megatron-bridge":  # cut to a whole number in each micro-batch
        return tokens / (int(sum(weights[:4])) + int(sum(weights[4:])))
    return float(tokens) if trainer == "tinker" else tokens / sum(weights)


def gradients_of(trainer: str, model: str, folder: Path) -> dict[str, np.ndarray]:
    """Gradients by export, computed where the trainer's own packages are."""
    module, packages = TRAINERS[trainer]
    place = Path(sys.prefix) / "trainers" / packages if packages else None
    if place and not place.exists():
        pytest.skip(f"the packages of {trainer} are not installed: run make install-test")
    return run_trainer(module, place, model, folder)
