"""All statistics of one token a row from its logits: on a GPU one fused Triton pass.

Definitions are those of grape_service.rows.statistics, of the distribution softmax(logits / temperature).
Shape legend: R rows, V vocabulary, S statistics.
"""

from __future__ import annotations

import logging
from collections.abc import Sequence
from functools import cache

import torch

from grape_service.rows.statistics import ENTROPY, LOGPROB, MAX_RANK, RANK, TOP, TOP20_ENTROPY
from workers.engines.token_logprobs import token_logprobs

log = logging.getLogger(__name__)

BLOCK = 4096
"""Logits a Triton program reads at a time."""

CHUNK_BYTES = 1 << 21
"""Float32 logits that the plain version works on at a time: about what a core's cache holds."""

NUM_COLUMNS = 512
"""Columns that a row is dealt to when its largest logits are looked for."""


def token_statistics(
    logits_RV: torch.Tensor, targets_R: torch.Tensor, temperatures_R: torch.Tensor | None, names: Sequence[str]
) -> torch.Tensor:
    """The statistics `names` of each row's target, float32 [R, S] in the order of `names`.

    Logits may be a strided view of any float type; no temperatures means 1 for every row. Sums are in float32.
    """
    if tuple(names) == (LOGPROB,):
        return token_logprobs(logits_RV, targets_R, temperatures_R)[:, None]
    if logits_RV.is_cuda and fused_statistics_work(logits_RV.device):
        return fused_token_statistics(logits_RV, targets_R, temperatures_R, names)
    return plain_token_statistics(logits_RV, targets_R, temperatures_R, names)


