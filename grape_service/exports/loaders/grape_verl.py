"""A release for verl's SFT trainer, with its loss weights.

    torchrun … grape_verl.py data.train_files=[…] data.pad_mode=no_padding …      the loss is sum(w * nll) / tokens
    torchrun … -m verl.trainer.sft_trainer data.custom_cls.path=…/grape_verl.py \\
        data.custom_cls.name=ReleaseDataset …                                     sum(w * nll) / sum(w)

The first is verl's own trainer with its own settings and `weighted_loss`; the second is verl's loss with weights in
the place of the mask. Both give verl the release's own tokens. Needs nothing of the service that wrote this file.
"""

from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq
import torch
from torch.utils.data import Dataset


class ReleaseDataset(Dataset):
    """Rows of the release's Parquet files, in memory; for data.pad_mode=no_padding. loss_mask is the weights."""

    def __init__(
        self, parquet_files: Any, tokenizer: Any, config: Any, processor: Any = None, max_samples: int = -1
    ) -> None:
        files = [parquet_files] if isinstance(parquet_files, str) else list(parquet_files)
        if config.get("pad_mode", "no_padding") != "no_padding":
            raise ValueError("loss weights reach verl's loss with data.pad_mode=no_padding alone")
        self.max_length = config.get("max_length", None)
        self.truncation = config.get("truncation", "error")
        weighted = "loss_weights" in pq.read_schema(files[0]).names
        columns = ["input_ids", "loss_mask", "loss_weights"] if weighted else ["input_ids", "loss_mask"]
        table = pa.concat_tables(
            [pq.read_table(file, columns=columns, page_checksum_verification=True) for file in files]
        )
        if not weighted:
            table = table.append_column("loss_weights", table.column("loss_mask"))
        self.rows = table if max_samples is None or max_samples < 0 else table.slice(0, max_samples)

    def __len__(self) -> int:
        return self.rows.num_rows

    def row(self, index: int) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
        """Ids, mask and weights of a row, cut to data.max_length where data.truncation allows it."""
        input_ids, mask, weights = (
            torch.tensor(self.rows.column(name)[index].values.to_numpy(zero_copy_only=False), dtype=dtype)
            for name, dtype in (
                ("input_ids", torch.long),
                ("loss_mask", torch.float32),
                ("loss_weights", torch.float32),
            )
        )
        if self.max_length is not None and len(input_ids) > self.max_length:
            if self.truncation == "error":
                raise ValueError(
                    f"row {index} has {len(input_ids)} tokens, more than data.max_length {self.max_length}"
                )
            input_ids, mask, weights = (part[: self.max_length] for part in (input_ids, mask, weights))
        return input_ids, mask, weights

    def __getitem__(self, index: int) -> dict[str, torch.Tensor]:
        input_ids, _, weights = self.row(index)
        return {"input_ids": input_ids, "position_ids": torch.arange(len(input_ids)), "loss_mask": weights}


class WeightedDataset(ReleaseDataset):
    """The same rows with mask and weights beside each other: verl then counts tokens with loss."""

    def __getitem__(self, index: int) -> dict[str, torch.Tensor]:
        input_ids, mask, weights = self.row(index)
        positions = torch.arange(len(input_ids))
        return {"input_ids": input_ids, "position_ids": positions, "loss_mask": mask, "loss_weights": weights}


def weighted_loss(config: Any, model_output: Any, data: Any, dp_group: Any = None) -> tuple[torch.Tensor, dict]:
    """sum(w * nll) / tokens with loss of the global batch, in the place of verl's `sft_loss`."""
    log_probs = model_output["log_probs"].values()  # at place t: of token t + 1
    weights = torch.roll(data["loss_weights"].values(), shifts=-1, dims=0)
    mask = torch.roll(data["loss_mask"].values(), shifts=-1, dims=0)
    total = torch.where(mask > 0, weights * log_probs, 0.0).sum()
    return -total / data["batch_num_tokens"] * data["dp_size"], {}


def main() -> None:
    """verl's SFT trainer with `WeightedDataset` and `weighted_loss`."""
    import hydra
    from omegaconf import OmegaConf, open_dict
    from verl.trainer import sft_trainer

    class Trainer(sft_trainer.SFTTrainer):
        def _build_engine(self) -> None:
            super()._build_engine()
            self.loss_fn = lambda model_output, data, dp_group=None: weighted_loss(None, model_output, data, dp_group)
            self.training_client.set_loss_fn(loss_fn=self.loss_fn)

    @hydra.main(config_path="pkg://verl.trainer.config", config_name="sft_trainer_engine", version_base=None)
    def run(config: Any) -> None:
        with open_dict(config):
            OmegaConf.update(config, "data.custom_cls.path", __file__, force_add=True)
            OmegaConf.update(config, "data.custom_cls.name", "WeightedDataset", force_add=True)
        sft_trainer.auto_set_device(config)
        sft_trainer.SFTTrainer = Trainer
        sft_trainer.run_sft(config)

    run()


if __name__ == "__main__":
    main()
