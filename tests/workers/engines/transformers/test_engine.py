"""The transformers engine against a plain forward of one sequence at a time."""

from __future__ import annotations

import sys
from collections.abc import Callable
from itertools import pairwise
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from transformers import AutoModelForCausalLM, AutoTokenizer

from grape_service.config.policy import PolicyConfig
from grape_service.errors import UserError
from grape_service.rows.ragged import TokenBatch
from tests.smollm2 import smollm2_folder
from tests.tiny_models import make_model
from workers.engines.base import OutOfMemory, invalid_rows
from workers.engines.transformers import packed_attention
from workers.engines.transformers.engine import TransformersEngine

VOCAB = 512
TOLERANCE = 1e-4

SHARING = {
    "llama": ("llama", {}),
    "llama-tied": ("llama", {"tie_word_embeddings": True}),
    "llama-one-key-head": ("llama", {"num_key_value_heads": 1}),
    "llama-all-key-heads": ("llama", {"num_key_value_heads": 4}),
    "llama-yarn": (
        "llama",
        {
            "rope_parameters": {
                "rope_type": "yarn",
                "rope_theta": 10000.0,
                "factor": 4.0,
                "original_max_position_embeddings": 32,
            }
        },
    ),
    "qwen2": ("qwen2", {}),
    "qwen2-sliding-upper-layer": ("qwen2", {"use_sliding_window": True, "sliding_window": 8, "max_window_layers": 1}),
    "qwen3": ("qwen3", {"tie_word_embeddings": True}),
    "gemma": ("gemma", {}),
    "gemma2-soft-caps": ("gemma2", {"attn_logit_softcapping": 2.0, "final_logit_softcapping": 3.0}),
    "gemma3": ("gemma3_text", {"sliding_window": 8, "layer_types": ["sliding_attention", "full_attention"]}),
    "mistral-sliding": ("mistral", {"sliding_window": 16}),
    "mistral-narrow": ("mistral", {"sliding_window": 3}),
    "gpt2": ("gpt2", {}),
    "phi3": ("phi3", {}),
    "granite-scaled-logits": ("granite", {"logits_scaling": 3.0}),
    "cohere-scaled-logits": ("cohere", {"logit_scale": 0.5}),
    "mixtral": ("mixtral", {"num_local_experts": 4}),
}
"""Models whose candidates share their prompt: name -> architecture, config."""

NOT_SHARING = {
    "bloom-position-biases": ("bloom", {}),
    "mamba": ("mamba", {}),
    "lfm2-convolutions": ("lfm2", {"layer_types": ["conv", "full_attention"]}),
    "gpt-oss-sinks": ("gpt_oss", {"num_local_experts": 4, "sliding_window": 8}),
}
"""Models that are scored in padded batches."""

Build = Callable[..., tuple[TransformersEngine, Any]]


@pytest.fixture(scope="module")
def built(tmp_path_factory: pytest.TempPathFactory) -> Build:
    """Makes an engine and the same model as transformers loads it."""

    def build(arch: str, over: dict[str, Any], **settings: Any) -> tuple[TransformersEngine, Any]:
        folder = make_model(tmp_path_factory.mktemp(arch), arch=arch, **over)
        dtype = settings.pop("dtype", "float32")
        engine = TransformersEngine(PolicyConfig(model=folder, dtype=dtype), folder, **settings)
        return engine, AutoModelForCausalLM.from_pretrained(folder, dtype=getattr(torch, dtype)).eval()

    return build


def plain_scores(model: Any, batch: TokenBatch, temperature: float = 1.0) -> np.ndarray:
    """One sequence at a time: all logits, float32 log-softmax, the tokens with loss."""
    scores = []
    for begin, end in pairwise(batch.offsets):
        ids = torch.from_numpy(batch.input_ids[begin:end].astype(np.int64))
        with torch.inference_mode():
            logits = model(input_ids=ids[None], use_cache=False).logits[0].float() / temperature
        places = np.flatnonzero(batch.mask[begin:end])
        scores.append(torch.log_softmax(logits, dim=-1)[places - 1, ids[places]].numpy())
    return np.concatenate(scores)


