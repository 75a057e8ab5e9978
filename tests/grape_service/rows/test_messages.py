"""Messages in a release hold what those of the pool hold."""

import pytest
from hypothesis import given
from hypothesis import strategies as st

from grape_service.rows.columns import MESSAGE_FIELDS
from grape_service.rows.messages import field_of, stored_message, whole_message

pytestmark = pytest.mark.quick

VALUES = st.recursive(
    st.booleans() | st.integers(-(2**53), 2**53) | st.text() | st.floats(allow_nan=False, allow_infinity=False),
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.text(), inner, max_size=3),
    max_leaves=5,
)
NAMES = st.sampled_from(["tool_call_id", "name", "reasoning_content", "extra", "thinking", "weight"]) | st.text()
CALLS = st.lists(st.fixed_dictionaries({"function": st.dictionaries(st.text(), VALUES, max_size=2)}), max_size=2)
MESSAGES = st.builds(
    lambda fields, text, calls: (
        fields | {"role": "assistant", "content": text} | ({"tool_calls": calls} if calls else {})
    ),
    st.dictionaries(NAMES.filter(lambda name: name not in ("role", "content", "tool_calls")), VALUES, max_size=4),
    st.text(),
    CALLS,
)


@given(MESSAGES)
def test_a_message_comes_back_whole(message):
    stored = stored_message(message)
    assert set(stored) <= set(MESSAGE_FIELDS)
    assert all(isinstance(value, str) for value in stored.values())
    assert set(stored) == {field_of(name, value) for name, value in message.items()}
    absent = dict.fromkeys(MESSAGE_FIELDS)
    assert whole_message({**absent, **stored}) == message
