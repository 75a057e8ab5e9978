"""The Triton kernel of `token_logprobs`: its own module because importing Triton is not possible everywhere."""

from __future__ import annotations

import triton
import triton.language as tl


@triton.jit
def row_logprob(  # type: ignore[no-untyped-def]
    logits, row_stride, targets, temperatures, logprobs, vocab, HEATED: tl.constexpr, BLOCK: tl.constexpr
):
    """One program a row: reads the row's logits once and keeps, for each of BLOCK lanes, the largest value
    seen and the sum of exponentials relative to it; the lanes are joined at the end. Sums are float32."""
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
