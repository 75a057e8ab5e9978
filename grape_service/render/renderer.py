"""From candidates to token ids and loss masks, under one policy's tokenizer and chat template."""

from __future__ import annotations

import hashlib
from collections.abc import Iterable, Sequence
from functools import cached_property, lru_cache
from typing import Any, Literal

import numpy as np
import orjson

from grape_service.config.policy import PolicyConfig
from grape_service.config.schema import RenderConfig
from grape_service.errors import UserError
from grape_service.models.tokenizer import folder_stamp, load_tokenizer, position_limit, stop_token_ids
from grape_service.models.vocabulary import Vocabulary
from grape_service.render.encoding import Encoder, Ids, is_encodable
from grape_service.render.layout import Batch, Plan, Span, recorded_logprobs, recorded_mismatch, trajectory_problem
from grape_service.render.messages import MessageError, template_messages
from grape_service.render.template import ChatTemplate, RenderingError
from grape_service.render.trajectory import SplitError, split_trajectory, turn_end_pattern
from grape_service.rows.candidate import Candidate, Message, Rejection, Rendered
from grape_service.rows.columns import LOSS_NONE, LOSS_TOKEN, LOSS_TURN_END
from grape_service.rows.messages import only_text

FORMAT = 1
"""Raised when the same settings come to give other tokens."""


