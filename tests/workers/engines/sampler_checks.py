"""What every sampler has to do, whichever engine is behind it."""

from __future__ import annotations

from math import erfc
from typing import Any

import numpy as np
import numpy.typing as npt
import torch

from grape_service.config.policy import PolicyConfig
from workers.engines.sampler import Sample, Sampler, SampleRequest, SampleSettings
from workers.engines.transformers.causal_model import load_model

STOP_IDS = (514, 7)
LENGTHS = (5, 9, 3, 17)


def settings(**over: Any) -> SampleSettings:
    """Temperature 1, no cuts, 24 tokens, two stop tokens; `over` are other values."""
    values: dict[str, Any] = {"temperature": 1.0, "top_p": 1.0, "top_k": -1, "max_tokens": 24, "stop_ids": STOP_IDS}
    return SampleSettings(**{**values, **over})


def requests(each: int = 6) -> list[SampleRequest]:
    """`each` samples of four random prompts."""
    random = np.random.default_rng(0)
    prompts = [random.integers(0, 512, size=length).astype(np.int32) for length in LENGTHS]
    return [SampleRequest(prompt, 1000 + seed) for seed, prompt in enumerate(p for p in prompts for _ in range(each))]


class PlainModel:
    """A float32 forward of one sequence at a time."""

    def __init__(self, folder: str):
        self._model = load_model(PolicyConfig(model=folder, dtype="float32"), folder, torch.device("cpu"))

    def logits(self, ids: npt.NDArray[np.int32]) -> torch.Tensor:
        """Logits [T, V] of the token after each."""
        with torch.inference_mode():
            return self._model(torch.from_numpy(ids.astype(np.int64))[None]).logits[0].double()

    def logprobs(self, request: SampleRequest, sample: Sample) -> npt.NDArray[np.float64]:
        """log p of each sampled token [T], before temperature and cuts."""
        scores = self.logits(np.concatenate([request.prompt_ids, sample.ids])).log_softmax(-1).numpy()
        return scores[len(request.prompt_ids) - 1 : -1][np.arange(len(sample.ids)), sample.ids]


def check_logprobs(sampler: Sampler, model: PlainModel, how: SampleSettings) -> None:
    """Recorded numbers are the model's own; a response ends at its first stop token and nowhere else."""
    asked = requests()
    for request, sample in zip(asked, sampler.sample(asked, how), strict=True):
        np.testing.assert_allclose(sample.logprobs, model.logprobs(request, sample), atol=1e-4)
        assert not np.isin(sample.ids[:-1], how.stop_ids).any()
        is_stopped = sample.ids[-1] in how.stop_ids
        assert sample.finish_reason == ("stop" if is_stopped else "length")
        assert is_stopped or len(sample.ids) == how.max_tokens


def check_seeds(sampler: Sampler) -> None:
    """A sample follows from its prompt, settings and seed, whatever is sampled beside it; others give others."""
    asked = requests()
    first, again = sampler.sample(asked, settings()), sampler.sample(asked[::-1][:13], settings())
    for one, other in zip(first[::-1], again, strict=False):
        assert one.ids.tolist() == other.ids.tolist()
    assert len({sample.ids.tobytes() for sample in first}) == len(first)


def check_distribution(sampler: Sampler, model: PlainModel, how: SampleSettings, number: int = 20_000) -> None:
    """Frequencies of `number` first tokens against the model's softmax: the chi-square test's p is above 0.001."""
    prompt = requests()[0].prompt_ids
    found = sampler.sample([SampleRequest(prompt, seed) for seed in range(number)], how)
    counts = np.bincount([int(sample.ids[0]) for sample in found], minlength=len(model.logits(prompt)[-1]))
    expected = number * torch.softmax(model.logits(prompt)[-1] / how.temperature, dim=-1).numpy()
    order = np.argsort(expected)  # rare tokens are counted together
    groups = np.searchsorted(np.cumsum(expected[order]), np.arange(0, number, 20)[1:])
    starts = sorted({0, *groups.tolist()})
    wanted, seen = np.add.reduceat(expected[order], starts), np.add.reduceat(counts[order], starts)
    assert len(wanted) > 20
    degrees = len(wanted) - 1
    square = float(((seen - wanted) ** 2 / wanted).sum())
    normal = ((square / degrees) ** (1 / 3) - (1 - 2 / (9 * degrees))) / np.sqrt(2 / (9 * degrees))  # Wilson-Hilferty
    assert erfc(normal / np.sqrt(2)) / 2 > 0.001


def check_stop_texts(sampler: Sampler, tokenizer: Any) -> None:
    """A stop text ends a response at the token that completes it, and stays in it."""
    asked = requests(each=10)
    free = sampler.sample(asked, settings(stop_ids=()))
    text = next(
        text
        for sample in free
        for text in (tokenizer.decode(sample.ids[6:8].tolist()),)
        if text.isascii() and text.isprintable() and len(text) > 1
    )
    stopped = sampler.sample(asked, settings(stop_ids=(), stop_texts=(text,)))
    assert any(sample.finish_reason == "stop" for sample in stopped)
    for whole, sample in zip(free, stopped, strict=True):
        length = next(n for n in range(1, 25) if n == 24 or text in tokenizer.decode(whole.ids[:n].tolist()))
        assert sample.ids.tolist() == whole.ids[:length].tolist()
