"""Does what is written down as better train better models? A controlled experiment.

    python -m benchmarks.learning.run --size cpu --work learning/      # two cores, under 4 hours
    python -m benchmarks.learning.run --size small --work learning/    # one GPU
    python -m benchmarks.learning.run --table                          # table and plot again, from the raw results

Run the same command again after an interruption: it resumes. Raw results go to WORK/results.json, table and plot
beside it; --publish copies the raw results of the CPU size to benchmarks/learning/results-cpu.json.
"""

from __future__ import annotations

import argparse
import json
import shutil
from pathlib import Path

from benchmarks.learning.summary import renew_page

HERE = Path(__file__).resolve().parent
PUBLISHED = HERE / "results-cpu.json"
DOCS = HERE.parents[1] / "docs"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--work", type=Path)
    parser.add_argument("--size", choices=("cpu", "small", "tiny"), default="cpu")
    parser.add_argument("--seeds", type=int)
    parser.add_argument("--arms", nargs="+", help="Names as in the table, such as grape+uniform; default: all.")
    parser.add_argument("--processes", type=int, help="Arms at the same time; default: the cores, on a GPU one.")
    parser.add_argument("--table", action="store_true", help="Only make table and plot from the published results.")
    parser.add_argument("--publish", action="store_true", help="Publish the raw results of this folder.")
    arguments = parser.parse_args()
    if arguments.table:
        renew_page(json.loads(PUBLISHED.read_text()), DOCS / "evidence.md", DOCS / "evidence.svg")
        return
    if arguments.work is None:
        parser.error("--work names the folder of the experiment")
    if arguments.publish:
        shutil.copyfile(arguments.work / "results.json", PUBLISHED)
        return
    from benchmarks.learning.schedule import run

    run(arguments.work, arguments.size, arguments.seeds, arguments.arms, arguments.processes, PUBLISHED)


if __name__ == "__main__":
    main()
