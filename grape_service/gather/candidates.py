"""Gathered candidates as a pool: samples in the shape that prepare reads, one file for each shard of prompts."""

from __future__ import annotations

import hashlib
from dataclasses import dataclass
from typing import Any

import orjson
import pyarrow as pa

from grape_service.config.gather import SamplingConfig, VerifyConfig
from grape_service.gather.samples import SampleStore, prompt_keys, sample_key, verify_id
from grape_service.gather.verdicts import Question, Verifier
from grape_service.keys import settings_of
from grape_service.models.tokenizer import text_behind
from grape_service.rows.candidate import Row
from grape_service.rows.columns import SHARD
from grape_service.rows.counts import Counts
from grape_service.rows.prefill import prefills_of
from grape_service.storage.parquet import open_small, write_parquet
from grape_service.storage.storage import Storage

GATHERED = pa.schema(
    [
        pa.field("prompt", pa.string(), nullable=False),  # chat messages as JSON
        pa.field("tools", pa.string()),  # JSON, or null
        pa.field("response", pa.string(), nullable=False),  # the ids decoded, the stop token left out
        pa.field("response_ids", pa.list_(pa.int32())),  # null where the target has other tokens
        pa.field("behavior_logprobs", pa.list_(pa.float32())),
        pa.field("sampling", pa.string(), nullable=False),  # JSON {temperature, top_p, top_k, logprobs}
        pa.field("finish_reason", pa.string(), nullable=False),
        pa.field("source", pa.string(), nullable=False),  # the policy's name
        pa.field("prompt_id", pa.string(), nullable=False),
        pa.field("sample", pa.int32(), nullable=False),  # its number among the policy's samples of the prompt
        pa.field("sampled_by", pa.string(), nullable=False),  # model, engine, dtype, quantization, seed, as JSON
        pa.field("verdict", pa.string()),  # right, wrong, unknown
        pa.field("verdict_reason", pa.string()),
        pa.field("verifier", pa.string()),
    ]
)
"""A gathered candidate; after these come the prompt row's other columns."""


@dataclass(frozen=True)
class Gathered:
    """How the samples of one policy become candidates."""

    name: str  # of the policy: the candidates' source
    sampler: str  # sampler_id
    sampling: SamplingConfig
    samples: int
    verify: VerifyConfig
    shares_tokens: bool  # with the target

    def made_of(self) -> list[Any]:
        """What decides the files, beside the samples."""
        return [self.name, self.sampler, self.samples, settings_of(self.verify), self.shares_tokens]


@dataclass
class GatherCounts(Counts):
    """What there is of a policy's samples."""

    prompts: int = 0
    wanted: int = 0
    samples: int = 0
    tokens: int = 0
    truncated: int = 0
    right: int = 0
    wrong: int = 0
    unknown: int = 0


