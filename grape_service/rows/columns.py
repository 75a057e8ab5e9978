"""Columns of the files that the service writes. Names and types are contracts of the design."""

from __future__ import annotations

from collections.abc import Collection, Iterable, Sequence

import pyarrow as pa

from grape_service.rows.statistics import STATISTICS, TARGET_FIELDS, beside_logprob

LOSS_NONE, LOSS_TOKEN, LOSS_TURN_END = 0, 1, 2
"""Values of a shard's loss_mask: context, a token that the policy wrote, a turn end that it wrote.
Both of the last two have loss; only LOSS_TOKEN counts in grape_score unless count_turn_end is set."""

NO_SOURCE = "(none)"
"""Stands for the source of rows without one, in counts and tables."""

SHARD = pa.schema(
    [
        pa.field("row_key", pa.binary(16), nullable=False),  # digest of input_ids and mask
        pa.field("prompt_id", pa.string(), nullable=False),
        pa.field("candidate_id", pa.string(), nullable=False),
        pa.field("source", pa.string()),
        pa.field("input_ids", pa.list_(pa.int32()), nullable=False),
        pa.field("loss_mask", pa.list_(pa.uint8()), nullable=False),  # LOSS_* above
        pa.field("prompt_len", pa.int32(), nullable=False),  # tokens before the first with loss
        pa.field("truncated", pa.bool_(), nullable=False),
        # Prompt and response as JSON: a list of chat messages, the first num_prompt_messages of them the prompt's.
        pa.field("messages", pa.string(), nullable=False),
        pa.field("num_prompt_messages", pa.int32(), nullable=False),
        pa.field("tools", pa.string()),  # JSON list of tool definitions, or null
        # Recorded while sampling, one value per token with loss (NaN for a turn end that was not recorded), or null.
        pa.field("recorded_logprobs", pa.list_(pa.float32())),
        pa.field("sampling", pa.string()),  # JSON {temperature, top_p, top_k}, or null
    ]
)
"""A shard; after these come the pool's other columns."""

SCORE = pa.schema(
    [
        pa.field("row_key", pa.binary(16), nullable=False),
        pa.field("logprobs", pa.list_(pa.float32()), nullable=False),  # one per token with loss
    ]
)

REJECT = pa.schema(
    [
        pa.field("file", pa.string(), nullable=False),
        pa.field("row", pa.int64(), nullable=False),  # from 0; lines of a .jsonl are rows
        pa.field("prompt_id", pa.string()),
        pa.field("candidate_id", pa.string()),
        pa.field("reason", pa.string(), nullable=False),  # a short fixed phrase, counted by
        pa.field("detail", pa.string()),  # what exactly, for a person
        pa.field("text", pa.string()),  # the beginning of the response, or of the row
    ]
)

FAILURE = pa.schema(
    [
        pa.field("row_key", pa.binary(16), nullable=False),
        pa.field("prompt_id", pa.string(), nullable=False),
        pa.field("candidate_id", pa.string(), nullable=False),
        pa.field("policy", pa.string(), nullable=False),
        pa.field("reason", pa.string(), nullable=False),
    ]
)

MESSAGE_FIELDS = ("role", "content", "tool_calls", "tool_call_id", "name", "reasoning_content", "extra")
"""Fields of a chat message in a release, all of them text; role and content always exist, tool_calls is JSON text.
`extra` is a JSON object of everything else that a message holds."""


def message_type(names: Collection[str]) -> pa.DataType:
    """The type of a release's `messages`: role, content and those of MESSAGE_FIELDS that the pool has."""
    there = [name for name in MESSAGE_FIELDS if name in ("role", "content") or name in names]
    return pa.list_(pa.struct([pa.field(name, pa.string()) for name in there]))


SELECT_FIELDS = [
    pa.field("select_score", pa.float64()),
    pa.field("select_rank", pa.int32()),  # 1 is best
    pa.field("select_margin", pa.float64()),  # lead over the next best, null if there is none
]
"""What a method other than GRAPE chose by."""


def made_fields(statistics: Iterable[str], has_select_score: bool) -> list[pa.Field]:
    """Columns of kept rows and releases that are there where they were made: another method's score, statistics of the
    target beside log-probabilities."""
    return [
        *(SELECT_FIELDS if has_select_score else []),
        *(TARGET_FIELDS[name] for name in beside_logprob(statistics)),
    ]


def release_schema(
    message_fields: list[str], other_columns: list[pa.Field], made: Sequence[pa.Field] = ()
) -> pa.Schema:
    """Columns of a release row, in order; `other_columns` are the pool's own, `made` those of `made_fields`."""
    return pa.schema(
        [
            pa.field("prompt_id", pa.string(), nullable=False),
            pa.field("candidate_id", pa.string(), nullable=False),
            pa.field("source", pa.string()),
            pa.field("messages", message_type(message_fields), nullable=False),
            pa.field("input_ids", pa.list_(pa.int32()), nullable=False),
            pa.field("loss_mask", pa.list_(pa.bool_()), nullable=False),
            pa.field("labels", pa.list_(pa.int32()), nullable=False),
            pa.field("target_logprobs", pa.list_(pa.float32())),
            pa.field("behavior_logprobs", pa.list_(pa.float32())),
            pa.field("loss_weights", pa.list_(pa.float32()), nullable=False),
            pa.field("weight_source", pa.string(), nullable=False),
            pa.field("grape_score", pa.float64()),
            pa.field("grape_rank", pa.int32()),
            pa.field("grape_margin", pa.float64()),
            *made,
            pa.field("num_candidates", pa.int32(), nullable=False),
            pa.field("truncated", pa.bool_(), nullable=False),
            *other_columns,
        ]
    )


BEHAVIOR_KNOWN = pa.field("behavior_known", pa.list_(pa.bool_()))
"""Column of a release that has behavior_logprobs of which some are not known (turn ends that were not recorded, or are
other tokens there): as long as input_ids, true where the number is the behavior's, null where behavior_logprobs is."""

OUR_COLUMNS = (
    frozenset(SHARD.names)
    | frozenset(release_schema([], [], made_fields(STATISTICS, True)).names)
    | {BEHAVIOR_KNOWN.name}
)
"""Names that a pool's other column may not have; it gets the prefix pool_."""

RELEASE_FORMAT = 2
"""Raised when the same rows come to be written as other bytes."""
