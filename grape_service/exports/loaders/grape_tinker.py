"""A release for Tinker: datums with the release's own tokens and weights.

    ReleaseBuilder(folder="…", batch_size=128)               a dataset builder for tinker_cookbook.supervised.train
    ReleaseBatches(files, batch_size=128).get_batch(0)       datums for forward_backward(datums, "cross_entropy")

The server's loss is sum(weights * -logprobs). With `divide` (the default) the weights of a batch are divided by its
number of tokens with loss, so that the loss is sum(w * nll) / tokens with loss. Nothing is sent anywhere while datums
are built. Needs nothing of the service that wrote this file.
"""

from pathlib import Path

import chz
import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import tinker
from tinker_cookbook.supervised.types import SupervisedDataset, SupervisedDatasetBuilder


class ReleaseBatches(SupervisedDataset):
    """Batches of `batch_size` rows; the last one holds what is left. Rows are in memory."""

    def __init__(self, files: list[str], batch_size: int, max_length: int | None = None, divide: bool = True):
        weighted = "loss_weights" in pq.read_schema(files[0]).names
        columns = ["input_ids", "loss_mask", "loss_weights" if weighted else "loss_mask"]
        tables = [
            pq.read_table(file, columns=list(dict.fromkeys(columns)), page_checksum_verification=True) for file in files
        ]
        table = pa.concat_tables(tables)
        self.columns = [table.column(name) for name in columns]
        self.batch_size, self.max_length, self.divide = batch_size, max_length, divide
        self.order = np.arange(table.num_rows)

    def __len__(self) -> int:
        return -(-len(self.order) // self.batch_size)

    def set_epoch(self, seed: int = 0) -> None:
        """Shuffle the rows."""
        self.order = np.random.default_rng(seed).permutation(len(self.order))

    def get_batch(self, index: int) -> list[tinker.Datum]:
        """The datums of a batch; a row longer than max_length is cut."""
        chosen = self.order[index * self.batch_size : (index + 1) * self.batch_size]
        rows = [[column[int(row)].values.to_numpy(zero_copy_only=False) for column in self.columns] for row in chosen]
        rows = [[part[: self.max_length] for part in row] for row in rows]
        num_tokens = sum(int(mask.sum()) for _, mask, _ in rows) if self.divide else 1
        return [_datum(ids, weights.astype(np.float64) / max(1, num_tokens)) for ids, _, weights in rows]


def _datum(input_ids: np.ndarray, weights: np.ndarray) -> tinker.Datum:
    target_tokens = input_ids[1:].tolist()
    return tinker.Datum(
        model_input=tinker.ModelInput.from_ints(input_ids[:-1].tolist()),
        loss_fn_inputs={
            "weights": tinker.TensorData(
                data=weights[1:].astype(np.float32).tolist(), dtype="float32", shape=[len(target_tokens)]
            ),
            "target_tokens": tinker.TensorData(data=target_tokens, dtype="int64", shape=[len(target_tokens)]),
        },
    )


@chz.chz
class ReleaseBuilder(SupervisedDatasetBuilder):
    """The export in `folder`: data/ to train on, and eval/ where it has one."""

    folder: str
    batch_size: int
    max_length: int | None = None
    divide: bool = True

    def __call__(self) -> tuple[SupervisedDataset, SupervisedDataset | None]:
        def batches(name: str) -> ReleaseBatches | None:
            files = sorted(str(path) for path in (Path(self.folder) / name).glob("*.parquet"))
            return ReleaseBatches(files, self.batch_size, self.max_length, self.divide) if files else None

        train = batches("data")
        if train is None:
            raise FileNotFoundError(f"there is no data/*.parquet in {self.folder}")
        return train, batches("eval")
