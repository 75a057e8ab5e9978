"""Small tokenizers of the types that model families have, with chat templates in the manner of theirs.

    tokenizer = template_families.make("zephyr")

Vocabularies are trained on a page of text; normalizers, pre-tokenizers, decoders and added tokens are as in the
families' own tokenizer.json files, and the templates do what theirs do with roles, white space and thoughts.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from functools import lru_cache
from typing import Any

from tests.tiny_models import CORPUS


@dataclass(frozen=True)
class Family:
    """How a family's tokenizer and template are made."""

    template: str
    kind: str
    """bytes (byte-level BPE), prepend (SentencePiece through a normalizer), first (Metaspace), plain-space (Gemma)."""
    special: tuple[str, ...]
    eos: str
    bos: str | None = None
    added: tuple[str, ...] = ()
    strips_right: bool = False
    """Whether special tokens take the white space behind them, as Phi-3's do."""
    add_prefix_space: bool = False
    kwargs: dict[str, Any] = field(default_factory=dict)


QWEN3 = (
    "{%- if tools %}{{ '<|im_start|>system\nTools: ' + (tools | tojson) + '<|im_end|>\n' }}{% endif %}"
    "{%- set last = namespace(user=-1) %}"
    "{%- for m in messages %}{%- if m.role == 'user' %}{%- set last.user = loop.index0 %}{% endif %}{%- endfor %}"
    "{%- for m in messages %}"
    "{%- if m.role == 'assistant' %}"
    "{%- set content = m.content %}{%- set thoughts = m.reasoning_content or '' %}"
    "{%- if '</think>' in content %}"
    "{%- set thoughts = content.split('</think>')[0].rstrip('\n').split('<think>')[-1].lstrip('\n') %}"
    "{%- set content = content.split('</think>')[-1].lstrip('\n') %}{% endif %}"
    "{%- if loop.index0 > last.user and (loop.last or thoughts) %}"
    "{{ '<|im_start|>assistant\n<think>\n' + thoughts.strip('\n') + '\n</think>\n\n' + content.lstrip('\n') }}"
    "{%- else %}{{ '<|im_start|>assistant\n' + content }}{% endif %}"
    "{%- for call in m.tool_calls or [] %}"
    "{{ '\n<tool_call>\n' + (call.function | tojson) + '\n</tool_call>' }}{%- endfor %}"
    "{{ '<|im_end|>\n' }}"
    "{%- elif m.role == 'tool' %}"
    "{{ '<|im_start|>user\n<tool_response>\n' + m.content + '\n</tool_response><|im_end|>\n' }}"
    "{%- else %}{{ '<|im_start|>' + m.role + '\n' + m.content + '<|im_end|>\n' }}{% endif %}"
    "{%- endfor %}"
    "{%- if add_generation_prompt %}{{ '<|im_start|>assistant\n' }}"
    "{%- if enable_thinking is defined and enable_thinking is false %}{{ '<think>\n\n</think>\n\n' }}{% endif %}"
    "{% endif %}"
)
QWEN25 = (
    "{%- if messages[0].role != 'system' %}{{ '<|im_start|>system\nYou are Qwen.<|im_end|>\n' }}{% endif %}"
    "{%- for m in messages %}{{ '<|im_start|>' + m.role + '\n' + m.content + '<|im_end|>\n' }}{%- endfor %}"
    "{%- if add_generation_prompt %}{{ '<|im_start|>assistant\n' }}{% endif %}"
)
LLAMA2 = (
    "{%- for m in messages %}"
    "{%- if m.role == 'user' %}{{ bos_token + '[INST] ' + m.content.strip() + ' [/INST]' }}"
    "{%- elif m.role == 'assistant' %}{{ ' ' + m.content.strip() + ' ' + eos_token }}"
    "{%- else %}{{ raise_exception('Only user and assistant roles are supported!') }}{% endif %}{%- endfor %}"
)
LLAMA3 = (
    "{{- bos_token }}{%- for m in messages %}"
    "{{- '<|start_header_id|>' + m.role + '<|end_header_id|>\n\n' + m.content | trim + '<|eot_id|>' }}{%- endfor %}"
    "{%- if add_generation_prompt %}{{ '<|start_header_id|>assistant<|end_header_id|>\n\n' }}{% endif %}"
)
MISTRAL1 = (
    "{{- bos_token }}{%- for m in messages %}"
    "{%- if m.role == 'user' %}{{ '[INST] ' + m.content + ' [/INST]' }}"
    "{%- elif m.role == 'assistant' %}{{ m.content + eos_token }}"
    "{%- else %}{{ raise_exception('Only user and assistant roles are supported!') }}{% endif %}{%- endfor %}"
)
MISTRAL3 = (
    "{{- bos_token }}{%- for m in messages %}"
    "{%- if m.role == 'user' %}{{ '[INST] ' + m.content + '[/INST]' }}"
    "{%- elif m.role == 'assistant' %}{{ ' ' + m.content + eos_token }}"
    "{%- else %}{{ raise_exception('Only user and assistant roles are supported!') }}{% endif %}{%- endfor %}"
)
GEMMA = (
    "{{ bos_token }}{%- for m in messages %}"
    "{%- if m.role == 'system' %}{{ raise_exception('System role not supported') }}{% endif %}"
    "{{- '<start_of_turn>' + ('model' if m.role == 'assistant' else m.role) + '\n' + m.content | trim }}"
    "{{- '<end_of_turn>\n' }}{%- endfor %}"
    "{%- if add_generation_prompt %}{{ '<start_of_turn>model\n' }}{% endif %}"
)
DEEPSEEK_R1 = (
    "{{ bos_token }}{%- for m in messages %}"
    "{%- if m.role == 'system' %}{{ m.content }}{% endif %}"
    "{%- if m.role == 'user' %}{{ '<｜User｜>' + m.content }}{% endif %}"
    "{%- if m.role == 'assistant' %}{%- set content = m.content %}"
    "{%- if '</think>' in content %}{%- set content = content.split('</think>')[-1] %}{% endif %}"
    "{{ '<｜Assistant｜>' + content + '<｜end▁of▁sentence｜>' }}{% endif %}{%- endfor %}"
    "{%- if add_generation_prompt %}{{ '<｜Assistant｜><think>\n' }}{% endif %}"
)
ZEPHYR = (
    "{%- for m in messages %}{{ '<|' + m.role + '|>\n' + m.content + eos_token + '\n' }}{%- endfor %}"
    "{%- if add_generation_prompt %}{{ '<|assistant|>\n' }}{% endif %}"
)
PHI3 = (
    "{%- for m in messages %}{{ '<|' + m.role + '|>\n' + m.content + '<|end|>\n' }}{%- endfor %}"
    "{%- if add_generation_prompt %}{{ '<|assistant|>\n' }}{% endif %}"
)
GPT_OSS = (
    "{{ '<|start|>system<|message|>You are a model.<|end|>' }}{%- for m in messages %}"
    "{%- if m.role == 'assistant' %}"
    "{%- if m.thinking %}{{ '<|start|>assistant<|channel|>analysis<|message|>' + m.thinking + '<|end|>' }}{% endif %}"
    "{{ '<|start|>assistant<|channel|>final<|message|>' + m.content }}"
    "{{- '<|return|>' if loop.last and not add_generation_prompt else '<|end|>' }}"
    "{%- else %}{{ '<|start|>' + ('developer' if m.role == 'system' else m.role) }}"
    "{{- '<|message|>' + m.content + '<|end|>' }}{% endif %}{%- endfor %}"
    "{%- if add_generation_prompt %}{{ '<|start|>assistant' }}{% endif %}"
)
CHATML = ("<|endoftext|>", "<|im_start|>", "<|im_end|>")
THINK = ("<think>", "</think>")

