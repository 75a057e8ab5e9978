"""The gate between SFT and RL: what is measured of SFT's checkpoint, and when RL is not started on it."""

from __future__ import annotations

import re

from pydantic import Field, field_validator, model_validator

from grape_service.config.base import Model
from grape_service.config.gather import SamplingConfig, VerifyConfig

HELD_OUT_LOSS = "held_out_loss"
_RULE = re.compile(r"(held_out_loss|pass@\d+)\s*([<>])\s*(\d+(?:\.\d+)?)")


class GateConfig(Model):
    """Is a checkpoint ready for RL? Accuracy after SFT misleads; held-out loss and pass@k foretell RL."""

    held_out_loss: bool = False
    """Record the loss on the prompts that SFT keeps back (sft.eval_share)."""
    pass_at: list[int] = []
    """Each k for which pass@k is estimated: the chance that one of k samples is right (arXiv 2107.03374)."""
    samples: int | None = Field(None, ge=1)
    """Samples of each prompt; null: twice the largest k."""
    prompts: str | None = None
    """Prompts to sample for, with what the verifier reads: file, folder or glob, local or s3://; null: those of the
    release that SFT kept back, or all of them if it kept none."""
    max_prompts: int = Field(256, ge=1)
    """Of the release's prompts so many are taken, by a digest of their ids."""
    sampling: SamplingConfig = SamplingConfig(max_tokens=1024)
    """How responses are sampled."""
    verify: VerifyConfig | None = None
    """What says which responses are right; null: gather.verify."""
    stop_if: list[str] = []
    """RL is not started where one of these holds, as in 'held_out_loss > 2.5' or 'pass@8 < 0.1'."""

    @field_validator("pass_at")
    @classmethod
    def _positive(cls, pass_at: list[int]) -> list[int]:
        if any(k < 1 for k in pass_at):
            raise ValueError("k counts samples from 1")
        return sorted(set(pass_at))

    @model_validator(mode="after")
    def _measures_what_it_stops_by(self) -> GateConfig:
        if not self.figures:
            raise ValueError("a gate measures something: set held_out_loss to true, or give pass_at, as in [1, 8]")
        if self.samples is not None and self.samples < max(self.pass_at, default=0):
            raise ValueError(f"pass@{max(self.pass_at)} needs {max(self.pass_at)} samples at least")
        for rule in self.stop_if:
            found = _RULE.fullmatch(rule.strip())
            if found is None:
                raise ValueError(f"'{rule}' is no rule: write 'held_out_loss > 2.5' or 'pass@8 < 0.1'")
            if found[1] not in self.figures:
                raise ValueError(f"'{rule}' needs a figure that is not measured: those are {', '.join(self.figures)}")
        return self

    @property
    def figures(self) -> list[str]:
        """Names of what is measured."""
        return [*([HELD_OUT_LOSS] if self.held_out_loss else []), *(f"pass@{k}" for k in self.pass_at)]

    @property
    def num_samples(self) -> int:
        """Samples of each prompt."""
        return self.samples if self.samples is not None else 2 * max(self.pass_at, default=0)

    def refusals(self, figures: dict[str, float]) -> list[str]:
        """Each rule that holds of the figures, as a part of a sentence."""
        found = []
        for rule in self.stop_if:
            match = _RULE.fullmatch(rule.strip())
            assert match is not None, "the config was validated"
            name, limit = match[1], float(match[3])
            if figures[name] > limit if match[2] == ">" else figures[name] < limit:
                found.append(f"{name} is {figures[name]:.4g}, and train.gate.stop_if has '{rule.strip()}'")
        return found
