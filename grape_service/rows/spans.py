"""What a row's tokens with loss say of its messages: its spans, their turn ends, and where the response begins.

A span is a stretch of tokens with loss that follow each other: what the policy wrote in one go. T tokens of N rows.
"""

from __future__ import annotations

from collections.abc import Collection, Sequence

import numpy as np
import numpy.typing as npt
import orjson

from grape_service.rows.candidate import Message
from grape_service.rows.columns import LOSS_TOKEN, LOSS_TURN_END
from grape_service.rows.prefill import one_turn
from grape_service.rows.ragged import Int64s, segment_sums

Mask = npt.NDArray[np.uint8]


def span_starts(has_loss: npt.NDArray[np.bool_], offsets: Int64s) -> npt.NDArray[np.bool_]:
    """Which tokens [T] begin a span."""
    before = np.zeros(len(has_loss), dtype=bool)
    before[1:] = has_loss[:-1]
    before[offsets[:-1][offsets[:-1] < len(has_loss)]] = False
    return has_loss & ~before


def num_spans(has_loss: npt.NDArray[np.bool_], offsets: Int64s) -> Int64s:
    """Spans of each row [N]."""
    return segment_sums(span_starts(has_loss, offsets), offsets)


def mask_with_turn_ends(
    ids: npt.NDArray[np.int32], has_loss: npt.NDArray[np.bool_], offsets: Int64s, stop_ids: Collection[int]
) -> Mask:
    """Booleans [T] -> LOSS_* [T]: the last token of a span is a turn end when it is one of the stop ids."""
    mask = has_loss.astype(np.uint8) * LOSS_TOKEN
    if stop_ids:
        followed = np.zeros(len(mask), dtype=bool)
        followed[:-1] = has_loss[1:]
        followed[offsets[1:] - 1] = False
        mask[has_loss & ~followed & np.isin(ids, list(stop_ids))] = LOSS_TURN_END
    return mask


def num_prompt_messages(messages: Sequence[Message], spans: int) -> int:
    """Messages before the response: it begins with the assistant message of its first span."""
    places = [place for place, message in enumerate(messages) if message["role"] == "assistant"]
    return places[-spans] if len(places) >= spans else max(len(messages) - 1, 0)


def are_told_by_tokens(
    ids: npt.NDArray[np.int32],
    mask: Mask,
    offsets: Int64s,
    stop_ids: Collection[int],
    messages: Sequence[str],
    prompt_messages: Sequence[int],
) -> npt.NDArray[np.bool_]:
    """Rows [N] whose turn ends [T] and whose number of prompt messages [N] follow from their tokens, a boolean mask and
    `messages`, which are JSON [N] of shards and are told of as a release has them."""
    told = segment_sums(mask_with_turn_ends(ids, mask > 0, offsets, stop_ids) != mask, offsets) == 0
    spans = num_spans(mask > 0, offsets)
    same = []
    for text, number, prompt in zip(messages, spans, prompt_messages, strict=True):
        released, before, _ = one_turn(orjson.loads(text), prompt)
        same.append(num_prompt_messages(released, int(number)) == before)
    return told & np.array(same, dtype=bool)
