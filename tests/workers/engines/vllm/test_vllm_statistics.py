"""Every statistic of the scoring head against float64 loops over transformers' logits."""

from __future__ import annotations

from collections.abc import Iterator

import pytest

from grape_service.errors import UserError
from grape_service.rows.ragged import TokenBatch
from grape_service.rows.statistics import STATISTICS
from tests.workers.engines.transformers.test_statistics import assert_statistics, batch_of
from tests.workers.engines.vllm.reference import engine_of, load_reference, random_ids, row, tiny_model
from workers.engines.base import invalid_rows
from workers.engines.vllm.engine import VllmEngine

pytestmark = pytest.mark.vllm

pytest.importorskip("vllm", reason="vLLM is not installed: run make test-vllm")


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> str:
    return tiny_model(tmp_path_factory.mktemp("statistics"))


@pytest.fixture
def engine(folder: str) -> Iterator[VllmEngine]:
    with engine_of(folder, max_batch_tokens=64) as started:
        yield started


def test_statistics_over_chunks_and_cached_prompts(engine: VllmEngine, folder: str) -> None:
    model = load_reference(folder)
    batch = batch_of()
    found = engine.score_statistics(batch, STATISTICS)
    assert tuple(found) == STATISTICS
    assert not invalid_rows(found, batch)
    assert_statistics(found, model, batch)
    assert_statistics(engine.score_statistics(batch, STATISTICS, 0.5), model, batch, 0.5)
    prompt = random_ids(5, 64)
    rows = [row(prompt, random_ids(6, 150)), row(prompt, random_ids(7, 9)), row(prompt, random_ids(6, 150))]
    long = TokenBatch.from_rows(rows)  # three steps and more, and a prompt that is in the cache
    assert_statistics(engine.score_statistics(long, STATISTICS), model, long)
    assert engine.stats()["rescored_rows"] == 0
    # Calls that ask for different statistics share steps.
    from concurrent.futures import ThreadPoolExecutor

    with ThreadPoolExecutor(3) as pool:
        asked = [("rank",), (), ("top20_entropy", "entropy")]
        answers = list(pool.map(lambda names: engine.score_statistics(long, names), asked))
    assert [list(answer) for answer in answers] == [
        ["logprob", "rank"],
        ["logprob"],
        ["logprob", "entropy", "top20_entropy"],
    ]
    whole = engine.score_statistics(long, STATISTICS)
    for answer in answers:
        for name, values in answer.items():
            assert values == pytest.approx(whole[name], abs=1e-4)


def test_prompt_logprobs_give_log_probabilities_alone(folder: str) -> None:
    with engine_of(folder, max_batch_tokens=64, scoring_head=False) as engine:
        assert engine.score(batch_of()).shape == (3 * 28,)
        with pytest.raises(UserError, match=r"rank of .* cannot be made through vLLM's prompt_logprobs"):
            engine.score_statistics(batch_of(), ("rank",))
