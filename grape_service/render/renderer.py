"""From candidates to token ids and loss masks, under one policy's tokenizer and chat template."""

from __future__ import annotations

import copy
import hashlib
from collections.abc import Iterable, Sequence
from functools import cached_property
from typing import Any

import numpy as np
import orjson

from grape_service.config.schema import RenderConfig
from grape_service.errors import UserError
from grape_service.models.vocabulary import Vocabulary
from grape_service.render.assemble import TOO_LONG, Assembler
from grape_service.render.encoding import Encoder, Ids, is_encodable
from grape_service.render.layout import SequencePlan, Span, TextBatch, shared_spans
from grape_service.render.messages import MessageForm
from grape_service.render.prompts import Prefills, PromptTexts, unusable_response
from grape_service.render.proof import prove_renderer
from grape_service.render.recorded import RecordedResponses, logprobs_mismatch
from grape_service.render.shared import SharedResponses
from grape_service.render.template import ChatTemplate, mode_of
from grape_service.render.trajectory import Trajectories, spelled_in, turn_end_pattern
from grape_service.render.turn_end import find_turn_end
from grape_service.render.variants import Variants
from grape_service.rows.candidate import Candidate, Message, Rejection, Rendered
from grape_service.rows.messages import only_text
from grape_service.rows.prefill import prefill_of, without_prefill

