"""Columns of every table that the service writes, from top to bottom as a row lives. Names and types are contracts.

    candidate -> MAPPED -> SHARD -> SCORE -> kept row -> RESCORED -> weighed row -> release row -> COMPARED

Beside it: REJECT (prepare), FAILURE (score), FINDING (check).

A stage says beside its function which of them it reads (`..._READS`) and which it adds (`..._ADDS`).
"""

from __future__ import annotations

from collections.abc import Collection, Iterable, Sequence

import pyarrow as pa

from grape_service.rows.statistics import ENTROPY, LOGPROB, RANK, STATISTICS, TOP20_ENTROPY, beside_logprob

LOSS_NONE, LOSS_TOKEN, LOSS_TURN_END = 0, 1, 2
"""Values of a shard's loss_mask: context, a token that the policy wrote, a turn end that it wrote.
Both of the last two have loss; only LOSS_TOKEN counts in grape_score unless count_turn_end is set."""

NO_SOURCE = "(none)"
"""Stands for the source of rows without one, in counts and tables."""


# prepare: a pool's rows become rows of shards, or rejects.

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
        # A prompt whose last message is the assistant's ends with a prefill: see rows/prefill.py.
        pa.field("messages", pa.string(), nullable=False),
        pa.field("num_prompt_messages", pa.int32(), nullable=False),
        pa.field("tools", pa.string()),  # JSON list of tool definitions, or null
        # Recorded while sampling, one value per token with loss (NaN for a turn end that was not recorded), or null.
        pa.field("recorded_logprobs", pa.list_(pa.float32())),
        pa.field("sampling", pa.string()),  # JSON {temperature, top_p, top_k}, or null
    ]
)
"""A shard; after these come the pool's other columns."""

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

MAPPED = pa.schema(
    [
        *SHARD,
        pa.field("prompt_order", pa.uint64(), nullable=False),
        pa.field("prompt_digest", pa.string(), nullable=False),
        pa.field("content_digest", pa.string(), nullable=False),
        pa.field("rest_digest", pa.uint64(), nullable=False),  # of what the other digests leave out
        pa.field("piece", pa.int32(), nullable=False),
        pa.field("segment", pa.int32(), nullable=False),  # of the piece
        pa.field("place", pa.int64(), nullable=False),  # in the segment
        pa.field("num_loss", pa.int32(), nullable=False),
        pa.field("other", pa.binary(), nullable=False),  # JSON object
    ]
)
"""Rows between map and reduce, in slices; see prepare/deal.py."""

MAP_REJECT = pa.schema(
    [
        pa.field("segment", pa.int32(), nullable=False),
        pa.field("place", pa.int64(), nullable=False),
        *(REJECT.field(name) for name in ("prompt_id", "candidate_id", "reason", "detail", "text")),
    ]
)
"""Rejects between map and reduce, which knows the numbers of a file's rows."""


# gather: a response as a policy sampled it.

SAMPLE = pa.schema(
    [
        pa.field("sample_key", pa.binary(16), nullable=False),  # digest of the prompt's tokens and the sample's number
        pa.field("prompt_id", pa.string(), nullable=False),
        pa.field("number", pa.int32(), nullable=False),  # from 0, among the samples of its prompt
        pa.field("seed", pa.int64(), nullable=False),  # that it was drawn with: it follows from the key
        pa.field("ids", pa.list_(pa.int32()), nullable=False),  # as sampled, the stop token included
        pa.field("logprobs", pa.list_(pa.float32()), nullable=False),  # of each, before temperature and cuts
        pa.field("finish_reason", pa.string(), nullable=False),  # stop, length
        pa.field("verdict", pa.string()),  # right, wrong, unknown; null where nothing was asked
        pa.field("verdict_reason", pa.string()),
    ]
)


# score: what a policy says of each row's tokens with loss; a row that could not be scored is a failure.

SCORE = pa.schema(
    [
        pa.field("row_key", pa.binary(16), nullable=False),
        pa.field("logprobs", pa.list_(pa.float32()), nullable=False),  # one per token with loss
    ]
)

SCORE_FIELDS = {
    LOGPROB: SCORE.field("logprobs"),
    ENTROPY: pa.field("entropy", pa.list_(pa.float32()), nullable=False),
    RANK: pa.field("rank", pa.list_(pa.uint16()), nullable=False),
    TOP20_ENTROPY: pa.field("top20_entropy", pa.list_(pa.float32()), nullable=False),
}
"""The column of a score file that holds each statistic: one value per token with loss."""

STOPPED = pa.schema(
    [
        SCORE.field("row_key"),
        pa.field("logprobs", pa.list_(pa.float32()), nullable=False),  # of its first tokens with loss, and of no others
        pa.field("method", pa.string(), nullable=False),  # whose score the next two bound
        pa.field("bound", pa.float64(), nullable=False),  # what that score cannot exceed
        pa.field("reach", pa.float64(), nullable=False),  # what it is taken not to exceed
        pa.field("risk", pa.float64(), nullable=False),  # of that; 0: it is certain
    ]
)
"""A row of which a race scored the first tokens alone; other statistics of those come after log-probabilities. It is
kept apart from SCORE, so that nobody takes it for a score."""

