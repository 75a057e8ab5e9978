"""LLaMA-Factory v0: its dataset code, its collator's labels, and the loss of the model that it trains."""

from pathlib import Path
from typing import Any

import numpy as np
from llamafactory.data import SFTDataCollatorWith4DAttentionMask, get_dataset, get_template_and_fix_tokenizer
from llamafactory.hparams import get_train_args
from transformers import AutoTokenizer

from tests.grape_service.exports.gradients import MICRO_BATCHES, flat_gradient


def gradient(model: Any, model_folder: str, export: Path) -> np.ndarray:
    arguments = {
        "model_name_or_path": model_folder,
        "stage": "sft",
        "do_train": True,
        "finetuning_type": "full",
        "dataset": "tiny",
        "dataset_dir": str(export),
        "template": "chatml",
        "output_dir": str(export.parent.parent / "trained"),
        "cutoff_len": 256,
        "overwrite_cache": True,
        "report_to": "none",
        "bf16": False,
    }
    model_args, data_args, training_args, _, _ = get_train_args(arguments)
    tokenizer = AutoTokenizer.from_pretrained(model_folder)
    template = get_template_and_fix_tokenizer(tokenizer, data_args)
    loaded = get_dataset(template, model_args, data_args, training_args, stage="sft", tokenizer=tokenizer)
    rows = list(loaded["train_dataset"])
    assert len(rows) == len((export / "train.jsonl").read_text().splitlines())  # each as often as it was written
    for row in rows:  # what effects.py says of its tokens: after each turn end with loss comes a newline with loss
        text = tokenizer.decode([label for label in row["labels"] if label >= 0])
        assert text.endswith("<|im_end|>\n")
    num_items = sum(sum(label >= 0 for label in row["labels"][1:]) for row in rows)
    collator = SFTDataCollatorWith4DAttentionMask(template=template, tokenizer=tokenizer, label_pad_token_id=-100)
    for place in MICRO_BATCHES:
        batch = collator([dict(row) for row in rows[place]])
        inputs = {name: batch[name] for name in ("input_ids", "attention_mask", "labels")}
        model(**inputs, num_items_in_batch=num_items).loss.backward()
    return flat_gradient(model)
