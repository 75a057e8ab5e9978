"""Attention over a packed batch: every token sees its group's prefix and what is before it in its own row.

Registered with transformers as an attention implementation, so that any model that takes one can run packed
batches. Shape legend: T packed tokens, R rows of a bundle, S their padded suffix length, P prefix length,
C keys (P + S), H query heads, G key heads, D head size.
"""

from __future__ import annotations

from contextvars import ContextVar
from dataclasses import dataclass, field
from typing import Any

import torch
from transformers import AttentionInterface

from workers.engines.transformers.packing import Group

IMPLEMENTATION = "grape_packed"

MAX_MASK_ELEMENTS = 2**22
MAX_PADDING_SHARE = 0.2

UNDERSTOOD = {"dropout", "scaling", "sliding_window", "softcap", "is_causal"}
"""Keyword arguments that change what attention computes and that `packed_attention` honours."""
HARMLESS = {"position_ids", "cache_position", "use_cache", "output_attentions", "output_hidden_states", "return_dict"}
"""Keyword arguments that some models hand down and that change nothing here."""


@dataclass(frozen=True)
class Bundle:
    """Rows of one group whose suffixes are computed together, padded to the longest."""

    begin: int  # first suffix token in the packed batch
    lens: list[int]

    @property
    def width(self) -> int:
        return self.lens[-1]


@dataclass(frozen=True)
class Segment:
    """A group in the packed batch."""

    begin: int
    prefix_len: int
    bundles: list[Bundle]


@dataclass
class Layout:
    """Where the groups of a packed batch lie, the masks made for them, and what the model asked for."""

    segments: list[Segment]
    masks: dict[tuple[int, int, int, int | None], torch.Tensor] = field(default_factory=dict)
    windows: list[int | None] = field(default_factory=list)  # one a call, in the order of the calls
    unknown: set[str] = field(default_factory=set)

    @classmethod
    def of(cls, groups: list[Group]) -> Layout:
        segments, begin = [], 0
        for group in groups:
            segments.append(Segment(begin, group.prefix_len, _bundles(begin + group.prefix_len, group)))
            begin += group.num_tokens
        return cls(segments)


LAYOUT: ContextVar[Layout] = ContextVar("packed_layout")
"""The layout of the packed batch that the model is computing now."""


def _bundles(begin: int, group: Group) -> list[Bundle]:
    """Cut suffixes, shortest first, where padding to the longest would waste more than MAX_PADDING_SHARE."""
    bundles: list[Bundle] = []
    lens: list[int] = []
    for suffix_len in [int(length) for length in group.suffix_lens if length]:
        padded = suffix_len * (len(lens) + 1)
        if lens and (group.prefix_len == 0 or padded - sum(lens) - suffix_len > MAX_PADDING_SHARE * padded):
            bundles.append(Bundle(begin, lens))
            begin, lens = begin + sum(lens), []
        lens.append(suffix_len)
    return [*bundles, Bundle(begin, lens)] if lens else bundles


def packed_attention(
    module: torch.nn.Module,
    query: torch.Tensor,
    key: torch.Tensor,
    value: torch.Tensor,
    attention_mask: torch.Tensor | None,
    scaling: float | None = None,
    sliding_window: int | None = None,
    softcap: float | None = None,
    **kwargs: Any,
) -> tuple[torch.Tensor, None]:
    """query [1, H, T, D], key and value [1, G, T, D] of a packed batch -> [1, T, H, D].

    A token at position i sees keys at positions j <= i of its row with i - j < sliding_window.
    """
    assert query.shape[0] == 1, "a packed batch is one sequence"
    layout = LAYOUT.get()
    if attention_mask is not None:
        layout.unknown.add("a mask of its own")
    layout.windows.append(sliding_window)
    layout.unknown |= {name for name, given in kwargs.items() if given is not None} - UNDERSTOOD - HARMLESS
    if not (kwargs.get("is_causal") or getattr(module, "is_causal", True)):
        layout.unknown.add("is_causal")
    query_THD, key_TGD, value_TGD = (tensor[0].transpose(0, 1) for tensor in (query, key, value))
    attended_THD = query_THD.new_empty(*query_THD.shape[:2], value.shape[-1])
    attend = _Attend(layout, scaling, sliding_window, softcap)
    for segment in layout.segments:
        end = segment.begin + segment.prefix_len
        prefix = slice(segment.begin, end)
        if segment.prefix_len:
            attended_THD[prefix] = attend(query_THD[None, prefix], key_TGD[None, prefix], value_TGD[None, prefix])[0]
        for bundle in segment.bundles:
            own_TGD = [_padded(tensor, bundle) for tensor in (query_THD, key_TGD, value_TGD)]
            if segment.prefix_len:
                own_TGD[1:] = [
                    torch.cat([tensor[None, prefix].expand(len(bundle.lens), -1, -1, -1), own], dim=1)
                    for tensor, own in zip((key_TGD, value_TGD), own_TGD[1:], strict=True)
                ]
            _unpad(attend(*own_TGD), bundle, attended_THD)
    return attended_THD[None], None