def candidates(prompt_lens: range, response_lens: tuple[int, ...], seed: int = 0) -> TokenBatch:
    """For each prompt length a prompt and responses: independent ones, and two that begin alike."""
    random = np.random.default_rng(seed)
    rows = []
    for prompt_len in prompt_lens:
        prompt = random.integers(0, VOCAB, prompt_len).tolist()
        responses = [random.integers(0, VOCAB, length).tolist() for length in response_lens]
        responses.append(responses[-1][: len(responses[-1]) // 2] + random.integers(0, VOCAB, 4).tolist())
        rows += [(prompt + r, [False] * prompt_len + [True] * len(r)) for r in responses]
    return TokenBatch.from_rows(rows)


@pytest.mark.parametrize("name", SHARING)
def test_every_prompt_length_agrees_with_a_plain_forward(built: Build, name: str) -> None:
    engine, model = built(*SHARING[name])
    batch = candidates(range(1, 71), (1, 21, 9))
    scores = engine.score(batch)
    assert engine.description.path == "shared_prefix", engine.why_padded
    assert not invalid_rows({"logprob": scores}, batch)
    np.testing.assert_allclose(scores, plain_scores(model, batch), rtol=0, atol=TOLERANCE)
    assert scores.std() > 0.5, "a model near to uniform would hide mistakes"
    assert engine.stats()["cached_tokens"] >= 3 * sum(range(1, 71))


@pytest.mark.parametrize("name", NOT_SHARING)
def test_models_that_cannot_share_are_scored_in_padded_batches(built: Build, name: str) -> None:
    engine, model = built(*NOT_SHARING[name], max_batch_tokens=300)
    batch = candidates(range(1, 70, 9), (1, 21, 9))
    np.testing.assert_allclose(engine.score(batch), plain_scores(model, batch), rtol=0, atol=TOLERANCE)
    assert engine.description.path == "padded"
    assert engine.description.extra["why_padded"]


@pytest.mark.parametrize("rope_type", ["longrope", "dynamic"])
def test_rotary_frequencies_that_depend_on_length_are_each_row_s_own(built: Build, rope_type: str) -> None:
    rope: dict[str, Any] = {"rope_type": rope_type, "rope_theta": 10000.0, "factor": 4.0}
    if rope_type == "longrope":
        rope |= {"original_max_position_embeddings": 64, "short_factor": [1.0] * 4, "long_factor": [3.0] * 4}
    engine, _ = built("llama", {"rope_parameters": rope, "max_position_embeddings": 64})
    batch = candidates(range(50, 68, 6), (1, 21, 9, 9))
    expected = []
    for row in range(len(batch)):  # dynamic frequencies remember the longest row: a fresh model for each
        fresh = AutoModelForCausalLM.from_pretrained(engine.description.model, dtype=torch.float32).eval()
        expected.append(plain_scores(fresh, batch.take([row])))
    np.testing.assert_allclose(engine.score(batch), np.concatenate(expected), rtol=0, atol=TOLERANCE)
    assert engine.stats()["cached_tokens"] > 0


def test_masks_with_several_spans(built: Build) -> None:
    engine, model = built("qwen3", {})
    random = np.random.default_rng(1)
    prompt = random.integers(0, VOCAB, 12).tolist()
    rows = []
    for length in (30, 31, 45):
        ids = prompt + random.integers(0, VOCAB, length).tolist()
        mask = [False] * 12 + [place % 11 < 4 for place in range(length)]
        rows.append((ids, mask))
    rows.append(([*prompt, 3], [False, True] + [False] * 10 + [True]))  # loss inside what the others share
    batch = TokenBatch.from_rows(rows)
    np.testing.assert_allclose(engine.score(batch), plain_scores(model, batch), rtol=0, atol=TOLERANCE)


def test_equal_rows_and_rows_that_begin_others(built: Build) -> None:
    engine, model = built("llama", {})
    ids = np.random.default_rng(2).integers(0, VOCAB, 20).tolist()
    rows = [(ids[:length], [False] * 8 + [True] * (length - 8)) for length in (20, 20, 12, 20, 9)]
    batch = TokenBatch.from_rows(rows)
    np.testing.assert_allclose(engine.score(batch), plain_scores(model, batch), rtol=0, atol=TOLERANCE)


@pytest.mark.parametrize("max_batch_tokens", [1, 100, 100_000])
def test_neither_the_budget_nor_the_order_of_rows_changes_scores(built: Build, max_batch_tokens: int) -> None:
    engine, model = built("mistral", {}, max_batch_tokens=max_batch_tokens)
    batch = candidates(range(1, 60, 6), (5, 40, 17))
    order = np.random.default_rng(3).permutation(len(batch))
    mixed = batch.take(order)
    np.testing.assert_allclose(engine.score(mixed), plain_scores(model, mixed), rtol=0, atol=TOLERANCE)


@pytest.mark.parametrize("name", ["llama", "mistral-sliding", "gemma2-soft-caps"])
def test_masks_are_made_in_blocks_of_queries(built: Build, name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """What rows of 100,000 tokens need, shown with small blocks."""
    engine, model = built(*SHARING[name])
    monkeypatch.setattr(packed_attention, "MAX_MASK_ELEMENTS", 16)
    batch = candidates(range(1, 70, 12), (40, 60, 39))
    np.testing.assert_allclose(engine.score(batch), plain_scores(model, batch), rtol=0, atol=TOLERANCE)


def test_logits_exist_for_a_chunk_of_tokens_with_loss_only(built: Build) -> None:
    engine, _ = built("llama", {}, logits_chunk_rows=16)
    rows: list[int] = []
    engine._model.model.lm_head.register_forward_hook(lambda module, args, out: rows.append(out.numel() // VOCAB))
    batch = candidates(range(30, 40), (1, 33, 50))
    engine.score(batch)
    width = engine._model.model.config.vocab_size / VOCAB
    assert max(rows) <= 16 * width
    assert sum(rows) <= (int(batch.mask.sum()) + 1) * width


def test_prompts_are_computed_once(built: Build) -> None:
    engine, _ = built("llama", {}, max_batch_tokens=64)
    computed: list[int] = []
    engine._model.base.embed_tokens.register_forward_hook(lambda module, args, out: computed.append(out.shape[1]))
    batch = candidates(range(20, 21), (10, 10, 10))
    engine.score(batch)
    assert max(computed) <= 64
    assert sum(computed) == 20 + 10 + 10 + 10 + 9, "the prompt once and every response"


@pytest.mark.parametrize("temperature", [0.6, 1.7])
def test_temperature_divides_the_logits(built: Build, temperature: float) -> None:
    engine, model = built("gemma2", {"final_logit_softcapping": 5.0})
    batch = candidates(range(5, 9), (4, 7))
    expected = plain_scores(model, batch, temperature)
    np.testing.assert_allclose(engine.score(batch, temperature), expected, rtol=0, atol=TOLERANCE)
    assert np.abs(engine.score(batch) - expected).max() > 0.1


def test_bfloat16_is_near_a_plain_bfloat16_forward(built: Build) -> None:
    engine, model = built("qwen2", {"initializer_range": 0.1}, dtype="bfloat16")
    batch = candidates(range(5, 40, 5), (20, 30))
    scores = engine.score(batch)
    assert engine.description.path == "shared_prefix"
    assert scores.dtype == np.float32
    assert np.abs(scores - plain_scores(model, batch)).mean() < 0.02


def test_smollm2_agrees_on_text() -> None:
    folder = str(smollm2_folder())
    tokenizer = AutoTokenizer.from_pretrained(folder)
    model = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32).eval()
    engine = TransformersEngine(PolicyConfig(model=folder, dtype="float32"), folder)
    questions = {
        "A farmer has 12 hens and each lays 5 eggs a week. How many eggs are there after 3 weeks?": [
            "Each week there are 12 * 5 = 60 eggs, so after 3 weeks there are 180 eggs.",
            "180",
            "Each week there are 5 eggs, so after three weeks the farmer has 15 eggs in all. " * 6,
        ],
        "What is the capital of France?": ["Paris.", "The capital of France is Paris, a city on the Seine."],
    }
    rows = []
    for question, responses in questions.items():
        message = [{"role": "user", "content": question}]
        prompt = tokenizer.apply_chat_template(message, add_generation_prompt=True, return_dict=False)
        for response in responses:
            ids = tokenizer(response, add_special_tokens=False)["input_ids"]
            rows.append((prompt + ids, [False] * len(prompt) + [True] * len(ids)))
    batch = TokenBatch.from_rows(rows)
    np.testing.assert_allclose(engine.score(batch), plain_scores(model, batch), rtol=0, atol=2e-4)
    engine.close()


def lora_folder(model: Any, folder: Path) -> str:
    from peft import LoraConfig, get_peft_model

    config = LoraConfig(r=4, lora_alpha=16, target_modules=["q_proj", "v_proj", "down_proj"], init_lora_weights=False)
    get_peft_model(model, config).save_pretrained(str(folder))
    return str(folder)


@pytest.mark.parametrize(("dtype", "tolerance"), [("float32", TOLERANCE), ("bfloat16", 0.15)])
def test_lora_agrees_with_peft(tmp_path: Path, dtype: str, tolerance: float) -> None:
    from peft import PeftModel

    folder = make_model(tmp_path / "model", arch="llama", initializer_range=0.2)
    adapter = lora_folder(AutoModelForCausalLM.from_pretrained(folder), tmp_path / "adapter")
    plain = AutoModelForCausalLM.from_pretrained(folder, dtype=getattr(torch, dtype)).eval()
    batch = candidates(range(3, 20, 4), (5, 12))
    without = plain_scores(plain, batch)
    expected = plain_scores(PeftModel.from_pretrained(plain, adapter).eval(), batch)
    engine = TransformersEngine(PolicyConfig(model=folder, adapter=adapter, dtype=dtype), folder)
    scores = engine.score(batch)
    np.testing.assert_allclose(scores, expected, rtol=0, atol=tolerance)
    assert np.abs(scores - without).max() > 0.5
    assert engine.description.path == "shared_prefix"


def test_an_adapter_without_peft_is_a_sentence(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    folder = make_model(tmp_path / "model")
    monkeypatch.setitem(sys.modules, "peft", None)
    with pytest.raises(UserError, match="needs the package peft"):
        TransformersEngine(PolicyConfig(model=folder, adapter=str(tmp_path), dtype="float32"), folder)


def test_a_row_that_breaks_is_nan_and_leaves_the_others_alone(built: Build) -> None:
    engine, model = built("llama", {"tie_word_embeddings": False})
    batch = candidates(range(10, 11), (6, 9, 7))
    broken = batch.input_ids[batch.offsets[1] + 12]  # in the second response
    with torch.no_grad():
        engine._model.model.model.embed_tokens.weight[int(broken)] = torch.nan
    holds = [bool((batch.input_ids[a:b] == broken).any()) for a, b in pairwise(batch.offsets)]
    assert holds == [False, True, False, False]
    scores = engine.score(batch)
    assert np.isnan(scores).tolist() == np.repeat(holds, batch.loss_lengths).tolist()
    assert invalid_rows({"logprob": scores}, batch) == {1: "log-probability missing"}
    others = np.repeat(np.logical_not(holds), batch.loss_lengths)
    np.testing.assert_allclose(scores[others], plain_scores(model, batch)[others], rtol=0, atol=TOLERANCE)


def test_out_of_memory_halves_the_budget_and_the_next_call_goes_on(built: Build) -> None:
    engine, model = built("llama", {}, max_batch_tokens=400)

    def memory_for_100_tokens(module: Any, args: Any, kwargs: dict[str, Any]) -> None:
        if kwargs["input_ids"].numel() > 100:
            torch.empty(2**60, dtype=torch.uint8)  # the allocator's own error

    engine._model.base.register_forward_pre_hook(memory_for_100_tokens, with_kwargs=True)
    batch = candidates(range(10, 30, 4), (30, 20))
    for left in (200, 100):
        with pytest.raises(OutOfMemory):
            engine.score(batch)
        assert engine.max_batch_tokens == left
    np.testing.assert_allclose(engine.score(batch), plain_scores(model, batch), rtol=0, atol=TOLERANCE)


def test_other_errors_are_not_taken_for_memory(built: Build) -> None:
    engine, _ = built("llama", {})
    batch = TokenBatch.from_rows([([1, 10**6], [False, True])])
    with pytest.raises((IndexError, RuntimeError)) as raised:
        engine.score(batch)
    assert not isinstance(raised.value, OutOfMemory)


@pytest.mark.parametrize(
    ("settings", "sentence"),
    [
        ({"quantization": "fp8"}, "quantization: fp8 needs engine: vllm"),
        ({"tensor_parallel": 2}, "tensor_parallel needs engine: vllm"),
        ({"engine": "transformers", "engine_args": {"swap": 1}}, "engine_args has no 'swap'"),
    ],
)
def test_what_this_engine_cannot_do_is_a_sentence(settings: dict[str, Any], sentence: str, tmp_path: Path) -> None:
    with pytest.raises(UserError, match=sentence):
        TransformersEngine(PolicyConfig(model=str(tmp_path), **settings), str(tmp_path))


def test_a_folder_without_a_model_is_a_sentence(tmp_path: Path) -> None:
    with pytest.raises(UserError, match="cannot be loaded by transformers"):
        TransformersEngine(PolicyConfig(model=str(tmp_path), dtype="float32"), str(tmp_path))


def test_engine_args_set_budgets(tmp_path: Path) -> None:
    folder = make_model(tmp_path)
    args = {"max_batch_tokens": 77, "logits_chunk_rows": 5}
    engine = TransformersEngine(PolicyConfig(model=folder, dtype="float32", engine_args=args), folder)
    assert (engine.max_batch_tokens, engine.logits_chunk_rows) == (77, 5)
