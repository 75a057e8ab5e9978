"""Axolotl: its check for datasets that are tokenized, its collator, and the loss of the model that it trains."""

import re
import sys
import types
from pathlib import Path
from typing import Any

import numpy as np
import yaml

numba = types.ModuleType("numba")  # compiles its packing alone
numba.njit = lambda *a, **k: a[0] if a and callable(a[0]) else lambda function: function
sys.modules["numba"] = numba

from axolotl.utils.collators import DataCollatorForSeq2Seq  # noqa: E402
from axolotl.utils.data.shared import load_dataset_with_config  # noqa: E402
from axolotl.utils.data.wrappers import get_dataset_wrapper  # noqa: E402
from axolotl.utils.dict import DictDefault  # noqa: E402
from transformers import AutoTokenizer  # noqa: E402

from tests.grape_service.exports.gradients import MICRO_BATCHES, flat_gradient  # noqa: E402


def gradient(model: Any, model_folder: str, export: Path) -> np.ndarray:
    tokenizer = AutoTokenizer.from_pretrained(model_folder)
    (text,) = re.findall("```yaml\n(.*?)```", (export / "README.md").read_text(), re.DOTALL)
    config = DictDefault(yaml.safe_load(text)["datasets"][0])
    loaded = load_dataset_with_config(config, use_auth_token=False)
    dataset, _ = get_dataset_wrapper(config, tokenizer, DictDefault({}), None, loaded)
    assert dataset is loaded
    rows = list(dataset)
    num_items = sum(sum(label >= 0 for label in row["labels"][1:]) for row in rows)
    for place in MICRO_BATCHES:
        batch = DataCollatorForSeq2Seq(tokenizer)(rows[place])
        model(**batch, num_items_in_batch=num_items).loss.backward()
    return flat_gradient(model)
