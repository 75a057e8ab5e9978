"""Steps of responses: where their text is cut, and which step each token is in.

A step of a response ends where a match of a pattern ends, and with the span that it is in: what the policy wrote in one
go. A token belongs to the step that it begins in, so one that holds the end of a step and the beginning of the next
belongs to the first of them. L tokens with loss of N rows.
"""

from __future__ import annotations

import re
from itertools import pairwise

import numpy as np
import numpy.typing as npt

from grape_service.rows.ragged import Int64s, segment_sums

STEP_END = r"\n\n"
"""What ends a step unless the config says otherwise: an empty line."""


def step_ends(text: bytes, pattern: re.Pattern[str]) -> list[int]:
    """Where in a text, in bytes, a step ends and another begins: behind each match, the end of the text left out."""
    decoded = text.decode("utf-8", "surrogateescape")
    ends: list[int] = []
    before, place = 0, 0
    for match in pattern.finditer(decoded):
        place += len(decoded[before : match.end()].encode("utf-8", "surrogateescape"))
        before = match.end()
        if place and place < len(text) and place not in ends[-1:]:
            ends.append(place)
    return ends


def step_starts(
    text: bytes, token_starts: Int64s, span_starts: npt.NDArray[np.bool_], pattern: re.Pattern[str]
) -> npt.NDArray[np.bool_]:
    """Which tokens [L] are the first of a step.

    `text` is what the tokens decode to one after the other, `token_starts` [L + 1] where each begins in it in bytes;
    a token without text, such as a turn end, begins no step. `span_starts` [L] are the first tokens of spans.
    """
    first = span_starts.copy()
    bounds = [*np.flatnonzero(span_starts).tolist(), len(span_starts)]
    for begin, end in pairwise(bounds):
        starts = token_starts[begin : end + 1]
        places = np.array(step_ends(text[starts[0] : starts[-1]], pattern), dtype=np.int64)
        found = begin + np.searchsorted(starts[:-1], starts[0] + places)
        found = found[found < end]
        first[found[token_starts[found] < starts[-1]]] = True
    return first


def step_numbers(first: npt.NDArray[np.bool_], offsets: Int64s) -> Int64s:
    """The step of each token [L] in its row, from 0, of the tokens that begin one [L] and the rows' offsets [N + 1]."""
    counted = np.concatenate([[0], np.cumsum(first, dtype=np.int64)])
    return counted[1:] - np.repeat(counted[offsets[:-1]], np.diff(offsets)) - 1


def is_step_start(steps: Int64s, offsets: Int64s) -> npt.NDArray[np.bool_]:
    """Which tokens [L] have another step than the token before them in their row: `step_numbers` taken back."""
    first = np.ones(len(steps), dtype=bool)
    first[1:] = steps[1:] != steps[:-1]
    first[offsets[:-1][offsets[:-1] < len(steps)]] = True
    return first


def steps_of_rows(steps: Int64s, offsets: Int64s) -> Int64s:
    """How many steps each row [N] has."""
    return segment_sums(is_step_start(steps, offsets), offsets)


def places_in_step(steps: Int64s, offsets: Int64s) -> Int64s:
    """How many tokens of its step stand before each token [L]."""
    starts = np.flatnonzero(is_step_start(steps, offsets))
    return np.arange(len(steps)) - np.repeat(starts, np.diff(np.append(starts, len(steps))))
