"""A stored verdict is that of one question: another right answer in the pool has the sample judged again."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import orjson
import pyarrow as pa
import pytest

from grape_service.config.gather import SamplingConfig, VerifyConfig
from grape_service.gather.candidates import Gathered, asked_of, write_candidates
from grape_service.gather.missing import Sampling, stored_samples
from grape_service.gather.samples import SampleStore, sample_key, verify_id
from grape_service.gather.verdicts import verifier_name
from grape_service.rows.columns import SHARD
from grape_service.rows.keys import row_keys
from grape_service.rows.ragged import list_array, offsets_from_lengths
from grape_service.storage.parquet import read_row_groups, write_parquet
from grape_service.storage.storage import Storage
from tests import tiny_models

VERIFY = VerifyConfig(method="exact", answer="answer")
IDS = np.array([7, 8, 9], np.int32)


def shard_of(storage: Storage, answers: list[str]) -> str:
    """Prompts with the same tokens and these answers."""
    offsets = offsets_from_lengths([len(IDS)] * len(answers))
    ids = np.tile(IDS, len(answers))
    messages = orjson.dumps([{"role": "user", "content": "2+2?"}]).decode()
    columns: dict[str, Any] = {
        "row_key": row_keys(ids, np.zeros(len(ids), np.uint8), offsets),
        "prompt_id": [f"p{place}" for place in range(len(answers))],
        "candidate_id": ["c"] * len(answers),
        "input_ids": list_array(offsets, ids, pa.int32()),
        "messages": [messages] * len(answers),
        "num_prompt_messages": pa.array([1] * len(answers), pa.int32()),
        "tools": pa.array([None] * len(answers), pa.string()),
        "answer": answers,
    }
    schema = pa.schema([*(SHARD.field(name) for name in list(columns)[:-1]), pa.field("answer", pa.string())])
    write_parquet(storage, "prompts/b-00000.parquet", schema, [pa.table(columns).cast(schema)])
    return "prompts/b-00000.parquet"


@pytest.mark.parametrize("right", [None, 1])
def test_another_answer_is_another_question(tmp_path: Path, right: int | None) -> None:
    storage = Storage(str(tmp_path / "workspace"))
    tokenizer = tiny_models.make_tokenizer(tmp_path / "model")
    ids = tokenizer.encode("4", add_special_tokens=False)
    key = sample_key(row_keys(IDS, np.zeros(3, np.uint8), np.array([0, 3]))[0].as_py(), 0)
    sample = {"sample_key": key, "prompt_id": "p0", "number": 0, "seed": 1, "finish_reason": "stop", "ids": ids}
    sample |= {"logprobs": [-1.0] * len(ids), "verdict": "right", "verdict_reason": "is the answer"}
    sample["asked"] = asked_of({"answer": "4"}, VERIFY)
    here = verify_id(VERIFY, verifier_name(VERIFY))
    made_by = {"made_by": {"engine": "e"}, "verify_id": here, "verifier": "exact"}
    SampleStore(storage, "s").write("b", [sample], "prompts/b-00000.parquet", made_by)
    gathered = Gathered("self", "s", SamplingConfig(), 1, VERIFY, True)
    sampling = Sampling("s", SamplingConfig(), 2, (), VERIFY, right)

    def verdicts(answers: list[str]) -> tuple[list[str], int]:
        shard = shard_of(storage, answers)
        write_candidates(storage, shard, "b", gathered, tokenizer, (), "out.parquet")
        found = pa.concat_tables(read_row_groups(storage, "out.parquet"))
        return found["verdict"].to_pylist(), stored_samples(storage, [shard], "b", sampling).missing

    enough = 1 if right is None else 0
    assert verdicts(["4"]) == (["right"], enough)
    assert verdicts(["5"]) == (["wrong"], 1)
    assert verdicts(["5", "4"]) == (["wrong", "right"], 1 + enough)