FORMAT = 4
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
        self.mode = mode_of(tokenizer, config)
        self._assembler = Assembler(self.encoder, self.vocabulary, is_plain=self.mode == "plain")
        self._template: ChatTemplate | None = None
        if self.mode == "chat":
            self._template = ChatTemplate(tokenizer, config.chat_template, config.template_kwargs)
        self._form = MessageForm(self._template, config.reasoning)
        stop_ids = set(stop_ids)
        self.turn_end_id = find_turn_end(
            self._template, self.encoder, self.vocabulary, tokenizer.eos_token_id, stop_ids
        )
        eos = tokenizer.eos_token_id
        ids = {*stop_ids, *([] if self.turn_end_id is None else [self.turn_end_id]), *([] if eos is None else [eos])}
        self.stop_ids = frozenset(int(id_) for id_ in ids if 0 <= id_ < self.vocab_size)
        stop_texts = [self.vocabulary.added[id_] for id_ in self.stop_ids if id_ in self.vocabulary.added]
        self.encoder.make_special(stop_texts)
        self._turn_ends = turn_end_pattern(stop_texts)
        self._id_of_stop = {self.vocabulary.added[id_]: id_ for id_ in self.stop_ids if id_ in self.vocabulary.added}
        self._recorded = RecordedResponses(
            self.vocabulary,
            self.encoder.special_ids,
            self.stop_ids,
            self.turn_end_id,
            tokenizer.pad_token_id,
            tokenizer.bos_token or "",
            self.encoder.unicode_forms,
        )
        self._shared = SharedResponses(self._template, self.vocabulary, self._recorded)
        self._read_prompts()
        self._max_tokens = config.max_tokens or max_tokens
        self._variants: Variants[Renderer] | None = Variants(self, self._with_template_kwargs)
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
        other._variants = Variants(other, other._with_template_kwargs)
        other.system_prompt = system_prompt
        other._read_prompts()
        other._assembler = Assembler(self.encoder, self.vocabulary, is_plain=self.mode == "plain")
        other._prove()
        return other

    def of(self, candidate: Candidate) -> Renderer:
        """The renderer of a candidate: this one, or one with the variables of the template that its row brings, proved
        as this one is. Raises UserError where the template cannot be used with them."""
        return self if self._template is None or self._variants is None else self._variants.of(candidate)

    def _with_template_kwargs(self, kwargs: dict[str, Any]) -> Renderer:
        other = copy.copy(self)
        other.__dict__.pop("_digest", None)
        other._variants = None
        variables = {**self.config.template_kwargs, **kwargs}
        other._template = ChatTemplate(self.tokenizer, self.config.chat_template, variables)
        other._form = MessageForm(other._template, self.config.reasoning)
        other._shared = SharedResponses(other._template, self.vocabulary, self._recorded)
        other._read_prompts()
        other._assembler = Assembler(self.encoder, self.vocabulary, is_plain=False)
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
        """The bytes that each id decodes to inside of a text; None for an id that is not a token."""
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
            "reasoning": self.config.reasoning,
            "stop_ids": sorted(self.stop_ids),
        }
        return hashlib.sha256(orjson.dumps(parts, option=orjson.OPT_SORT_KEYS)).hexdigest()

    def render(self, candidates: Sequence[Candidate]) -> list[Rendered | Rejection]:
        """Tokens and mask of each candidate, in order; candidates of one prompt should stand next to each other."""
        self._recorded.say_responses(candidates)
        if self._variants is not None and self._have_kwargs(candidates):
            return self._variants.each(candidates, lambda own, places: own._render([candidates[p] for p in places]))
        return self._render(candidates)

    def _have_kwargs(self, candidates: Sequence[Candidate]) -> bool:
        return self._template is not None and any(candidate.template_kwargs for candidate in candidates)

    def _render(self, candidates: Sequence[Candidate]) -> list[Rendered | Rejection]:
        batch = TextBatch()
        plans: list[SequencePlan | Rejection] = []
        for candidate, prompt in zip(candidates, self._prompts(candidates, batch), strict=True):
            plans.append(prompt if isinstance(prompt, Rejection) else self._plan(candidate, prompt, batch))
        return self._assembler.sequences(plans, batch)

    def render_prompts(self, candidates: Sequence[Candidate]) -> list[Rendered | Rejection]:
        """Tokens of each candidate's prompt, up to where a response begins; nothing has loss."""
        if self._variants is not None and self._have_kwargs(candidates):
            return self._variants.each(
                candidates, lambda own, places: own._render_prompts([candidates[p] for p in places])
            )
        return self._render_prompts(candidates)

    def _render_prompts(self, candidates: Sequence[Candidate]) -> list[Rendered | Rejection]:
        batch = TextBatch()
        prompts = self._prefilled(candidates, self._prompts(candidates, batch), batch)
        contexts = self._assembler.encode_contexts(batch)
        rendered: list[Rendered | Rejection] = []
        for prompt in prompts:
            if isinstance(prompt, Rejection):
                rendered.append(prompt)
                continue
            ids = contexts[prompt]
            if self.max_tokens is not None and len(ids) >= self.max_tokens:
                rendered.append(Rejection(TOO_LONG, f"its prompt has {len(ids)} tokens, of {self.max_tokens} at most"))
                continue
            rendered.append(Rendered(ids, np.zeros(len(ids), np.uint8), len(ids)))
        return rendered

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
        if self._variants is not None and self._have_kwargs(candidates):
            return self._variants.each(
                candidates,
                lambda own, places: own._render_behavior(
                    [candidates[p] for p in places], [targets[p] for p in places], target_turn_end_id
                ),
            )
        return self._render_behavior(candidates, targets, target_turn_end_id)

    def _render_behavior(
        self, candidates: Sequence[Candidate], targets: Sequence[Rendered], target_turn_end_id: int | None
    ) -> list[Rendered | Rejection]:
        batch = TextBatch()
        plans: list[SequencePlan | Rejection] = []
        prompts = self._prompts(candidates, batch)
        contexts = self._prefilled(candidates, prompts, batch)
        for candidate, target, prompt, context in zip(candidates, targets, prompts, contexts, strict=True):
            shared = shared_spans(target, target_turn_end_id, self.vocabulary, self.turn_end_id, self.stop_ids)
            if isinstance(prompt, Rejection) or isinstance(context, Rejection):
                assert isinstance(context, Rejection), "of a prompt that is refused there is no more"
                plans.append(context)
                continue
            if isinstance(shared, Rejection):
                plans.append(shared)
                continue
            read, spans = shared
            is_prefilled = context != prompt
            if len(spans) == 1:
                written = spans[0].ids
                assert written is not None, "shared spans have ids"
                answer = self._answer(candidate)
                plans.append(SequencePlan([self._shared.context(answer, context, written, batch, is_prefilled)], spans))
            elif isinstance(candidate.response, str):
                plans.append(self._shared.around_masked(candidate, target, context, read, spans, batch, is_prefilled))
            else:
                own = self._trajectories.plan(candidate, self._answer(candidate), prompt, batch)
                if isinstance(own, SequencePlan) and len(own.spans) != len(spans):
                    own = Rejection("rendering cannot be split", "the two policies split the response differently")
                plans.append(own if isinstance(own, Rejection) else SequencePlan(own.contexts, spans))
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
        """What stands before a text response, and what is written of it there."""
        text, response = self._texts.of(candidate), only_text(self._answer(candidate))
        if isinstance(text, Rejection) or response is None:
            return None, ""
        split = self._split(candidate, text, response)
        return (None, "") if isinstance(split, Rejection) else split

    def whole_text(self, candidate: Candidate) -> str:
        """The template's rendering of prompt and response. Raises RenderingError."""
        assert self._template is not None, "only a template renders conversations"
        messages = self._texts.with_system(self._form.prompt(without_prefill(candidate.prompt)))
        answer = (prefill_of(candidate.prompt) or "") + (only_text(self._answer(candidate)) or "")
        return self._template.render([*messages, {"role": "assistant", "content": answer}], candidate.tools)

    # Prompts

    def _prompts(self, candidates: Sequence[Candidate], batch: TextBatch) -> list[int | Rejection]:
        """For each candidate the index of its prompt's text; neighbours of one prompt share it."""
        prompts: list[int | Rejection] = []
        previous: Candidate | None = None
        for candidate in candidates:
            if previous is None or candidate.prompt != previous.prompt or candidate.tools != previous.tools:
                text = self._texts.of(candidate)
                prompts.append(text if isinstance(text, Rejection) else batch.add_context(text))
            else:
                prompts.append(prompts[-1])
            previous = candidate
        return prompts

    def _prefilled(
        self, candidates: Sequence[Candidate], prompts: list[int | Rejection], batch: TextBatch
    ) -> list[int | Rejection]:
        """For each candidate the index of its prompt's text up to where its response begins, behind a prefill."""
        found = list(prompts)
        for place, (candidate, prompt) in enumerate(zip(candidates, prompts, strict=True)):
            if not isinstance(prompt, Rejection) and prefill_of(candidate.prompt) is not None:
                text = self._prefills.context(candidate, batch.contexts[prompt])
                found[place] = text if isinstance(text, Rejection) else batch.add_context(text)
        return found

    # Responses

    def _plan(self, candidate: Candidate, prompt: int, batch: TextBatch) -> SequencePlan | Rejection:
        if (unusable := unusable_response(candidate)) is not None:
            return unusable
        if candidate.response_ids is not None:
            return self._plan_recorded(candidate, prompt, batch)
        if candidate.recorded_logprobs is not None:
            return logprobs_mismatch("there are no response_ids")
        if candidate.response_mask is not None:
            return Rejection("response_mask does not match response_ids", "there are no response_ids")
        response = self._answer(candidate)
        text = only_text(response)
        if text is None:
            return self._trajectories.plan(candidate, response, prompt, batch)
        if not text:
            return Rejection("empty response")
        if not is_encodable(text):
            return Rejection("not UTF-8", "the response holds a lone surrogate")
        spelled = spelled_in(text, self.encoder)
        if spelled is not None:
            return spelled
        turn_end = None if candidate.truncated else self.turn_end_id
        before = batch.contexts[prompt]
        split = self._split(candidate, before, text)
        if isinstance(split, Rejection):
            return split
        own, text = split
        if not text:
            return Rejection("empty response", "it only repeats the end of the generation prompt")
        context = prompt if own == before else batch.add_context(own)
        return SequencePlan([context], [Span(batch.add_text(text), turn_end=turn_end)])

    def _plan_recorded(self, candidate: Candidate, prompt: int, batch: TextBatch) -> SequencePlan | Rejection:
        before, text = batch.contexts[prompt], only_text(candidate.response)
        if prefill_of(candidate.prompt) is not None:
            [context] = self._prefilled([candidate], [prompt], batch)
            if isinstance(context, Rejection):
                return context
            return self._recorded.plan(candidate, batch.contexts[context], context)
        own = before if self._template is None or text is None else self._frame_split(before, text)[0]
        return self._recorded.plan(candidate, before, prompt if own == before else batch.add_context(own))

    def _answer(self, candidate: Candidate) -> str | list[Message]:
        """The response with its thoughts where render.reasoning wants them."""
        return candidate.response if isinstance(candidate.response, str) else self._form.thoughts(candidate.response)

    def _split(self, candidate: Candidate, before: str, response: str) -> tuple[str, str] | Rejection:
        """What stands before a response, given its generation prompt, and what is written of it there."""
        if prefill_of(candidate.prompt) is not None:
            return self._prefills.split(candidate, before, response)
        return (before, response) if self._template is None else self._frame_split(before, response)

    def _frame_split(self, before: str, response: str) -> tuple[str, str]:
        """See `AnswerFrame.split`."""
        assert self._template is not None, "only templates have frames"
        return self._template.frame.split(before, response, self.encoder.drops_space)

    # Construction

    def _read_prompts(self) -> None:
        """How prompts are read. Raises UserError where the template takes no system prompt."""
        separator = self.config.separator
        self._texts = PromptTexts(self._template, self._form, self.encoder, separator, self.system_prompt)
        self._prefills = Prefills(self._template, self._form, self._texts, self.encoder)
        self._trajectories = Trajectories(
            self._template,
            self._form,
            self._texts,
            self._prefills,
            self.encoder,
            self._turn_ends,
            self.turn_end_id,
            self._id_of_stop,
        )
        if self._template is not None and self.system_prompt is not None and not self._template.takes_system():
            raise UserError(
                f"the chat template of {self.tokenizer.name_or_path} takes no system message: remove its system_prompt"
            )