FAILURE = pa.schema(
    [
        pa.field("row_key", pa.binary(16), nullable=False),
        pa.field("prompt_id", pa.string(), nullable=False),
        pa.field("candidate_id", pa.string(), nullable=False),
        pa.field("policy", pa.string(), nullable=False),
        pa.field("reason", pa.string(), nullable=False),
    ]
)


AUDITED = pa.schema(
    [
        *[SHARD.field(n) for n in ("row_key", "prompt_id", "candidate_id", "input_ids", "loss_mask", "prompt_len")],
        pa.field("recorded", pa.list_(pa.float32())),
    ]
)
"""A sample of recorded rows as rows to score, with what was recorded."""


# select: a kept row is a shard's row with what chose it.

KEPT_COLUMNS = [
    pa.field("target_logprobs", pa.list_(pa.float32())),  # one per token with loss; null where none was needed
    pa.field("grape_score", pa.float64()),
    pa.field("grape_rank", pa.int32()),
    pa.field("grape_margin", pa.float64()),
    pa.field("num_candidates", pa.int32(), nullable=False),
]
"""What every kept row has after the shard's columns."""

SELECT_FIELDS = [
    pa.field("select_score", pa.float64()),
    pa.field("select_rank", pa.int32()),  # 1 is best
    pa.field("select_margin", pa.float64()),  # lead over the next best, null if there is none
]
"""What a method other than GRAPE chose by."""


TARGET_FIELDS = {
    ENTROPY: pa.field("target_entropy", pa.list_(pa.float32())),
    RANK: pa.field("target_rank", pa.list_(pa.int32())),
    TOP20_ENTROPY: pa.field("target_top20_entropy", pa.list_(pa.float32())),
}
"""The column of kept rows and releases that holds each of the target's statistics, beside target_logprobs."""


MARGIN_AT_LEAST = pa.field("margin_at_least", pa.bool_())
"""Column of kept rows and releases of a race: the margin is to a candidate that was stopped, so it may be larger."""


def computed_fields(statistics: Iterable[str], has_select_score: bool, raced: bool = False) -> list[pa.Field]:
    """Columns that kept rows and releases have where they were computed: another method's score, whether a margin of a
    race may be larger, statistics of the target beside log-probabilities."""
    return [
        *(SELECT_FIELDS if has_select_score else []),
        *([MARGIN_AT_LEAST] if raced else []),
        *(TARGET_FIELDS[name] for name in beside_logprob(statistics)),
    ]


def kept_columns(computed: list[pa.Field]) -> list[pa.Field]:
    """What a kept row has after the shard's columns: `computed` are those of `computed_fields`."""
    return [*KEPT_COLUMNS[:-1], *computed, KEPT_COLUMNS[-1]]


# check: what is found in kept rows and in all responses.

FINDING = pa.schema(
    [
        pa.field("check", pa.string(), nullable=False),
        pa.field("prompt_id", pa.string()),  # null where a whole source is flagged
        pa.field("candidate_id", pa.string()),
        pa.field("reason", pa.string(), nullable=False),  # a short phrase, counted by
        pa.field("detail", pa.string()),  # what exactly, for a person
    ]
)

RESPONSE_DIGEST = pa.schema(
    [pa.field("digest", pa.uint64()), pa.field("prompt_id", pa.string()), pa.field("candidate_id", pa.string())]
)
"""A response's tokens as a number, to find the same response under several prompts."""


# weigh: kept rows are scored under other policies, then get weights.

RESCORED = pa.schema(
    [
        *[SHARD.field(name) for name in ("row_key", "prompt_id", "candidate_id", "source")],
        *[SHARD.field(name) for name in ("input_ids", "loss_mask", "prompt_len")],
        pa.field("target_row_key", pa.binary(16), nullable=False),  # of the kept row
        pa.field("turn_end_differs", pa.bool_(), nullable=False),  # from the target's: another token
        # Of a policy with another tokenizer the span of each token with loss, of the target's and of its own: see
        # weigh/align.py. Null where the two share their tokens.
        pa.field("target_spans", pa.list_(pa.int32())),
        pa.field("own_spans", pa.list_(pa.int32())),
    ]
)
"""A kept row in the rendering of a policy that scores it."""

BEHAVIOR_ROW_COLUMNS = pa.schema(
    [
        *[RESCORED.field(name) for name in ("prompt_id", "candidate_id", "target_row_key", "row_key")],
        *[RESCORED.field(name) for name in ("turn_end_differs", "target_spans", "own_spans")],
    ]
)
"""Of RESCORED, what joins a kept row, by its candidate, to its scores."""

WEIGHED_COLUMNS = [
    pa.field("behavior_logprobs", pa.list_(pa.float32())),  # one per token with loss; null without a behavior
    pa.field("weights", pa.list_(pa.float32()), nullable=False),  # one per token with loss
    pa.field("weight_source", pa.string(), nullable=False),
]
"""What a weighed row has after the kept row's columns; the first only where its weights compare with a behavior.
BEHAVIOR_KNOWN follows, one for each token with loss, where some behavior of the partition is not known."""

