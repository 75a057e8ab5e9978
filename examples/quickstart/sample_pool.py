"""Writes the quickstart's sampled candidates, pool/sampled.jsonl: what SmolLM2-135M-Instruct itself answers.

    python examples/quickstart/sample_pool.py        (some ten minutes on 2 cores; the result is in the repository)

Two policies answer every question of questions.json, both the same model under a system prompt of their own:

- smollm2-tutor at temperature 0.6. Token ids, the log-probability of each under the distribution that it was drawn
  from (softmax of logits / temperature, no top-p, no top-k) and the sampling settings are recorded with the response.
- smollm2-brief at temperature 1.0. Only the text is kept, as with most pools; its behavior policy has to be scored.

Each draws six answers, of which the pool gets the first right one, or else the first that ended by itself:
a model of this size is often wrong. Those stay in, with `correct` false. Everything is seeded by policy and question,
but another machine or torch version may draw other answers: then read them again (READ_AND_FOUND_WRONG).
"""

from __future__ import annotations

import hashlib
import json
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from check_answer import is_right
from prepare_model import DEFAULT_FOLDER, prepare_model
from transformers import AutoModelForCausalLM, AutoTokenizer, PreTrainedModel, PreTrainedTokenizerBase

HERE = Path(__file__).resolve().parent


@dataclass(frozen=True)
class Sampler:
    source: str
    system_prompt: str
    temperature: float
    max_new_tokens: int
    recorded: bool


DRAWS = 6

READ_AND_FOUND_WRONG: dict[str, set[int]] = {
    "smollm2-tutor/train": {2},
    "smollm2-tutor/largest-planet": {1, 2},
    "smollm2-tutor/mountain": {2},
    "smollm2-tutor/plants": {2, 3},
    "smollm2-tutor/romeo": {0, 1, 3, 4, 5},
    "smollm2-tutor/heart": {3},
    "smollm2-tutor/sky": {0, 2, 3, 4},
    "smollm2-tutor/roses": {3, 5},
    "smollm2-tutor/race": {2},
    "smollm2-tutor/heights": {5},
    "smollm2-tutor/is-even": {1, 3, 4, 5},
    "smollm2-brief/australia": {1, 2, 3},
    "smollm2-brief/largest-planet": {5},
    "smollm2-brief/plants": {0, 1, 2, 3, 4, 5},
    "smollm2-brief/romeo": {3, 4, 5},
    "smollm2-brief/heart": {2, 4},
    "smollm2-brief/gold": {0, 2, 3, 5},
    "smollm2-brief/sky": {3},
    "smollm2-brief/roses": {0, 4},
    "smollm2-brief/heights": {1, 5},
    "smollm2-brief/weekday": {0, 4},
    "smollm2-brief/is-even": {0, 3},
    "smollm2-brief/reverse": {0, 1, 5},
}
"""By source and question: draws that pass the question's rule but are wrong in what else they say."""

SAMPLERS = [
    Sampler(
        source="smollm2-tutor",
        system_prompt="You are a careful tutor. Give the right answer and explain it in one or two short sentences.",
        temperature=0.6,
        max_new_tokens=80,
        recorded=True,
    ),
    Sampler(
        source="smollm2-brief",
        system_prompt="Answer in one short sentence.",
        temperature=1.0,
        max_new_tokens=80,
        recorded=False,
    ),
]


@dataclass(frozen=True)
class Sample:
    ids: list[int]  # the turn end included, where the model wrote one
    logprobs: list[float]  # one for each of ids
    finish_reason: str  # stop | length

    @property
    def text_ids(self) -> list[int]:
        return self.ids[:-1] if self.finish_reason == "stop" else self.ids


