"""The arms: which candidates are selected and how their tokens are weighed."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any


@dataclass(frozen=True)
class Arm:
    """One way to make the training set."""

    select: str  # as select.method of the config
    weights: str = "uniform"  # a key of WEIGHTS

    @property
    def name(self) -> str:
        return f"{self.select.replace(':', '-')}+{self.weights}"

    @property
    def dataset(self) -> str:
        """The arm's name as a dataset name."""
        return self.name.replace("+", "-")

    @property
    def depends_on_seed(self) -> bool:
        """Whether its training set does."""
        return self.select == "random"


WEIGHTS: dict[str, dict[str, Any] | None] = {
    "uniform": None,
    "sequence": {"method": "pear", "level": "sequence"},
    "token": {"method": "pear", "level": "token"},
    "block": {"method": "pear", "level": "block"},
    "token-centered": {"method": "pear", "level": "token", "center": "sequence"},
    "block-centered": {"method": "pear", "level": "block", "center": "sequence"},
    "probability": {"method": "probability"},
    "entropy": {"method": "entropy"},
}
"""The weights section of the config; the sequence level refuses center, which would erase its weights."""

SELECT_METHODS = ("all", "random", "longest", "source:words", "grape", "rsr", "surprise")
"""With uniform weights each; source:words is the strongest source."""

SCORED = ("grape", "rsr", "surprise")
"""Those that need scores."""

CPU_ARMS = [
    *(Arm(method) for method in SELECT_METHODS),
    *(Arm(select, weights) for select in ("grape", "all") for weights in WEIGHTS if weights != "uniform"),
]
GPU_ARMS = [
    *(Arm(method) for method in ("grape", "random", "longest", "source:words")),
    *(Arm(select, weights) for select in ("grape", "random") for weights in ("sequence", "token", "block")),
]
