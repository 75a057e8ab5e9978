from grape_service.pool.sample import sample_candidates
from tests.prepared_pools import make_config, write_jsonl


def test_a_sample_has_the_first_rows_of_some_files(tmp_path):
    for number in range(20):
        rows = [{"prompt": f"q {number}", "response": f"a {row}", "ok": row % 2} for row in range(50)]
        write_jsonl(tmp_path / f"{number:02d}.jsonl", [b"{", *rows])
    config = make_config(tmp_path, pool={"where": [{"column": "ok", "equals": 1}]})
    candidates, rejected = sample_candidates(config, 28)
    assert len(candidates) + len(rejected) == 28
    assert len(rejected) == 7
    assert {candidate.prompt[0]["content"] for candidate in candidates} == {f"q {number}" for number in range(0, 20, 3)}
    assert {candidate.response for candidate in candidates} == {"a 1", "a 3", "a 5"}


def test_a_small_pool_is_its_own_sample(tmp_path):
    pool = write_jsonl(tmp_path / "p.jsonl", [{"prompt": "q", "responses": ["a", "b", ""]}])
    candidates, rejected = sample_candidates(make_config(pool))
    assert [candidate.response for candidate in candidates] == ["a", "b"]
    assert [reject.rejection.reason for reject in rejected] == ["empty response"]
