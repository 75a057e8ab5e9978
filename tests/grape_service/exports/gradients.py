"""What the matrix of exports compares: the gradient of sum(w * nll) / tokens with loss, in float64, and a trainer's.

    python -m tests.grape_service.exports.in_trainers.<trainer> MODEL FOLDER OUTPUT

runs with the trainer's own packages on its path, reads the exports FOLDER/<level> and saves a gradient for each.
"""

from __future__ import annotations

import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import torch
from transformers import AutoModelForCausalLM

LEVELS = ("uniform", "sequence", "block", "token")
MICRO_BATCHES = (slice(0, 4), slice(4, None))
"""The rows of a step: unequal micro-batches, so that a loss that divides each by its own sum is seen."""


def double_model(folder: str) -> Any:
    """The tiny model in float64."""
    return AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float64, attn_implementation="eager").train()


def log_probs(model: Any, input_ids: Any) -> torch.Tensor:
    """Log p of each token [T - 1] after the first."""
    ids = torch.as_tensor(np.asarray(input_ids), dtype=torch.long)
    return model(ids[None]).logits[0, :-1].log_softmax(-1).gather(1, ids[1:, None])[:, 0]


def flat_gradient(model: Any) -> np.ndarray:
    """The gradient of all parameters as one float64 vector; the model's is gone afterwards."""
    parts = [torch.zeros_like(p).flatten() if p.grad is None else p.grad.detach().flatten() for p in model.parameters()]
    model.zero_grad()
    return torch.cat(parts).double().numpy()


def reference_gradient(model_folder: str, rows: list[dict[str, Any]]) -> np.ndarray:
    """The gradient of sum(w * nll) / tokens with loss over the rows of a release, row after row."""
    model = double_model(model_folder)
    tokens = sum(int(row["loss_mask"].sum()) for row in rows)
    for row in rows:
        weights = torch.as_tensor(row["loss_weights"][1:]).double()
        (-(weights * log_probs(model, row["input_ids"])).sum() / tokens).backward()
    return flat_gradient(model)


def compared(found: np.ndarray, expected: np.ndarray) -> tuple[str, float]:
    """(equal, factor or changed; the factor that brings the expected gradient nearest to the one that was found)."""
    factor = float(found @ expected / (expected @ expected))
    rest = np.linalg.norm(found - factor * expected) / np.linalg.norm(found)
    if rest > 1e-4:
        return "changed", factor
    return ("equal" if abs(factor - 1) < 1e-4 else "factor"), factor


def run_all(gradient: Callable[[Any, str, Path], np.ndarray]) -> None:
    """For a module of in_trainers: the gradient of `gradient(model, model_folder, export)` for each export."""
    model_folder, folder, output = sys.argv[1:]
    found = {}
    for export in sorted(Path(folder).iterdir()):
        found[export.name] = gradient(double_model(model_folder), model_folder, export)
    np.savez(output, **found)
