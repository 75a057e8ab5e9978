"""One step of SFT with settings that leave nothing to chance, and the same step made by hand in float64."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import torch
from transformers import AutoModelForCausalLM

from grape_service.config.methods import WeightsConfig
from grape_service.config.training import SftSettings
from tests.workers.training.tiny_release import make_rows, slow_weights

NUM_ROWS = 12
BLOCK = {"level": "block", "block_size": 4, "ratio_clip": [-0.5, 0.5], "normalize": "sequence"}


def step_settings(**over: Any) -> SftSettings:
    return SftSettings(
        **{
            "batch_size": NUM_ROWS,
            "micro_batch_size": NUM_ROWS,
            "max_steps": 1,
            "optimizer": "sgd",
            "learning_rate": 0.5,
            "schedule": "constant",
            "max_grad_norm": 0.0,
            "device": "cpu",
            **over,
        }
    )


def log_probs_by_hand(model: Any, ids: list[int], mask: list[bool]) -> torch.Tensor:
    logits = model(torch.tensor([ids])).logits[0, :-1].log_softmax(-1)
    chosen = logits.gather(1, torch.tensor(ids)[1:, None])[:, 0]
    return chosen[torch.tensor(mask[1:])]


def step_by_hand(model_folder: str, settings: SftSettings) -> tuple[float, dict[str, torch.Tensor]]:
    """Loss, and weights after one SGD step, in float64, row after row."""
    model = AutoModelForCausalLM.from_pretrained(model_folder, dtype=torch.float64)
    model.eval()
    pear = settings.pear or WeightsConfig(**BLOCK)
    total, tokens = torch.zeros((), dtype=torch.float64), 0
    for row in make_rows(NUM_ROWS):
        mask = row["loss_mask"]
        log_probs = log_probs_by_hand(model, row["input_ids"].tolist(), mask.tolist())
        if settings.loss == "uniform":
            weights = [1.0] * len(log_probs)
        elif settings.loss == "column" or row["behavior_logprobs"] is None:
            weights = row["loss_weights"][mask].tolist()
        else:
            weights = slow_weights(log_probs.tolist(), row["behavior_logprobs"][mask].tolist(), pear)
        losses = -log_probs * (log_probs.detach().exp() if settings.base_loss == "dft" else 1.0)
        total = total + (torch.tensor(weights, dtype=torch.float64) * losses).sum()
        tokens += len(log_probs)
    loss = total / tokens
    loss.backward()
    after = {name: (value - settings.learning_rate * value.grad).detach() for name, value in model.named_parameters()}
    return loss.item(), after


def first_loss(output: Path) -> float:
    return json.loads((output / "metrics.jsonl").read_text().splitlines()[0])["loss"]
