"""What each method keeps of a pool, by the product's own formulas, steps and windows.

Shapes: N candidates, L tokens of theirs without the end, which counts in no score; `offsets` [N + 1].
"""

from __future__ import annotations

import re
from collections.abc import Iterator, Sequence
from itertools import pairwise

import numpy as np
import numpy.typing as npt
import pyarrow as pa
import torch

from benchmarks.learning.chains.models import END_ID, IDS, Batch, Model, Written, batch_of, log_probs_n
from benchmarks.learning.chains.task import END
from grape_service.config.methods import SelectConfig
from grape_service.methods import SELECT
from grape_service.methods.base import Float64s
from grape_service.rows.method_batch import MethodBatch
from grape_service.rows.ragged import Int64s, list_array, offsets_from_lengths
from grape_service.rows.statistics import LOGPROB, RANK
from grape_service.rows.steps import step_numbers, step_starts
from grape_service.score.windows import windows_of

STEP_END = r";|\. "
"""What ends a step of a chain in each of its forms."""
SCORED = ("grape", "steps", "local", "rsr")
BATCH = 64
"""Rows that are read at a time."""


@torch.no_grad()
def scores(method: str, model: Model, prompts: Sequence[str], texts: Sequence[str]) -> Float64s:
    """What a method of the product gives each candidate [N] under a model, the largest wins."""
    config = SelectConfig.model_validate({"method": method, "step_end": STEP_END})
    how = SELECT[method]
    offsets = offsets_from_lengths(np.array([len(text) for text in texts]))
    logprobs, ranks = read_with_ranks(model, prompts, texts)
    steps = _steps(texts, offsets) if how.cuts_steps else None
    windows = config.windows
    local = None if windows is None or steps is None else _local(model, prompts, texts, steps, config)
    ids = pa.array([str(row) for row in range(len(texts))])
    statistics = {LOGPROB: logprobs, RANK: ranks}
    batch = MethodBatch(np.arange(len(texts)), ids, ids, offsets, statistics, {}, steps, local)
    return how.oriented(how.score(batch, config))


@torch.no_grad()
def read_with_ranks(
    model: Model, prompts: Sequence[str], texts: Sequence[str]
) -> tuple[npt.NDArray[np.float32], Int64s]:
    """log p of each token [L], and its rank among all tokens there, from 1."""
    logprobs, ranks = [], []
    for start in range(0, len(texts), BATCH):
        some = [Written(text, False) for text in texts[start : start + BATCH]]
        batch = batch_of(prompts[start : start + BATCH], some)
        logits = model(batch.ids[:, :-1])[batch.mask]
        taken = logits.gather(-1, batch.ids[:, 1:][batch.mask][:, None])
        logprobs.append((taken[:, 0] - logits.logsumexp(-1)).numpy())
        ranks.append((logits > taken).sum(-1).numpy() + 1)
    return np.concatenate(logprobs), np.concatenate(ranks)


def _steps(texts: Sequence[str], offsets: Int64s) -> Int64s:
    """The step of each token [L] in its response; a token is a character."""
    is_first = np.zeros(int(offsets[-1]), dtype=bool)
    is_first[offsets[:-1]] = True
    places = np.arange(int(offsets[-1]) + 1)
    return step_numbers(step_starts("".join(texts).encode(), places, is_first, re.compile(STEP_END)), offsets)


def _local(
    model: Model, prompts: Sequence[str], texts: Sequence[str], steps: Int64s, config: SelectConfig
) -> npt.NDArray[np.float32]:
    """log p of each token [L] in the window of its step."""
    assert config.windows is not None, "local has a window"
    sequences = [[IDS[c] for c in END + prompt + text] for prompt, text in zip(prompts, texts, strict=True)]
    offsets = offsets_from_lengths(np.array([len(sequence) for sequence in sequences]))
    before = np.array([len(END + prompt) for prompt in prompts], dtype=np.int32)
    mask = (np.arange(offsets[-1]) - np.repeat(offsets[:-1] + before, np.diff(offsets)) >= 0).astype(np.uint8)
    columns = {
        "input_ids": list_array(offsets, np.concatenate(sequences).astype(np.int32), pa.int32()),
        "loss_mask": list_array(offsets, mask, pa.uint8()),
        "prompt_len": pa.array(before),
    }
    windows = windows_of(pa.table(columns), steps, config.windows)
    ids, with_loss, bounds, _ = windows.sequences(slice(0, len(windows)))
    return np.concatenate([log_probs_n(model, batch).numpy() for batch in _padded(ids, with_loss, bounds)])


def _padded(ids: npt.NDArray[np.int32], mask: npt.NDArray[np.uint8], bounds: Int64s) -> Iterator[Batch]:
    """Sequences [M] as batches, in order."""
    for start in range(0, len(bounds) - 1, 4 * BATCH):
        some = bounds[start : start + 4 * BATCH + 1]
        longest = int(np.diff(some).max())
        batch_ids = torch.full((len(some) - 1, longest), END_ID)
        batch_mask = torch.zeros(len(some) - 1, longest, dtype=torch.bool)
        for row, (begin, end) in enumerate(pairwise(some)):
            batch_ids[row, : end - begin] = torch.from_numpy(ids[begin:end].astype(np.int64))
            batch_mask[row, : end - begin] = torch.from_numpy(mask[begin:end] > 0)
        yield Batch(batch_ids, batch_mask[:, 1:])


def kept(
    method: str, model: Model, prompts: Sequence[str], texts: Sequence[str], of_each: int, rng: np.random.Generator
) -> Int64s:
    """Which rows are kept: of the `of_each` candidates of each problem the best, one at random, or all."""
    if method == "all":
        return rng.permutation(len(texts))
    firsts = np.arange(0, len(texts), of_each)
    if method == "random":
        return firsts + rng.integers(of_each, size=len(firsts))
    return firsts + scores(method, model, prompts, texts).reshape(-1, of_each).argmax(axis=1)