def plain_token_statistics(
    logits_RV: torch.Tensor, targets_R: torch.Tensor, temperatures_R: torch.Tensor | None, names: Sequence[str]
) -> torch.Tensor:
    """The same in PyTorch's own operations, a few rows at a time on a CPU."""
    found_RS = torch.empty(len(logits_RV), len(names), dtype=torch.float32, device=logits_RV.device)
    rows = max(1, CHUNK_BYTES // (4 * logits_RV.shape[1])) if logits_RV.device.type == "cpu" else 256
    for start in range(0, len(logits_RV), rows):
        chunk = slice(start, start + rows)
        temperature_R = None if temperatures_R is None else temperatures_R[chunk]
        found = _of_chunk(logits_RV[chunk], targets_R[chunk], temperature_R, names)
        for place, name in enumerate(names):
            found_RS[chunk, place] = found[name]
    return found_RS


def _of_chunk(
    logits_RV: torch.Tensor, targets_R: torch.Tensor, temperatures_R: torch.Tensor | None, names: Sequence[str]
) -> dict[str, torch.Tensor]:
    raw_RV = logits_RV.float()
    target_R1 = raw_RV.gather(1, targets_R[:, None])
    found: dict[str, torch.Tensor] = {}
    if RANK in names:
        # Of the logits as they are: a division could make two of them equal. Counted in float32, exact up to 2**24.
        above_RV = torch.gt(raw_RV, target_R1, out=torch.empty_like(raw_RV))
        found[RANK] = above_RV.sum(1).add_(1).clamp_(max=MAX_RANK)
    if temperatures_R is not None:
        raw_RV, target_R1 = raw_RV / temperatures_R[:, None], target_R1 / temperatures_R[:, None]
    if TOP20_ENTROPY in names:
        top_RK, largest_R1 = _top(raw_RV)
        found[TOP20_ENTROPY] = _entropy(top_RK - largest_R1)[0]
    else:
        largest_R1 = raw_RV.amax(1, keepdim=True)
    entropy_R, log_sum_R = _entropy(raw_RV - largest_R1)
    found[ENTROPY] = entropy_R
    found[LOGPROB] = (target_R1 - largest_R1).squeeze(1).sub_(log_sum_R).clamp_(max=0.0)
    return found


def _entropy(shifted_RV: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """Entropy of softmax and log of the sum of exponentials, [R] each, of logits less their largest: overwritten.

    H = log Z - sum_v e^z(v) z(v) / Z
    """
    shifted_RV.clamp_(min=-1e4)  # a logit of -inf has no part in either sum
    weight_RV = shifted_RV.exp()
    total_R = weight_RV.sum(1)
    log_sum_R = total_R.log()
    moment_R = torch.linalg.vecdot(weight_RV, shifted_RV)
    return (log_sum_R - moment_R / total_R).clamp_(min=0.0), log_sum_R


def _top(values_RV: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """The TOP largest of each row [R, TOP] in no order, and the largest [R, 1].

    On a CPU `topk` of a whole vocabulary takes longer than everything else together. Here a row is dealt to columns;
    the largest of all lie in the columns with the largest maxima, and only those are looked at.
    """
    rows, vocab = values_RV.shape
    height = vocab // NUM_COLUMNS
    if height < 2:
        top_RK = values_RV.topk(min(TOP, vocab), dim=1, sorted=False).values
        return top_RK, top_RK.amax(1, keepdim=True)
    table_RHC = values_RV[:, : height * NUM_COLUMNS].view(rows, height, NUM_COLUMNS)
    columns_RK = table_RHC.amax(1).topk(TOP, dim=1, sorted=False).indices
    among = table_RHC.gather(2, columns_RK[:, None, :].expand(-1, height, -1)).flatten(1)
    rest = values_RV[:, height * NUM_COLUMNS :]
    top_RK = torch.cat([among, rest], dim=1).topk(TOP, dim=1, sorted=False).values
    return top_RK, top_RK.amax(1, keepdim=True)


def fused_token_statistics(
    logits_RV: torch.Tensor, targets_R: torch.Tensor, temperatures_R: torch.Tensor | None, names: Sequence[str]
) -> torch.Tensor:
    """The same as one Triton kernel: each row is read once."""
    assert logits_RV.stride(1) == 1, "the logits of a row must lie next to each other"
    from workers.engines.token_statistics_kernel import row_statistics

    rows, vocab = logits_RV.shape
    found_4R = torch.empty(4, rows, dtype=torch.float32, device=logits_RV.device)
    row_statistics[(rows,)](
        logits_RV,
        logits_RV.stride(0),
        targets_R,
        logits_RV if temperatures_R is None else temperatures_R,
        found_4R,
        rows,
        vocab,
        HEATED=temperatures_R is not None,
        WITH_TOP=TOP20_ENTROPY in names,
        TOP=TOP,
        MAX_RANK=MAX_RANK,
        BLOCK=BLOCK,
        num_warps=8,
    )
    order = (LOGPROB, ENTROPY, RANK, TOP20_ENTROPY)
    return found_4R[[order.index(name) for name in names]].T


@cache
def fused_statistics_work(device: torch.device) -> bool:
    """Whether Triton can compile and run the kernel on `device` and agrees there with PyTorch."""
    generator = torch.Generator(device).manual_seed(0)
    logits_RV = (10 * torch.randn(3, 2 * BLOCK + 7, generator=generator, device=device)).to(torch.bfloat16)[:, :-3]
    targets_R = torch.tensor([0, BLOCK + 1, 2 * BLOCK + 3], device=device)
    temperatures_R = torch.tensor([1.0, 0.5, 2.0], device=device)
    names = (LOGPROB, ENTROPY, RANK, TOP20_ENTROPY)
    try:
        fused_RS = fused_token_statistics(logits_RV, targets_R, temperatures_R, names)
    except Exception as error:  # a host without a compiler, a Triton too old: PyTorch's operations do it too
        log.info("no fused statistics on %s: %s", device, error)
        return False
    plain_RS = plain_token_statistics(logits_RV, targets_R, temperatures_R, names)
    return torch.allclose(fused_RS, plain_RS, atol=1e-4, rtol=0)
