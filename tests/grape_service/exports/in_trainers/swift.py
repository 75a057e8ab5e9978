"""ms-swift: its dataset code, template, collator and trainer, as `swift sft` puts them together."""

import os
from pathlib import Path
from typing import Any

os.environ["USE_HF"] = "1"

import numpy as np
import torch
from swift import sft_main
from transformers import TrainerCallback


def gradient(model: Any, model_folder: str, export: Path) -> np.ndarray:
    found: list[np.ndarray] = []

    class Gradient(TrainerCallback):
        def on_pre_optimizer_step(self, args: Any, state: Any, control: Any, model: Any = None, **more: Any) -> None:
            found.append(torch.cat([p.grad.detach().flatten() for p in model.parameters()]).double().numpy())

    from swift.callbacks import callbacks_map

    callbacks_map["gradient"] = lambda *a, **k: Gradient()
    options = {
        "model": model_folder,
        "model_type": "llama",
        "check_model": "false",  # it asks a hub, and waits for it
        "dataset": str(export / "train.jsonl"),
        "external_plugins": str(export / "grape_swift.py"),
        "template": "grape",
        "is_binary_loss_scale": "false",
        "tuner_type": "full",
        "torch_dtype": "float32",
        "bf16": "false",
        "split_dataset_ratio": "0",
        "output_dir": str(export.parent.parent / "trained"),
        "max_steps": "1",
        "per_device_train_batch_size": "2",
        "gradient_accumulation_steps": "5",
        "max_grad_norm": "1000",
        "save_strategy": "no",
        "report_to": "none",
        "callbacks": "gradient",
        "use_cpu": "true",
        "gradient_checkpointing": "false",
        "attn_impl": "eager",
        "dataloader_num_workers": "0",
    }
    sft_main([word for name, value in options.items() for word in (f"--{name}", value)])
    return found[0]