FAMILIES: dict[str, Family] = {
    "mistral-v1": Family(MISTRAL1, "prepend", ("<unk>", "<s>", "</s>"), "</s>", "<s>"),
    "mistral-v3": Family(MISTRAL3, "first", ("<unk>", "<s>", "</s>", "[INST]", "[/INST]"), "</s>", "<s>"),
    "llama-2": Family(LLAMA2, "prepend", ("<unk>", "<s>", "</s>"), "</s>", "<s>"),
    "llama-3": Family(
        LLAMA3,
        "bytes",
        ("<|begin_of_text|>", "<|end_of_text|>", "<|start_header_id|>", "<|end_header_id|>", "<|eot_id|>"),
        "<|eot_id|>",
        "<|begin_of_text|>",
    ),
    "qwen-2.5": Family(QWEN25, "bytes", CHATML, "<|im_end|>"),
    "qwen-3": Family(QWEN3, "bytes", CHATML, "<|im_end|>", added=THINK),
    "qwen-3-no-thinking": Family(QWEN3, "bytes", CHATML, "<|im_end|>", added=THINK, kwargs={"enable_thinking": False}),
    "gemma": Family(
        GEMMA, "plain-space", ("<pad>", "<eos>", "<bos>", "<start_of_turn>", "<end_of_turn>"), "<eos>", "<bos>"
    ),
    "deepseek-r1": Family(
        DEEPSEEK_R1,
        "bytes",
        ("<｜begin▁of▁sentence｜>", "<｜end▁of▁sentence｜>", "<｜User｜>", "<｜Assistant｜>"),
        "<｜end▁of▁sentence｜>",
        "<｜begin▁of▁sentence｜>",
        added=THINK,
    ),
    "zephyr": Family(ZEPHYR, "prepend", ("<unk>", "<s>", "</s>"), "</s>", "<s>"),
    "zephyr-first": Family(ZEPHYR, "first", ("<unk>", "<s>", "</s>"), "</s>", "<s>"),
    "zephyr-prefix-space": Family(ZEPHYR, "bytes", ("<s>", "</s>"), "</s>", "<s>", add_prefix_space=True),
    "phi-3": Family(
        PHI3,
        "prepend",
        ("<unk>", "<s>", "</s>", "<|endoftext|>", "<|assistant|>", "<|user|>", "<|system|>", "<|end|>"),
        "<|endoftext|>",
        "<s>",
        strips_right=True,
    ),
    "gpt-oss": Family(
        GPT_OSS,
        "bytes",
        ("<|start|>", "<|end|>", "<|message|>", "<|channel|>", "<|return|>", "<|call|>"),
        "<|return|>",
    ),
    "special-think": Family(QWEN3, "bytes", (*CHATML, *THINK), "<|im_end|>"),
}


