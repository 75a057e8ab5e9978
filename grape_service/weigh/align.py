"""One response under two tokenizers: which tokens of each cover the same bytes.

Both spell the same text. It is cut wherever both begin a token; a span is what lies between two such places, and holds
tokens of each. With T_s and B_s the sums of log p of a span's tokens under target and behavior, and n_s the target's
tokens in it, each of these gets an equal share of the span's log ratio:

    delta_t = (T_s - B_s) / n_s, so that sum_{t in s} delta_t = T_s - B_s

Not compared, and of a delta of 0, are: text that one of the two has in its prompt, spans with a special token, and turn
ends that are other tokens. Lt and Lb are the tokens with loss of a row under target and behavior.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
import numpy.typing as npt

from grape_service.models.vocabulary import Vocabulary
from grape_service.rows.candidate import Rendered
from grape_service.rows.columns import LOSS_TURN_END
from grape_service.rows.ragged import Int64s
from grape_service.rows.spans import span_starts

NOT_COMPARED = -1
"""The span of a token that is in none."""

Spans = npt.NDArray[np.int32]


@dataclass(frozen=True)
class Written:
    """What a policy wrote in one go, under one tokenizer."""

    text: bytes
    starts: Int64s  # [n + 1] where each token begins in it
    special: npt.NDArray[np.bool_]  # [n]
    turn_end: bytes | None  # how that is written, where there is one behind it


def written_of(row: Rendered, vocabulary: Vocabulary) -> list[Written]:
    """The tokens with loss of a row, a part for each stretch of them."""
    has_loss = row.loss_mask > 0
    ids, kind = row.input_ids[has_loss], row.loss_mask[has_loss]
    first = np.flatnonzero(span_starts(has_loss, np.array([0, len(has_loss)]))[has_loss])
    found = []
    for begin, end in zip(first.tolist(), [*first.tolist()[1:], len(ids)], strict=True):
        turn_end = None
        if kind[end - 1] == LOSS_TURN_END:
            end -= 1
            turn_end = vocabulary.bytes_of([ids[end]])[0]
        text, starts = vocabulary.spelled(ids[begin:end])
        found.append(Written(text, starts, np.isin(ids[begin:end], vocabulary.special_ids), turn_end))
    return found


def spans_of(starts: Int64s, others: Int64s) -> tuple[Int64s, Int64s]:
    """The span of each token of two tokenizers, from 0, by where their tokens begin in a text: [n + 1], [m + 1] -> [n],
    [m]; NOT_COMPARED for those before the first place or behind the last that both have."""
    if np.array_equal(starts, others):
        each = np.arange(len(starts) - 1)
        return each, each.copy()
    shared = np.intersect1d(starts, others)

    def span(places: Int64s) -> Int64s:
        found = np.searchsorted(shared, places[:-1], side="right") - 1
        return np.where(found < len(shared) - 1, found, NOT_COMPARED)

    return span(starts), span(others)


def align(target: list[Written], own: list[Written]) -> tuple[Spans, Spans] | None:
    """The span of each token with loss [Lt] and [Lb] of a row; None where the two do not write the same text.

    Of the first part one may have more at its beginning, which the other has in its prompt.
    """
    if len(target) != len(own):
        return None
    ours: list[Int64s] = []
    theirs: list[Int64s] = []
    count = 0
    for place, (one, other) in enumerate(zip(target, own, strict=True)):
        more = len(one.text) - len(other.text)
        longer, shorter = (one, other) if more > 0 else (other, one)
        if not longer.text.endswith(shorter.text) or (more and place):
            return None
        left, right = spans_of(one.starts - max(more, 0), other.starts - max(-more, 0))
        special = np.zeros(len(left) + len(right), dtype=bool)
        for spans, are_special in ((left, one.special), (right, other.special)):
            special[spans[are_special & (spans != NOT_COMPARED)]] = True
        number = max(int(left.max(initial=-1)), int(right.max(initial=-1))) + 1
        for spans, into in ((left, ours), (right, theirs)):
            known = spans != NOT_COMPARED
            known[known] &= ~special[spans[known]]
            into.append(np.where(known, spans + count, NOT_COMPARED))
        count += number
        same = one.turn_end is not None and one.turn_end == other.turn_end
        for part, into in ((one, ours), (other, theirs)):
            if part.turn_end is not None:
                into.append(np.array([count if same else NOT_COMPARED]))
        count += same
    return np.concatenate(ours).astype(np.int32), np.concatenate(theirs).astype(np.int32)


def shared_logprobs(
    target: npt.NDArray[np.float32],
    target_spans: npt.NDArray[np.integer],
    own: npt.NDArray[np.float32],
    own_spans: npt.NDArray[np.integer],
) -> npt.NDArray[np.float32]:
    """The behavior's log-probability as it stands beside each of the target's tokens: [Lt], [Lt], [Lb], [Lb] -> [Lt].

    The target's less the token's share of its span's log ratio; a span's add up to B_s. Of a span of one token each it
    is the behavior's own, bit for bit. NaN where the token is not compared.
    """
    number = int(max(target_spans.max(initial=-1), own_spans.max(initial=-1))) + 1

    def sums(spans: npt.NDArray[np.integer], values: npt.NDArray[np.float32] | None) -> npt.NDArray:
        there = spans != NOT_COMPARED
        weights = None if values is None else values[there].astype(np.float64)
        return np.bincount(spans[there], weights=weights, minlength=number)

    lengths, behavior = sums(target_spans, None), sums(own_spans, own)
    share = (sums(target_spans, target) - behavior) / np.maximum(lengths, 1)
    there = target_spans != NOT_COMPARED
    spans = target_spans[there]
    found = np.full(len(target), np.nan)
    found[there] = np.where(lengths[spans] == 1, behavior[spans], target[there].astype(np.float64) - share[spans])
    return found.astype(np.float32)


def one_to_one(
    target_spans: npt.NDArray[np.integer], own_spans: npt.NDArray[np.integer]
) -> tuple[npt.NDArray[np.bool_], Int64s]:
    """Which of the target's tokens [Lt] are in a span of one token each, and the target's tokens in each span [S]."""
    number = int(max(target_spans.max(initial=-1), own_spans.max(initial=-1))) + 1
    ours, theirs = (np.bincount(spans[spans != NOT_COMPARED], minlength=number) for spans in (target_spans, own_spans))
    there = target_spans != NOT_COMPARED
    single = np.zeros(len(target_spans), dtype=bool)
    single[there] = ((ours == 1) & (theirs == 1))[target_spans[there]]
    return single, ours[ours > 0]
