"""Small language models made on the spot: the model to train, and those that write the pool.

They share a byte tokenizer and one architecture and differ in what they were trained on and for how long, so
nothing has to be downloaded.
"""

from __future__ import annotations

import random
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from transformers import AutoModelForCausalLM, AutoTokenizer, LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast

from benchmarks.learning.task import Difficulty, Problem, problems, solution, solved

SEPARATOR = "\n"


@dataclass(frozen=True)
class Recipe:
    """How a policy was made."""

    styles: dict[str, float]  # shares of the solutions that it saw
    steps: float  # in units of the size's pretraining steps
    seed: int
    from_policy: str | None = None  # trained further from this one


RECIPES = {
    "target": Recipe({"steps": 0.7, "words": 0.15, "terse": 0.15}, 1.0, seed=1),
    "own": Recipe({"steps": 1.0}, 1.0, seed=2, from_policy="target"),  # the target's own family, further trained
    "words": Recipe({"words": 1.0}, 2.5, seed=3),  # the strongest, in another style
    "terse": Recipe({"terse": 1.0}, 1.0, seed=4),  # short and often wrong
    "verbose": Recipe({"verbose": 1.0}, 1.5, seed=5),  # in many words
}
"""The model to train, and the policies that write candidates."""
LONGEST_FIRST = ("words", "own", "verbose", "terse")
"""The order in which policies are made; the target is made for its own family's."""


STANDARD = Difficulty()


@dataclass(frozen=True)
class ModelSize:
    """Architecture and training of every policy."""

    hidden: int
    layers: int
    heads: int
    pretrain_steps: int
    batch_size: int
    learning_rate: float = 1e-3
    difficulty: Difficulty = STANDARD
    problems: int | None = None  # different ones in pretraining; None: 50 for each row of a batch
    target_steps: int | None = None  # of pretraining at most; None: as its recipe says
    target_stops_at: float | None = None  # accuracy at which its pretraining ends: it comes within a few dozen steps


def make_tokenizer(folder: Path) -> Any:
    """Bytes and an end of text."""
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers

    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    backend = Tokenizer(models.BPE(vocab={symbol: i for i, symbol in enumerate(alphabet)}, merges=[]))
    backend.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)
    backend.decoder = decoders.ByteLevel()
    tokenizer = PreTrainedTokenizerFast(
        tokenizer_object=backend,
        eos_token="<|endoftext|>",
        pad_token="<|endoftext|>",
        clean_up_tokenization_spaces=False,
    )
    tokenizer.save_pretrained(str(folder))
    return tokenizer


