"""TRL: token ids and labels as its SFT trainer takes them prepared, and a trainer that reads the weights.

TRL's own SFTTrainer has no token weights and ignores the column; weighted_sft.py, which is put beside the data,
is its subclass with the loss sum(w * nll) / tokens with loss.
"""

from __future__ import annotations

from grape_service.exports.rows import other_columns, write_parquet
from grape_service.exports.summary import ExportSummary, Target
from grape_service.release.load import Release

USAGE = """```python
from datasets import load_dataset
from weighted_sft import WeightedSFTTrainer  # in this folder

rows = load_dataset("parquet", data_files="data/*.parquet", split="train")
WeightedSFTTrainer(model="…", args=SFTConfig(…), train_dataset=rows).train()
```"""

PLAIN_USAGE = """```python
from datasets import load_dataset
from trl import SFTTrainer

rows = load_dataset("parquet", data_files="data/*.parquet", split="train")
SFTTrainer(model="…", args=SFTConfig(…), train_dataset=rows).train()
```"""


def export(release: Release, target: Target) -> ExportSummary:
    """Write data/*.parquet with input_ids, labels and loss_weights, and weighted_sft.py."""
    columns = ["prompt_id", "candidate_id", "input_ids", "labels"]
    if not target.drop_weights:
        columns.append("loss_weights")
    names = [name for name in other_columns(release) if name not in columns]
    rows, weighted, _ = write_parquet(release, target.storage, [*columns, *names])
    if not weighted:
        sentence = f"{rows} rows; every token has weight 1, so TRL's own SFTTrainer trains on all there is."
    elif target.drop_weights:
        sentence = f"{rows} rows without their loss weights, as asked."
    else:
        sentence = (
            f"{rows} rows with token weights: train with WeightedSFTTrainer from weighted_sft.py beside them, "
            "since TRL's own SFTTrainer ignores loss_weights."
        )
    if not target.drop_weights:
        target.add_loader("weighted_sft.py")
    target.add_readme(release, sentence, PLAIN_USAGE if target.drop_weights else USAGE)
    return ExportSummary("trl", target.storage.root, rows, sentence)
