"""Which family of models a name belongs to, as far as names show it."""

from __future__ import annotations

import re

FAMILIES = {
    name: family
    for family, names in {
        "qwen": ("qwen", "qwq", "qwencoder"),
        "llama": ("llama", "codellama", "vicuna", "alpaca"),
        "mistral": ("mistral", "mixtral", "ministral", "codestral", "devstral", "magistral", "zephyr"),
        "gemma": ("gemma", "codegemma"),
        "phi": ("phi",),
        "deepseek": ("deepseek",),
        "gpt": ("gpt", "chatgpt", "davinci"),
        "claude": ("claude",),
        "gemini": ("gemini",),
        "smollm": ("smollm",),
        "olmo": ("olmo", "olmoe"),
        "glm": ("glm", "chatglm"),
        "yi": ("yi",),
        "internlm": ("internlm",),
        "granite": ("granite",),
        "falcon": ("falcon",),
        "kimi": ("kimi", "moonlight"),
        "command": ("command", "aya"),
        "nemotron": ("nemotron",),
        "exaone": ("exaone",),
        "minicpm": ("minicpm",),
        "bloom": ("bloom", "bloomz"),
        "pythia": ("pythia",),
    }.items()
    for name in names
}
"""First words of model names, and their families."""


def families_of(name: str) -> set[str]:
    """Families that a model's name names: {'deepseek', 'qwen'} of DeepSeek-R1-Distill-Qwen-7B."""
    words = re.findall(r"[a-z]+", name.lower())
    return {FAMILIES[word] for word in words if word in FAMILIES}


def is_same_model(one: str, other: str) -> bool:
    """Whether two names are of one model, whatever the organisation or folder before it."""
    last = [re.sub(r"[^a-z0-9]+", "", name.rstrip("/").rsplit("/", 1)[-1].lower()) for name in (one, other)]
    return bool(last[0]) and last[0] == last[1]
