"""Exports, loaded again with verl's and LLaMA-Factory's own code.

Both want other versions of our libraries, so that each lies in its own folder (`make install-test`) and runs
in its own process that has this folder on its path.
"""

from __future__ import annotations

import os
import subprocess
import sys
from collections import Counter
from pathlib import Path

import numpy as np
import pytest

import grape_service
from grape_service.exports import export
from grape_service.release.load import Release
from tests.tiny_models import make_model
from tests.workers.training.tiny_release import make_rows, write_release

NUM_ROWS = 9

VERL = """
import sys
import numpy as np, torch
from tensordict import TensorDict
from verl.utils.dataset.dataset_utils import SFTTensorCollator
from verl.utils.import_utils import load_extern_object
from verl.utils.tensordict_utils import assign_non_tensor
from verl.workers.utils.losses import sft_loss

folder, released = sys.argv[1], np.load(sys.argv[2])
weights, sizes = torch.from_numpy(released["weights"]), released["sizes"]
dataset_class = load_extern_object(f"{folder}/grape_verl.py", "ReleaseDataset")
config = {"pad_mode": "no_padding", "max_length": 64}
files = [f"{folder}/data/part-00000.parquet"]
dataset = dataset_class(parquet_files=files, tokenizer=None, config=config, processor=None, max_samples=-1)
batch = SFTTensorCollator("no_padding")([dataset[index] for index in range(len(dataset))])
assert batch["loss_mask"].offsets().diff().tolist() == sizes.tolist()
assert torch.equal(batch["loss_mask"].values(), weights)
assert batch["input_ids"].values().tolist() == released["input_ids"].tolist()

log_probs = -torch.rand(len(weights))  # at place t: of token t + 1
data = TensorDict({"loss_mask": batch["loss_mask"]}, batch_size=[len(dataset)])
assign_non_tensor(data, dp_size=1, batch_num_tokens=data["loss_mask"].sum().item())  # as its engine counts them
jagged = torch.nested.nested_tensor_from_jagged(log_probs, batch["loss_mask"].offsets())
loss, _ = sft_loss(None, {"log_probs": jagged}, data)
expected = -(log_probs.double() * torch.roll(weights, -1)).sum() / weights.double().sum()
torch.testing.assert_close(torch.as_tensor(loss).double(), expected, rtol=1e-6, atol=0)
print("rows", len(dataset))
"""

LLAMAFACTORY = """
import sys
from llamafactory.data import get_dataset, get_template_and_fix_tokenizer
from llamafactory.hparams import get_train_args
from transformers import AutoTokenizer

model, folder, output = sys.argv[1:]
arguments = dict(
    model_name_or_path=model, stage="sft", do_train=True, finetuning_type="full", dataset="tiny", dataset_dir=folder,
    template="chatml", output_dir=output, cutoff_len=256, overwrite_cache=True, report_to="none", bf16=False,
)
model_args, data_args, training_args, _, _ = get_train_args(arguments)
tokenizer = AutoTokenizer.from_pretrained(model)
template = get_template_and_fix_tokenizer(tokenizer, data_args)
rows = get_dataset(template, model_args, data_args, training_args, stage="sft", tokenizer=tokenizer)["train_dataset"]
for row in rows:
    print("ROW", tokenizer.decode([token for token in row["labels"] if token >= 0]).split("<")[0].strip())
"""


def run_in(trainer: str, code: str, *arguments: str) -> list[str]:
    """Lines that Python code prints with a trainer's own packages on its path."""
    packages = Path(sys.prefix) / "trainers" / trainer
    if not packages.exists():
        pytest.skip(f"{trainer} is not in {packages}: run make install-test")
    environment = os.environ | {
        "PYTHONPATH": os.pathsep.join([str(packages), os.environ.get("PYTHONPATH", "")]),
        "DISABLE_VERSION_CHECK": "1",
        "HF_HUB_OFFLINE": "1",
        "USE_MODELSCOPE_HUB": "0",
    }
    command = [sys.executable, "-c", code, *arguments]
    ended = subprocess.run(command, capture_output=True, text=True, timeout=240, env=environment)
    assert ended.returncode == 0, ended.stderr[-3000:]
    return ended.stdout.splitlines()


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> str:
    return make_model(tmp_path_factory.mktemp("model"))


@pytest.fixture
def release(tmp_path: Path) -> Release:
    return grape_service.load(write_release(tmp_path / "out", make_rows(NUM_ROWS), {}))


def test_verls_loader_and_loss_get_each_token_with_its_weight(release: Release, tmp_path: Path) -> None:
    """The class as verl's trainer loads it, its collator and its loss: sum(w * nll) / sum(w)."""
    export(release, "verl", str(tmp_path / "verl"))
    rows = make_rows(NUM_ROWS)
    released = {name: np.concatenate([row[name] for row in rows]) for name in ("loss_weights", "input_ids")}
    sizes = [len(row["input_ids"]) for row in rows]
    np.savez(tmp_path / "released.npz", weights=released["loss_weights"], input_ids=released["input_ids"], sizes=sizes)
    said = run_in("verl", VERL, str(tmp_path / "verl"), str(tmp_path / "released.npz"))
    assert said[-1] == f"rows {NUM_ROWS}"


def test_llamafactorys_loader_gets_rows_as_often_as_they_weigh(release: Release, model: str, tmp_path: Path) -> None:
    summary = export(release, "llamafactory", str(tmp_path / "lf"))
    said = run_in("llamafactory", LLAMAFACTORY, model, str(tmp_path / "lf"), str(tmp_path / "trained"))
    found = Counter(int(line.split()[1]) for line in said if line.startswith("ROW"))
    assert found.total() == summary.rows
    means = np.array([row["loss_weights"][row["loss_mask"]].mean() for row in make_rows(NUM_ROWS)])
    for number, share in enumerate(means / means.mean()):
        assert found[number + 1] in (int(share), int(share) + 1)  # the answer to question number n is n + 1
    assert set(found) <= set(range(1, NUM_ROWS + 1))
