"""Does what is written down as better train better models? A controlled experiment on one GPU.

    python -m benchmarks.learning.run --work learning/ [--seeds 3] [--arms grape+uniform random+uniform] [--size tiny]

Go on with the same command after an interruption. Writes table.md and plot.svg into the folder.
"""

from __future__ import annotations

import argparse
import json
from pathlib import Path

from benchmarks.learning.experiment import ARMS, SMALL, TINY, Experiment
from benchmarks.learning.summary import plot, table


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--work", type=Path, required=True)
    parser.add_argument("--size", choices=("small", "tiny"), default="small")
    parser.add_argument("--seeds", type=int, default=3)
    parser.add_argument("--arms", nargs="+", choices=[arm.name for arm in ARMS], default=[arm.name for arm in ARMS])
    arguments = parser.parse_args()
    experiment = Experiment(arguments.work, SMALL if arguments.size == "small" else TINY)
    experiment.prepare()
    start = json.loads((arguments.work / "start.json").read_text())
    results = []
    for seed in range(arguments.seeds):
        for arm in (arm for arm in ARMS if arm.name in arguments.arms):
            results.append(experiment.run(arm, seed))
            print(json.dumps(results[-1]), flush=True)
            (arguments.work / "table.md").write_text(table(results, start))
            (arguments.work / "plot.svg").write_text(plot(results, start))
    print(table(results, start))


if __name__ == "__main__":
    main()
