"""The embedded engine: scores with a transformers model on CPU or one GPU.

A prompt's candidates share its computation: rows with a common beginning are packed into one sequence without
padding in which the beginning stands once (packing.py), and attention keeps rows apart (packed_attention.py).
Logits exist only for tokens with loss, a chunk of rows at a time. A model that does not take packed batches
(state-space layers, other masks) is scored in batches padded on the right, which a causal model cannot see.
"""

from __future__ import annotations

import gc
import os
import time
from collections.abc import Sequence
from typing import Any

import numpy as np
import numpy.typing as npt
import torch
import transformers

from grape_service.config.policy import PolicyConfig
from grape_service.errors import UserError
from grape_service.rows.ragged import Int64s, TokenBatch
from grape_service.rows.statistics import LOGPROB, ordered
from workers.engines.base import EngineDescription, OutOfMemory
from workers.engines.token_statistics import token_statistics
from workers.engines.transformers import packed_attention
from workers.engines.transformers.arguments import engine_args
from workers.engines.transformers.causal_model import (
    CausalModel,
    LengthDependentRope,
    device_of,
    is_out_of_memory,
    load_model,
)
from workers.engines.transformers.packing import PackedBatch, pack

MAX_BATCH_TOKENS = {"cpu": 4096, "cuda": 16384}
LOGITS_CHUNK_ROWS = {"cpu": 128, "cuda": 1024}

PACKABLE_LAYERS = {"full_attention", "sliding_attention"}
PROBE_ROWS = 5
PROBE_PREFIX = 24
"""Tokens that the rows of a probe have in common."""
HIDDEN_TOLERANCE = {torch.float32: 1e-4, torch.float16: 2e-2, torch.bfloat16: 1e-1}
"""Relative difference of hidden states, packed against plain, up to which a model takes packed batches."""


