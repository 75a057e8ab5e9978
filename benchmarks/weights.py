"""How fast the weights are made: tokens per second of one core, by level and length of response.

python benchmarks/weights.py
"""

from __future__ import annotations

import argparse
import time

import numpy as np

from grape_service.config.methods import WeightsConfig
from grape_service.rows.ragged import offsets_from_lengths
from grape_service.weigh.pear import pear_weights

SETTINGS: list[tuple[str, WeightsConfig]] = [
    ("token", WeightsConfig()),
    ("token, center and normalize", WeightsConfig.model_validate({"center": "sequence", "normalize": "sequence"})),
    ("block of 4", WeightsConfig.model_validate({"level": "block"})),
    ("sequence", WeightsConfig.model_validate({"level": "sequence"})),
]


def main() -> None:
    """Prints one line for each level and length; the best of `--repeat` runs counts."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0] if __doc__ else None)
    parser.add_argument("--tokens", type=int, default=10_000_000)
    parser.add_argument("--repeat", type=int, default=3)
    arguments = parser.parse_args()
    generator = np.random.default_rng(0)
    ratios = generator.normal(0.02, 0.2, arguments.tokens)
    for mean_length in (50, 400, 100_000):
        lengths = generator.poisson(mean_length, 1 + arguments.tokens // mean_length)
        offsets = np.minimum(offsets_from_lengths(lengths), arguments.tokens)
        for name, config in SETTINGS:
            seconds = []
            for _ in range(arguments.repeat):
                start = time.process_time()
                pear_weights(ratios[: offsets[-1]], offsets, config)
                seconds.append(time.process_time() - start)
            rate = offsets[-1] / min(seconds) / 1e6
            print(f"{name:28} responses of {mean_length:6} tokens  {rate:6.1f} million tokens/s")


if __name__ == "__main__":
    main()