def write_candidates(
    storage: Storage,
    shard: str,
    partition: str,
    gathered: Gathered,
    tokenizer: Any,
    stop_ids: tuple[int, ...],
    out: str,
) -> GatherCounts:
    """Write the samples of a shard of prompts as a pool file; verdicts of another verifier are made again."""
    with open_small(storage, shard) as file:
        table = file.read()
    store = SampleStore(storage, gathered.sampler)
    keys = [sample_key(key, number) for key in prompt_keys(table) for number in range(gathered.samples)]
    found = store.read(partition, keys)
    others = [name for name in table.column_names if name not in SHARD.names and name not in GATHERED.names]
    rows = table.select([*others, "messages", "num_prompt_messages", "tools", "prompt_id"]).to_pylist()
    prefills = prefills_of([row["messages"] for row in rows], [row["num_prompt_messages"] for row in rows])
    for row in rows:
        messages = orjson.loads(row["messages"])[: row["num_prompt_messages"]]
        row["messages"] = orjson.dumps(messages).decode()
    prompt_ids = table["input_ids"]
    counts = GatherCounts(prompts=len(rows), wanted=len(keys))
    candidates: list[dict[str, Any]] = []
    places: list[int] = []
    sampling = orjson.dumps(
        {**gathered.sampling.model_dump(include={"temperature", "top_p", "top_k"}), "logprobs": "raw"}
    ).decode()
    for place, sample in enumerate(found):
        if sample is None:
            continue
        row = rows[place // gathered.samples]
        ids = list(sample["ids"])
        counts.samples += 1
        counts.tokens += len(ids)
        counts.truncated += sample["finish_reason"] == "length"
        text = ids[:-1] if ids and ids[-1] in stop_ids else ids
        prompt = place // gathered.samples
        before = [] if prefills[prompt] is None else prompt_ids[prompt].as_py()
        candidates.append(
            {
                "prompt": row["messages"],
                "tools": row["tools"],
                "response": text_behind(tokenizer, before, text),
                "response_ids": ids if gathered.shares_tokens else None,
                "behavior_logprobs": sample["logprobs"] if gathered.shares_tokens else None,
                "sampling": sampling,
                "finish_reason": sample["finish_reason"],
                "source": gathered.name,
                "prompt_id": row["prompt_id"],
                "sample": sample["number"],
                "sampled_by": orjson.dumps({**sample["made_by"], "seed": sample["seed"]}).decode(),
                "verdict": sample["verdict"],
                "verdict_reason": sample["verdict_reason"],
                "verifier": sample.get("verifier"),
                "\0judged": (sample.get("verify_id"), sample.get("asked")),
                "\0prefill": prefills[prompt] or "",
            }
        )
        places.append(place // gathered.samples)
    if gathered.verify.method == "none":
        for one in candidates:
            one |= {"verdict": None, "verdict_reason": None, "verifier": None}
    else:
        beside = [{name: row[name] for name in others} for row in rows]
        _judge(candidates, [beside[place] for place in places], gathered.verify)
    for one in candidates:
        if one["verdict"] is not None:
            setattr(counts, one["verdict"], getattr(counts, one["verdict"]) + 1)
    own = pa.Table.from_pylist([{name: one[name] for name in GATHERED.names} for one in candidates], GATHERED)
    carried = table.select(others).take(pa.array(places, pa.int64()))
    for name in others:
        own = own.append_column(carried.schema.field(name), carried[name])
    write_parquet(storage, out, own.schema, [own])
    return counts


def _judge(candidates: list[dict[str, Any]], rows: list[Row], verify: VerifyConfig) -> None:
    """Give each candidate the verdict of this verifier, where another's, none or that of another question is stored."""
    with Verifier(verify) as verifier:
        here = verify_id(verify, verifier.name)
        for one, row in zip(candidates, rows, strict=True):
            if one["\0judged"] != (here, asked_of(row, verify)):
                turn = one["\0prefill"] + one["response"]
                verdict = next(verifier.verdicts([question_of(turn, row, verify)]))
                one |= {"verdict": verdict.word, "verdict_reason": verdict.reason, "verifier": verifier.name}


def asked_of(row: Row, verify: VerifyConfig) -> str:
    """Names what a judge is told beside a response, for a pool row's other columns: the right answer, and to a function
    of the user's the whole row. A verdict is that of this question."""
    told = [question_of("", row, verify).answer, row if verify.is_own else None]
    options = orjson.OPT_SORT_KEYS | orjson.OPT_NON_STR_KEYS
    return hashlib.sha256(orjson.dumps(told, default=str, option=options)).hexdigest()[:16]


def question_of(text: str, row: Row, verify: VerifyConfig) -> Question:
    """What a judge is asked of a response to the prompt of a pool row: `text` is the whole turn, prefill included."""
    answer = row.get(verify.answer) if verify.answer is not None else None
    if answer is not None and not isinstance(answer, str):
        answer = orjson.dumps(answer).decode()
    return Question(text, answer, row)
