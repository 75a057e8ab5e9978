"""Tinker: the datums of its SDK, with its documented loss, sum(weights * -logprobs) over the datums of a batch."""

import sys
from pathlib import Path
from typing import Any

import numpy as np
import tinker
import torch

from tests.grape_service.exports.gradients import flat_gradient, log_probs


def gradient(model: Any, model_folder: str, export: Path) -> np.ndarray:
    plain = export.name.endswith("-plain")
    sys.path.insert(0, str(export))
    sys.modules.pop("grape_tinker", None)
    from grape_tinker import ReleaseBuilder

    train, held_back = ReleaseBuilder(folder=str(export), batch_size=100, divide=not plain)()
    assert len(train) == 1
    assert held_back is None
    for datum in train.get_batch(0):
        assert isinstance(datum, tinker.Datum)
        assert datum.loss_fn_inputs["weights"].dtype == "float32"
        target_tokens = datum.loss_fn_inputs["target_tokens"].to_numpy()
        inputs = datum.model_input.to_ints()
        assert inputs[1:] == target_tokens[:-1].tolist()
        weights = torch.as_tensor(datum.loss_fn_inputs["weights"].to_numpy()).double()
        (-(weights * log_probs(model, [*inputs, target_tokens[-1]])).sum()).backward()
    sys.path.remove(str(export))
    return flat_gradient(model)
