"""Samples that continue a prefill: the text that stands in their tokens there, and verdicts on the whole turn."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import orjson
import pyarrow as pa

from grape_service.config.gather import SamplingConfig, VerifyConfig
from grape_service.config.schema import RenderConfig
from grape_service.gather.candidates import Gathered, write_candidates
from grape_service.gather.judge import write_questions
from grape_service.gather.samples import SampleStore, sample_key
from grape_service.render.renderer import Renderer
from grape_service.rows.candidate import Candidate, Rendered
from grape_service.rows.columns import SHARD
from grape_service.rows.keys import row_keys
from grape_service.storage.parquet import read_row_groups, write_parquet
from grape_service.storage.storage import Storage
from tests.template_families import make

ASKED = [{"role": "user", "content": "3+4?"}, {"role": "assistant", "content": "It is"}]


def gathered(storage: Storage, renderer: Renderer, verify: VerifyConfig) -> list[dict[str, Any]]:
    """The candidates of one prompt with a prefill, of which " 7" was sampled."""
    [row] = renderer.render([Candidate(ASKED, " 7", "p", "c")])
    assert isinstance(row, Rendered)
    prompt, ids = row.input_ids[: row.prompt_len], row.input_ids[row.prompt_len : -1].tolist()
    key = row_keys(prompt, np.zeros(len(prompt), np.uint8), np.array([0, len(prompt)]))
    columns: dict[str, Any] = {
        "row_key": key,
        "prompt_id": ["p"],
        "candidate_id": ["c"],
        "input_ids": [prompt.tolist()],
        "messages": [orjson.dumps([*ASKED, {"role": "assistant", "content": ""}]).decode()],
        "num_prompt_messages": [2],
        "tools": [None],
    }
    schema = pa.schema([*(SHARD.field(name) for name in columns), pa.field("answer", pa.string())])
    table = pa.table({**columns, "answer": ["It is 7"]}, schema)
    write_parquet(storage, "prompts.parquet", schema, [table])
    sample = {"sample_key": sample_key(key[0].as_py(), 0), "prompt_id": "p", "number": 0, "seed": 1, "ids": ids}
    sample |= {"logprobs": [-1.0] * len(ids), "finish_reason": "stop", "verdict": None, "verdict_reason": None}
    SampleStore(storage, "s").write("b", [sample], "prompts.parquet", {"made_by": {"engine": "e"}})
    how = Gathered("self", "s", SamplingConfig(), 1, verify, True)
    write_candidates(storage, "prompts.parquet", "b", how, renderer.tokenizer, (), "out.parquet")
    return pa.concat_tables(read_row_groups(storage, "out.parquet")).to_pylist()


def test_a_sample_has_the_space_that_its_tokens_have_and_its_turn_is_judged(tmp_path: Path) -> None:
    renderer = Renderer(make("zephyr"), RenderConfig())  # which decodes no space before a text
    storage = Storage(str(tmp_path))
    [row] = gathered(storage, renderer, VerifyConfig(method="exact", answer="answer"))
    assert row["response"] == " 7"
    assert orjson.loads(row["prompt"]) == ASKED
    assert row["verdict"] == "right"


def test_a_judge_is_shown_the_whole_turn(tmp_path: Path) -> None:
    renderer = Renderer(make("zephyr"), RenderConfig())
    storage = Storage(str(tmp_path))
    verify = VerifyConfig(method="none")
    gathered(storage, renderer, verify)
    judge = VerifyConfig(method="judge", model="m", prompt="[{prompt}] [{response}]")
    assert write_questions(storage, "out.parquet", "asked.parquet", judge, renderer) == 1
    [question] = pa.concat_tables(read_row_groups(storage, "asked.parquet")).to_pylist()
    assert "[3+4?] [It is 7]" in renderer.tokenizer.decode(question["input_ids"])
