"""LLaMA-Factory v1: one step of its trainer, from its own config, with its own entry point and with ours."""

import os
import sys
from pathlib import Path
from typing import Any

os.environ["USE_V1"] = "1"

import numpy as np
import torch
from llamafactory.v1.trainers import sft_trainer


class Found(Exception):
    """The gradient of a step is there."""


def gradient(model: Any, model_folder: str, export: Path) -> np.ndarray:
    config = {
        "model": model_folder,
        "train_dataset": str(export / "dataset.yaml"),
        "template": "chatml",
        "output_dir": str(export.parent.parent / "trained"),
        "micro_batch_size": 3,
        "global_batch_size": 9,
        "cutoff_len": 256,
        "batching_workers": 0,
        "max_steps": 1,
        "bf16": False,
    }
    plain_class = sft_trainer.SFTTrainer
    if not export.name.endswith("-plain"):
        sys.path.insert(0, str(export))
        sys.modules.pop("grape_llamafactory", None)
        from grape_llamafactory import WeightedTrainer

        sft_trainer.SFTTrainer = WeightedTrainer
        sys.path.remove(str(export))
    found: list[np.ndarray] = []

    def clip(parameters: Any, *more: Any, **options: Any) -> torch.Tensor:
        found.append(torch.cat([p.grad.detach().flatten() for p in parameters]).double().numpy())
        raise Found

    kept, torch.nn.utils.clip_grad_norm_ = torch.nn.utils.clip_grad_norm_, clip
    try:
        sft_trainer.run_sft(config)
    except Found:
        pass
    finally:
        torch.nn.utils.clip_grad_norm_ = kept
        sft_trainer.SFTTrainer = plain_class
    return found[0]
