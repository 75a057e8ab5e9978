"""SFT with weights and GRPO, for models so small that a trainer's own start would take longer than the training.

The losses and the weights of `loss: online` are the product's (workers.training.trainers.loss). GRPO is that of TRL's
defaults, which the product's RL has: one update on each batch of answers, advantages divided by their standard
deviation in the group, the loss a mean over the tokens of all answers, no KL term.
"""

from __future__ import annotations

import random
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from torch import Tensor

from benchmarks.learning.chains.models import Model, Written, batch_of, log_probs_n, write
from benchmarks.learning.chains.task import Problem, is_right
from grape_service.config.methods import WeightsConfig
from workers.training.trainers.loss import online_weights_n, token_losses_n


@dataclass(frozen=True)
class Rows:
    """Prompts and their responses, with a weight and the behavior's log p for each token with loss of a row."""

    prompts: list[str]
    responses: list[Written]
    weights: list[np.ndarray]
    behavior: list[np.ndarray]


@dataclass(frozen=True)
class SftSizes:
    batch: int = 16
    warmup: int = 10
    max_grad_norm: float = 1.0


@dataclass(frozen=True)
class RlSizes:
    steps: int = 240
    prompts: int = 6  # a step
    answers: int = 8  # a prompt
    micro_batch: int = 32
    learning_rate: float = 3e-4
    warmup: int = 5
    max_tokens: int = 220
    max_grad_norm: float = 1.0
    measure_every: int = 40


def sft(
    model: Model, rows: Rows, online: WeightsConfig | None, learning_rate: float, seed: int, sizes: SftSizes
) -> list[dict[str, float]]:
    """One epoch over all rows in a random order, the learning rate falling to 0 in a cosine; metrics of each step."""
    order = np.random.default_rng(seed).permutation(len(rows.prompts))
    batches = [order[start : start + sizes.batch] for start in range(0, len(order), sizes.batch)]
    optimizer = torch.optim.AdamW(model.parameters(), lr=learning_rate, weight_decay=0.0)
    metrics = []
    for step, places in enumerate(batches):
        share = min(1.0, (step + 1) / sizes.warmup) * 0.5 * (1 + np.cos(np.pi * step / len(batches)))
        _set_rate(optimizer, learning_rate * float(share))
        batch = batch_of([rows.prompts[i] for i in places], [rows.responses[i] for i in places])
        log_probs = log_probs_n(model, batch)
        weights = _joined([rows.weights[i] for i in places])
        if online is not None:
            lengths = torch.tensor([rows.responses[i].length for i in places])
            sequence = torch.repeat_interleave(torch.arange(len(places)), lengths)
            behavior = _joined([rows.behavior[i] for i in places])
            weights = online_weights_n(log_probs, behavior, sequence, online)
        loss = (weights * token_losses_n(log_probs, "nll")).sum() / len(log_probs)
        loss.backward()
        norm = _step(model, optimizer, sizes.max_grad_norm)
        metrics.append(
            {"loss": loss.item(), "nll": -log_probs.mean().item(), "grad_norm": norm, "weight": weights.mean().item()}
        )
    return metrics


def grpo(
    model: Model,
    problems: Sequence[Problem],
    seed: int,
    sizes: RlSizes,
    measure: Callable[[int], None],
) -> list[dict[str, float]]:
    """GRPO on the problems, a reward of 1 for a response that is right in every step; metrics of each step.

    `measure` is called every few steps with their number.
    """
    optimizer = torch.optim.AdamW(model.parameters(), lr=sizes.learning_rate, weight_decay=0.0)
    generator = torch.Generator().manual_seed(seed)
    upcoming = _endless(problems, seed)
    metrics = []
    for step in range(1, sizes.steps + 1):
        started = time.process_time()
        _set_rate(optimizer, sizes.learning_rate * min(1.0, step / sizes.warmup))
        asked = [problem for problem in (next(upcoming) for _ in range(sizes.prompts)) for _ in range(sizes.answers)]
        prompts = [problem.prompt for problem in asked]
        answers = write(model, prompts, sizes.max_tokens, 1.0, generator)
        rewards = torch.tensor([float(a.ended and is_right(a.text, p)) for a, p in zip(answers, asked, strict=True)])
        advantages = group_advantages(rewards, sizes.answers)
        num_tokens = sum(answer.length for answer in answers)
        useful = sorted(advantages.nonzero()[:, 0].tolist(), key=lambda row: answers[row].length)
        for start in range(0, len(useful), sizes.micro_batch):
            some = useful[start : start + sizes.micro_batch]
            log_probs = log_probs_n(model, batch_of([prompts[i] for i in some], [answers[i] for i in some]))
            lengths = torch.tensor([answers[i].length for i in some])
            loss = -(torch.repeat_interleave(advantages[some], lengths) * log_probs).sum() / num_tokens
            loss.backward()
        norm = _step(model, optimizer, sizes.max_grad_norm) if useful else 0.0
        metrics.append(
            {
                "reward": rewards.mean().item(),
                "length": num_tokens / len(answers),
                "useful": len(useful) / len(answers),
                "grad_norm": norm,
                "seconds": time.process_time() - started,
            }
        )
        if step % sizes.measure_every == 0:
            measure(step)
    return metrics


def group_advantages(rewards: Tensor, answers: int) -> Tensor:
    """Rewards [B] less their problem's mean, divided by its standard deviation, for `answers` rows of each problem."""
    groups = rewards.view(-1, answers)
    return ((groups - groups.mean(1, keepdim=True)) / (groups.std(1, keepdim=True) + 1e-4)).view(-1)


def _step(model: Model, optimizer: Any, max_grad_norm: float) -> float:
    norm = torch.nn.utils.clip_grad_norm_(model.parameters(), max_grad_norm).item()
    optimizer.step()
    optimizer.zero_grad(set_to_none=True)
    return norm


def _set_rate(optimizer: Any, learning_rate: float) -> None:
    for group in optimizer.param_groups:
        group["lr"] = learning_rate


def _joined(parts: list[np.ndarray]) -> Tensor:
    return torch.from_numpy(np.concatenate(parts).astype(np.float32))


def _endless(problems: Sequence[Problem], seed: int) -> Iterator[Problem]:
    rng = random.Random(seed)
    while True:
        yield from rng.sample(problems, len(problems))
