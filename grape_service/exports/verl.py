"""verl: token ids with a fractional loss mask, through a dataset class that verl loads by its path.

verl's SFT loss is sum(mask * nll) / sum(mask) over the global batch, so weights in the place of the mask reach each
token; a batch is divided by the sum of its weights and not by its number of tokens.
"""

from __future__ import annotations

from grape_service.exports.rows import write_parquet
from grape_service.exports.summary import ExportSummary, Target
from grape_service.release.load import Release

USAGE = """```
torchrun … -m verl.trainer.sft_trainer \\
    data.train_files=[{files}] \\
    data.custom_cls.path={folder}/grape_verl.py data.custom_cls.name=ReleaseDataset \\
    data.pad_mode=no_padding data.max_length={longest} …
```"""


def export(release: Release, target: Target) -> ExportSummary:
    """Write data/*.parquet with messages, input_ids, loss_mask and loss_weights, and grape_verl.py."""
    columns = ["prompt_id", "candidate_id", "messages", "input_ids", "loss_mask"]
    if not target.drop_weights:
        columns.append("loss_weights")
    rows, weighted, names = write_parquet(release, target.storage, columns)
    how = "through ReleaseDataset in grape_verl.py beside them (data.custom_cls), and not through messages"
    if not weighted:
        sentence = f"{rows} rows; every token has weight 1. verl gets the release's own tokens {how}."
    elif target.drop_weights:
        sentence = f"{rows} rows without their loss weights, as asked; verl gets the release's own tokens {how}."
    else:
        sentence = (
            f"{rows} rows with token weights, which verl gets as a fractional loss_mask {how}; it divides a batch by "
            "the sum of its weights instead of its number of tokens: a step's size changes, no token's share does."
        )
    target.add_loader("grape_verl.py")
    files = ",".join(f"{target.storage.root}/{name}" for name in names)
    usage = USAGE.format(files=files, folder=target.storage.root, longest="…")
    target.add_readme(release, sentence, usage)
    return ExportSummary("verl", target.storage.root, rows, sentence)
