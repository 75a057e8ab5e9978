"""Megatron-Bridge: its loss on batches of our dataset, with the step's division by the tokens that the loss counts.

The division is that of Megatron-Core with calculate_per_token_loss: gradients of the summed losses over the sum of
num_tokens. Parts of both packages that want CUDA's libraries or Python 3.12 are not imported.
"""

import sys
import types
import typing
from importlib.machinery import ModuleSpec
from pathlib import Path
from typing import Any
from unittest.mock import MagicMock

import numpy as np
import torch
import torch._dynamo  # before triton's place is taken
import typing_extensions

from tests.grape_service.exports.gradients import MICRO_BATCHES, flat_gradient

typing.override = typing_extensions.override  # type: ignore[attr-defined]  # Python 3.12's
for name in ("triton", "triton.language"):  # its kernels are for GPUs
    sys.modules[name] = MagicMock(__version__="3.0.0", __spec__=ModuleSpec(name, None))
import megatron  # noqa: E402

bridge = Path(next(iter(megatron.__path__))) / "bridge"
for name in ("bridge", "bridge.training", "bridge.data"):  # without their __init__, which import every model
    package = types.ModuleType(f"megatron.{name}")
    package.__path__ = [str(bridge.parent / name.replace(".", "/"))]
    sys.modules[f"megatron.{name}"] = package

from megatron.bridge.data.base import DatasetProvider  # noqa: E402
from megatron.bridge.training.losses import masked_next_token_loss  # noqa: E402

for name in ("triton", "triton.language"):
    del sys.modules[name]


def gradient(model: Any, model_folder: str, export: Path) -> np.ndarray:
    plain = export.name.endswith("-plain")
    sys.path.insert(0, str(export))
    sys.modules.pop("grape_megatron", None)
    import grape_megatron

    provider = grape_megatron.ReleaseProvider(folder=str(export), seq_length=96)
    assert isinstance(provider, DatasetProvider)
    context = types.SimpleNamespace(train_samples=100, valid_samples=0)
    assert len(provider.build_datasets(context)[0]) == 100
    files = [str(path) for path in sorted((export / "data").iterdir())]
    dataset = grape_megatron.ReleaseDataset(files, seq_length=96)
    loss_function = masked_next_token_loss if plain else grape_megatron.weighted_next_token_loss
    rows = [dataset[index] for index in range(len(dataset))]
    total = 0
    for place in MICRO_BATCHES:
        batch = dataset.collate_fn(rows[place])
        assert batch["loss_mask"].dtype == torch.float32
        logits = model(batch["tokens"], position_ids=batch["position_ids"]).logits
        losses = -logits.log_softmax(-1).gather(2, batch["labels"][..., None])[..., 0]  # a loss per token, as GPTModel
        loss, num_tokens, _ = loss_function(batch["loss_mask"], losses, check_for_nan_in_loss=False)
        loss.backward()
        total += int(num_tokens)
    sys.path.remove(str(export))
    return flat_gradient(model) / max(total, 1)
