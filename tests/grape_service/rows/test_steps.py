"""Which tokens begin a step: by hand, and of texts that a tokenizer cut, by the places that it says itself."""

from __future__ import annotations

import re

import numpy as np
import pyarrow as pa
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from grape_service.models.vocabulary import Vocabulary
from grape_service.rows.ragged import list_array, offsets_from_lengths
from grape_service.rows.steps import STEP_END, is_step_start, places_in_step, step_ends, step_numbers, step_starts
from grape_service.select.steps import token_steps
from tests.tiny_models import make_tokenizer

pytestmark = pytest.mark.quick
EMPTY_LINE = re.compile(STEP_END)


def test_ends_by_hand() -> None:
    assert step_ends(b"one\n\ntwo\n\n", EMPTY_LINE) == [5]
    assert step_ends("é\n\n東\n\n.".encode(), EMPTY_LINE) == [4, 9]
    assert step_ends(b"\xff\n\n\xe4\n\nx", EMPTY_LINE) == [3, 6]  # not UTF-8
    assert step_ends(b"One. Two. Three.", re.compile(r"(?<=\.) ")) == [5, 10]
    assert step_ends(b"", EMPTY_LINE) == []
    assert step_ends(b"a|b", re.compile(r"$|\|")) == [2]


def starts(tokens: list[str], span_starts: list[int]) -> list[int]:
    lengths = [len(token.encode()) for token in tokens]
    spans = np.zeros(len(tokens), dtype=bool)
    spans[span_starts] = True
    first = step_starts("".join(tokens).encode(), offsets_from_lengths(lengths), spans, EMPTY_LINE)
    return np.flatnonzero(first).tolist()


def test_starts_by_hand() -> None:
    assert starts(["a", "b\n\n", "c", "\n", "\n", "d", "e"], [0]) == [0, 2, 5]
    # A token that ends a step and begins the next belongs to the first of them; what has no text begins none.
    assert starts(["a", "\n\nb", "c", ""], [0]) == [0, 2]
    assert starts(["a\n\n", ""], [0]) == [0]
    # Steps end with their span, and a pattern is not put together out of two of them.
    assert starts(["a\n", "\nb", "c\n\n", "d"], [0, 1]) == [0, 1, 3]


def test_numbers_and_places_by_hand() -> None:
    first = np.array([True, False, True, True, False, False])
    offsets = np.array([0, 3, 3, 6])
    numbers = step_numbers(first, offsets)
    assert numbers.tolist() == [0, 0, 1, 0, 0, 0]
    assert is_step_start(numbers, offsets).tolist() == first.tolist()
    assert places_in_step(numbers, offsets).tolist() == [0, 1, 0, 0, 1, 2]


@pytest.fixture(scope="module")
def tokenizer(tmp_path_factory: pytest.TempPathFactory):
    return make_tokenizer(tmp_path_factory.mktemp("tokenizer"), vocab=400)


TEXTS = st.lists(
    st.sampled_from(["12 * 5 = 60", "\n", "\n\n", " ", "So", " the eggs", "é", "東京", "🙂", "."]), max_size=25
)


@settings(deadline=None, max_examples=150)
@given(rows=st.lists(st.tuples(TEXTS, st.booleans()), min_size=1, max_size=4))
def test_steps_are_where_the_tokenizer_says_that_the_text_is(rows, tokenizer) -> None:
    ids, mask, lengths, expected = [], [], [], []
    for parts, has_turn_end in rows:
        text = "".join(parts) or "x"
        encoded = tokenizer(text, add_special_tokens=False, return_offsets_mapping=True)
        begins = [begin for begin, _ in encoded["offset_mapping"]]
        ends = [match.end() for match in re.finditer("\n\n", text)]
        numbers = [sum(1 for end in ends if end <= begin) for begin in begins]
        # Numbers that no token has are passed over: nothing begins in such a step.
        seen = sorted(set(numbers))
        numbers = [seen.index(number) for number in numbers]
        expected += numbers + [numbers[-1]] * has_turn_end
        ids += [7, *encoded["input_ids"], *[tokenizer.eos_token_id] * has_turn_end]
        mask += [0, *[1] * len(begins), *[2] * has_turn_end]
        lengths.append(1 + len(begins) + has_turn_end)
    offsets = offsets_from_lengths(lengths)
    table = pa.table(
        {
            "input_ids": list_array(offsets, np.array(ids, np.int32), pa.int32()),
            "loss_mask": list_array(offsets, np.array(mask, np.uint8), pa.uint8()),
        }
    )
    assert token_steps(table, Vocabulary(tokenizer), STEP_END).tolist() == expected
