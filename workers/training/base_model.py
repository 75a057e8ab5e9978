"""Which model SFT trains, and whether the release's tokens are that model's: known before a job starts."""

from __future__ import annotations

import os
from pathlib import Path
from typing import Any

import numpy as np

from grape_service.config.policy import PolicyConfig
from grape_service.config.training import SftSettings
from grape_service.errors import UserError
from grape_service.models.tokenizer import load_tokenizer
from grape_service.models.vocabulary import Vocabulary
from grape_service.release.load import Release
from grape_service.rows.columns import PREFILL

SAMPLE_ROWS = 32


def base_model(release: Release, settings: SftSettings) -> str:
    """`settings.model`, else the release's target. Raises UserError where neither says a whole model."""
    if settings.model:
        return settings.model
    target = release.manifest.config.get("target") or {}
    if not target.get("model"):
        raise UserError(f"{release.reference} does not say which model it was made for: give train.sft.model")
    if target.get("adapter"):
        raise UserError(
            f"{release.reference} was made for '{target['model']}' with the adapter '{target['adapter']}': "
            "give train.sft.model a folder in which they are merged"
        )
    return str(target["model"])


def base_revision(release: Release, settings: SftSettings) -> str | None:
    """The hub revision of `base_model`: the settings' own, else the one that the release was scored with."""
    if settings.model:
        return settings.revision
    scored = next((use.revision for use in release.manifest.parents.policies if use.role == "target"), None)
    return scored or (release.manifest.config.get("target") or {}).get("revision")


def check_local_model(release: Release, settings: SftSettings) -> None:
    """What can be known on this machine before a job starts on it. Raises UserError for a model that is not there, and
    for one with another tokenizer."""
    model = base_model(release, settings)
    looks_local = model.startswith((".", "/", "~")) or model.count("/") > 1
    folder = Path(os.path.expanduser(model))
    if "://" in model or not (looks_local or folder.is_dir()):
        return
    if not (folder / "config.json").is_file():
        raise UserError(f"{folder.absolute()} is not the folder of a model: give train.sft.model the one to train")
    check_tokenizer(release, model, str(folder), settings)


def check_tokenizer(release: Release, model: str, folder: str, settings: SftSettings) -> None:
    """Raises UserError where the release's tokens are another tokenizer's than that of the model in `folder`.

    Equal digests are enough; otherwise what the first rows' tokens with loss decode to must be their answers.
    """
    recorded = next((use.tokenizer_digest for use in release.manifest.parents.policies if use.role == "target"), None)
    if recorded is None:
        return
    policy = PolicyConfig(model=model, trust_remote_code=settings.trust_remote_code)
    tokenizer = load_tokenizer(folder, policy)
    if Vocabulary(tokenizer).digest == recorded or _decodes(release, tokenizer):
        return
    target = (release.manifest.config.get("target") or {}).get("model", "its target")
    raise UserError(
        f"{release.reference} holds tokens of the tokenizer of '{target}', which is not that of '{model}': train that "
        "model, or make the release for this one"
    )


def _decodes(release: Release, tokenizer: Any) -> bool:
    compared = 0
    names = ["messages", "input_ids", "loss_mask", *({PREFILL.name} & set(release.schema.names))]
    batches = release.batches(names, batch_rows=SAMPLE_ROWS)
    for row in next(iter(batches)).slice(0, SAMPLE_ROWS).to_pylist():
        turns = [m["content"] for m in row["messages"] if m["role"] == "assistant" and m["content"]]
        answers = [turn.removeprefix(row.get(PREFILL.name) or "").strip() for turn in turns]
        ids, mask = np.array(row["input_ids"]), np.array(row["loss_mask"], bool)
        if ids.max(initial=0) >= len(tokenizer):
            return False
        spans = np.flatnonzero(np.diff(np.concatenate([[False], mask, [False]]).astype(np.int8)))
        texts = [tokenizer.decode(ids[start:end].tolist()) for start, end in zip(spans[::2], spans[1::2], strict=True)]
        if answers and answers[-1] not in "\n".join(texts):
            return False
        compared += bool(answers)
    return compared > 0
