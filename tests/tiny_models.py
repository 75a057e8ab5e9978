"""Tiny tokenizers and random models, made on the spot: what exactness tests run on.

    folder = tiny_models.make_model(tmp_path / "model", arch="qwen3", template="chatml")

The tokenizer is a byte-level BPE trained on a page of text, so that every string has tokens; the
templates are written in the manner of the families they are named after.
"""

from __future__ import annotations

from functools import lru_cache
from pathlib import Path
from typing import Any

CORPUS = [
    "A farmer has 12 hens and each hen lays 5 eggs a week. How many eggs are there after 3 weeks?",
    "Each week there are 12 * 5 = 60 eggs, so after 3 weeks there are 3 * 60 = 180 eggs. The answer is 180.",
    "What is the capital of France? The capital of France is Paris.",
    "Let x be the number of apples. Then x + 3 = 10, so x = 7. Therefore the answer is 7.",
    "Write a function that returns the sum of a list.\n\n    def total(numbers):\n        return sum(numbers)\n",
    "First we add the two numbers, then we divide the result by two. That gives us the mean of them.",
    "user assistant system model tool You are a helpful assistant. Hello, how can I help you today?",
    "Der Zug fährt um acht Uhr ab. Où est la gare? ¿Dónde está la estación? 东京在哪里 こんにちは 🙂🙂",
    '<tool_call>\n{"name": "add", "arguments": {"a": 1, "b": 2}}\n</tool_call>\n<tool_response>\n3\n</tool_response>',
    "If all of these are cats, and some of the cats are black, then some of these may be black.\n\nYes.\nNo.",
]

CHATML = (
    "{%- if tools %}{{ '<|im_start|>system\nTools: ' + (tools | tojson) + '<|im_end|>\n' }}{% endif %}"
    "{%- for message in messages %}"
    "{%- if message.role == 'tool' %}"
    "{{ '<|im_start|>user\n<tool_response>\n' + message.content + '\n</tool_response>' }}"
    "{%- else %}{{ '<|im_start|>' + message.role + '\n' + (message.content or '') }}"
    "{%- for call in message.tool_calls or [] %}"
    "{{ '\n<tool_call>\n' + (call.function | tojson) + '\n</tool_call>' }}"
    "{%- endfor %}{%- endif %}{{ '<|im_end|>\n' }}"
    "{%- endfor %}"
    "{%- if add_generation_prompt %}{{ '<|im_start|>assistant\n' }}{% endif %}"
)

LLAMA3 = (
    "{{- bos_token }}"
    "{%- for message in messages %}"
    "{{- '<|start_header_id|>' + message.role + '<|end_header_id|>\n\n' + message.content | trim + '<|eot_id|>' }}"
    "{%- endfor %}"
    "{%- if add_generation_prompt %}{{ '<|start_header_id|>assistant<|end_header_id|>\n\n' }}{% endif %}"
)

GEMMA = (
    "{{ bos_token }}"
    "{%- if messages[0].role == 'system' %}{{ raise_exception('System role not supported') }}{% endif %}"
    "{%- for message in messages %}"
    "{%- if (message.role == 'user') != (loop.index0 % 2 == 0) %}"
    "{{ raise_exception('Conversation roles must alternate user/assistant/user/assistant/...') }}{% endif %}"
    "{%- set role = 'model' if message.role == 'assistant' else message.role %}"
    "{{- '<start_of_turn>' + role + '\n' + message.content | trim + '<end_of_turn>\n' }}"
    "{%- endfor %}"
    "{%- if add_generation_prompt %}{{ '<start_of_turn>model\n' }}{% endif %}"
)

MISTRAL = (
    "{{ bos_token }}"
    "{%- for message in messages %}"
    "{%- if (message.role == 'user') != (loop.index0 % 2 == 0) %}"
    "{{ raise_exception('Conversation roles must alternate user/assistant/user/assistant/...') }}{% endif %}"
    "{%- if message.role == 'user' %}{{ '[INST] ' + message.content + ' [/INST]' }}"
    "{%- elif message.role == 'assistant' %}{{ message.content + eos_token }}"
    "{%- else %}{{ raise_exception('Only user and assistant roles are supported!') }}{% endif %}"
    "{%- endfor %}"
)

REASONING = (
    "{%- for message in messages %}"
    "{%- set content = message.content %}"
    "{%- if message.role == 'assistant' and '</think>' in content %}"
    "{%- set content = content.split('</think>')[-1].lstrip('\n') %}{% endif %}"
    "{{- '<|im_start|>' + message.role + '\n' + content + '<|im_end|>\n' }}"
    "{%- endfor %}"
    "{%- if add_generation_prompt %}{{ '<|im_start|>assistant\n<think>\n' }}{% endif %}"
)

TEMPLATES: dict[str, str] = {
    "chatml": CHATML,
    "llama3": LLAMA3,
    "gemma": GEMMA,
    "mistral": MISTRAL,
    "reasoning": REASONING,
}
"""Chat templates by family; a tokenizer without one is made with template=None."""

