"""Which bytes a token id stands for."""

import pytest
from tokenizers import Tokenizer, decoders, models, normalizers, pre_tokenizers
from transformers import PreTrainedTokenizerFast

from grape_service.config.schema import RenderConfig
from grape_service.models.vocabulary import Vocabulary
from grape_service.render.renderer import Renderer
from tests import tiny_models

TEXTS = ["Hello, 12 hens!", "東京 🙂", "\x00\x7f\u0080", " a  b\n\n\tc", "<think>é</think>"]


def sentencepiece(byte_fallback):
    """A Unigram tokenizer in the manner of sentencepiece, with byte tokens for what it lacks."""
    pieces = ["<unk>", "<s>", "</s>", *(f"<0x{byte:02X}>" for byte in range(256)), "▁", "a", "b", "▁a", "ab", "é"]
    backend = Tokenizer(
        models.Unigram([(piece, -float(i)) for i, piece in enumerate(pieces)], unk_id=0, byte_fallback=byte_fallback)
    )
    backend.normalizer = normalizers.Replace(" ", "▁")
    backend.decoder = decoders.Sequence(
        [decoders.Replace("▁", " "), *([decoders.ByteFallback()] if byte_fallback else []), decoders.Fuse()]
    )
    return PreTrainedTokenizerFast(tokenizer_object=backend, eos_token="</s>", bos_token="<s>", unk_token="<unk>")


def test_byte_level_tokens_join_to_the_text(tmp_path):
    tokenizer = tiny_models.make_tokenizer(tmp_path, "reasoning")
    renderer = Renderer(tokenizer, RenderConfig())
    for text in TEXTS:
        ids = tokenizer.encode(text, add_special_tokens=False)
        assert b"".join(renderer.token_bytes(ids)) == text.encode()
    assert renderer.vocab_size == 517
    assert renderer.token_bytes([tokenizer.convert_tokens_to_ids("<think>")]) == [b"<think>"]
    assert renderer.token_bytes([517, -1]) == [None, None]
    assert len(set(renderer.token_bytes(range(256)))) == 256


@pytest.mark.parametrize("text", ["a b ab", "aéb", "東 🙂"])
def test_sentencepiece_byte_fallback(text):
    tokenizer = sentencepiece(byte_fallback=True)
    vocabulary = Vocabulary(tokenizer)
    ids = tokenizer.encode(text, add_special_tokens=False)
    assert b"".join(vocabulary.bytes_of(ids)) == text.encode()
    without = Vocabulary(sentencepiece(byte_fallback=False))
    assert without.bytes_of([3]) == [b"<0x00>"]


def test_metaspace():
    backend = Tokenizer(models.WordLevel({"▁Hi": 0, "▁you": 1, "<unk>": 2}, unk_token="<unk>"))
    backend.pre_tokenizer = pre_tokenizers.Metaspace()
    backend.decoder = decoders.Metaspace()
    vocabulary = Vocabulary(PreTrainedTokenizerFast(tokenizer_object=backend, unk_token="<unk>"))
    assert vocabulary.bytes_of([0, 1]) == [b" Hi", b" you"]
