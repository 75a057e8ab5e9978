"""OpenRLHF: its SFT dataset, its loss, and its count of tokens over the micro-batches of a step."""

import sys
from pathlib import Path
from types import ModuleType, SimpleNamespace
from typing import Any

import numpy as np
import openrlhf
import torch
from datasets import load_dataset
from openrlhf.datasets.sft_dataset import SFTDataset
from transformers import AutoTokenizer

from tests.grape_service.exports.gradients import MICRO_BATCHES, flat_gradient, log_probs

models = ModuleType("openrlhf.models")  # without its __init__, which imports flash_attn
models.__path__ = [str(Path(next(iter(openrlhf.__path__))) / "models")]
sys.modules["openrlhf.models"] = models
sys.modules["deepspeed"] = ModuleType("deepspeed")  # its loss does without

from openrlhf.models.loss import SFTLoss  # noqa: E402

del sys.modules["deepspeed"]


def gradient(model: Any, model_folder: str, export: Path) -> np.ndarray:
    tokenizer = AutoTokenizer.from_pretrained(model_folder)
    data = SimpleNamespace(input_key="messages", output_key=None, apply_chat_template=True)
    strategy = SimpleNamespace(args=SimpleNamespace(data=data))
    cache = str(export.parent.parent / "cache")
    loaded = load_dataset("json", data_files=str(export / "train.jsonl"), split="train", cache_dir=cache)
    dataset = SFTDataset(loaded, tokenizer, 256, strategy, num_processors=None)
    rows = [dataset[index] for index in range(len(dataset))]
    num_tokens = sum(float(mask[:, :-1].sum()) for _, _, mask in rows)
    for place in MICRO_BATCHES:
        for ids, _, mask in rows[place]:
            loss = SFTLoss()(log_probs(model, ids[0])[None], mask[:, :-1].double(), batch_num_tokens=num_tokens)
            torch.as_tensor(loss).backward()
    return flat_gradient(model)
