"""The Triton kernel of `token_statistics`: its own module because importing Triton is not possible everywhere."""

from __future__ import annotations

import triton
import triton.language as tl


@triton.jit
def row_statistics(  # type: ignore[no-untyped-def]
    logits,
    row_stride,
    targets,
    temperatures,
    found,
    rows,
    vocab,
    HEATED: tl.constexpr,
    WITH_TOP: tl.constexpr,
    TOP: tl.constexpr,
    MAX_RANK: tl.constexpr,
    BLOCK: tl.constexpr,
):
    """One program a row: reads the row's logits once. `found` [4, rows]: logprob, entropy, rank, entropy of the top.

    Each of BLOCK lanes keeps the largest value that it has seen, the sum of exponentials relative to it, and the sum of
    those times the value less the largest; the lanes are joined at the end. The TOP largest are kept apart: as long as
    a block holds one larger than the smallest of them, it takes that one's place.
    """
    row = tl.program_id(0).to(tl.int64)
    start = logits + row * row_stride
    inverse = 1.0
    if HEATED:
        inverse = 1.0 / tl.load(temperatures + row)
    raw_target = tl.load(start + tl.load(targets + row)).to(tl.float32)
    columns = tl.arange(0, BLOCK)
    slots = tl.arange(0, 32)
    largest = tl.full([BLOCK], float("-inf"), tl.float32)
    total = tl.zeros([BLOCK], tl.float32)
    moment = tl.zeros([BLOCK], tl.float32)
    above = tl.zeros([BLOCK], tl.int32)
    # The slots beyond TOP hold +inf: never the smallest, and left out at the end.
    top = tl.where(slots < TOP, float("-inf"), float("inf"))
    for first in range(0, vocab, BLOCK):
        inside = first + columns < vocab
        raw = tl.load(start + first + columns, mask=inside, other=float("-inf")).to(tl.float32)
        above += (raw > raw_target).to(tl.int32)
        values = raw * inverse
        grown = tl.maximum(largest, values)
        # Lanes that have seen no value yet hold -inf; their sums stay 0.
        seen = grown > float("-inf")
        had = largest > float("-inf")
        has = values > float("-inf")
        fell = tl.where(had, largest - grown, 0.0)
        kept = tl.where(had, tl.exp(fell), 0.0)
        step = tl.where(has, values - grown, 0.0)
        added = tl.where(has, tl.exp(step), 0.0)
        moment = kept * (moment + fell * total) + step * added
        total = total * kept + added
        largest = tl.where(seen, grown, largest)
        if WITH_TOP:
            left = values
            best = tl.max(left, axis=0)
            worst = tl.min(top, axis=0)
            while best > worst:
                place = tl.argmin(top, axis=0)
                top = tl.where(slots == place, best, top)
                left = tl.where(columns == tl.argmax(left, axis=0), float("-inf"), left)
                best = tl.max(left, axis=0)
                worst = tl.min(top, axis=0)
    peak = tl.max(largest, axis=0)
    had = largest > float("-inf")
    fell = tl.where(had, largest - peak, 0.0)
    scale = tl.where(had, tl.exp(fell), 0.0)
    whole = tl.sum(total * scale, axis=0)
    moments = tl.sum(scale * (moment + fell * total), axis=0)
    log_sum = tl.log(whole)
    tl.store(found + row, tl.minimum(raw_target * inverse - peak - log_sum, 0.0))
    tl.store(found + rows + row, tl.maximum(log_sum - moments / whole, 0.0))
    rank = tl.minimum(tl.sum(above, axis=0) + 1, MAX_RANK)
    tl.store(found + 2 * rows + row, rank.to(tl.float32))
    if WITH_TOP:
        is_top = (slots < TOP) & (top > float("-inf"))
        step = tl.where(is_top, top - peak, 0.0)
        weight = tl.where(is_top, tl.exp(step), 0.0)
        whole_top = tl.sum(weight, axis=0)
        tl.store(found + 3 * rows + row, tl.maximum(tl.log(whole_top) - tl.sum(weight * step, axis=0) / whole_top, 0.0))
