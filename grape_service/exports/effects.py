"""What becomes of the weights in each trainer: its gradient against that of sum(w * nll) / tokens with loss.

tests/grape_service/exports/test_matrix.py measures each entry with the trainer's own code; docs/exports.md is the
same table for people.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

Level = Literal["uniform", "sequence", "token"]
"""How weights vary: not at all, from row to row, or within a row (from token to token or block to block)."""
LEVELS: tuple[Level, ...] = ("uniform", "sequence", "token")


@dataclass(frozen=True)
class Effect:
    """A trainer's gradient at one level of weights."""

    gradient: Literal["equal", "factor", "changed"]
    how: str = ""  # which factor, or what changes it

    @property
    def words(self) -> str:
        """As part of a sentence."""
        if self.gradient == "equal":
            return "its gradient is that of sum(w * nll) / tokens with loss"
        if self.gradient == "factor":
            return f"its gradient is that of sum(w * nll) / tokens with loss times {self.how}"
        return f"its gradient is not that of sum(w * nll) / tokens with loss: {self.how}"


EQUAL = Effect("equal")
OVER_WEIGHTS = Effect("factor", "(tokens with loss) / (sum of weights) of each batch")
OVER_WHOLE_WEIGHTS = Effect("factor", "(tokens with loss) / (sum of weights, cut to a whole number) of each batch")
IGNORED = Effect("changed", "it takes every weight as 1")
REPEATED = Effect("changed", "a row's mean weight is how often it occurs, and all tokens of a row weigh the same")
REPEATED_SEQUENCES = Effect("changed", "a row's weight is how often it occurs, so it is right in the mean over rows")
PER_MICRO_BATCH = Effect(
    "changed",
    "it divides each micro-batch by the sum of its weights, and gives all tokens of a message the row's mean weight",
)
ALL_EQUAL: dict[Level, Effect] = {"uniform": EQUAL, "sequence": EQUAL, "token": EQUAL}


def _weights_are_repeats(uniform: Effect) -> dict[Level, Effect]:
    return {"uniform": uniform, "sequence": REPEATED_SEQUENCES, "token": REPEATED}


def own_tokens(what: str) -> Effect:
    """A trainer that makes its own tokens of the messages."""
    return Effect("changed", f"it makes its own tokens of the messages, and {what}")


EFFECTS: dict[str, dict[Level, Effect]] = {
    "trl": ALL_EQUAL,
    "verl": ALL_EQUAL,
    "ms-swift": ALL_EQUAL,
    "tinker": ALL_EQUAL,
    "llamafactory-v1": ALL_EQUAL,
    "megatron-bridge": ALL_EQUAL,
    "axolotl": _weights_are_repeats(EQUAL),
    "openrlhf": _weights_are_repeats(EQUAL),
    "llamafactory": _weights_are_repeats(own_tokens("has loss on what its template puts after a turn end")),
}
"""With the code that the export puts beside the data, where it puts some."""

PLAIN_EFFECTS: dict[str, dict[Level, Effect]] = {
    "trl": {"uniform": EQUAL, "sequence": IGNORED, "token": IGNORED},
    "verl": {"uniform": EQUAL, "sequence": OVER_WEIGHTS, "token": OVER_WEIGHTS},
    "llamafactory-v1": {
        "uniform": own_tokens("has loss on what its template puts around a turn"),
        "sequence": PER_MICRO_BATCH,
        "token": PER_MICRO_BATCH,
    },
    "megatron-bridge": {"uniform": EQUAL, "sequence": OVER_WHOLE_WEIGHTS, "token": OVER_WHOLE_WEIGHTS},
    "tinker": {
        level: Effect("factor", "(tokens with loss) of each batch: its server adds up and does not divide")
        for level in LEVELS
    },
}
"""With the trainer's own entry point or loss instead."""