BEHAVIOR_KNOWN = pa.field("behavior_known", pa.list_(pa.bool_()))
"""Column of a release that has behavior_logprobs of which some are not known (turn ends that were not recorded, or are
other tokens there): as long as input_ids, true where the number is the behavior's, null where behavior_logprobs is."""


# release: arrays as long as input_ids.

MESSAGE_FIELDS = ("role", "content", "tool_calls", "tool_call_id", "name", "reasoning_content", "extra")
"""Fields of a chat message in a release, all of them text; role and content always exist, tool_calls is JSON text.
`extra` is a JSON object of everything else that a message holds."""


def message_type(names: Collection[str]) -> pa.DataType:
    """The type of a release's `messages`: role, content and those of MESSAGE_FIELDS that the pool has."""
    there = [name for name in MESSAGE_FIELDS if name in ("role", "content") or name in names]
    return pa.list_(pa.struct([pa.field(name, pa.string()) for name in there]))


def release_schema(
    message_fields: list[str], other_columns: list[pa.Field], computed: Sequence[pa.Field] = ()
) -> pa.Schema:
    """Columns of a release row, in order; `other_columns` are the pool's own, `computed` those of `computed_fields`."""
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
            *computed,
            pa.field("num_candidates", pa.int32(), nullable=False),
            pa.field("truncated", pa.bool_(), nullable=False),
            *other_columns,
        ]
    )


SAMPLING, TOOLS = SHARD.field("sampling"), SHARD.field("tools")
"""Columns of a shard that a release has where one of its rows has them."""

TURN_ENDS = pa.field("turn_ends", pa.list_(pa.bool_()))
PLACES = [SHARD.field("num_prompt_messages"), TURN_ENDS]
"""Columns of a release with a row whose tokens do not tell where its response begins, or which of them are turn ends
(as long as input_ids, true on those): see rows/spans.py."""

PREFILL = pa.field("prefill", pa.string())
"""Column of a release with a row whose policy was given the beginning of its turn: these words, with which the first
message of the response begins, and which have no loss. Null in the other rows."""


def needed_fields(
    *, recorded: bool, tools: bool, not_told: bool, says_known: bool, prefilled: bool = False
) -> list[pa.Field]:
    """Columns of ours that a release has where its rows need them to be weighed again: `recorded` log-probabilities,
    `tools`, rows whose tokens do not tell of their PLACES, behaviors of which some are not known, prefills."""
    return [
        *([SAMPLING] if recorded else []),
        *([TOOLS] if tools else []),
        *(PLACES if not_told else []),
        *([PREFILL] if prefilled else []),
        *([BEHAVIOR_KNOWN] if says_known else []),
    ]


OUR_COLUMNS = (
    frozenset(SHARD.names)
    | frozenset(release_schema([], [], computed_fields(STATISTICS, True, raced=True)).names)
    | {BEHAVIOR_KNOWN.name, TURN_ENDS.name, PREFILL.name}
)
"""Names that a pool's other column may not have; it gets the prefix pool_."""

RELEASE_FORMAT = 2
"""Raised when the same rows come to be written as other bytes."""


# changes: what a version kept that the one before it did not, and the other way round.

CHANGE = pa.schema(
    [
        pa.field("prompt_id", pa.string(), nullable=False),
        pa.field("candidate_id", pa.string(), nullable=False),
        pa.field("source", pa.string()),
        pa.field("change", pa.string(), nullable=False),  # entered, left, stayed, weight (stayed, with other weights)
        pa.field("score_before", pa.float64()),  # select_score, or grape_score where no other method chose
        pa.field("score_after", pa.float64()),
        pa.field("rank_before", pa.int32()),
        pa.field("rank_after", pa.int32()),
        pa.field("weight_before", pa.float64()),  # mean loss weight over the row's tokens with loss
        pa.field("weight_after", pa.float64()),
        pa.field("reason", pa.string(), nullable=False),  # a short fixed phrase, counted by
    ]
)
"""changes.parquet of a version: a row for each row of it and of the version before it."""

CHANGE_SIDE = pa.schema(
    [
        *[CHANGE.field(name) for name in ("prompt_id", "candidate_id", "source")],
        pa.field("score", pa.float64()),
        pa.field("rank", pa.int32()),
        pa.field("weight", pa.float64()),
        pa.field("row", pa.int64()),
    ]
)
"""What is compared of a version's row to find its change."""


# lineage: rows that a checkpoint was trained on.

IDS = pa.schema(
    [
        pa.field("release", pa.string(), nullable=False),  # its reference
        *[SHARD.field(name) for name in ("prompt_id", "candidate_id", "source")],
    ]
)


# diff: two releases side by side.

COMPARED = pa.schema(
    [
        *[SHARD.field(name).with_nullable(True) for name in ("prompt_id", "candidate_id", "source")],
        pa.field("grape_score", pa.float64()),
        pa.field("tokens", pa.uint64()),  # hash of the token ids
        pa.field("weight_sum", pa.float64()),
        pa.field("num_loss", pa.int64()),
    ]
)
"""What is compared of a release row."""
