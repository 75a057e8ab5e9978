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
import multiprocessing
import os
import shutil
from concurrent.futures import ProcessPoolExecutor, as_completed
from pathlib import Path
from typing import Any

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
        write_documents(json.loads(PUBLISHED.read_text()), DOCS)
        return
    if arguments.work is None:
        parser.error("--work names the folder of the experiment")
    if arguments.publish:
        shutil.copyfile(arguments.work / "results.json", PUBLISHED)
        return
    run(arguments.work, arguments.size, arguments.seeds, arguments.arms, arguments.processes)


def run(work: Path, size_name: str, seeds: int | None, names: list[str] | None, processes: int | None) -> None:
    """Every arm and seed that has no result yet; arms that fail are named at the end."""
    import torch

    from benchmarks.learning.experiment import SIZES, Experiment

    size = SIZES[size_name]
    on_gpu = torch.cuda.is_available()
    seeds = seeds or (3 if size_name == "small" else 5)
    arms = [arm for arm in size.arms if names is None or arm.name in names]
    experiment = Experiment(work, size)
    experiment.prepare()
    for arm in arms:  # first, one after the other: each is a run of the service that uses all cores
        for seed in range(seeds if arm.depends_on_seed else 1):
            experiment.release(arm, seed)
    jobs = [(str(work), size_name, arm.name, seed) for seed in range(seeds) for arm in arms]
    failed = []
    count = processes or (1 if on_gpu else len(os.sched_getaffinity(0)))
    with ProcessPoolExecutor(count, mp_context=multiprocessing.get_context("spawn")) as pool:
        futures = {pool.submit(one, *job): job for job in jobs}
        for done in as_completed(futures):
            error = done.exception()
            if error is not None:
                failed.append(f"{futures[done][2]} seed {futures[done][3]}: {type(error).__name__}: {error}")
                continue
            print(json.dumps(done.result()), flush=True)
            raw = collected(work, size_name)
            (work / "results.json").write_text(json.dumps(raw))
            write_documents(raw, work)
    for line in failed:
        print(f"failed: {line}")
    if failed:
        raise SystemExit(1)


def one(work: str, size_name: str, arm_name: str, seed: int) -> dict[str, Any]:
    """An arm and seed, in its own process with one thread where there is no GPU."""
    import torch

    from benchmarks.learning.experiment import SIZES, Experiment

    if not torch.cuda.is_available():
        torch.set_num_threads(1)
    size = SIZES[size_name]
    arm = next(arm for arm in size.arms if arm.name == arm_name)
    return Experiment(Path(work), size).run(arm, seed)


def collected(work: Path, size_name: str) -> dict[str, Any]:
    """All results of a folder, arms in the order of the size, and what they started from."""
    from benchmarks.learning.experiment import SIZES

    order = {arm.name: place for place, arm in enumerate(SIZES[size_name].arms)}
    results = [json.loads(path.read_text()) for path in (work / "results").glob("*.json")]
    results.sort(key=lambda result: (order[result["arm"]], result["seed"]))
    start = json.loads((work / "start.json").read_text())
    return {"size": size_name, "start": start, "results": results}


def write_documents(raw: dict[str, Any], folder: Path) -> None:
    """evidence-table.md and evidence.svg in `folder`."""
    from benchmarks.learning.summary import plot, table

    folder.mkdir(parents=True, exist_ok=True)
    (folder / "evidence-table.md").write_text(table(raw["results"], raw["start"]))
    (folder / "evidence.svg").write_text(plot(raw["results"], raw["start"]))


if __name__ == "__main__":
    main()
