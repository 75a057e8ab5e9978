"""Spans that two tokenizers both cover: by hand, by a slow float64 way, over six tokenizers and over random bytes."""

from __future__ import annotations

import json
import math
from typing import Any

import numpy as np
import pyarrow as pa
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from tokenizers import Tokenizer, decoders, models, normalizers, pre_tokenizers, trainers
from transformers import AutoTokenizer, PreTrainedTokenizerFast

from grape_service.methods.weights.pear import log_ratios
from grape_service.models.vocabulary import Vocabulary
from grape_service.rows.candidate import Rendered
from grape_service.rows.columns import NO_SOURCE
from grape_service.weigh.align import NOT_COMPARED, Written, align, one_to_one, shared_logprobs, spans_of, written_of
from grape_service.weigh.counts import AlignedCounts
from grape_service.weigh.lookup import AlignedSpans, count_aligned
from tests.smollm2 import smollm2_folder
from tests.tiny_models import CORPUS, make_tokenizer


def written(*tokens: str, turn_end: bytes | None = None, special: tuple[int, ...] = ()) -> Written:
    lengths = [len(token.encode()) for token in tokens]
    marks = np.isin(np.arange(len(tokens)), special)
    return Written("".join(tokens).encode(), np.cumsum([0, *lengths]), marks, turn_end)


def test_spans_by_hand() -> None:
    # "the| eggs| are" and "the| e|ggs| ar|e": 1 and 1, 1 and 2, 1 and 2 tokens.
    found = align([written("the", " eggs", " are")], [written("the", " e", "ggs", " ar", "e")])
    assert found is not None
    assert [spans.tolist() for spans in found] == [[0, 1, 2], [0, 1, 1, 2, 2]]
    # "ab|c|d" and "a|bcd": nothing but the ends is shared.
    left, right = spans_of(np.array([0, 2, 3, 4]), np.array([0, 1, 4]))
    assert (left.tolist(), right.tolist()) == ([0, 0, 0], [0, 0])


def test_what_is_not_compared() -> None:
    def spans(left: list[Written], right: list[Written]) -> list[list[int]] | None:
        found = align(left, right)
        return None if found is None else [part.tolist() for part in found]

    no = NOT_COMPARED
    assert spans([written("a", turn_end=b"<|im_end|>")], [written("a", turn_end=b"</s>")]) == [[0, no], [0, no]]
    assert spans([written("a", turn_end=b"</s>")], [written("a", turn_end=b"</s>")]) == [[0, 1], [0, 1]]
    assert spans([written("a", turn_end=b"</s>")], [written("a")]) == [[0, no], [0]]
    assert spans([written("a", "<x>", "b", special=(1,))], [written("a", "<", "x>", "b")]) == [
        [0, no, 2],
        [0, no, no, 2],
    ]
    # What the other has in its prompt, and the token that crosses from it.
    assert spans([written("<t>", "ab", "c")], [written("ab", "c")]) == [[no, 0, 1], [0, 1]]
    assert spans([written("a", "bc")], [written("<t>a", "b", "c")]) == [[no, 0], [no, 0, 0]]
    assert spans([written("ab")], [written("ac")]) is None
    assert spans([written("a")], [written("a"), written("b")]) is None
    assert spans([written("a"), written("b")], [written("a"), written("cb")]) is None
    assert spans([written("a"), written("bc")], [written("a"), written("b", "c")]) == [[0, 1], [0, 1, 1]]


def test_ratios_by_hand() -> None:
    # Span 1: -1 - 2 = -3 under the target, -4 under the behavior; a delta of 1 in two equal shares.
    target, own = np.array([-0.5, -1, -2, -9], np.float32), np.array([-0.25, -1, -3, -1], np.float32)
    behavior = shared_logprobs(target, np.array([0, 1, 1, -1]), own, np.array([0, 1, 1, -1]))
    ratios = log_ratios(target, behavior)
    assert ratios.tolist()[:3] == [-0.25, 0.5, 0.5]
    assert np.isnan(ratios[3])
    single, lengths = one_to_one(np.array([0, 1, 1, -1]), np.array([0, 1, 1, -1]))
    assert (single.tolist(), lengths.tolist()) == ([True, False, False, False], [1, 2])


