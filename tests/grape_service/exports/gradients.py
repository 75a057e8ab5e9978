"""What the matrix of exports compares: the gradient of sum(w * nll) / tokens with loss, in float64, and a trainer's.

A trainer's is computed in a process of its own with the trainer's own packages on its path. These processes are forked
from one that has imported torch and transformers already, which is most of what each of them would do.
"""

from __future__ import annotations

import importlib
import multiprocessing
import os
import sys
import traceback
from collections.abc import Callable
from pathlib import Path
from typing import Any

import datasets
import numpy as np
import pytest
import torch
from transformers import AutoModelForCausalLM

LEVELS = ("uniform", "sequence", "block", "token")
MICRO_BATCHES = (slice(0, 4), slice(4, None))
"""The rows of a step: unequal micro-batches, so that a loss that divides each by its own sum is seen."""
PRELOADED = ["tests.grape_service.exports.gradients", "torch._dynamo", "transformers.trainer"]
ENVIRONMENT = {
    "HF_HUB_OFFLINE": "1",
    "TORCHDYNAMO_DISABLE": "1",
    "DISABLE_VERSION_CHECK": "1",
    "USE_MODELSCOPE_HUB": "0",
    "AXOLOTL_DO_NOT_TRACK": "1",
    "DO_NOT_TRACK": "1",
}


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


def run_trainer(module: str, packages: Path | None, model: str, folder: Path) -> dict[str, np.ndarray]:
    """By export FOLDER/exports/<name>, what in_trainers/<module>.py finds with `packages` first on its path."""
    context = multiprocessing.get_context("forkserver")
    context.set_forkserver_preload(PRELOADED)
    process = context.Process(target=_in_trainer, args=(module, packages, model, folder))
    with pytest.MonkeyPatch.context() as patch:
        for name, value in ENVIRONMENT.items():
            patch.setenv(name, value)
        process.start()
    process.join(240)
    if process.is_alive():
        process.kill()
    said = (folder / "said.txt").read_text()
    assert process.exitcode == 0, said[-4000:]
    return dict(np.load(folder / "gradients.npz"))


def _in_trainer(module: str, packages: Path | None, model_folder: str, folder: Path) -> None:
    with open(folder / "said.txt", "w") as said:
        os.dup2(said.fileno(), 1)
        os.dup2(said.fileno(), 2)
    os.chdir(folder)
    os.environ["MODELSCOPE_CACHE"] = str(folder / "modelscope")
    datasets.config.HF_DATASETS_CACHE = folder / "cache"
    torch.set_num_threads(1)  # for a tiny model, threads only wait for one another
    sys.argv = [module]
    if packages:
        sys.path.insert(0, str(packages))
    try:
        gradient: Callable[[Any, str, Path], np.ndarray]
        gradient = importlib.import_module(f"tests.grape_service.exports.in_trainers.{module}").gradient
        exports = sorted((folder / "exports").iterdir())
        found = {export.name: gradient(double_model(model_folder), model_folder, export) for export in exports}
    except BaseException:
        traceback.print_exc()
        raise
    np.savez(folder / "gradients.npz", **found)
