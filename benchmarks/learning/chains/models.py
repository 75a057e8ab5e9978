"""A small decoder-only transformer (RMSNorm, rotary positions, no biases), and how it writes and reads responses.

Shapes: B rows, T tokens, V the alphabet. Everything is float32 on one thread, so that the same call gives the same
digits.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor, nn
from torch.nn import functional as F

from benchmarks.learning.chains.task import ALPHABET, END

IDS = {character: place for place, character in enumerate(ALPHABET)}
END_ID = IDS[END]
LONGEST = 320
"""Tokens of a prompt and its response."""


@dataclass(frozen=True)
class Shape:
    """Of the model: 0.8 million parameters."""

    hidden: int = 128
    layers: int = 4
    heads: int = 4


class Layer(nn.Module):
    """Attention and a feed-forward part of four times the width."""

    def __init__(self, shape: Shape):
        super().__init__()
        d = shape.hidden
        self.heads = shape.heads
        self.norm1, self.norm2 = nn.RMSNorm(d), nn.RMSNorm(d)
        self.qkv, self.out = nn.Linear(d, 3 * d, bias=False), nn.Linear(d, d, bias=False)
        self.up, self.down = nn.Linear(d, 4 * d, bias=False), nn.Linear(4 * d, d, bias=False)

    def qkv_heads(self, x: Tensor) -> Tensor:
        """[B, T, hidden] -> query, key, value in [3, B, heads, T, hidden / heads]."""
        b, t, d = x.shape
        return self.qkv(self.norm1(x)).view(b, t, 3, self.heads, d // self.heads).permute(2, 0, 3, 1, 4)

    def after_attention(self, x: Tensor, attended: Tensor) -> Tensor:
        """The rest of the layer, from what attention gives [B, heads, T, hidden / heads]."""
        x = x + self.out(attended.transpose(1, 2).reshape(x.shape))
        return x + self.down(F.gelu(self.up(self.norm2(x))))


class Model(nn.Module):
    """[B, T] token ids -> [B, T, V] logits of the next token."""

    cos: Tensor
    sin: Tensor

    def __init__(self, shape: Shape):
        super().__init__()
        self.shape = shape
        self.embedding = nn.Embedding(len(ALPHABET), shape.hidden)
        self.layers = nn.ModuleList(Layer(shape) for _ in range(shape.layers))
        self.norm = nn.RMSNorm(shape.hidden)
        self.head = nn.Linear(shape.hidden, len(ALPHABET), bias=False)
        half = shape.hidden // shape.heads // 2
        angles = torch.arange(LONGEST)[:, None] * 1000.0 ** (-torch.arange(half) / half)
        self.register_buffer("cos", angles.cos(), persistent=False)
        self.register_buffer("sin", angles.sin(), persistent=False)
        for parameter in self.parameters():
            if parameter.dim() == 2:
                nn.init.normal_(parameter, std=shape.hidden**-0.5)
        for layer in self.layers:
            for part in (layer.out, layer.down):
                nn.init.normal_(part.weight, std=(2 * shape.layers * part.in_features) ** -0.5)

    def rotated(self, x: Tensor, start: int) -> Tensor:
        """Rotary positions from `start` on [..., T, hidden / heads]."""
        stop = start + x.shape[-2]
        cos, sin = self.cos[start:stop], self.sin[start:stop]
        a, b = x.chunk(2, dim=-1)
        return torch.cat([a * cos - b * sin, b * cos + a * sin], dim=-1)

    def forward(self, ids: Tensor) -> Tensor:
        x = self.embedding(ids)
        for layer in self.layers:
            q, k, v = layer.qkv_heads(x)
            attended = F.scaled_dot_product_attention(self.rotated(q, 0), self.rotated(k, 0), v, is_causal=True)
            x = layer.after_attention(x, attended)
        return self.head(self.norm(x))


@dataclass(frozen=True)
class Written:
    """A response as token ids, the end included where it came to one."""

    text: str  # without the end
    ended: bool

    @property
    def length(self) -> int:
        """Tokens with loss."""
        return len(self.text) + self.ended


@torch.no_grad()
def write(
    model: Model, prompts: Sequence[str], max_tokens: int, temperature: float, generator: torch.Generator | None = None
) -> list[Written]:
    """A response to each prompt; temperature 0 takes the likeliest token. Rows that ended leave the batch."""
    shape, rows = model.shape, len(prompts)
    forced = [[END_ID, *(IDS[c] for c in prompt)] for prompt in prompts]
    lengths = torch.tensor([len(ids) for ids in forced])
    limit = min(LONGEST, int(lengths.max()) + max_tokens)
    tokens = torch.full((rows, limit + 1), END_ID)
    for row, ids in enumerate(forced):
        tokens[row, : len(ids)] = torch.tensor(ids)
    active = torch.arange(rows)
    caches = [torch.zeros(2, rows, shape.heads, limit, shape.hidden // shape.heads) for _ in range(shape.layers)]
    is_done = torch.zeros(rows, dtype=torch.bool)
    ends = torch.full((rows,), -1)
    for place in range(limit):
        x = model.embedding(tokens[active, place])[:, None]
        for number, layer in enumerate(model.layers):
            q, k, v = layer.qkv_heads(x)
            cache = caches[number]
            cache[0, :, :, place], cache[1, :, :, place] = model.rotated(k, place)[:, :, 0], v[:, :, 0]
            attended = F.scaled_dot_product_attention(
                model.rotated(q, place), cache[0, :, :, : place + 1], cache[1, :, :, : place + 1]
            )
            x = layer.after_attention(x, attended)
        if place + 1 < int(lengths.min()):
            continue
        logits = model.head(model.norm(x[:, 0]))
        if temperature > 0:
            noise = torch.empty_like(logits).exponential_(generator=generator).log_()
            logits = logits / temperature - noise
        chosen = logits.argmax(-1)
        written = place + 1 >= lengths[active]
        chosen = torch.where(written, chosen, tokens[active, place + 1])
        tokens[active, place + 1] = chosen
        stops = written & ~is_done[active] & ((chosen == END_ID) | (place + 1 - lengths[active] + 1 >= max_tokens))
        ends[active[stops & (chosen == END_ID)]] = place + 1
        is_done[active[stops]] = True
        keep = ~is_done[active]
        if not keep.any():
            break
        if int(keep.sum()) <= 0.8 * len(active):
            active = active[keep]
            caches = [cache[:, keep].contiguous() for cache in caches]
    found = []
    for row, (ids, end) in enumerate(zip(tokens.tolist(), ends.tolist(), strict=True)):
        begin = len(forced[row])
        stop = end if end >= 0 else min(begin + max_tokens, limit)
        found.append(Written("".join(ALPHABET[i] for i in ids[begin:stop]), end >= 0))
    return found


@dataclass(frozen=True)
class Batch:
    """Rows padded on the right: ids [B, T], and which of ids[:, 1:] have loss [B, T - 1]."""

    ids: Tensor
    mask: Tensor


def batch_of(prompts: Sequence[str], responses: Sequence[Written]) -> Batch:
    """Begin, prompt, response and its end, if it has one."""
    texts = [END + p + r.text + END * r.ended for p, r in zip(prompts, responses, strict=True)]
    longest = max(map(len, texts))
    ids = torch.full((len(texts), longest), END_ID)
    mask = torch.zeros(len(texts), longest - 1, dtype=torch.bool)
    for row, (text, prompt) in enumerate(zip(texts, prompts, strict=True)):
        ids[row, : len(text)] = torch.tensor([IDS[c] for c in text])
        mask[row, len(prompt) : len(text) - 1] = True
    return Batch(ids, mask)


def log_probs_n(model: Model, batch: Batch) -> Tensor:
    """log p of each token with loss [n], row after row."""
    logits = model(batch.ids[:, :-1])[batch.mask]
    return -F.cross_entropy(logits, batch.ids[:, 1:][batch.mask], reduction="none")


@torch.no_grad()
def read(model: Model, prompts: Sequence[str], responses: Sequence[Written], rows: int = 64) -> np.ndarray:
    """log p of each token of the responses, one after the other, float32 [L]."""
    parts = []
    for start in range(0, len(prompts), rows):
        some = slice(start, start + rows)
        parts.append(log_probs_n(model, batch_of(prompts[some], responses[some])).numpy())
    return np.concatenate(parts)
