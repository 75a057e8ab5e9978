"""One row of a pool, normalised."""

from grape_service.pool.candidates import Normaliser
from grape_service.pool.outcomes import Accepted, Rejected
from tests.prepared_pools import make_config

CALL = {"role": "assistant", "content": None, "tool_calls": [{"function": {"name": "add", "arguments": "{}"}}]}


def normalise(row, **keys):
    return list(Normaliser(make_config("pool.jsonl", **keys)).candidates(row))


def accepted(row, **keys):
    (item,) = normalise(row, **keys)
    assert isinstance(item, Accepted), item
    return item.candidate


def reason(row, **keys):
    (item,) = normalise(row, **keys)
    assert isinstance(item, Rejected), item
    return item.rejection.reason
