"""verl: its loader of dataset classes, its collator and its count of tokens, with its own loss and with ours.

The engine's count is that of workers/engine/fsdp/transformer_impl.py: the sum of loss_mask over the global batch.
"""

from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow.parquet as pq
import torch
from tensordict import TensorDict
from verl.utils.dataset.dataset_utils import SFTTensorCollator
from verl.utils.import_utils import load_extern_object
from verl.utils.tensordict_utils import assign_non_tensor
from verl.workers.utils.losses import sft_loss

from tests.grape_service.exports.gradients import MICRO_BATCHES, flat_gradient, log_probs


def gradient(model: Any, model_folder: str, export: Path) -> np.ndarray:
    plain = export.name.endswith("-plain")
    loader = str(export / "grape_verl.py")
    dataset_class = load_extern_object(loader, "ReleaseDataset" if plain else "WeightedDataset")
    files = [str(path) for path in sorted((export / "data").iterdir())]
    config = {"pad_mode": "no_padding", "max_length": 256}
    dataset = dataset_class(parquet_files=files, tokenizer=None, config=config, processor=None, max_samples=-1)
    loss_function = partial(sft_loss if plain else load_extern_object(loader, "weighted_loss"), config=None)
    rows = [dataset[index] for index in range(len(dataset))]
    batch_num_tokens = sum(float(row["loss_mask"].sum()) for row in rows)
    for place in MICRO_BATCHES:
        batch = SFTTensorCollator("no_padding")(rows[place])
        written = [row for file in files for row in pq.read_table(file).to_pylist()][place]
        assert batch["input_ids"].values().tolist() == [token for row in written for token in row["input_ids"]]
        weights = np.concatenate([np.float32(row["loss_weights"]) for row in written])
        np.testing.assert_array_equal(batch["loss_mask" if plain else "loss_weights"].values(), weights)
        micro = TensorDict({name: batch[name] for name in batch}, batch_size=[len(rows[place])])
        assign_non_tensor(micro, dp_size=1, batch_num_tokens=batch_num_tokens, pad_mode="no_padding")
        # At place t the log-probability of token t + 1; at the last one of nothing.
        parts = [torch.cat([log_probs(model, row["input_ids"]), torch.zeros(1)]) for row in rows[place]]
        flat = torch.nested.nested_tensor_from_jagged(torch.cat(parts), batch["input_ids"].offsets())
        loss, _ = loss_function(model_output={"log_probs": flat}, data=micro)
        loss.backward()
    return flat_gradient(model)
