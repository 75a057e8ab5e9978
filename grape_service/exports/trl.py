"""TRL: token ids and labels as its SFT trainer takes them prepared, and a trainer that reads the weights.

TRL's own SFTTrainer has no token weights and ignores the column; weighted_sft.py, which is put beside the data,
is its subclass with the loss sum(w * nll) / tokens with loss.
"""

from __future__ import annotations

from grape_service.exports.effects import EFFECTS
from grape_service.exports.parquet_export import Form, export_parquet
from grape_service.exports.rows import WeightTotals
from grape_service.exports.summary import ExportSummary, Target
from grape_service.release.load import Release

USAGE = """In this folder:

```python
import torch
from datasets import load_dataset
from trl import {imports}

rows = load_dataset("parquet", data_files="data/*.parquet", split="train")
arguments = SFTConfig(output_dir="trained", max_length=None, bf16=torch.cuda.is_available())
{trainer}(model={model!r}, args=arguments, train_dataset=rows).train()
```"""


def export(release: Release, target: Target) -> ExportSummary:
    """Write data/*.parquet with input_ids, labels and loss_weights, and weighted_sft.py."""

    def sentence(seen: WeightTotals) -> str:
        if not seen.weighted:
            enough = ": TRL's own SFTTrainer trains on all there is" if seen.tokens else ""
            return f"{seen.rows} rows {seen.unweighted_words}{enough}."
        if target.drop_weights:
            return f"{seen.rows} rows without their loss weights, as asked."
        return (
            f"{seen.rows} rows with token weights: train with WeightedSFTTrainer from weighted_sft.py beside them "
            f"({EFFECTS['trl'][seen.level].words}), since TRL's own SFTTrainer ignores loss_weights."
        )

    form = Form(("input_ids", "labels", "loss_weights"), None if target.drop_weights else "weighted_sft.py")
    model = (release.manifest.config.get("target") or {}).get("model") or "the target's model"
    names = {"imports": "SFTConfig, SFTTrainer", "trainer": "SFTTrainer"}
    if not target.drop_weights:
        imports = "SFTConfig\nfrom weighted_sft import WeightedSFTTrainer"
        names = {"imports": imports, "trainer": "WeightedSFTTrainer"}
    return export_parquet("trl", release, target, form, sentence, USAGE.format(model=model, **names))
