"""The sampling actor: a sampler in one process, fed with units of prompts, writing samples itself."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator
from dataclasses import asdict, dataclass, replace
from typing import Any

import numpy as np
import pyarrow as pa

from grape_service.config.policy import PolicyConfig
from grape_service.errors import StageError
from grape_service.gather.candidates import asked_of, question_of
from grape_service.gather.missing import KnownSamples, Sampling
from grape_service.gather.samples import SampleStore, StoredSample, prompt_keys, sample_key, seed_of, verify_id
from grape_service.gather.verdicts import Question, Verdict, Verifier
from grape_service.json_types import JsonObject
from grape_service.models.tokenizer import load_tokenizer, text_behind
from grape_service.rows.candidate import Row
from grape_service.rows.columns import SHARD
from grape_service.rows.prefill import prefills_of
from grape_service.storage.parquet import open_small
from workers.engines.base import OutOfMemory
from workers.engines.choose import load_sampler
from workers.engines.sampler import Sample, SampleRequest, SampleSettings
from workers.scoring.actor import ScoringActor, ScoringSpec
from workers.scoring.work import Unit, UnitResult

ATTEMPTS = 8
"""Halvings of what a sampler takes at once, before a unit that is too large for its memory fails."""


@dataclass(frozen=True)
class SamplingSpec(ScoringSpec):
    """What an actor needs to know to sample for one policy."""

    sampling: Sampling

    @property
    def actor(self) -> type[ScoringActor]:
        return SamplingActor


class SamplingActor(ScoringActor):
    """A replica that samples: `tokens_done` counts samples."""

    judged = 0  # verdicts since the start

    def moved(self) -> float:
        """Tokens that were sampled, an engine's steps on the way to them, and verdicts: a response counts as done once
        it is judged and stored."""
        stats = self.engine.stats()
        return stats["tokens"] + stats.get("steps", 0.0) + self.judged

    def load(self, policy: PolicyConfig, folder: str) -> Any:
        assert isinstance(self.spec, SamplingSpec)
        self.sampling = self.spec.sampling
        self.tokenizer = load_tokenizer(folder, policy)
        self.idle_verifiers: list[Verifier] = []
        return load_sampler(policy, folder)

    def score_unit(self, call: int, unit: Unit, store_id: str, temperature: float) -> UnitResult | None:
        """Make the samples of a unit's prompts that are not stored."""
        sampling = self.sampling
        store = SampleStore(self.spec.workspace, sampling.sampler)
        with open_small(self.spec.workspace, unit.path) as file:
            table = file.read().slice(unit.first, None if unit.last is None else unit.last - unit.first)
        keys = prompt_keys(table)
        wanted = [sample_key(key, number) for key in keys for number in range(sampling.samples)]
        # Nothing was there of an unchecked unit as the run began: what came since is in its shard's own files.
        known = store.read(unit.partition, wanted, shard=None if unit.check else unit.path)
        prompts = [
            _Prompt(*row, known[place * sampling.samples : (place + 1) * sampling.samples])
            for place, row in enumerate(
                zip(
                    keys,
                    table["prompt_id"].to_pylist(),
                    table["input_ids"].to_pylist(),
                    _prefills(table),
                    strict=True,
                )
            )
        ]
        others = table.drop_columns([name for name in SHARD.names if name in table.column_names])
        reused = sum(one is not None for one in known)
        sampled = tokens = 0
        with self.on_engine(call) as turn, self._verifier() as verifier:
            if turn is None:
                return None
            self._judge_known(prompts, others.to_pylist(), verifier)
            while asked := [(place, number) for place, one in enumerate(prompts) for number in one.next(sampling)]:
                samples = self._sample([prompts[place].request(number, sampling) for place, number in asked])
                rows = self._rows(prompts, asked, samples, others, verifier)
                store.write(unit.partition, rows, unit.path, self._metadata(verifier))
                sampled += len(samples)
                tokens += sum(len(sample.ids) for sample in samples)
                self.tokens_done += len(samples)
        return UnitResult(sampled, 0, reused, tokens, turn.seconds)

    def _sample(self, requests: list[SampleRequest]) -> list[Sample]:
        config = self.sampling.config
        settings = SampleSettings(
            temperature=config.temperature,
            top_p=config.top_p,
            top_k=config.top_k,
            max_tokens=config.max_tokens,
            stop_ids=self.sampling.stop_ids,
            stop_texts=tuple(config.stop),
        )
        for _ in range(ATTEMPTS):
            try:
                return list(self.engine.sample(requests, settings))
            except OutOfMemory as error:
                self.events.append(f"out of memory: fewer responses at once ({error})")
        raise StageError("the sampler runs out of memory however few responses it samples at once")

    @contextlib.contextmanager
    def _verifier(self) -> Iterator[Verifier | None]:
        """A verifier that no other unit uses: its process, which may take seconds to start, is kept for the next."""
        if self.sampling.verify.method == "none":
            yield None
            return
        try:
            verifier = self.idle_verifiers.pop()
        except IndexError:
            verifier = Verifier(self.sampling.verify)
        with contextlib.ExitStack() as stack:
            stack.push(verifier)  # ended where a unit fails in the middle of a question
            yield verifier
            stack.pop_all()
        self.idle_verifiers.append(verifier)

    def _judge_known(self, prompts: list[_Prompt], others: list[Row], verifier: Verifier | None) -> None:
        """Verdicts of stored samples that another verifier judged, or none: they decide what else is sampled."""
        if verifier is None or self.sampling.right is None:
            return
        here = verify_id(self.sampling.verify, verifier.name)
        for prompt, row in zip(prompts, others, strict=True):
            for number, sample in prompt.samples.items():
                if (sample.get("verify_id"), sample.get("asked")) != (here, asked_of(row, self.sampling.verify)):
                    question = self._question(prompt, np.asarray(sample["ids"]), row)
                    prompt.verdicts[number] = next(verifier.verdicts([question])).word
                    self.judged += 1

    def _rows(
        self,
        prompts: list[_Prompt],
        asked: list[tuple[int, int]],
        samples: list[Sample],
        others: Any,
        verifier: Verifier | None,
    ) -> list[StoredSample]:
        rows = others.to_pylist()
        questions = [
            self._question(prompts[place], sample.ids, rows[place])
            for (place, _), sample in zip(asked, samples, strict=True)
        ]
        verdicts: list[Verdict | None] = [None] * len(asked)
        if verifier is not None:
            for count, said in enumerate(verifier.verdicts(questions)):
                verdicts[count] = said
                self.judged += 1
        sampled = []
        for (place, number), sample, verdict in zip(asked, samples, verdicts, strict=True):
            prompt = prompts[place]
            key = sample_key(prompt.key, number)
            value: StoredSample = {
                "sample_key": key,
                "prompt_id": prompt.prompt_id,
                "number": number,
                "seed": seed_of(self.sampling.sampler, key),
                "ids": sample.ids,
                "logprobs": sample.logprobs,
                "finish_reason": sample.finish_reason,
                "verdict": verdict.word if verdict else None,
                "verdict_reason": verdict.reason if verdict else None,
                "asked": asked_of(rows[place], self.sampling.verify) if verdict else None,
            }
            prompt.samples[number] = value
            prompt.verdicts[number] = value["verdict"]
            sampled.append(value)
        return sampled

    def _question(self, prompt: _Prompt, ids: Any, row: Row) -> Question:
        text = response_text(self.tokenizer, ids, self.sampling.stop_ids, prompt.ids if prompt.prefill else ())
        return question_of((prompt.prefill or "") + text, row, self.sampling.verify)

    def _metadata(self, verifier: Verifier | None) -> JsonObject:
        made_by = asdict(replace(self.engine.description, extra={}))
        del made_by["extra"]
        if verifier is None:
            return {"made_by": made_by}
        name = verifier.name
        return {"made_by": made_by, "verifier": name, "verify_id": verify_id(self.sampling.verify, name)}


class _Prompt(KnownSamples):
    """A prompt of a unit, and the samples of it that there are."""

    def __init__(
        self, key: bytes, prompt_id: str, ids: list[int], prefill: str | None, known: list[StoredSample | None]
    ):
        super().__init__(known)
        self.prefill = prefill
        self.key, self.prompt_id = key, prompt_id
        self.ids = np.asarray(ids, dtype=np.int32)

    def request(self, number: int, sampling: Sampling) -> SampleRequest:
        """What the sampler is asked for."""
        return SampleRequest(self.ids, seed_of(sampling.sampler, sample_key(self.key, number)))


def _prefills(table: pa.Table) -> list[str | None]:
    """The prefill of each prompt; questions to a judge have none, nor messages."""
    if "messages" not in table.column_names:
        return [None] * table.num_rows
    return prefills_of(table["messages"].to_pylist(), table["num_prompt_messages"].to_pylist())


def response_text(tokenizer: Any, ids: Any, stop_ids: tuple[int, ...], before: Any = ()) -> str:
    """The text of a response, its stop token left out, as it follows the ids `before`."""
    tokens = [int(id_) for id_ in ids]
    while tokens and tokens[-1] in stop_ids:
        tokens.pop()
    return text_behind(tokenizer, before, tokens)
