"""Select methods: by hand and against float64 loops; the user's own, and what is refused."""

from __future__ import annotations

import hashlib
import sys
from pathlib import Path
from types import ModuleType

import numpy as np
import pyarrow as pa
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from grape_service.config.loading import parse_config
from grape_service.config.own_methods import own_method
from grape_service.errors import UserError
from grape_service.methods.select.local import local_scores
from grape_service.methods.select.rsr import rsr_scores
from grape_service.methods.select.steps import steps_scores
from grape_service.methods.select.surprise import surprise_scores
from grape_service.rows.method_batch import MethodBatch
from grape_service.rows.ragged import offsets_from_lengths

pytestmark = pytest.mark.quick


def batch_of(lengths: list[int], steps: list[int] | None = None, **statistics: list[float]) -> MethodBatch:
    """One candidate a prompt."""
    ids = pa.array([f"p{number}" for number in range(len(lengths))])
    arrays = {
        name: np.array(values, dtype=np.int64 if name == "rank" else np.float32) for name, values in statistics.items()
    }
    offsets, local = offsets_from_lengths(lengths), arrays.pop("local_logprob", None)
    return MethodBatch(np.arange(len(lengths)), ids, ids, offsets, arrays, {}, steps and np.array(steps), local)


def test_rsr_by_hand() -> None:
    # (1 + 4) / (0.5 + 2) = 2; a rank of 5,000 counts as 100: 100 / 4 = 25
    batch = batch_of([2, 1], logprob=[-0.5, -2.0, -4.0], rank=[1, 4, 5000])
    assert rsr_scores(batch).tolist() == [2.0, 25.0]
    # A response that the target is certain of has no surprisal: the largest ratio there is, and finite.
    assert np.isfinite(rsr_scores(batch_of([2], logprob=[0.0, 0.0], rank=[1, 1]))).all()


def test_surprise_by_hand() -> None:
    # (-1 + 1.5) and (-2 + 1) over two tokens: -0.25; a token as surprising as expected: 0
    batch = batch_of([2, 1], logprob=[-1.0, -2.0, -0.75], entropy=[1.5, 1.0, 0.75])
    assert surprise_scores(batch).tolist() == [-0.25, 0.0]


def test_steps_by_hand() -> None:
    # Steps of 2 and 3 tokens: (-0.5 - 1 - 0.25) / 3 without the first of each; of one token nothing is left.
    batch = batch_of([5, 1], steps=[0, 0, 1, 1, 1, 0], logprob=[-4.0, -0.5, -8.0, -1.0, -0.25, -2.0])
    assert steps_scores(batch, 1).tolist()[0] == pytest.approx(-1.75 / 3)
    assert np.isnan(steps_scores(batch, 1)[1])
    assert steps_scores(batch, 2).tolist()[0] == -0.25
    # Two responses of the same tokens, cut into short steps and into one long step: only their means differ.
    hard, easy = -6.0, -0.5
    short, long = [hard, easy, hard, easy, hard, easy], [hard, *[easy] * 5]
    batch = batch_of([6, 6], steps=[0, 0, 1, 1, 2, 2] + [0] * 6, logprob=[*short, *long])
    assert steps_scores(batch, 0).tolist() == pytest.approx([np.mean(short), np.mean(long)])
    assert steps_scores(batch, 1).tolist() == pytest.approx([easy, easy])


@settings(deadline=None, max_examples=40)
@given(lengths=st.lists(st.integers(1, 30), min_size=1, max_size=8), seed=st.integers(0, 2**20), skip=st.integers(0, 4))
def test_steps_against_a_float64_loop(lengths: list[int], seed: int, skip: int) -> None:
    random = np.random.default_rng(seed)
    rows = [np.cumsum(random.random(length) < 0.3) for length in lengths]
    rows = [row - row[0] for row in rows]
    logprob = (-random.exponential(2, sum(lengths))).astype(np.float32)
    found = steps_scores(batch_of(lengths, steps=np.concatenate(rows).tolist(), logprob=logprob), skip)
    start = 0
    for place, steps in enumerate(rows):
        left, seen = [], {}
        for step, value in zip(steps.tolist(), logprob[start : start + len(steps)], strict=True):
            seen[step] = seen.get(step, 0) + 1
            if seen[step] > skip:
                left.append(float(value))
        start += len(steps)
        expected = sum(left) / len(left) if left else np.nan
        assert found[place] == pytest.approx(expected, rel=1e-9, nan_ok=True)