def make_policy(name: str, folder: Path, size: ModelSize, device: str) -> Path:
    """Train a policy of RECIPES into folder/name, once; those that it starts from too."""
    target = folder / name
    if (target / "model.safetensors").exists():
        return target
    recipe = RECIPES[name]
    torch.manual_seed(recipe.seed)
    if recipe.from_policy is not None:
        start = make_policy(recipe.from_policy, folder, size, device)
        model = AutoModelForCausalLM.from_pretrained(start, dtype=torch.float32)
        tokenizer = AutoTokenizer.from_pretrained(start)
    else:
        tokenizer = make_tokenizer(target)
        model = LlamaForCausalLM(
            LlamaConfig(
                vocab_size=-(-len(tokenizer) // 8) * 8,
                hidden_size=size.hidden,
                intermediate_size=4 * size.hidden,
                num_hidden_layers=size.layers,
                num_attention_heads=size.heads,
                max_position_embeddings=512,
                bos_token_id=None,
                eos_token_id=tokenizer.eos_token_id,
                pad_token_id=tokenizer.pad_token_id,
                tie_word_embeddings=True,
            )
        )
    stop_at = size.target_stops_at if name == "target" else None
    steps = (size.target_steps if name == "target" else None) or max(1, round(size.pretrain_steps * recipe.steps))
    _pretrain(model.to(device), tokenizer, recipe, size, device, steps, stop_at)
    tokenizer.save_pretrained(str(target))
    model.save_pretrained(str(target))
    return target


def _pretrain(
    model: Any, tokenizer: Any, recipe: Recipe, size: ModelSize, device: str, steps: int, stop_at: float | None
) -> None:
    optimizer = torch.optim.AdamW(model.parameters(), lr=size.learning_rate, weight_decay=0.01)
    schedule = torch.optim.lr_scheduler.OneCycleLR(optimizer, size.learning_rate, total_steps=steps + 1)
    rng = random.Random(recipe.seed)
    pool = problems(size.problems or 50 * size.batch_size, 10_000 + recipe.seed, size.difficulty, held_out=False)
    styles, shares = list(recipe.styles), list(recipe.styles.values())
    asked = problems(200, 20_000 + recipe.seed, size.difficulty, held_out=False) if stop_at is not None else []
    model.train()
    for step in range(1, steps + 1):
        batch = rng.choices(pool, k=size.batch_size)
        texts = [
            f"{problem.prompt}{SEPARATOR}{solution(problem, style)}{tokenizer.eos_token}"
            for problem, style in zip(batch, rng.choices(styles, shares, k=len(batch)), strict=True)
        ]
        encoded = tokenizer(texts, padding=True, return_tensors="pt", return_token_type_ids=False)
        ids = encoded["input_ids"]
        # The pad token is the end of text: of its places only the first after the text has loss.
        labels = ids.masked_fill(encoded["attention_mask"] == 0, -100)
        with torch.autocast(device, torch.bfloat16, enabled=device != "cpu"):
            loss = model(input_ids=ids.to(device), labels=labels.to(device)).loss
        loss.backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        optimizer.zero_grad(set_to_none=True)
        schedule.step()
        if asked and step % 20 == 0:
            model.eval()
            random_state = torch.get_rng_state()
            written = write(model, tokenizer, asked, 64, temperature=0.0, seed=0)
            torch.set_rng_state(random_state)
            model.train()
            if sum(solved(text, problem) for (text, _), problem in zip(written, asked, strict=True)) >= stop_at * 200:
                break
    model.eval()


def answers(
    folder: Path, asked: list[Problem], max_tokens: int, device: str, temperature: float, seed: int
) -> list[tuple[str, bool]]:
    """A response of the model in `folder` to each problem, and whether it came to an end; temperature 0 is greedy."""
    tokenizer = AutoTokenizer.from_pretrained(folder)
    model = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32).to(device).eval()
    return write(model, tokenizer, asked, max_tokens, temperature, seed)


@torch.no_grad()
def write(
    model: Any,
    tokenizer: Any,
    asked: list[Problem],
    max_tokens: int,
    temperature: float,
    seed: int,
    batch_size: int = 512,
) -> list[tuple[str, bool]]:
    """As `answers`, of a model in eval mode."""
    torch.manual_seed(seed)
    sampling: dict[str, Any] = {"do_sample": temperature > 0}
    if temperature > 0:
        sampling |= {"temperature": temperature, "top_k": 0, "top_p": 1.0}
    found: list[tuple[str, bool]] = []
    for batch in _batches(asked, batch_size):
        prompts = [problem.prompt + SEPARATOR for problem in batch]
        encoded = tokenizer(
            prompts, padding=True, padding_side="left", return_tensors="pt", return_token_type_ids=False
        ).to(model.device)
        made = model.generate(**encoded, max_new_tokens=max_tokens, pad_token_id=tokenizer.pad_token_id, **sampling)[
            :, encoded["input_ids"].shape[1] :
        ]
        for row in made.tolist():
            ended = tokenizer.eos_token_id in row
            found.append((tokenizer.decode(row[: row.index(tokenizer.eos_token_id)] if ended else row), ended))
    return found


def _batches(items: list[Problem], size: int) -> list[list[Problem]]:
    return [items[start : start + size] for start in range(0, len(items), size)]
