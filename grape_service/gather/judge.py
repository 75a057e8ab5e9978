"""A judge model: what it is asked of a candidate, what its answer says, and the verdicts in the gathered files.

It samples as any policy does: its answers are kept as samples, named by its weights and the tokens of the question.
"""

from __future__ import annotations

import re
from dataclasses import dataclass
from typing import Any

import numpy as np
import orjson
import pyarrow as pa

from grape_service.config.gather import SamplingConfig, VerifyConfig
from grape_service.gather.candidates import GatherCounts, question_of
from grape_service.gather.samples import SampleStore, prompt_keys, sample_key
from grape_service.gather.verdicts import Verdict, Word
from grape_service.keys import digest_of
from grape_service.render.renderer import Renderer
from grape_service.rows.candidate import Candidate, Rejection
from grape_service.rows.columns import SHARD
from grape_service.rows.keys import row_keys
from grape_service.rows.messages import shown_content
from grape_service.rows.prefill import prefill_of, without_prefill
from grape_service.rows.ragged import list_array, offsets_from_lengths
from grape_service.storage.parquet import open_small, write_parquet
from grape_service.storage.storage import Storage

PROMPT = """You judge whether a response answers a request correctly.

Request:
{prompt}

Response:
{response}
{reference}
Explain in a few sentences. Then end with a line that says Verdict: right, Verdict: wrong, or Verdict: unknown where it
cannot be told."""
REFERENCE = "\nThe right answer is:\n{answer}\n"
SAYS = re.compile(r"^\W*verdict\W*:\W*(right|wrong|unknown)\b", re.I | re.M)
"""What counts as a verdict: a line that begins so. The last one holds."""
JUDGE_TEXT = "judge_text"
QUESTION = pa.schema([SHARD.field(n) for n in ("row_key", "prompt_id", "candidate_id", "input_ids")])
"""A question to the judge as a row of a shard of prompts; candidate_id is the candidate's place in its file."""
_PLACE = re.compile(r"\{(prompt|response|answer|reference)\}")


def judge_sampling(verify: VerifyConfig) -> SamplingConfig:
    """How the judge answers."""
    return SamplingConfig(temperature=0.0, max_tokens=verify.max_tokens)


def judge_name(verify: VerifyConfig, sampler: str) -> str:
    """What says so: the model, its weights and how it is asked."""
    return f"judge ({verify.model}, {sampler}, prompt {digest_of(verify.prompt or PROMPT, 12)})"


def question_text(verify: VerifyConfig, prompt: list[dict[str, Any]], response: str, answer: str | None) -> str:
    """What the judge is asked. Text of a pool that looks like a place is text."""
    turns = [f"{turn['role']}: {shown_content(turn['content'])}" for turn in prompt]
    said = shown_content(prompt[-1]["content"]) if len(prompt) == 1 else "\n\n".join(turns)
    values = {"prompt": said, "response": response, "answer": answer or ""}
    values["reference"] = "" if answer is None else _filled(REFERENCE, values)
    return _filled(verify.prompt or PROMPT, values)


def _filled(template: str, values: dict[str, str]) -> str:
    return _PLACE.sub(lambda match: values[match[1]], template)


def verdict_of(text: str, is_whole: bool) -> Verdict:
    """What an answer says: its last line that begins with Verdict:."""
    found = SAYS.findall(text)
    if not found:
        why = "gives no line that begins with Verdict:" if is_whole else "was cut at verify.max_tokens"
        return Verdict("unknown", f"the judge {why}")
    word: Word = found[-1].lower()
    return Verdict(word, "the judge says so")


def write_questions(storage: Storage, path: str, out: str, verify: VerifyConfig, renderer: Renderer) -> int:
    """Write the questions about a gathered file's candidates as a shard of prompts; how many. What is too long for the
    judge is left out, and unknown."""
    with open_small(storage, path) as file:
        rows = file.read().to_pylist()
    asked = []
    for place, row in enumerate(rows):
        prompt = orjson.loads(row["prompt"])
        turn = (prefill_of(prompt) or "") + row["response"]
        answer = question_of(turn, row, verify).answer
        text = question_text(verify, without_prefill(prompt), turn, answer)
        asked.append(Candidate([{"role": "user", "content": text}], "", row["prompt_id"], str(place)))
    rendered = renderer.render_prompts(asked)
    good = [(one, found) for one, found in zip(asked, rendered, strict=True) if not isinstance(found, Rejection)]
    offsets = offsets_from_lengths([len(found.input_ids) for _, found in good])
    flat = np.concatenate([np.zeros(0, np.int32), *(found.input_ids for _, found in good)]).astype(np.int32)
    columns = {
        "row_key": row_keys(flat, np.zeros(len(flat), np.uint8), offsets),
        "prompt_id": [one.prompt_id for one, _ in good],
        "candidate_id": [one.candidate_id for one, _ in good],
        "input_ids": list_array(offsets, flat, pa.int32()),
    }
    write_parquet(storage, out, QUESTION, [pa.table(columns).cast(QUESTION)])
    return len(good)


@dataclass(frozen=True)
class Judging:
    """What the answers of a judge are read with."""

    verify: VerifyConfig
    sampler: str
    stop_ids: tuple[int, ...]

    @property
    def name(self) -> str:
        """What says so."""
        return judge_name(self.verify, self.sampler)


def write_judged(
    storage: Storage, path: str, questions: str, partition: str, judging: Judging, tokenizer: Any, out: str
) -> GatherCounts:
    """Write a gathered file with the judge's verdicts and its answers; counts of the verdicts alone."""
    with open_small(storage, path) as file:
        table = file.read()
    with open_small(storage, questions) as file:
        asked = file.read(columns=["row_key", "candidate_id"])
    keys = [sample_key(key, 0) for key in prompt_keys(asked)]
    answers = SampleStore(storage, judging.sampler).read(partition, keys)
    verdicts = [Verdict("unknown", "the question is longer than the judge takes")] * table.num_rows
    texts: list[str | None] = [None] * table.num_rows
    for place, answer in zip(map(int, asked["candidate_id"].to_pylist()), answers, strict=True):
        if answer is None:
            verdicts[place] = Verdict("unknown", "the judge was not asked: a limit was met, or its engine failed")
            continue
        ids = [id_ for id_ in answer["ids"] if id_ not in judging.stop_ids]
        text = tokenizer.decode(ids, skip_special_tokens=True, clean_up_tokenization_spaces=False)
        texts[place], verdicts[place] = text, verdict_of(text, answer["finish_reason"] != "length")
    counts = GatherCounts()
    for verdict in verdicts:
        setattr(counts, verdict.word, getattr(counts, verdict.word) + 1)
    said = {
        "verdict": pa.array([verdict.word for verdict in verdicts], pa.string()),
        "verdict_reason": pa.array([verdict.reason for verdict in verdicts], pa.string()),
        "verifier": pa.array([judging.name] * table.num_rows, pa.string()),
        JUDGE_TEXT: pa.array(texts, pa.string()),
    }
    for name, values in said.items():
        if name in table.column_names:
            table = table.set_column(table.column_names.index(name), pa.field(name, pa.string()), values)
        else:
            table = table.append_column(pa.field(name, pa.string()), values)
    write_parquet(storage, out, table.schema, [table])
    return counts
