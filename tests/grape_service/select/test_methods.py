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
from grape_service.rows.method_batch import MethodBatch
from grape_service.rows.ragged import offsets_from_lengths
from grape_service.select.rsr import rsr_scores
from grape_service.select.surprise import surprise_scores


def batch_of(lengths: list[int], **statistics: list[float]) -> MethodBatch:
    """One candidate a prompt."""
    ids = pa.array([f"p{number}" for number in range(len(lengths))])
    arrays = {
        name: np.array(values, dtype=np.int64 if name == "rank" else np.float32) for name, values in statistics.items()
    }
    return MethodBatch(np.arange(len(lengths)), ids, ids, offsets_from_lengths(lengths), arrays, {})


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
        ("return ['a', 'b', 'c']", "gave a list that is no array of numbers at prompt 'p0'"),
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
