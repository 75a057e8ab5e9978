"""What tokens tell of messages: where a response begins, which tokens end its turns."""

from __future__ import annotations

import json

import numpy as np
import pytest

from grape_service.rows.spans import are_told_by_tokens, mask_with_turn_ends, num_prompt_messages, num_spans

pytestmark = pytest.mark.quick
STOP = 9
ROLES = ["system", "user", "assistant", "user", "assistant", "tool", "assistant"]
MESSAGES = [{"role": role, "content": "x"} for role in ROLES]


@pytest.mark.parametrize(("spans", "expected"), [(1, 6), (2, 4), (3, 2), (4, 6)])
def test_a_response_begins_with_the_message_of_its_first_span(spans: int, expected: int) -> None:
    assert num_prompt_messages(MESSAGES, spans) == expected


def test_turn_ends_are_stop_tokens_that_end_a_span() -> None:
    ids = np.array([1, STOP, 5, STOP, 3, 4, STOP, STOP, 7, 5], np.int32)
    loss = np.array([0, 0, 1, 1, 0, 0, 1, 1, 0, 1], bool)
    offsets = np.array([0, 4, 10])
    assert mask_with_turn_ends(ids, loss, offsets, [STOP]).tolist() == [0, 0, 1, 2, 0, 0, 1, 2, 0, 1]
    assert num_spans(loss, offsets).tolist() == [1, 2]


def test_rows_of_which_tokens_do_not_tell() -> None:
    def told(mask: list[int], prompt_messages: int, stop_ids: list[int]) -> bool:
        ids = np.array([1, 5, STOP], np.int32)
        found = are_told_by_tokens(
            ids, np.array(mask, np.uint8), np.array([0, 3]), stop_ids, [json.dumps(MESSAGES)], [prompt_messages]
        )
        return bool(found[0])

    assert told([0, 1, 2], 6, [STOP])
    assert not told([0, 1, 1], 6, [STOP])  # written by the policy, and no turn end
    assert not told([0, 1, 2], 6, [])
    assert not told([0, 1, 2], 4, [STOP])  # one span for several messages
