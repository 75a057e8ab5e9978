"""The papers' formulas as a plain script: transformers, float64, Python loops. It shares no code with the project.

    python tests/plain_formulas.py MODEL < rows.jsonl

Each line has input_ids, loss_mask (0 or 1), counted (0 or 1: the response's own tokens) and, for `steps`, starts (0 or
1: the first token of a step); each line of the answer has the numbers of every method.
"""

import json
import math
import sys

import torch
from transformers import AutoModelForCausalLM


def entropy(values: list[float]) -> float:
    largest = max(values)
    total = math.fsum(math.exp(value - largest) for value in values)
    return -math.fsum(math.exp(value - largest) / total * (value - largest - math.log(total)) for value in values)


def methods(model: torch.nn.Module, row: dict[str, list[int]]) -> dict[str, object]:
    with torch.no_grad():
        logits = model(torch.tensor([row["input_ids"]])).logits[0].double().tolist()
    log_p, ranks, entropies, tops, counts, goes_on = [], [], [], [], [], []
    for place in range(1, len(row["input_ids"])):
        if not row["loss_mask"][place]:
            continue
        before, token = logits[place - 1], row["input_ids"][place]
        largest = max(before)
        log_p.append(before[token] - largest - math.log(math.fsum(math.exp(value - largest) for value in before)))
        ranks.append(1 + sum(1 for value in before if value > before[token]))
        entropies.append(entropy(before))
        tops.append(entropy(sorted(before)[-20:]))
        counts.append(row["counted"][place])
        goes_on.append(row["counted"][place] and not row.get("starts", row["counted"])[place])
    own = [place for place, counted in enumerate(counts) if counted]
    later = [value for value, goes in zip(log_p, goes_on, strict=True) if goes]
    return {
        "logprob": log_p,
        "rank": ranks,
        "entropy": entropies,
        "top20_entropy": tops,
        # 2502.04194: length-normalised log-likelihood, the largest
        "grape": sum(log_p[place] for place in own) / len(own),
        # 2601.14249: clipped ranks over surprisal, the smallest
        "rsr": sum(min(ranks[place], 100) for place in own) / sum(-log_p[place] for place in own),
        # 2602.12222: surprisal less its expectation, the largest
        "surprise": sum(log_p[place] + entropies[place] for place in own) / len(own),
        # 2604.06834: length-normalised log-likelihood without the first token of each step, the largest
        "steps": sum(later) / len(later) if later else None,
        # 2606.09396: the probability of the token
        "probability": [math.exp(max(-10.0, min(5.0, value))) for value in log_p],
        # 2601.02151: the entropy of the 20 most probable, over the scale 3
        "entropy_weights": [
            math.exp(max(-10.0, min(5.0, math.log(top / 3.0)))) if top > 0 else math.exp(-10) for top in tops
        ],
    }


if __name__ == "__main__":
    scored_by = AutoModelForCausalLM.from_pretrained(sys.argv[1], dtype=torch.float32).eval()
    for line in sys.stdin:
        print(json.dumps(methods(scored_by, json.loads(line))))
