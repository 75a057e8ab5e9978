"""TRL's GRPO trainer, asked in given tokens and stopped at the template's turn end."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import torch
from trl import GRPOTrainer
from trl.trainer.utils import RepeatSampler

from grape_service.errors import StageError
from grape_service.render.renderer import Renderer
from workers.training.trainers.output import EndsAtLastStep, Output
from workers.training.trainers.rendering import stop_at_turn_ends

MANY_CUT = 0.5
"""A larger share of cut answers in the first batch is told: such answers earn nothing and teach nothing."""


class PromptSampler(RepeatSampler):
    """TRL's sampler, whose order of an epoch follows from the seed and the epoch alone.

    TRL's draws the orders of all epochs one after the other from one generator, so that a job that was resumed in a
    later epoch asks the prompts in the order of the first.
    """

    epoch = 0

    def set_epoch(self, epoch: int) -> None:
        """The next order is that of this epoch; the trainer says so before each."""
        self.epoch = epoch

    def __iter__(self) -> Iterator[int]:
        if self.shuffle:
            assert self.seed is not None, "settings have one"
            self.generator.manual_seed(self.seed)
            for _ in range(self.epoch):
                torch.randperm(self.num_samples, generator=self.generator)
        return super().__iter__()


class PromptedGRPOTrainer(EndsAtLastStep, GRPOTrainer):
    """GRPO on rows that hold their prompt's token ids in `prompt_ids`; `prompt` is their text, for logs."""

    def __init__(self, renderer: Renderer | None, output: Output, **arguments: Any):
        super().__init__(**arguments)
        model = self.accelerator.unwrap_model(self.model)
        self.output = output
        self.eos_token_ids = stop_at_turn_ends(model.generation_config, renderer)
        if hasattr(self, "generation_config"):  # not where vLLM writes the answers
            self.generation_config.eos_token_id = self.eos_token_ids
            self.generation_kwargs["eos_token_id"] = self.eos_token_ids
        self._asked: list[list[int]] = []
        self._has_answered = False

    def _get_train_sampler(self, dataset: Any = None) -> PromptSampler:
        made: Any = super()._get_train_sampler(dataset)
        counts = made.mini_repeat_count, made.batch_size, made.repeat_count
        return PromptSampler(made.data_source, *counts, made.shuffle, made.seed)

    def create_model_card(self, *_: Any, **__: Any) -> None:
        """Nothing: a checkpoint has our card, which knows the release."""

    def _generate_and_score_completions(self, inputs: list[dict[str, Any]]) -> Any:
        self._asked = [row["prompt_ids"] for row in inputs]
        return super()._generate_and_score_completions(inputs)

    def _tokenize_prompts(self, prompts: list[Any]) -> tuple[list[list[int]], None, dict[str, Any]]:
        assert len(prompts) == len(self._asked), "TRL asks for the prompts of the batch that it is given"
        return [list(ids) for ids in self._asked], None, {}

    def _generate(self, prompts: list[Any]) -> Any:
        found = super()._generate(prompts)
        if not self._has_answered:
            self._has_answered = True
            if found[0] != self._asked:
                raise StageError("the first batch was not asked in the tokens of its prompts: TRL has changed them")
            self._tell_cut(found[1])
        return found

    def _tell_cut(self, answers: list[list[int]]) -> None:
        """Say at once where most answers of the first batch, over all processes, reach the limit."""
        is_cut = [not ids or ids[-1] not in self.eos_token_ids for ids in answers]
        cut = self.accelerator.gather(torch.tensor(is_cut, device=self.accelerator.device))
        if float(cut.float().mean()) <= MANY_CUT:
            return
        ends = ", ".join(repr(self._tokenizer.decode([id_])) for id_ in self.eos_token_ids)
        self.output.note(
            f"{int(cut.sum())} of {len(cut)} answers of the first batch are cut at max_response_tokens "
            f"{self.max_completion_length}: raise it, or see whether the model has learnt to end its turn ({ends})"
        )
        self.output.doing("the first step, whose answers are there")