class TransformersEngine:
    """Implements workers.engines.base.Engine; `path` of its description is shared_prefix or padded."""

    def __init__(
        self,
        policy: PolicyConfig,
        folder: str,
        max_batch_tokens: int | None = None,
        logits_chunk_rows: int | None = None,
        is_wrapped: bool = False,
        probe_rows: int = PROBE_ROWS,
    ):
        """`folder` is the model's local folder; policy.adapter is a local folder too.

        `max_batch_tokens` is the most tokens that are computed at once, unless one row alone is longer;
        `logits_chunk_rows` the most tokens whose logits exist at once. Both can be given in policy.engine_args.
        `probe_rows` is how many rows tell whether the model takes packed batches, from 2 on.
        Raises UserError where the policy asks for what this engine cannot do.
        """
        args = engine_args(policy)
        device = device_of(args)
        if os.environ.get("OMP_NUM_THREADS", "").isdigit():
            torch.set_num_threads(max(int(os.environ["OMP_NUM_THREADS"]), 1))
        kind = "cpu" if device.type == "cpu" else "cuda"
        self.max_batch_tokens = int(max_batch_tokens or args.get("max_batch_tokens") or MAX_BATCH_TOKENS[kind])
        self.logits_chunk_rows = int(logits_chunk_rows or args.get("logits_chunk_rows") or LOGITS_CHUNK_ROWS[kind])
        self._policy = policy
        self._model = CausalModel(load_model(policy, folder, device, is_wrapped))
        self._rope = LengthDependentRope(self._model.base)
        self.why_padded = self._try_packing(probe_rows)
        self._description = EngineDescription(
            engine="transformers",
            version=transformers.__version__,
            model=policy.model,
            dtype=policy.dtype,
            quantization=None,
            path="padded" if self.why_padded else "shared_prefix",
            device=torch.cuda.get_device_name(device) if device.type == "cuda" else device.type,
            extra={"torch": str(torch.__version__), **({"why_padded": self.why_padded} if self.why_padded else {})},
        )
        self._stats = {"tokens": 0.0, "cached_tokens": 0.0, "seconds": 0.0}

    @property
    def description(self) -> EngineDescription:
        return self._description

    def stats(self) -> dict[str, float]:
        """tokens of all rows, cached_tokens of them that were not computed because another row had them, seconds."""
        return dict(self._stats)

    def score(self, batch: TokenBatch, temperature: float = 1.0) -> npt.NDArray[np.float32]:
        """log p(token | tokens before it) of each token with loss: flat [L], in the batch's order.

        Logits are divided by `temperature`; log-softmax is float32. A row with a value that is not finite has NaN in
        all its places. Raises OutOfMemory, after which the engine works with half its max_batch_tokens.
        """
        return self.score_statistics(batch, (), temperature)[LOGPROB]

    def score_statistics(
        self, batch: TokenBatch, names: Sequence[str], temperature: float = 1.0
    ) -> dict[str, npt.NDArray[np.float32]]:
        """Log-probabilities and the statistics `names`, as `score` gives the first: see `Engine.score_statistics`."""
        names = ordered(names)
        started = time.monotonic()
        scores_LS = np.full((int(batch.mask.sum()), len(names)), np.nan, dtype=np.float32)
        computed = 0
        try:
            with torch.inference_mode():
                kinds = self._rope.kinds(batch.lengths)
                for packed in pack(batch, self.max_batch_tokens, kinds, padded=bool(self.why_padded)):
                    scores_LS[packed.loss_index] = self._score_packed(packed, names, temperature)
                    computed += packed.num_tokens
        except (torch.OutOfMemoryError, MemoryError, RuntimeError) as error:
            if not is_out_of_memory(error):
                raise
            reason = str(error).splitlines()[0] if str(error) else type(error).__name__
        else:
            self._stats["tokens"] += batch.num_tokens
            self._stats["cached_tokens"] += batch.num_tokens - computed
            self._stats["seconds"] += time.monotonic() - started
            scores_LS = _without_bad_rows(scores_LS, batch)
            return {name: np.ascontiguousarray(scores_LS[:, place]) for place, name in enumerate(names)}
        gc.collect()
        if torch.cuda.is_available():
            torch.cuda.empty_cache()
        self.max_batch_tokens = max(self.max_batch_tokens // 2, 1)
        raise OutOfMemory(reason)

    def divides(self, lengths: Int64s) -> npt.NDArray[np.bool_]:
        """See `Engine.divides`: those whose rotary frequencies do not depend on their length."""
        return self._rope.kinds(lengths) == 0

    def close(self) -> None:
        """Free the model's memory."""
        self._model.close()
        gc.collect()
        if torch.cuda.is_available():
            torch.cuda.empty_cache()

    # From packed batches to log-probabilities

    def _score_packed(self, packed: PackedBatch, names: tuple[str, ...], temperature: float) -> npt.NDArray[np.float32]:
        hidden = self._hidden_states(packed)
        targets = torch.from_numpy(packed.target_ids).to(hidden.device)
        scores_LS = torch.empty(len(targets), len(names), dtype=torch.float32, device=hidden.device)
        for begin in range(0, len(targets), self.logits_chunk_rows):
            chunk = slice(begin, begin + self.logits_chunk_rows)
            logits = self._model.logits(hidden[chunk])
            if names == (LOGPROB,):
                logits = logits.float() if temperature == 1.0 else logits.float() / temperature
                scores_LS[chunk, 0] = -torch.nn.functional.cross_entropy(logits, targets[chunk], reduction="none")
            else:
                divisors = (
                    None if temperature == 1.0 else torch.full_like(targets[chunk], temperature, dtype=torch.float32)
                )
                scores_LS[chunk] = token_statistics(logits, targets[chunk], divisors, names)
        return scores_LS.cpu().numpy()

    def _hidden_states(self, packed: PackedBatch) -> torch.Tensor:
        """Hidden states at the places that predict a token with loss: [L, hidden size]."""
        self._rope.reset()
        device = self._model.device
        index = torch.from_numpy(packed.hidden_index).to(device)
        if self.why_padded:
            return self._padded_hidden_states(packed, index)
        token = packed_attention.LAYOUT.set(packed_attention.Layout.of(packed.groups))
        try:
            ids, positions = (torch.from_numpy(a)[None].to(device) for a in (packed.input_ids, packed.position_ids))
            return self._model.hidden_states(ids, positions)[0, index]
        finally:
            packed_attention.LAYOUT.reset(token)

    def _padded_hidden_states(self, packed: PackedBatch, index: torch.Tensor) -> torch.Tensor:
        lens = [group.num_tokens for group in packed.groups]
        ids = torch.nn.utils.rnn.pad_sequence(list(torch.from_numpy(packed.input_ids).split(lens)), batch_first=True)
        hidden = self._model.hidden_states(ids.to(self._model.device))
        return torch.cat([row[:length] for row, length in zip(hidden, lens, strict=True)])[index]

    # Does this model take packed batches?

    def _try_packing(self, num_rows: int) -> str | None:
        """Switch the model to packed attention; the reason where that would not give what its plain forward gives.

        Raises UserError where the model's logits do not come out of its base model's hidden states.
        """
        model, config = self._model.model, self._model.model.config.get_text_config()
        plain = model.config._attn_implementation
        probe = _probe(int(config.vocab_size), num_rows)
        (packed,) = pack(probe, probe.num_tokens)
        layout = packed_attention.Layout.of(packed.groups)
        token = packed_attention.LAYOUT.set(layout)
        expected: torch.Tensor | None = None
        ids, positions, index, order = (
            torch.from_numpy(array).to(self._model.device)
            for array in (packed.input_ids, packed.position_ids, packed.hidden_index, packed.loss_index)
        )
        try:
            with torch.inference_mode():
                expected = self._plain_hidden_states(probe)[order]
                if not model._can_set_attn_implementation():
                    return "its attention cannot be replaced"
                model.set_attn_implementation(packed_attention.IMPLEMENTATION)
                got = self._model.hidden_states(ids[None], positions[None])[0, index]
            why = _why_not_packed(config, layout)
            difference = float((got - expected).float().norm() / expected.float().norm())
            if not why and not difference <= HIDDEN_TOLERANCE[got.dtype]:
                why = f"packed and plain hidden states differ by {difference:.1e}"
        except (RuntimeError, ValueError, TypeError, AttributeError) as error:
            if expected is None or is_out_of_memory(error):
                raise
            why = f"its forward does not take a packed batch ({type(error).__name__}: {error})"
        finally:
            packed_attention.LAYOUT.reset(token)
        if why:
            model.set_attn_implementation(plain)
        return why

    def _plain_hidden_states(self, probe: TokenBatch) -> torch.Tensor:
        """Hidden states of rows one at a time, all but each row's last; checks on one that logits come out of them."""
        states = []
        for ids in torch.from_numpy(probe.input_ids.astype(np.int64)).split(probe.lengths.tolist()):
            row = ids[None].to(self._model.device)
            states.append(self._model.hidden_states(row)[0])
        expected = self._model.model(input_ids=row, use_cache=False).logits[0].float()
        logits = self._model.logits(states[-1]).float()
        if not bool(torch.isfinite(expected).all()):
            raise UserError(f"model '{self._policy.model}': its logits are not finite: try dtype: bfloat16 or float32")
        self._refuse_if_not_causal(states)
        tolerance = HIDDEN_TOLERANCE[states[-1].dtype] * float(expected.abs().max())
        if logits.shape != expected.shape or not torch.allclose(logits, expected, rtol=0, atol=tolerance):
            raise UserError(
                f"model '{self._policy.model}': {type(self._model.model).__name__} does not make its logits from its "
                "base model's hidden states alone; score it with engine: vllm"
            )
        return torch.cat([state[:-1] for state in states])

    def _refuse_if_not_causal(self, states: list[torch.Tensor]) -> None:
        """Rows with the same beginning have the same states there, whatever follows."""
        first, other = states[0][:PROBE_PREFIX].float(), states[1][:PROBE_PREFIX].float()
        if float((first - other).norm()) > HIDDEN_TOLERANCE[states[0].dtype] * float(first.norm()):
            raise UserError(
                f"model '{self._policy.model}': {type(self._model.model).__name__} lets later tokens change earlier "
                "ones, so it is no causal language model: give one that is"
            )


def _why_not_packed(config: Any, layout: packed_attention.Layout) -> str | None:
    """What shows, after a forward pass over `layout`, that packed attention is not all that mixes tokens."""
    if layout.unknown:
        return f"its attention takes {', '.join(sorted(layout.unknown))}"
    layer_types = list(getattr(config, "layer_types", None) or [])
    if not layer_types:
        window = getattr(config, "sliding_window", None)
        layer_types = ["sliding_attention" if window else "full_attention"] * config.num_hidden_layers
    if set(layer_types) - PACKABLE_LAYERS:
        return f"it has layers of type {', '.join(sorted(set(layer_types) - PACKABLE_LAYERS))}"
    called = ["sliding_attention" if window else "full_attention" for window in layout.windows]
    return None if called == layer_types else "its attention layers are not those of its config"


def _probe(vocab_size: int, num_rows: int) -> TokenBatch:
    """Up to PROBE_ROWS rows with loss everywhere, some with a common beginning, of tokens drawn once and for all."""
    random = np.random.default_rng(0)
    prefix = random.integers(0, vocab_size, PROBE_PREFIX).tolist()
    rows = [prefix + random.integers(0, vocab_size, length).tolist() for length in (9, 1, 5, 9)]
    rows.append(random.integers(0, vocab_size, 12).tolist())
    return TokenBatch.from_rows([(row, [False] + [True] * (len(row) - 1)) for row in rows[:num_rows]])


def _without_bad_rows(scores_LS: npt.NDArray[np.float32], batch: TokenBatch) -> npt.NDArray[np.float32]:
    """NaN over every row that has a value that is not finite."""
    bad = ~np.isfinite(scores_LS).all(axis=1)
    if bad.any():
        lens: Int64s = batch.loss_lengths
        rows = np.repeat(np.arange(len(batch)), lens)
        scores_LS[np.isin(rows, rows[bad])] = np.nan
    return scores_LS