class Renderer:
    """Renders candidates for one policy.

    Chat: the template's rendering of the prompt with its generation prompt, the response's own tokens, the
    turn-end token. Plain: prompt, separator, response, end-of-text. `mode` says which; `turn_end_id` is what
    ends a response (None if the tokenizer has nothing of the kind).
    """

    def __init__(
        self,
        tokenizer: Any,
        config: RenderConfig,
        system_prompt: str | None = None,
        max_tokens: int | None = None,
        stop_ids: Iterable[int] = (),
    ):
        """`tokenizer` is a fast transformers tokenizer; `max_tokens` the model's limit, where config has none.

        `stop_ids` are further tokens at which the model stops (generation_config.json). Raises UserError
        where mode, template or system prompt do not fit the model.
        """
        if not getattr(tokenizer, "is_fast", False):
            raise UserError(f"{tokenizer.name_or_path} has no fast tokenizer (tokenizer.json), which rendering needs")
        self.config = config
        self.system_prompt = system_prompt
        self.max_tokens = config.max_tokens or max_tokens
        self.tokenizer = tokenizer
        self.vocabulary = Vocabulary(tokenizer)
        self._encoder = Encoder(tokenizer)
        self.mode: Literal["chat", "plain"] = self._resolve_mode()
        self._template: ChatTemplate | None = None
        if self.mode == "chat":
            self._template = ChatTemplate(tokenizer, config.chat_template, config.template_kwargs)
            if system_prompt is not None and not self._template.takes_system():
                raise UserError(
                    f"the chat template of {tokenizer.name_or_path} takes no system message: remove its system_prompt"
                )
        self.turn_end_id: int | None = self._find_turn_end()
        eos = tokenizer.eos_token_id
        ids = {*stop_ids, *([] if self.turn_end_id is None else [self.turn_end_id]), *([] if eos is None else [eos])}
        self.stop_ids = frozenset(int(id_) for id_ in ids if 0 <= id_ < self.vocab_size)
        stop_texts = [self.vocabulary.added[id_] for id_ in self.stop_ids if id_ in self.vocabulary.added]
        self._encoder.make_special(stop_texts)
        self._turn_ends = turn_end_pattern(stop_texts)
        self._id_of_stop = {self.vocabulary.added[id_]: id_ for id_ in self.stop_ids if id_ in self.vocabulary.added}

    @classmethod
    def load(cls, folder: str, policy: PolicyConfig, config: RenderConfig, own_template: bool = False) -> Renderer:
        """The renderer of a local model folder; a process makes it once. Raises UserError if there is no tokenizer.

        `own_template`: a model that has a chat template uses that one and not `config.chat_template`, which
        was written for another policy.
        """
        return _load(folder, folder_stamp(folder), policy.model_dump_json(), config.model_dump_json(), own_template)

    @property
    def vocab_size(self) -> int:
        """One more than the largest token id."""
        return self.vocabulary.size

    def token_bytes(self, ids: Iterable[int]) -> list[bytes | None]:
        """The bytes that each id decodes to inside of a text; None for an id that is no token."""
        return self.vocabulary.bytes_of(ids)

    def tokenizer_digest(self) -> str:
        """sha256 of vocabulary, merges, added tokens, normaliser and the rest of the tokenizer."""
        return self.vocabulary.digest

    def template_digest(self) -> str:
        """sha256 of the chat template and its variables; of the separator in plain mode."""
        if self._template is not None:
            return self._template.digest()
        return hashlib.sha256(orjson.dumps(["plain", self.config.separator])).hexdigest()

    def digest(self) -> str:
        """sha256 of everything that decides which tokens a candidate gets."""
        return self._digest

    @cached_property
    def _digest(self) -> str:
        parts = {
            "format": FORMAT,
            "tokenizer": self.tokenizer_digest(),
            "template": self.template_digest(),
            "mode": self.mode,
            "system_prompt": self.system_prompt,
            "max_tokens": self.max_tokens,
            "turn_end": self.turn_end_id,
            "stop_ids": sorted(self.stop_ids),
        }
        return hashlib.sha256(orjson.dumps(parts, option=orjson.OPT_SORT_KEYS)).hexdigest()

    def render(self, candidates: Sequence[Candidate]) -> list[Rendered | Rejection]:
        """Tokens and mask of each candidate, in order; candidates of one prompt should stand next to each other."""
        batch = Batch()
        plans: list[Plan | Rejection] = []
        for candidate, prompt in zip(candidates, self._prompts(candidates, batch), strict=True):
            plans.append(prompt if isinstance(prompt, Rejection) else self._plan(candidate, prompt, batch))
        return self._encode(plans, batch)

    def render_behavior(
        self,
        candidates: Sequence[Candidate],
        targets: Sequence[Rendered],
        target_turn_end_id: int | None,
    ) -> list[Rendered | Rejection]:
        """This policy's contexts around the tokens that the target's rendering has loss on.

        The tokens with loss are the target's, as many, with the same mask values. Its turn end is replaced by
        this policy's own: where the ids at LOSS_TURN_END differ, the two log-probabilities cannot be compared.
        """
        batch = Batch()
        plans: list[Plan | Rejection] = []
        prompts = self._prompts(candidates, batch)
        for candidate, target, prompt in zip(candidates, targets, prompts, strict=True):
            spans = self._shared_spans(target, target_turn_end_id)
            if isinstance(prompt, Rejection):
                plans.append(prompt)
            elif isinstance(spans, Rejection):
                plans.append(spans)
            elif len(spans) == 1:
                plans.append(Plan([prompt], spans))
            else:
                own = self._plan_trajectory(candidate, prompt, batch)
                if isinstance(own, Plan) and len(own.spans) != len(spans):
                    own = Rejection("rendering cannot be split", "the two policies split the response differently")
                plans.append(own if isinstance(own, Rejection) else Plan(own.contexts, spans))
        return self._encode(plans, batch)

    # Prompts

    def _prompts(self, candidates: Sequence[Candidate], batch: Batch) -> list[int | Rejection]:
        """For each candidate the index of its prompt's text; neighbours of one prompt share it."""
        prompts: list[int | Rejection] = []
        previous: Candidate | None = None
        for candidate in candidates:
            if previous is None or candidate.prompt != previous.prompt or candidate.tools != previous.tools:
                text = self._prompt_text(candidate)
                prompts.append(text if isinstance(text, Rejection) else batch.add_rendered(text))
            else:
                prompts.append(prompts[-1])
            previous = candidate
        return prompts

    def _prompt_text(self, candidate: Candidate) -> str | Rejection:
        try:
            messages = template_messages(candidate.prompt)
            if not any(message["content"] or message.get("tool_calls") for message in messages):
                return Rejection("empty prompt")
            if self._template is None:
                text = self._plain_prompt(candidate, messages)
            else:
                text = self._template.render(
                    self._with_system(self._encoder.protect(messages)),
                    self._encoder.protect(candidate.tools),
                    generation_prompt=True,
                )
        except (MessageError, RenderingError) as error:
            return Rejection("prompt cannot be rendered", str(error))
        return text if is_encodable(text) else Rejection("not UTF-8", "the prompt holds a lone surrogate")

    def _with_system(self, messages: list[Message]) -> list[Message]:
        if self.system_prompt is None or messages[0].get("role") in ("system", "developer"):
            return messages
        return [{"role": "system", "content": self.system_prompt}, *messages]

    def _plain_prompt(self, candidate: Candidate, messages: list[Message]) -> str:
        if candidate.tools or any(message.get("tool_calls") for message in messages):
            raise MessageError("tools need a chat template")
        contents = [message["content"] for message in self._with_system(messages)]
        return self.config.separator.join([*contents, ""])

    # Responses

    def _plan(self, candidate: Candidate, prompt: int, batch: Batch) -> Plan | Rejection:
        if candidate.response_ids is not None:
            return self._plan_ids(candidate, prompt)
        if candidate.recorded_logprobs is not None:
            return recorded_mismatch("there are no response_ids")
        text = only_text(candidate.response)
        if text is None:
            return self._plan_trajectory(candidate, prompt, batch)
        if not text:
            return Rejection("empty response")
        if not is_encodable(text):
            return Rejection("not UTF-8", "the response holds a lone surrogate")
        turn_end = None if candidate.truncated else self.turn_end_id
        return Plan([prompt], [Span(batch.add_text(text), turn_end=turn_end)])

    def _plan_ids(self, candidate: Candidate, prompt: int) -> Plan | Rejection:
        if isinstance(candidate.response, list) and len(candidate.response) != 1:
            return Rejection("rendering cannot be split", "response_ids of several messages do not say which are whose")
        ids = self._valid_ids(candidate.response_ids)
        if isinstance(ids, Rejection):
            return ids
        recorded = recorded_logprobs(candidate.recorded_logprobs, len(ids))
        if isinstance(recorded, Rejection):
            return recorded
        if int(ids[-1]) in self.stop_ids:
            if len(ids) == 1:
                return Rejection("empty response", "response_ids hold a turn end and nothing else")
            return Plan([prompt], [Span(ids=ids[:-1], turn_end=int(ids[-1]))], recorded)
        turn_end = None if candidate.truncated else self.turn_end_id
        if recorded is not None and turn_end is not None:
            recorded = np.append(recorded, np.float32(np.nan))
        return Plan([prompt], [Span(ids=ids, turn_end=turn_end)], recorded)

    def _valid_ids(self, values: Any) -> Ids | Rejection:
        ids = np.asarray(values)
        if ids.size == 0:
            return Rejection("empty response", "response_ids are empty")
        if ids.ndim != 1 or ids.dtype.kind not in "iu":
            return Rejection("response_ids are not integers")
        unknown = ids[~self.vocabulary.knows(ids)]
        if len(unknown):
            return Rejection("token id outside the vocabulary", f"{unknown[0]} is not a token of the policy")
        return ids.astype(np.int32)

    def _plan_trajectory(self, candidate: Candidate, prompt: int, batch: Batch) -> Plan | Rejection:
        response = candidate.response
        assert isinstance(response, list), "text is planned elsewhere"
        problem = trajectory_problem(response)
        if problem is not None:
            return problem
        if self._template is None:
            return Rejection("messages need a chat template")
        try:
            turns = split_trajectory(
                self._template,
                self._with_system(self._encoder.protect(template_messages(candidate.prompt))),
                self._encoder.protect(template_messages(response)),
                self._encoder.protect(candidate.tools),
                self._turn_ends,
            )
        except (MessageError, RenderingError) as error:
            return Rejection("response cannot be rendered", str(error))
        except SplitError as error:
            return Rejection("rendering cannot be split", str(error))
        if not all(turn.written for turn in turns):
            return Rejection("empty response", "an assistant message of the response is empty")
        if not all(is_encodable(turn.context) and is_encodable(turn.written) for turn in turns):
            return Rejection("not UTF-8", "the response holds a lone surrogate")
        if turns[0].context != batch.rendered[prompt]:
            return Rejection("rendering cannot be split", "the template renders the same prompt in two ways")
        contexts = [prompt, *(batch.add_rendered(turn.context) for turn in turns[1:])]
        spans = [
            Span(
                batch.add_rendered(turn.written),
                is_rendered=True,
                turn_end=self.turn_end_id if turn.turn_end is None else self._id_of_stop[turn.turn_end],
            )
            for turn in turns
        ]
        if candidate.truncated:
            spans[-1].turn_end = None
        return Plan(contexts, spans)

    def _shared_spans(self, target: Rendered, target_turn_end_id: int | None) -> list[Span] | Rejection:
        """The target's spans with loss as this policy gets them."""
        ids, mask = target.input_ids, target.loss_mask
        with_loss = mask != LOSS_NONE
        ends = with_loss & ~np.append(with_loss[1:], False) | (mask == LOSS_TURN_END)
        unknown = ids[(mask == LOSS_TOKEN) & ~self.vocabulary.knows(ids)]
        if len(unknown):
            return Rejection("token id outside the vocabulary", f"{unknown[0]} is not a token of the behavior policy")
        spans: list[Span] = []
        start = 0
        for end in np.flatnonzero(ends):
            start += int(np.argmax(with_loss[start:]))
            written, last = ids[start : end + 1], int(ids[end])
            start = int(end) + 1
            if mask[end] != LOSS_TURN_END:
                spans.append(Span(ids=written))
                continue
            own = last if last != target_turn_end_id and last in self.stop_ids else self.turn_end_id
            if own is None:
                return Rejection("no turn end", "the behavior policy has no token that ends a turn")
            spans.append(Span(ids=written[:-1], turn_end=own))
        return spans

    # Tokens

    def _encode(self, plans: list[Plan | Rejection], batch: Batch) -> list[Rendered | Rejection]:
        rendered = self._encode_rendered(batch.rendered)
        texts = self._encoder.encode_text(batch.texts)
        return [plan if isinstance(plan, Rejection) else self._assemble(plan, rendered, texts) for plan in plans]

    def _encode_rendered(self, texts: list[str]) -> list[Ids]:
        if self.mode == "chat":
            return self._encoder.encode_rendered(texts)
        prefix = self._encoder.sequence_prefix
        encoded = self._encoder.encode_text(texts)
        return [np.concatenate([prefix, ids]) for ids in encoded] if len(prefix) else encoded

    def _assemble(self, plan: Plan, rendered: list[Ids], texts: list[Ids]) -> Rendered | Rejection:
        pieces: list[Ids] = []
        values: list[int] = []
        for context, span in zip(plan.contexts, plan.spans, strict=True):
            ids = span.ids
            if ids is None:
                assert span.text is not None, "a span has ids or a text"
                ids = (rendered if span.is_rendered else texts)[span.text]
                if len(ids) == 0:
                    return Rejection("empty response", "the response has no tokens")
            pieces += [rendered[context], ids]
            values += [LOSS_NONE, LOSS_TOKEN]
            if span.turn_end is not None:
                pieces.append(np.array([span.turn_end], dtype=np.int32))
                values.append(LOSS_TURN_END)
        lengths = [len(piece) for piece in pieces]
        if lengths[0] == 0:
            return Rejection("empty prompt", "the prompt has no tokens")
        total = sum(lengths)
        if self.max_tokens is not None and total > self.max_tokens:
            return Rejection("longer than max_tokens", f"{total} tokens; the limit is {self.max_tokens}")
        return Rendered(
            input_ids=np.concatenate(pieces),
            loss_mask=np.repeat(np.array(values, dtype=np.uint8), lengths),
            prompt_len=lengths[0],
            recorded_logprobs=plan.recorded_logprobs,
        )

    # Construction

    def _resolve_mode(self) -> Literal["chat", "plain"]:
        has_template = bool(self.config.chat_template or self.tokenizer.chat_template)
        if self.config.mode == "chat" and not has_template:
            raise UserError(
                f"render.mode is chat but {self.tokenizer.name_or_path} has no chat template: "
                "set render.chat_template or render.mode: plain"
            )
        return "chat" if has_template and self.config.mode != "plain" else "plain"

    def _find_turn_end(self) -> int | None:
        """The first added token after an assistant's words; in plain mode, or without one, the end of text."""
        if self._template is not None:
            added = self.vocabulary.added
            for id_ in self._encoder.encode_rendered([self._template.after_response()])[0].tolist():
                if id_ in added and not added[id_].isspace():
                    return id_
        eos = self.tokenizer.eos_token_id
        return None if eos is None else int(eos)


@lru_cache(maxsize=8)
def _load(folder: str, stamp: str, policy_json: str, config_json: str, own_template: bool) -> Renderer:
    policy = PolicyConfig.model_validate_json(policy_json)
    config = RenderConfig.model_validate_json(config_json)
    tokenizer = load_tokenizer(folder, policy)
    if own_template and tokenizer.chat_template:
        config = config.model_copy(update={"chat_template": None})
    return Renderer(
        tokenizer,
        config,
        system_prompt=policy.system_prompt,
        max_tokens=position_limit(folder),
        stop_ids=stop_token_ids(folder),
    )
