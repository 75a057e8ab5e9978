"""From candidates to token ids and loss masks, under one policy's tokenizer and chat template."""

from __future__ import annotations

import copy
import hashlib
from collections.abc import Iterable, Sequence
from functools import cached_property
from typing import Any, Literal

import numpy as np
import orjson

from grape_service.config.schema import RenderConfig
from grape_service.errors import UserError
from grape_service.models.vocabulary import Vocabulary
from grape_service.render.assemble import Assembler
from grape_service.render.conversation import repeated
from grape_service.render.encoding import Encoder, Ids, is_encodable
from grape_service.render.fields import left_out_field, left_out_words
from grape_service.render.layout import (
    Batch,
    Plan,
    Span,
    recorded_logprobs,
    recorded_mismatch,
    shared_spans,
    trajectory_problem,
    valid_ids,
)
from grape_service.render.messages import MessageError, template_messages
from grape_service.render.proof import prove_renderer
from grape_service.render.template import ChatTemplate, RenderingError
from grape_service.render.trajectory import SplitError, split_trajectory, turn_end_pattern
from grape_service.rows.candidate import Candidate, Message, Rejection, Rendered
from grape_service.rows.messages import only_text

FORMAT = 2
"""Raised when the same settings come to give other tokens."""


class Renderer:
    """Renders candidates for one policy.

    Chat: the template's rendering of the prompt with its generation prompt, the response's own tokens, the turn-end
    token. Plain: prompt, separator, response, end-of-text. `turn_end_id` is None if the tokenizer has no turn end.
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

        `stop_ids` are further tokens at which the model stops. Raises UserError where mode, template or system
        prompt do not fit the model.
        """
        if not getattr(tokenizer, "is_fast", False):
            raise UserError(f"{tokenizer.name_or_path} has no fast tokenizer (tokenizer.json), which rendering needs")
        self.config = config
        self.system_prompt = system_prompt
        self.tokenizer = tokenizer
        self.vocabulary = Vocabulary(tokenizer)
        self.encoder = Encoder(tokenizer)
        self.mode: Literal["chat", "plain"] = self._resolve_mode()
        self._assembler = Assembler(self.encoder, self.vocabulary, is_plain=self.mode == "plain")
        self._template: ChatTemplate | None = None
        if self.mode == "chat":
            self._template = ChatTemplate(tokenizer, config.chat_template, config.template_kwargs)
        self._refuse_untaken_prompt()
        self.turn_end_id: int | None = self._find_turn_end()
        eos = tokenizer.eos_token_id
        ids = {*stop_ids, *([] if self.turn_end_id is None else [self.turn_end_id]), *([] if eos is None else [eos])}
        self.stop_ids = frozenset(int(id_) for id_ in ids if 0 <= id_ < self.vocab_size)
        stop_texts = [self.vocabulary.added[id_] for id_ in self.stop_ids if id_ in self.vocabulary.added]
        self.encoder.make_special(stop_texts)
        self._turn_ends = turn_end_pattern(stop_texts)
        self._id_of_stop = {self.vocabulary.added[id_]: id_ for id_ in self.stop_ids if id_ in self.vocabulary.added}
        self._max_tokens = config.max_tokens or max_tokens
        self._prove()

    def _prove(self) -> None:
        """Try the renderer; only from then on are long sequences rejected."""
        prove_renderer(self)
        self._assembler.max_tokens = self._max_tokens

    def with_system_prompt(self, system_prompt: str) -> Renderer:
        """A renderer that differs in its system prompt alone and shares the rest. Raises UserError where the
        template takes none."""
        other = copy.copy(self)
        other.__dict__.pop("_digest", None)
        other.system_prompt = system_prompt
        other._refuse_untaken_prompt()
        other._assembler = Assembler(self.encoder, self.vocabulary, is_plain=self.mode == "plain")
        other._prove()
        return other

    @property
    def max_tokens(self) -> int | None:
        """Longer sequences are rejected; None: no limit is known."""
        return self._assembler.max_tokens

    @property
    def vocab_size(self) -> int:
        """One more than the largest token id."""
        return self.vocabulary.size

    def token_bytes(self, ids: Iterable[int]) -> list[bytes | None]:
        """The bytes that each id decodes to inside of a text; None for an id that is no token."""
        return self.vocabulary.bytes_of(ids)

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
            "tokenizer": self.vocabulary.digest,
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
        return self._assembler.sequences(plans, batch)

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
            spans = shared_spans(target, target_turn_end_id, self.vocabulary, self.turn_end_id, self.stop_ids)
            if isinstance(prompt, Rejection):
                plans.append(prompt)
            elif isinstance(spans, Rejection):
                plans.append(spans)
            elif len(spans) == 1:
                written = spans[0].ids
                assert written is not None, "shared spans have ids"
                plans.append(Plan([self._own_context(candidate, prompt, written, batch)], spans))
            else:
                own = self._plan_trajectory(candidate, prompt, batch)
                if isinstance(own, Plan) and len(own.spans) != len(spans):
                    own = Rejection("rendering cannot be split", "the two policies split the response differently")
                plans.append(own if isinstance(own, Rejection) else Plan(own.contexts, spans))
        return self._assembler.sequences(plans, batch)

    # What a proof asks (proof.py)

    @property
    def opens_thoughts(self) -> bool:
        """Whether the generation prompt opens thoughts that the policy is to close."""
        return self._template is not None and self._template.frame.opens_thoughts

    def encode_whole(self, text: str) -> Ids:
        """Ids of a whole text in one go; in plain mode nothing in it is special."""
        return self.encoder.encode_start([text])[0] if self._template is None else self.encoder.whole(text)

    def context_of(self, candidate: Candidate) -> tuple[str | None, str]:
        """What stands before a text response, and the part of it that follows the generation prompt."""
        text, response = self._prompt_text(candidate), only_text(candidate.response)
        if isinstance(text, Rejection) or response is None:
            return None, ""
        header = "" if self._template is None else self._before(response)[0]
        return text + header, header

    def whole_text(self, candidate: Candidate) -> str:
        """The template's rendering of prompt and response. Raises RenderingError."""
        assert self._template is not None, "only a template renders conversations"
        messages = self._with_system(template_messages(candidate.prompt))
        answer = {"role": "assistant", "content": only_text(candidate.response)}
        return self._template.render([*messages, answer], candidate.tools)

    # Prompts

    def _prompts(self, candidates: Sequence[Candidate], batch: Batch) -> list[int | Rejection]:
        """For each candidate the index of its prompt's text; neighbours of one prompt share it."""
        prompts: list[int | Rejection] = []
        previous: Candidate | None = None
        for candidate in candidates:
            if previous is None or candidate.prompt != previous.prompt or candidate.tools != previous.tools:
                text = self._prompt_text(candidate)
                prompts.append(text if isinstance(text, Rejection) else batch.add_context(text))
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
                text = self._chat_prompt(self._template, messages, candidate.tools)
        except (MessageError, RenderingError) as error:
            return Rejection("prompt cannot be rendered", str(error))
        return text if is_encodable(text) else Rejection("not UTF-8", "the prompt holds a lone surrogate")

    def _chat_prompt(self, template: ChatTemplate, messages: list[Message], tools: list[dict[str, Any]] | None) -> str:
        """The rendering of a prompt. Raises RenderingError where it has not all of it."""
        shown, offered = self._with_system(self.encoder.protect(messages)), self.encoder.protect(tools)
        text = template.render(shown, offered, generation_prompt=True)
        if self.encoder.is_cut(text):
            raise RenderingError("the template cuts the text at a special token that a message holds")
        missing = left_out_words(text, shown, offered) or left_out_field(template, shown, offered, None)
        if missing is not None:
            raise RenderingError(f"the template leaves out {missing}")
        return text

    def _with_system(self, messages: list[Message]) -> list[Message]:
        if self.system_prompt is None or messages[0].get("role") in ("system", "developer"):
            return messages
        return [{"role": "system", "content": self.system_prompt}, *messages]

    def _plain_prompt(self, candidate: Candidate, messages: list[Message]) -> str:
        if candidate.tools or any(message.get("tool_calls") for message in messages):
            raise MessageError("tools need a chat template")
        return self.config.separator.join([*(message["content"] for message in self._with_system(messages)), ""])

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
        if self._template is None:
            return Plan([prompt], [Span(batch.add_text(text), turn_end=turn_end)])
        before = batch.contexts[prompt]
        header, lead = self._before(text)
        text = text.removeprefix(repeated(before, text)[1])
        if not text:
            return Rejection("empty response", "it only repeats the end of the generation prompt")
        context = batch.add_context(before + header) if header else prompt
        return Plan([context], [Span(batch.add_text(lead + text), turn_end=turn_end)])

    def _before(self, response: str) -> tuple[str, str]:
        """What the template puts between generation prompt and response: (as context, as one text with the response).

        A space is one text with the response where decoding drops it, as models with SentencePiece write it.
        """
        assert self._template is not None, "only templates have frames"
        before = self._template.frame.before(response)
        return ("", before) if before == " " and self.encoder.drops_space else (before, "")

    def _plan_ids(self, candidate: Candidate, prompt: int) -> Plan | Rejection:
        if isinstance(candidate.response, list) and len(candidate.response) != 1:
            return Rejection("rendering cannot be split", "response_ids of several messages do not say which are whose")
        ids = valid_ids(candidate.response_ids, self.vocabulary)
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
                self._with_system(self.encoder.protect(template_messages(candidate.prompt))),
                self.encoder.protect(template_messages(response)),
                self.encoder.protect(candidate.tools),
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
        if any(self.encoder.is_cut(turn.context) or self.encoder.is_cut(turn.written) for turn in turns):
            return Rejection("rendering cannot be split", "the template cuts the text at a special token in a message")
        if turns[0].context != batch.contexts[prompt]:
            return Rejection("rendering cannot be split", "the template renders the same prompt in two ways")
        ends = [self.turn_end_id if turn.turn_end is None else self._id_of_stop[turn.turn_end] for turn in turns]
        contexts = [prompt, *(batch.add_context(turn.context, end) for turn, end in zip(turns[1:], ends, strict=False))]
        spans = [
            Span(batch.add_written(turn.written), is_rendered=True, turn_end=end)
            for turn, end in zip(turns, ends, strict=True)
        ]
        if candidate.truncated:
            spans[-1].turn_end = None
        return Plan(contexts, spans)

    def _own_context(self, candidate: Candidate, prompt: int, written: Ids, batch: Batch) -> int:
        """This policy's context around a response whose tokens are another's.

        What the other's generation prompt holds already, such as <think>, is not among the tokens; what this one's
        holds and is among them is left out here.
        """
        text, before = only_text(candidate.response), batch.contexts[prompt]
        if self._template is None or text is None:
            return prompt
        header, _ = self._before(text)
        tail, again = repeated(before, text)
        if not again and not header and int(self.vocabulary.num_bytes([written])[0]) >= len(text.encode()):
            return prompt  # as nearly always: the tokens hold all of the response
        stated = b"".join(part or b"" for part in self.vocabulary.bytes_of(written.tolist())).decode(errors="replace")
        dropped = text[: -len(stated)] if len(stated) < len(text) and text.endswith(stated) else ""
        if dropped and not again:
            return batch.add_context(before + header + dropped)
        if again and not dropped and stated.startswith(again):
            return batch.add_context(before.removesuffix(tail))
        if header and not stated.startswith(header):
            return batch.add_context(before + header)
        return prompt

    # Construction

    def _refuse_untaken_prompt(self) -> None:
        if self._template is not None and self.system_prompt is not None and not self._template.takes_system():
            raise UserError(
                f"the chat template of {self.tokenizer.name_or_path} takes no system message: remove its system_prompt"
            )

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
            for id_ in self.encoder.whole(self._template.after_response()).tolist():
                if id_ in added and not added[id_].isspace():
                    return id_
        eos = self.tokenizer.eos_token_id
        return None if eos is None else int(eos)