_CHATML_TOKENS = ["<|endoftext|>", "<|im_start|>", "<|im_end|>"]
_TOKENS: dict[str | None, dict[str, Any]] = {
    None: {"special": ["<|endoftext|>"], "eos_token": "<|endoftext|>"},
    "chatml": {"special": _CHATML_TOKENS, "eos_token": "<|im_end|>"},
    "llama3": {
        "special": ["<|begin_of_text|>", "<|end_of_text|>", "<|start_header_id|>", "<|end_header_id|>", "<|eot_id|>"],
        "bos_token": "<|begin_of_text|>",
        "eos_token": "<|end_of_text|>",
        "add_bos": True,
    },
    "gemma": {
        "special": ["<pad>", "<eos>", "<bos>", "<start_of_turn>", "<end_of_turn>"],
        "bos_token": "<bos>",
        "eos_token": "<eos>",
        "add_bos": True,
    },
    "mistral": {
        "special": ["<s>", "</s>", "[INST]", "[/INST]"],
        "bos_token": "<s>",
        "eos_token": "</s>",
        "add_bos": True,
    },
    "reasoning": {"special": _CHATML_TOKENS, "added": ["<think>", "</think>"], "eos_token": "<|im_end|>"},
}


def make_tokenizer(
    folder: str | Path, template: str | None = "chatml", vocab: int = 512, corpus: list[str] | None = None
) -> Any:
    """A byte-level BPE tokenizer with a chat template, saved into `folder`.

    `template` is a key of TEMPLATES or None (no chat template, as base models have it). The first `vocab`
    ids (256 bytes and merges) are the same for every template; the family's special tokens follow them.
    The same arguments give the same tokenizer.
    """
    from transformers import PreTrainedTokenizerFast

    spec = _TOKENS[template]
    tokenizer = PreTrainedTokenizerFast(
        tokenizer_object=_trained(template, vocab, tuple(corpus or CORPUS)),
        bos_token=spec.get("bos_token"),
        eos_token=spec["eos_token"],
        pad_token=spec["special"][0],
        clean_up_tokenization_spaces=False,
    )
    if template is not None:
        tokenizer.chat_template = TEMPLATES[template]
    Path(folder).mkdir(parents=True, exist_ok=True)
    tokenizer.save_pretrained(str(folder))
    return tokenizer


def _trained(template: str | None, vocab: int, corpus: tuple[str, ...]) -> Any:
    from tokenizers import AddedToken, Tokenizer, processors

    spec = _TOKENS[template]
    backend = Tokenizer.from_str(_bpe_json(vocab, corpus))
    backend.add_special_tokens([AddedToken(token, special=True, normalized=False) for token in spec["special"]])
    backend.add_tokens([AddedToken(token, special=False, normalized=False) for token in spec.get("added", [])])
    if spec.get("add_bos"):
        bos = spec["bos_token"]
        backend.post_processor = processors.TemplateProcessing(
            single=f"{bos} $A", pair=f"{bos} $A {bos} $B", special_tokens=[(bos, backend.token_to_id(bos))]
        )
    return backend


@lru_cache(maxsize=16)
def _bpe_json(vocab: int, corpus: tuple[str, ...]) -> str:
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers

    backend = Tokenizer(models.BPE())
    backend.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    backend.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=vocab, initial_alphabet=sorted(pre_tokenizers.ByteLevel.alphabet()), show_progress=False
    )
    backend.train_from_iterator(corpus, trainer)
    return backend.to_str()


ARCHITECTURES = ("llama", "qwen2", "qwen3", "gemma", "gemma2", "mistral", "gpt2")


def make_model(
    folder: str | Path,
    arch: str = "llama",
    template: str | None = "chatml",
    vocab: int = 512,
    seed: int = 0,
    **over: Any,
) -> str:
    """A random model of `arch` (one of ARCHITECTURES) in float32 with its tokenizer, saved into `folder`.

    `over` are keys of its transformers config (in Llama's names for GPT-2's sizes too). Defaults: 2 layers,
    hidden size 32, 4 heads of which 2 have keys and values, 512 positions, weights large enough that the
    model is far from uniform. Returns the folder.
    """
    import torch
    from transformers import AutoConfig, AutoModelForCausalLM

    tokenizer = make_tokenizer(folder, template, vocab)
    sizes: dict[str, Any] = {
        "vocab_size": -(-len(tokenizer) // 8) * 8,
        "hidden_size": 32,
        "intermediate_size": 64,
        "num_hidden_layers": 2,
        "num_attention_heads": 4,
        "num_key_value_heads": 2,
        "max_position_embeddings": 512,
        "initializer_range": 0.3,
        "bos_token_id": tokenizer.bos_token_id,
        "eos_token_id": tokenizer.eos_token_id,
        "pad_token_id": tokenizer.pad_token_id,
        "dtype": "float32",
        **over,
    }
    if arch == "gpt2":
        for ours, theirs in (
            ("hidden_size", "n_embd"),
            ("intermediate_size", "n_inner"),
            ("num_hidden_layers", "n_layer"),
            ("num_attention_heads", "n_head"),
            ("max_position_embeddings", "n_positions"),
        ):
            sizes[theirs] = sizes.pop(ours)
        sizes.pop("num_key_value_heads")
        sizes = {"resid_pdrop": 0.0, "embd_pdrop": 0.0, "attn_pdrop": 0.0, **sizes}
    else:
        sizes.setdefault("head_dim", sizes["hidden_size"] // sizes["num_attention_heads"])
    if arch == "gemma2":
        sizes = {"query_pre_attn_scalar": 8, "sliding_window": 16, **sizes}
    if arch == "mistral":
        sizes = {"sliding_window": 16, **sizes}
    config = AutoConfig.for_model(arch, **sizes)
    with torch.random.fork_rng():
        torch.manual_seed(seed)
        model = AutoModelForCausalLM.from_config(config, dtype=torch.float32)
    model.eval()
    model.save_pretrained(str(folder))
    return str(folder)
