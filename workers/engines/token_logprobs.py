"""log p of one token a row from logits, without a float32 copy of them: on a GPU one fused Triton pass.

Shape legend: R rows, V vocabulary.
"""

from __future__ import annotations

import logging
from functools import cache

import torch

log = logging.getLogger(__name__)

BLOCK = 4096
"""Logits a Triton program reads at a time."""


def token_logprobs(
    logits_RV: torch.Tensor, targets_R: torch.Tensor, temperatures_R: torch.Tensor | None
) -> torch.Tensor:
    """log_softmax(logits / temperature) at each row's target, float32 [R]; logits may be a strided view.

    No temperatures means 1 for every row.
    The sum is in float32 whatever the logits' type. Never above 0.
    """
    if logits_RV.is_cuda and fused_kernel_works(logits_RV.device):
        return fused_token_logprobs(logits_RV, targets_R, temperatures_R)
    return plain_token_logprobs(logits_RV, targets_R, temperatures_R)


def plain_token_logprobs(
    logits_RV: torch.Tensor, targets_R: torch.Tensor, temperatures_R: torch.Tensor | None
) -> torch.Tensor:
    """The same in PyTorch's own operations; makes float32 copies of the logits."""
    scaled_RV = logits_RV.float()
    if temperatures_R is not None:
        scaled_RV = scaled_RV / temperatures_R[:, None]
    picked_R = scaled_RV.gather(1, targets_R[:, None]).squeeze(1)
    return (picked_R - torch.logsumexp(scaled_RV, dim=1)).clamp_(max=0.0)


def fused_token_logprobs(
    logits_RV: torch.Tensor, targets_R: torch.Tensor, temperatures_R: torch.Tensor | None
) -> torch.Tensor:
    """The same as one Triton kernel: each row is read once, with a running maximum and sum."""
    assert logits_RV.stride(1) == 1, "the logits of a row must lie next to each other"
    from workers.engines.token_logprobs_kernel import row_logprob

    rows, vocab = logits_RV.shape
    logprobs_R = torch.empty(rows, dtype=torch.float32, device=logits_RV.device)
    row_logprob[(rows,)](
        logits_RV,
        logits_RV.stride(0),
        targets_R,
        logits_RV if temperatures_R is None else temperatures_R,
        logprobs_R,
        vocab,
        HEATED=temperatures_R is not None,
        BLOCK=BLOCK,
        num_warps=8,
    )
    return logprobs_R


@cache
def fused_kernel_works(device: torch.device) -> bool:
    """Whether Triton can compile and run the kernel on `device` and agrees there with PyTorch."""
    generator = torch.Generator(device).manual_seed(0)
    logits_RV = (10 * torch.randn(3, 2 * BLOCK + 7, generator=generator, device=device)).to(torch.bfloat16)[:, :-3]
    targets_R = torch.tensor([0, BLOCK + 1, 2 * BLOCK + 3], device=device)
    temperatures_R = torch.tensor([1.0, 0.5, 2.0], device=device)
    try:
        fused_R = fused_token_logprobs(logits_RV, targets_R, temperatures_R)
    except Exception as error:  # a host without a compiler, a Triton too old: PyTorch's operations do it too
        log.info("no fused log-softmax on %s: %s", device, error)
        return False
    return torch.allclose(fused_R, plain_token_logprobs(logits_RV, targets_R, temperatures_R), atol=1e-4, rtol=0)
