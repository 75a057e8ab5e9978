"""TRL: its SFTTrainer, and the one that is put beside the data; a step of plain gradient descent shows its gradient."""

import importlib.util
from pathlib import Path
from typing import Any

import numpy as np
import torch
from datasets import load_dataset
from transformers import AutoTokenizer
from trl import SFTConfig, SFTTrainer


def gradient(model: Any, model_folder: str, export: Path) -> np.ndarray:
    plain = export.name.endswith("-plain")
    files = str(export / "data" / "*.parquet")
    rows = load_dataset("parquet", data_files=files, split="train", cache_dir=str(export.parent.parent / "cache"))
    arguments = SFTConfig(
        output_dir=str(export.parent.parent / "trained"),
        per_device_train_batch_size=2,
        gradient_accumulation_steps=5,
        max_steps=1,
        optim="sgd",
        learning_rate=1.0,
        lr_scheduler_type="constant",
        max_grad_norm=0,
        max_length=None,
        bf16=False,
        use_cpu=True,
        report_to="none",
        save_strategy="no",
        gradient_checkpointing=False,
    )
    trainer_class: Any = SFTTrainer
    if not plain:
        spec = importlib.util.spec_from_file_location("weighted_sft", export / "weighted_sft.py")
        assert spec is not None
        assert spec.loader is not None
        module = importlib.util.module_from_spec(spec)
        spec.loader.exec_module(module)
        trainer_class = module.WeightedSFTTrainer
    before = torch.nn.utils.parameters_to_vector(model.parameters()).detach().clone()
    tokenizer = AutoTokenizer.from_pretrained(model_folder)
    trainer_class(model, arguments, train_dataset=rows, processing_class=tokenizer).train()
    return (before - torch.nn.utils.parameters_to_vector(model.parameters()).detach()).numpy()