@torch.inference_mode()
def draw(
    model: PreTrainedModel, prompt_ids: list[int], turn_end: int, sampler: Sampler, generator: torch.Generator
) -> list[Sample]:
    """DRAWS independent responses from softmax(logits / temperature), with nothing cut off."""
    ids: list[list[int]] = [[] for _ in range(DRAWS)]
    logprobs: list[list[float]] = [[] for _ in range(DRAWS)]
    step_BT = torch.tensor([prompt_ids] * DRAWS)
    cache = None
    for _ in range(sampler.max_new_tokens):
        output = model(step_BT, past_key_values=cache, use_cache=True, logits_to_keep=1)
        cache = output.past_key_values
        logprobs_BV = torch.log_softmax(output.logits[:, -1].float() / sampler.temperature, dim=-1)
        step_BT = torch.multinomial(logprobs_BV.exp(), 1, generator=generator)
        drawn_B = logprobs_BV.gather(1, step_BT)[:, 0].tolist()
        for row, (token, logprob) in enumerate(zip(step_BT[:, 0].tolist(), drawn_B, strict=True)):
            if turn_end not in ids[row][-1:]:
                ids[row].append(token)
                logprobs[row].append(round(logprob, 5))
        if all(row[-1] == turn_end for row in ids):
            break
    return [
        Sample(row, values, "stop" if row[-1] == turn_end else "length")
        for row, values in zip(ids, logprobs, strict=True)
    ]


def as_messages(prompt: str | list[dict[str, str]]) -> list[dict[str, str]]:
    return [{"role": "user", "content": prompt}] if isinstance(prompt, str) else prompt


def pool_row(
    model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase, question: dict[str, Any], sampler: Sampler
) -> dict[str, Any]:
    """Draws answers to `question` and makes one of them a pool row: a right one if there is any."""
    messages = [{"role": "system", "content": sampler.system_prompt}, *as_messages(question["prompt"])]
    prompt_ids = tokenizer.apply_chat_template(messages, add_generation_prompt=True, return_dict=False)
    seed = hashlib.sha256(f"{sampler.source}/{question['prompt_id']}".encode()).digest()[:6]
    generator = torch.Generator().manual_seed(int.from_bytes(seed, "little"))
    drawn = draw(model, prompt_ids, tokenizer.eos_token_id, sampler, generator)
    texts = [tokenizer.decode(sample.text_ids, clean_up_tokenization_spaces=False) for sample in drawn]
    misread = READ_AND_FOUND_WRONG.get(f"{sampler.source}/{question['prompt_id']}", ())
    right = [number not in misread and is_right(text, question["rule"]) for number, text in enumerate(texts)]
    # max takes the first of equals.
    chosen = max(range(DRAWS), key=lambda number: (right[number], drawn[number].finish_reason == "stop"))
    sample = drawn[chosen]
    row = {
        **{key: question[key] for key in ("prompt_id", "prompt", "topic", "difficulty")},
        "source": sampler.source,
        "response": texts[chosen],
        "correct": right[chosen],
        "finish_reason": sample.finish_reason,
    }
    if sampler.recorded:
        sampling = {"temperature": sampler.temperature, "top_p": 1.0, "top_k": 0}
        row |= {"response_ids": sample.ids, "behavior_logprobs": sample.logprobs, "sampling": sampling}
    return row


def main() -> None:
    prepare_model()
    tokenizer = AutoTokenizer.from_pretrained(DEFAULT_FOLDER)
    model = AutoModelForCausalLM.from_pretrained(DEFAULT_FOLDER, dtype=torch.float32).eval()
    questions = json.loads((HERE / "questions.json").read_text())
    rows = [pool_row(model, tokenizer, question, sampler) for question in questions for sampler in SAMPLERS]
    lines = [json.dumps(row, ensure_ascii=False) + "\n" for row in rows]
    (HERE / "pool" / "sampled.jsonl").write_text("".join(lines))
    for sampler in SAMPLERS:
        own = [row for row in rows if row["source"] == sampler.source]
        right = sum(row["correct"] for row in own)
        cut = sum(row["finish_reason"] == "length" for row in own)
        print(f"{sampler.source}: {len(own)} answers, {right} of them right, {cut} cut at the token limit")


if __name__ == "__main__":
    main()