def test_local_by_hand() -> None:
    # Steps of 2 and 1 tokens: ((-1 - 3) / 2 + -5) / 2 = -3.5; each step weighs the same, whatever its length.
    batch = batch_of([3, 1], steps=[0, 0, 1, 0], local_logprob=[-1.0, -3.0, -5.0, -0.25])
    assert local_scores(batch).tolist() == [-3.5, -0.25]


@settings(deadline=None, max_examples=40)
@given(lengths=st.lists(st.integers(1, 30), min_size=1, max_size=8), seed=st.integers(0, 2**20))
def test_local_against_a_float64_loop(lengths: list[int], seed: int) -> None:
    random = np.random.default_rng(seed)
    rows = [np.cumsum(random.random(length) < 0.4) for length in lengths]
    logprob = (-random.exponential(2, sum(lengths))).astype(np.float32)
    found = local_scores(batch_of(lengths, steps=np.concatenate(rows).tolist(), local_logprob=logprob))
    start = 0
    for place, steps in enumerate(rows):
        by_step: dict[int, list[float]] = {}
        for step, value in zip(steps.tolist(), logprob[start : start + len(steps)], strict=True):
            by_step.setdefault(step, []).append(float(value))
        start += len(steps)
        means = [sum(values) / len(values) for values in by_step.values()]
        assert found[place] == pytest.approx(sum(means) / len(means), rel=1e-9)


@settings(deadline=None, max_examples=40)
@given(lengths=st.lists(st.integers(1, 30), min_size=1, max_size=8), seed=st.integers(0, 2**20))
def test_against_float64_loops(lengths: list[int], seed: int) -> None:
    random = np.random.default_rng(seed)
    count = sum(lengths)
    logprob = (-random.exponential(2, count)).astype(np.float32)
    entropy = random.exponential(2, count).astype(np.float32)
    rank = random.integers(1, 400, count)
    batch = batch_of(lengths, logprob=logprob, entropy=entropy, rank=rank)
    rsr, surprise = rsr_scores(batch), surprise_scores(batch)
    start = 0
    for row, length in enumerate(lengths):
        places = range(start, start + length)
        ranks = sum(min(int(rank[place]), 100) for place in places)
        assert rsr[row] == pytest.approx(ranks / max(sum(-float(logprob[p]) for p in places), 1e-6), rel=1e-9)
        mean = sum(float(logprob[p]) + float(entropy[p]) for p in places) / length
        assert surprise[row] == pytest.approx(mean, rel=1e-9, abs=1e-9)
        start += length


def module_with(monkeypatch: pytest.MonkeyPatch, tmp_path: Path, source: str) -> str:
    """The name of a new module with this source."""
    name = f"own_{abs(hash((source, str(tmp_path))))}"
    (tmp_path / f"{name}.py").write_text(source)
    monkeypatch.syspath_prepend(str(tmp_path))
    return name


@pytest.mark.parametrize(
    ("body", "sentence"),
    [
        ("return [1.0]", r"select.method .*:score gave an array of shape \(1,\) for 3 candidates"),
        ("return 1.0", "gave the single number 1.0 for 1 candidate at prompt 'p0'"),
        ("return ['a', 'b', 'c']", "gave a list, not an array of numbers at prompt 'p0'"),
        ("return [1.0, float('nan'), 2.0]", "gave nan for candidate 'p1' of prompt 'p1', which is no finite number"),
        (
            "if 'p2' in batch.prompt_ids.to_pylist(): raise KeyError('x')\n    return [0.0] * len(batch)",
            "KeyError: 'x' at prompt 'p2'",
        ),
    ],
)
def test_a_bad_answer_names_the_method_and_the_prompt(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path, body: str, sentence: str
) -> None:
    name = module_with(monkeypatch, tmp_path, f"def score(batch):\n    {body}\n")
    with pytest.raises(UserError, match=sentence):
        own_method("select", f"{name}:score")(batch_of([1, 1, 1], logprob=[0, 0, 0]))


