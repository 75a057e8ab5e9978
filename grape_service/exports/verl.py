"""verl: token ids, mask and weights, through a dataset class that verl loads by its path.

verl's own SFT loss is sum(mask * nll) / sum(mask) over the global batch: weights in the place of the mask reach each
token, and a batch is divided by the sum of its weights. grape_verl.py, started in the place of verl's trainer, is
that trainer with weights beside the mask and the loss sum(w * nll) / tokens with loss.
"""

from __future__ import annotations

from grape_service.exports.effects import EFFECTS, PLAIN_EFFECTS
from grape_service.exports.parquet_export import Form, export_parquet
from grape_service.exports.rows import WeightTotals
from grape_service.exports.summary import ExportSummary, Target
from grape_service.release.load import Release

USAGE = """```
torchrun … {folder}/grape_verl.py \\
    data.train_files=[{files}] \\
    data.pad_mode=no_padding data.max_length=… …
```

With verl's own entry point (`-m verl.trainer.sft_trainer`) add `data.custom_cls.path={folder}/grape_verl.py
data.custom_cls.name=ReleaseDataset`: {plain}."""


def export(release: Release, target: Target) -> ExportSummary:
    """Write data/*.parquet with messages, input_ids, loss_mask and loss_weights, and grape_verl.py."""

    def sentence(seen: WeightTotals) -> str:
        if not seen.weighted:
            return (
                f"{seen.rows} rows {seen.unweighted_words}; verl gets the release's own tokens through "
                "ReleaseDataset in grape_verl.py beside them (data.custom_cls), and not through messages."
            )
        if target.drop_weights:
            return (
                f"{seen.rows} rows without their loss weights, as asked; verl gets the release's own tokens through "
                "ReleaseDataset in grape_verl.py beside them (data.custom_cls), and not through messages."
            )
        return (
            f"{seen.rows} rows with token weights: start grape_verl.py beside them instead of "
            f"verl.trainer.sft_trainer ({EFFECTS['verl'][seen.level].words}); with verl's own trainer and this file as "
            f"data.custom_cls, {PLAIN_EFFECTS['verl'][seen.level].words}."
        )

    def usage(files: list[str]) -> str:
        listed, plain = ",".join(f"{target.folder}/{name}" for name in files), PLAIN_EFFECTS["verl"]["token"].words
        return USAGE.format(folder=target.folder, files=listed, plain=plain)

    form = Form(("input_ids", "loss_mask", "loss_weights"), "grape_verl.py")
    return export_parquet("verl", release, target, form, sentence, usage)