AttentionInterface.register(IMPLEMENTATION, packed_attention)


def _padded(tensor_THD: torch.Tensor, bundle: Bundle) -> torch.Tensor:
    """The bundle's rows as [R, S, H, D]; without a copy when all are equally long."""
    own = tensor_THD[bundle.begin : bundle.begin + sum(bundle.lens)]
    if bundle.lens[0] == bundle.width:
        return own.unflatten(0, (len(bundle.lens), bundle.width))
    return torch.nn.utils.rnn.pad_sequence(list(own.split(bundle.lens)), batch_first=True)


def _unpad(attended_RSHD: torch.Tensor, bundle: Bundle, attended_THD: torch.Tensor) -> None:
    """Write the bundle's rows to their place in the packed batch."""
    begin = bundle.begin
    if bundle.lens[0] == bundle.width:
        attended_THD[begin : begin + sum(bundle.lens)] = attended_RSHD.flatten(0, 1)
        return
    for row, suffix_len in enumerate(bundle.lens):
        attended_THD[begin : begin + suffix_len] = attended_RSHD[row, :suffix_len]
        begin += suffix_len


@dataclass(frozen=True)
class _Attend:
    """Causal attention of the last S of C tokens; a mask is made for a block of queries at a time."""

    layout: Layout
    scaling: float | None
    window: int | None
    softcap: float | None

    def __call__(self, query_RSHD: torch.Tensor, key_RCGD: torch.Tensor, value_RCGD: torch.Tensor) -> torch.Tensor:
        query, key, value = (tensor.transpose(1, 2) for tensor in (query_RSHD, key_RCGD, value_RCGD))
        num_queries, num_keys = query.shape[2], key.shape[2]
        whole = self.softcap is None and (self.window is None or num_keys <= self.window)
        if whole and num_queries == num_keys:
            return self._sdpa(query, key, value, None, True).transpose(1, 2)
        if whole and num_queries == 1:
            return self._sdpa(query, key, value, None, False).transpose(1, 2)
        wide = 1 if self.softcap is None else query.shape[0] * query.shape[1]
        block = max(MAX_MASK_ELEMENTS // (num_keys * wide), 16)
        past = num_keys - num_queries
        parts = []
        for begin in range(0, num_queries, block):
            end = min(begin + block, num_queries)
            low = 0 if self.window is None else max(past + begin + 1 - self.window, 0)
            keys = slice(low, past + end)
            mask = self._mask(end - begin, past + begin - low, past + end - low, query)
            attention = self._sdpa if self.softcap is None else self._softcapped
            parts.append(attention(query[:, :, begin:end], key[:, :, keys], value[:, :, keys], mask, False))
        return torch.cat(parts, dim=2).transpose(1, 2)

    def _mask(self, num_queries: int, past: int, num_keys: int, like: torch.Tensor) -> torch.Tensor:
        """0 where query i, at place past + i among the keys, sees key j, and -inf elsewhere: [1, 1, S, C]."""
        shape = (num_queries, past, num_keys, self.window)
        if shape not in self.layout.masks:
            ahead = (
                torch.arange(num_keys, device=like.device)[None, :]
                - torch.arange(past, past + num_queries, device=like.device)[:, None]
            )
            hidden = ahead > 0
            if self.window is not None:
                hidden |= ahead <= -self.window
            mask = torch.zeros(hidden.shape, dtype=like.dtype, device=like.device)
            self.layout.masks[shape] = mask.masked_fill_(hidden, float("-inf"))[None, None]
        return self.layout.masks[shape]

    def _sdpa(
        self,
        query: torch.Tensor,
        key: torch.Tensor,
        value: torch.Tensor,
        mask: torch.Tensor | None,
        is_causal: bool,
    ) -> torch.Tensor:
        grouped = key.shape[1] != query.shape[1]
        if grouped and mask is not None and query.is_cuda:  # no fused CUDA kernel takes both
            key, value = (t.repeat_interleave(query.shape[1] // t.shape[1], dim=1) for t in (key, value))
            grouped = False
        return torch.nn.functional.scaled_dot_product_attention(
            query, key, value, attn_mask=mask, is_causal=is_causal, scale=self.scaling, enable_gqa=grouped
        )

    def _softcapped(
        self, query: torch.Tensor, key: torch.Tensor, value: torch.Tensor, mask: torch.Tensor, is_causal: bool
    ) -> torch.Tensor:
        """softmax(softcap * tanh(scaled scores / softcap)) in float32, as the models that have it write it."""
        assert self.softcap is not None
        assert not is_causal
        repeats = query.shape[1] // key.shape[1]
        key, value = (tensor.repeat_interleave(repeats, dim=1) for tensor in (key, value))
        scaling = query.shape[-1] ** -0.5 if self.scaling is None else self.scaling
        scores = torch.matmul(query, key.transpose(2, 3)) * scaling
        scores = torch.tanh(scores / self.softcap) * self.softcap + mask
        return torch.matmul(torch.softmax(scores, dim=-1, dtype=torch.float32).to(query.dtype), value)