def test_a_weight_is_finite_and_not_negative(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    name = module_with(monkeypatch, tmp_path, "def weigh(batch):\n    return [1.0, 2.0, -1.0]\n")
    with pytest.raises(UserError, match=r"gave -1.0 for token 1 of candidate 'p1' of prompt 'p1'"):
        own_method("weights", f"{name}:weigh")(batch_of([1, 2], logprob=[0, 0, 0]))


@pytest.mark.parametrize(
    ("source", "attribute", "sentence"),
    [
        ("import no_such_package", "score", "there is no module 'no_such_package' here"),
        ("1 / 0", "score", "raised ZeroDivisionError"),
        ("score = 3", "score", "has no function 'score'"),
        ("def score(): return []", "score", "has to take one argument"),
        (
            "def score(b): pass\nscore.statistics = ['perplexity']",
            "score",
            "asks for the statistic 'perplexity'; there are",
        ),
        ("def score(b): pass\nscore.better = 'nicest'", "score", "it is 'largest' or 'smallest'"),
        ("def score(b): pass\nscore.columns = 'level'", "score", "it is a list of names"),
    ],
)
def test_what_cannot_be_loaded_is_refused(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path, source: str, attribute: str, sentence: str
) -> None:
    name = module_with(monkeypatch, tmp_path, source)
    with pytest.raises(UserError, match=sentence):
        own_method("select", f"{name}:{attribute}")


def config(**keys: object) -> dict[str, object]:
    return {"name": "n", "pool": {"path": "p"}, "target": {"model": "m"}, "output": {"path": "o"}, **keys}


def test_what_the_methods_need_is_what_is_asked_for(monkeypatch: pytest.MonkeyPatch) -> None:
    assert parse_config(config()).statistics == ()
    assert parse_config(config(select={"method": "rsr"}, weights={"method": "entropy"})).statistics == (
        "rank",
        "top20_entropy",
    )
    assert parse_config(config(score={"statistics": ["entropy"]})).statistics == ("entropy",)
    with pytest.raises(UserError, match=r"score.statistics lacks 'rank', which select.method rsr needs"):
        parse_config(config(select={"method": "rsr"}, score={"statistics": ["entropy"]})).check_methods()
    with pytest.raises(UserError, match="nothing is scored"):
        parse_config(config(select={"method": "random"}, score={"statistics": ["rank"]})).check_methods()
    with pytest.raises(UserError, match="'besst' is not a method"):
        parse_config(config(weights={"method": "besst"}))
    with pytest.raises(UserError, match="skip belongs to method steps; method rsr has no such setting"):
        parse_config(config(select={"method": "rsr", "skip": 2}))
    with pytest.raises(UserError, match="is no regular expression"):
        parse_config(config(select={"step_end": "("}))
    with pytest.raises(UserError, match="matches a text without characters"):
        parse_config(config(select={"step_end": "x*"}))
    assert parse_config(config(select={"method": "steps", "skip": 2})).select.skip == 2
    with pytest.raises(UserError, match="gamma belongs to method pear"):
        parse_config(config(weights={"method": "probability", "gamma": 0.9}))
    module = ModuleType("own_columns_only")
    exec("def score(b): return [0.0] * len(b)\nscore.statistics = ()\nscore.columns = ('level',)", module.__dict__)
    monkeypatch.setitem(sys.modules, "own_columns_only", module)
    assert not parse_config(config(select={"method": "own_columns_only:score"})).select.needs_scores


def test_an_installed_package_brings_a_method(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """By the metadata that an installer leaves: name, version and source are on record."""
    source = "import numpy as np\n\n\ndef fewest(batch):\n    return -np.diff(batch.offsets).astype(float)\n"
    (tmp_path / "fewest_package.py").write_text(source)
    metadata = tmp_path / "fewest_package-1.2.dist-info"
    metadata.mkdir()
    (metadata / "METADATA").write_text("Metadata-Version: 2.1\nName: fewest-package\nVersion: 1.2\n")
    (metadata / "RECORD").write_text("fewest_package.py,,\n")
    (metadata / "entry_points.txt").write_text("[grape_service.select_methods]\nfewest = fewest_package:fewest\n")
    monkeypatch.syspath_prepend(str(tmp_path))
    record = own_method("select", "fewest").record()
    expected = hashlib.sha256(source.encode()).hexdigest()
    assert (record["package"], record["package_version"]) == ("fewest-package", "1.2")
    assert (record["function"], record["source_digest"]) == ("fewest_package:fewest", expected)
    own_method.cache_clear()