def sentencepiece(kind: str) -> PreTrainedTokenizerFast:
    """BPE or Unigram with ▁ for a space and byte tokens for what it lacks."""
    special = ["<unk>", "<s>", "</s>"]
    model = models.BPE(unk_token="<unk>", fuse_unk=True) if kind == "bpe" else models.Unigram()
    trained = Tokenizer(model)
    trained.normalizer = normalizers.Replace(" ", "▁")
    trained.pre_tokenizer = pre_tokenizers.Split("▁", "merged_with_next")
    of = trainers.BpeTrainer if kind == "bpe" else trainers.UnigramTrainer
    trained.train_from_iterator(
        CORPUS, of(vocab_size=300, special_tokens=special, show_progress=False, unk_token="<unk>")
    )
    found = [f"<0x{byte:02X}>" for byte in range(256)]
    if kind == "bpe":
        state = json.loads(trained.to_str())["model"]
        vocabulary = {**state["vocab"]}
        for piece in found:
            vocabulary.setdefault(piece, len(vocabulary))
        merges = [tuple(pair) for pair in state["merges"]]
        backend = Tokenizer(models.BPE(vocabulary, merges, unk_token="<unk>", fuse_unk=True, byte_fallback=True))
    else:
        pieces = [(piece, score) for piece, score in json.loads(trained.to_str())["model"]["vocab"]]
        backend = Tokenizer(models.Unigram([*pieces, *((p, -20.0) for p in found)], unk_id=0, byte_fallback=True))
    backend.normalizer, backend.pre_tokenizer = trained.normalizer, trained.pre_tokenizer
    backend.decoder = decoders.Sequence([decoders.Replace("▁", " "), decoders.ByteFallback(), decoders.Fuse()])
    return PreTrainedTokenizerFast(tokenizer_object=backend, eos_token="</s>", bos_token="<s>", unk_token="<unk>")


def single_bytes() -> PreTrainedTokenizerFast:
    """A token a byte."""
    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    backend = Tokenizer(models.BPE({character: place for place, character in enumerate(alphabet)}, []))
    backend.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    backend.decoder = decoders.ByteLevel()
    return PreTrainedTokenizerFast(tokenizer_object=backend)


@pytest.fixture(scope="module")
def tokenizers(tmp_path_factory: pytest.TempPathFactory) -> dict[str, PreTrainedTokenizerFast]:
    folder = tmp_path_factory.mktemp("tokenizers")
    return {
        "smollm2": AutoTokenizer.from_pretrained(smollm2_folder()),
        "byte-level 300": make_tokenizer(folder / "small", vocab=300),
        "byte-level 900": make_tokenizer(folder / "large", vocab=900),
        "sentencepiece bpe": sentencepiece("bpe"),
        "sentencepiece unigram": sentencepiece("unigram"),
        "single bytes": single_bytes(),
    }


def row_of(tokenizer: PreTrainedTokenizerFast, text: str) -> Rendered:
    ids = np.array([0, *tokenizer(text, add_special_tokens=False)["input_ids"]], np.int32)
    mask = np.ones(len(ids), np.uint8)
    mask[0] = 0
    return Rendered(ids, mask, 1)


def slow(target: list[bytes], own: list[bytes], left: list[float], right: list[float]) -> list[float]:
    """delta of each of the target's tokens: byte by byte, Python sums."""

    def ends(tokens: list[bytes]) -> list[int]:
        return [sum(len(token) for token in tokens[: place + 1]) for place in range(len(tokens))]

    ours, theirs = ends(target), ends(own)
    cuts = sorted(set(ours) & set(theirs))
    deltas, before = [], 0
    for cut in cuts:
        one = [value for value, end in zip(left, ours, strict=True) if before < end <= cut]
        other = [value for value, end in zip(right, theirs, strict=True) if before < end <= cut]
        deltas += [(math.fsum(one) - math.fsum(other)) / len(one)] * len(one)
        before = cut
    return deltas


PARTS = ["The answer is ", "12 hens", "é", "東京", "🙂🙂", "\n\n", "  ", "x", "\t", "an", "swers"]
TEXTS = st.one_of(
    st.lists(st.sampled_from(PARTS), min_size=1, max_size=12).map("".join),
    st.text(st.characters(exclude_categories=["Cs"], exclude_characters="▁\r"), min_size=1, max_size=40),
)


