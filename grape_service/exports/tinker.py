"""Tinker: the release's own tokens and weights, made into the datums of its SDK by the loader beside them.

Tinker's cross_entropy adds up weights * -logprobs and does not divide. grape_tinker.py divides the weights of each
batch by its number of tokens with loss.
"""

from __future__ import annotations

from grape_service.exports.effects import EFFECTS
from grape_service.exports.parquet_export import Form, export_parquet
from grape_service.exports.rows import WeightTotals
from grape_service.exports.summary import ExportSummary, Target
from grape_service.release.load import Release

USAGE = """```python
from grape_tinker import ReleaseBuilder  # in this folder
from tinker_cookbook.supervised import train

config = train.Config(dataset_builder=ReleaseBuilder(folder="{folder}", batch_size=…), …)
```

or, without the cookbook, `ReleaseBatches(files, batch_size).get_batch(0)` for
`training_client.forward_backward(datums, "cross_entropy")`."""


def export(release: Release, target: Target) -> ExportSummary:
    """Write data/*.parquet with input_ids, loss_mask and loss_weights, and grape_tinker.py."""

    def sentence(seen: WeightTotals) -> str:
        how = "for Tinker, as datums with weights and target_tokens through grape_tinker.py beside them"
        if target.drop_weights and seen.weighted:
            return f"{seen.rows} rows without their loss weights, as asked, {how}."
        kind = "with token weights" if seen.weighted else seen.unweighted_words
        return (
            f"{seen.rows} rows {kind} {how}, which divides them by the tokens with loss of each batch "
            f"({EFFECTS['tinker'][seen.level].words})."
        )

    form = Form(("input_ids", "loss_mask", "loss_weights"), "grape_tinker.py")
    return export_parquet("tinker", release, target, form, sentence, USAGE.format(folder=target.folder))