@lru_cache(maxsize=32)
def make(family: str, vocab: int = 600) -> Any:
    """The fast tokenizer of a family, with its template."""
    return make_family(family, FAMILIES[family], vocab)


def make_family(family: str, spec: Family, vocab: int = 600) -> Any:
    """The fast tokenizer of any family that is described, under its name."""
    from transformers import PreTrainedTokenizerFast

    tokenizer = PreTrainedTokenizerFast(
        tokenizer_object=_backend(spec, vocab),
        bos_token=spec.bos,
        eos_token=spec.eos,
        clean_up_tokenization_spaces=False,
    )
    tokenizer.chat_template = spec.template
    tokenizer.name_or_path = family
    return tokenizer


def _backend(spec: Family, vocab: int) -> Any:
    from tokenizers import AddedToken, Tokenizer, decoders, models, normalizers, pre_tokenizers, processors, trainers

    if spec.kind == "bytes":
        backend = Tokenizer(models.BPE())
        backend.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=spec.add_prefix_space)
        backend.decoder = decoders.ByteLevel()
        alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
        trainer = trainers.BpeTrainer(vocab_size=vocab, initial_alphabet=alphabet, show_progress=False)
        backend.train_from_iterator(CORPUS, trainer)
    else:
        bytes_ = [f"<0x{byte:02X}>" for byte in range(256)]
        backend = Tokenizer(models.BPE(unk_token="<unk>", byte_fallback=True, fuse_unk=True))
        backend.normalizer = normalizers.Replace(" ", "▁")
        backend.pre_tokenizer = pre_tokenizers.Split("▁", "merged_with_next")
        trainer = trainers.BpeTrainer(
            vocab_size=vocab + 256, special_tokens=["<unk>", *bytes_], show_progress=False, initial_alphabet=["▁", "\n"]
        )
        backend.train_from_iterator(CORPUS, trainer)
        backend = Tokenizer.from_str(_without_special(backend.to_str()))
        backend.pre_tokenizer = None
        strip: list[Any] = [] if spec.kind == "plain-space" else [decoders.Strip(" ", 1, 0)]
        backend.decoder = decoders.Sequence(
            [decoders.Replace("▁", " "), decoders.ByteFallback(), decoders.Fuse(), *strip]
        )
        if spec.kind == "prepend":
            backend.normalizer = normalizers.Sequence([normalizers.Prepend("▁"), normalizers.Replace(" ", "▁")])
        elif spec.kind == "first":
            backend.normalizer = None
            backend.pre_tokenizer = pre_tokenizers.Metaspace("▁", prepend_scheme="first", split=False)
    tokens = [
        AddedToken(token, special=True, normalized=False, rstrip=spec.strips_right and token.startswith("<|"))
        for token in spec.special
    ]
    backend.add_special_tokens(tokens)
    backend.add_tokens([AddedToken(token, special=False, normalized=False) for token in spec.added])
    if spec.bos:
        backend.post_processor = processors.TemplateProcessing(
            single=f"{spec.bos} $A", special_tokens=[(spec.bos, backend.token_to_id(spec.bos))]
        )
    return backend


def _without_special(state: str) -> str:
    """The trained tokenizer with <unk> and bytes as ordinary tokens of its vocabulary."""
    import json

    value = json.loads(state)
    value["added_tokens"] = []
    return json.dumps(value)