@settings(deadline=None, max_examples=120)
@given(text=TEXTS, seed=st.integers(0, 2**30))
def test_every_pair_of_six_tokenizers(text: str, seed: int, tokenizers: dict[str, PreTrainedTokenizerFast]) -> None:
    random = np.random.default_rng(seed)
    vocabularies = {name: Vocabulary(tokenizer) for name, tokenizer in tokenizers.items()}
    rows = {name: row_of(tokenizer, text) for name, tokenizer in tokenizers.items()}
    scores = {name: (-random.exponential(2, len(row.input_ids) - 1)).astype(np.float32) for name, row in rows.items()}
    tokens = {name: vocabularies[name].bytes_of(row.input_ids[1:]) for name, row in rows.items()}
    # SmolLM2 has no token for some control characters, and leaves them out.
    able = [name for name in rows if name != "smollm2" or b"".join(tokens[name]) == text.encode()]
    for name in able:
        assert b"".join(tokens[name]) == text.encode(), name
    for ours in able:
        for theirs in able:
            found = align(written_of(rows[ours], vocabularies[ours]), written_of(rows[theirs], vocabularies[theirs]))
            assert found is not None
            behavior = shared_logprobs(scores[ours], found[0], scores[theirs], found[1])
            if ours == theirs:
                assert behavior.tobytes() == scores[theirs].tobytes()  # as without alignment, bit for bit
            deltas = log_ratios(scores[ours], behavior)
            expected = slow(tokens[ours], tokens[theirs], scores[ours].tolist(), scores[theirs].tolist())
            np.testing.assert_allclose(deltas, expected, rtol=1e-5, atol=1e-5)
            total = math.fsum(scores[ours].tolist()) - math.fsum(scores[theirs].tolist())
            assert math.fsum(deltas.tolist()) == pytest.approx(total, rel=1e-5, abs=1e-4)
            # The other way round the same spans are shared.
            back = align(written_of(rows[theirs], vocabularies[theirs]), written_of(rows[ours], vocabularies[ours]))
            assert back is not None
            assert (back[0].tolist(), back[1].tolist()) == (found[1].tolist(), found[0].tolist())
            single, lengths = one_to_one(*found)
            assert lengths.sum() == len(single)


@settings(deadline=None, max_examples=200)
@given(st.lists(st.integers(0, 3), max_size=12), st.lists(st.integers(0, 3), max_size=12), st.binary(max_size=40))
def test_any_bytes_cut_in_any_two_ways(left: list[int], right: list[int], text: bytes) -> None:
    """Tokens that hold part of a character, or nothing."""

    def cut(lengths: list[int]) -> Written:
        starts = np.minimum(np.cumsum([0, *lengths, len(text)]), len(text))
        return Written(text, starts, np.zeros(len(lengths) + 1, bool), None)

    one, other = cut(left), cut(right)
    found = align([one], [other])
    assert found is not None
    for spans, part in zip(found, (one, other), strict=True):
        assert len(spans) == len(part.starts) - 1
        for number in set(spans.tolist()) - {NOT_COMPARED}:
            # What a span's tokens cover is the same on both sides.
            covers = [
                part.text[int(side.starts[:-1][s == number].min()) : int(side.starts[1:][s == number].max())]
                for s, side in zip(found, (one, other), strict=True)
            ]
            assert covers[0] == covers[1]


def test_what_was_compared_is_counted_by_source() -> None:
    random = np.random.default_rng(3)
    rows = [random.integers(-1, 4, random.integers(1, 9)).astype(np.int32) for _ in range(40)]
    own = [random.integers(-1, 4, random.integers(1, 9)).astype(np.int32) for _ in range(40)]
    sources = [random.choice(["a", "b", None]) for _ in rows]
    spans = AlignedSpans(pa.array(rows, pa.list_(pa.int32())), pa.array(own, pa.list_(pa.int32())))
    expected: dict[str, list[Any]] = {}
    for mine, theirs, source in zip(rows, own, sources, strict=True):
        counted = expected.setdefault(source or NO_SOURCE, [0, 0, 0, 0, {}])
        is_single = [s >= 0 and (mine == s).sum() == 1 and (theirs == s).sum() == 1 for s in mine.tolist()]
        counted[0] += 1
        counted[1] += sum(is_single) / len(mine) < 0.5
        counted[2] += len(mine)
        counted[3] += sum(is_single)
        for span in set(mine.tolist()) - {-1}:
            size = str((mine == span).sum())
            counted[4][size] = counted[4].get(size, 0) + 1
    counts: dict[str, AlignedCounts] = {}
    coverage = count_aligned(spans, pa.array(sources, pa.string()), 0.5, counts)
    assert {name: list(one.to_json().values()) for name, one in counts.items()} == expected
    assert (coverage < 0.5).sum() == sum(one.rows_below for one in counts.values()) > 0
