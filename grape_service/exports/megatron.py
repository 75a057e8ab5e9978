"""Megatron-Bridge: the release's own tokens with a float loss_mask, through the dataset provider beside them.

Each dataset of its own makes whole numbers of a loss_mask, which turns weights below 1 into 0. Its loss takes a float
mask, sums mask * loss and counts tokens as the mask's sum, cut to a whole number; grape_megatron.py has a dataset
whose mask stays float, and a forward step that counts tokens with loss.
"""

from __future__ import annotations

from grape_service.exports.effects import EFFECTS, PLAIN_EFFECTS
from grape_service.exports.parquet_export import Form, export_parquet
from grape_service.exports.rows import WeightTotals
from grape_service.exports.summary import ExportSummary, Target
from grape_service.release.load import Release

USAGE = """```python
from grape_megatron import ReleaseProvider, forward_step  # in this folder
from megatron.bridge.training.finetune import finetune

config.dataset = ReleaseProvider(folder="{folder}", seq_length=…)
config.model.calculate_per_token_loss = True
config.ddp.average_in_collective = False
finetune(config, forward_step)
```

Without `calculate_per_token_loss` Megatron divides each micro-batch by its own number of tokens and averages."""


def export(release: Release, target: Target) -> ExportSummary:
    """Write data/*.parquet with input_ids, loss_mask and loss_weights, and grape_megatron.py."""

    def sentence(seen: WeightTotals) -> str:
        how = "for Megatron-Bridge 0.6 through ReleaseProvider in grape_megatron.py beside them"
        if target.drop_weights and seen.weighted:
            return f"{seen.rows} rows without their loss weights, as asked, {how}."
        if not seen.weighted:
            return f"{seen.rows} rows {seen.unweighted_words}, {how}."
        return (
            f"{seen.rows} rows with token weights as a float loss_mask {how}, with its forward_step "
            f"({EFFECTS['megatron-bridge'][seen.level].words}); with Megatron-Bridge's own forward step, "
            f"{PLAIN_EFFECTS['megatron-bridge'][seen.level].words}."
        )

    form = Form(("input_ids", "loss_mask", "loss_weights"), "grape_megatron.py")
    return export_parquet("megatron-bridge", release, target, form, sentence, USAGE.format(folder=target.folder))
