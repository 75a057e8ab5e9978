"""Samples answers from a vLLM or SGLang server and writes pool rows with their token ids and log-probabilities.

    python examples/recording/record.py vllm http://127.0.0.1:8000 MODEL prompts.jsonl >pool.jsonl

Each line of prompts.jsonl is {"prompt": "..."}. Nothing but Python is needed.
"""

from __future__ import annotations

import json
import sys
import urllib.request
from typing import Any

SAMPLING = {"temperature": 1.0, "top_p": 1.0, "top_k": -1}
MAX_TOKENS = 256


def post(address: str, body: dict[str, Any]) -> dict[str, Any]:
    """The answer to a JSON body."""
    request = urllib.request.Request(address, json.dumps(body).encode(), {"Content-Type": "application/json"})
    with urllib.request.urlopen(request, timeout=600) as answer:
        return json.load(answer)


def from_vllm(address: str, model: str, prompt: str) -> dict[str, Any]:
    """A row from vLLM's chat completions; `return_token_ids` gives the ids as they were sampled."""
    asked = {"model": model, "messages": [{"role": "user", "content": prompt}], "max_tokens": MAX_TOKENS}
    asked |= {**SAMPLING, "logprobs": True, "return_token_ids": True, "skip_special_tokens": True}
    choice = post(f"{address}/v1/chat/completions", asked)["choices"][0]
    return {
        "response": choice["message"]["content"],
        "response_ids": choice["token_ids"],
        "behavior_logprobs": [token["logprob"] for token in choice["logprobs"]["content"]],
        "finish_reason": choice["finish_reason"],
        "sampling": {
            **SAMPLING,
            "logprobs": "raw",
        },  # "processed" where the server has --logprobs-mode processed_logprobs
    }


def from_sglang(address: str, model: str, prompt: str) -> dict[str, Any]:
    """A row from SGLang's /generate, which takes the prompt's tokens: `model` is what its tokenizer is loaded from."""
    from transformers import AutoTokenizer

    tokenizer = AutoTokenizer.from_pretrained(model)
    chat = [{"role": "user", "content": prompt}]
    ids = tokenizer.apply_chat_template(chat, add_generation_prompt=True, return_dict=True)["input_ids"]
    asked = {"input_ids": ids, "sampling_params": {**SAMPLING, "max_new_tokens": MAX_TOKENS}, "return_logprob": True}
    answer = post(f"{address}/generate", asked)
    tokens = answer["meta_info"]["output_token_logprobs"]  # of each token: log-probability, id, text
    return {
        "response": answer["text"],
        "response_ids": [token[1] for token in tokens],
        "behavior_logprobs": [token[0] for token in tokens],
        "finish_reason": answer["meta_info"]["finish_reason"]["type"],
        "sampling": {**SAMPLING, "logprobs": "raw"},
    }


def main(server: str, address: str, model: str, prompts: str) -> None:
    """A row for each prompt on standard output."""
    record = {"vllm": from_vllm, "sglang": from_sglang}[server]
    with open(prompts, encoding="utf-8") as file:
        for line in file:
            prompt = json.loads(line)["prompt"]
            print(json.dumps({"prompt": prompt, "source": model, **record(address, model, prompt)}, ensure_ascii=False))


if __name__ == "__main__":
    main(*sys.argv[1:])
