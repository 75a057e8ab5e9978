"""Rendering against the bare tokenizer: what templates, masks and assembly cost on top.

    python benchmarks/rendering.py FOLDER [--prompts 2000] [--candidates 8]

FOLDER holds a tokenizer with a chat template. The bare tokenizer encodes each prompt's text once and each
response once, and nothing else.
"""

from __future__ import annotations

import argparse
import random
import time
from collections.abc import Callable

from grape_service.config.policy import PolicyConfig
from grape_service.config.schema import RenderConfig
from grape_service.render.loading import load_renderer
from grape_service.render.renderer import Renderer
from grape_service.rows.candidate import Candidate

SENTENCE = (
    "the number of eggs is twice what each hen lays in a week so we add them and then divide by two which gives "
    "us an answer that we check again with x = 12 and y = 7, because 12 * 7 = 84. Therefore, it follows that"
)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("folder")
    parser.add_argument("--prompts", type=int, default=2000)
    parser.add_argument("--candidates", type=int, default=8)
    parser.add_argument("--words", type=int, default=100, help="words of a response, on average")
    parser.add_argument("--batch", type=int, default=1024, help="candidates a call")
    parser.add_argument("--rounds", type=int, default=5)
    arguments = parser.parse_args()
    renderer = load_renderer(arguments.folder, PolicyConfig(model=arguments.folder), RenderConfig())
    pool = made_up_pool(arguments.prompts, arguments.candidates, arguments.words)
    batches = [pool[start : start + arguments.batch] for start in range(0, len(pool), arguments.batch)]
    bare_seconds, render_seconds = [], []
    for _ in range(arguments.rounds):
        bare_seconds.append(seconds(lambda batch: encode_bare(renderer, batch), batches))
        render_seconds.append(seconds(renderer.render, batches))
    tokens = sum(len(row.input_ids) for batch in batches for row in renderer.render(batch))
    bare, rendered = min(bare_seconds), min(render_seconds)
    print(f"{len(pool)} candidates, {tokens / len(pool):.0f} tokens each, {arguments.candidates} a prompt")
    print(f"bare tokenizer {bare:.2f} s, rendering {rendered:.2f} s: {rendered / bare - 1:.0%} on top")
    print(f"{len(pool) / rendered:,.0f} candidates/s, {tokens / rendered:,.0f} tokens/s")


def made_up_pool(num_prompts: int, num_candidates: int, mean_words: int) -> list[Candidate]:
    """Candidates of random words, those of a prompt next to each other."""
    generator = random.Random(0)
    words = SENTENCE.split()

    def text(mean: int) -> str:
        return " ".join(generator.choices(words, k=generator.randint(mean // 2, mean * 3 // 2)))

    pool = []
    for prompt in range(num_prompts):
        messages = [{"role": "user", "content": text(40)}]
        pool += [Candidate(messages, text(mean_words), str(prompt), str(index)) for index in range(num_candidates)]
    return pool


def encode_bare(renderer: Renderer, batch: list[Candidate]) -> None:
    backend = renderer.tokenizer.backend_tokenizer
    prompts = list(dict.fromkeys(candidate.prompt[0]["content"] for candidate in batch))
    backend.encode_batch_fast([*prompts, *(candidate.response for candidate in batch)], add_special_tokens=False)


def seconds(function: Callable[[list[Candidate]], object], batches: list[list[Candidate]]) -> float:
    start = time.perf_counter()
    for batch in batches:
        function(batch)
    return time.perf_counter() - start


if __name__ == "__main__":
    main()
