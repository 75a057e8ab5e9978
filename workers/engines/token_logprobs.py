"""log p of one token a row from logits, without a float32 copy of them: on a GPU one fused Triton pass.

Shape legend: R rows, V vocabulary.
"""

from __future__ import annotations

from collections.abc import Callable
from functools import cache
from typing import Any

import torch

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
    rows, vocab = logits_RV.shape
    logprobs_R = torch.empty(rows, dtype=torch.float32, device=logits_RV.device)
    _triton_kernel()[(rows,)](
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
        torch._logging._internal.log.info("no fused log-softmax on %s: %s", device, error)
        return False
    return torch.allclose(fused_R, plain_token_logprobs(logits_RV, targets_R, temperatures_R), atol=1e-4, rtol=0)


@cache
def _triton_kernel() -> Callable[..., Any]:
    import triton
    import triton.language as tl

    @triton.jit
    def kernel(  # type: ignore[no-untyped-def]
        logits, row_stride, targets, temperatures, logprobs, vocab, HEATED: tl.constexpr, BLOCK: tl.constexpr
    ):
        row = tl.program_id(0).to(tl.int64)
        start = logits + row * row_stride
        inverse = 1.0
        if HEATED:
            inverse = 1.0 / tl.load(temperatures + row)
        columns = tl.arange(0, BLOCK)
        largest = tl.full([BLOCK], float("-inf"), tl.float32)
        total = tl.zeros([BLOCK], tl.float32)
        for first in range(0, vocab, BLOCK):
            inside = first + columns < vocab
            values = tl.load(start + first + columns, mask=inside, other=float("-inf")).to(tl.float32) * inverse
            grown = tl.maximum(largest, values)
            # Lanes that have seen no value yet hold -inf; their sums stay 0.
            seen = grown > float("-inf")
            kept = tl.where(seen, tl.exp(largest - grown), 0.0)
            added = tl.where(seen, tl.exp(values - grown), 0.0)
            total = total * kept + added
            largest = grown
        top = tl.max(largest, axis=0)
        normaliser = top + tl.log(tl.sum(tl.where(largest > float("-inf"), total * tl.exp(largest - top), 0.0), axis=0))
        target = tl.load(start + tl.load(targets + row)).to(tl.float32) * inverse
        tl.store(logprobs + row, tl.minimum(target - normaliser, 0.0))

    return kernel
