"""Does PEAR help where its weights differ, and does it matter what is selected? The second and the third experiment,
as plan-2.md and plan-3.md register them.

    python -m benchmarks.learning --calibrate --work learning-2/   # what the plan's numbers rest on: no arm
    python -m benchmarks.learning --rates --work learning-2/       # each arm's learning rate, on the pilot
    python -m benchmarks.learning --work learning-2/               # one core; run it again to continue
    python -m benchmarks.learning --work learning-2/ --arms uniform token --seeds 1    # two arms, to compare the digits
    python -m benchmarks.learning --publish --work learning-2/     # finished arms to results-2, and the page again
    python -m benchmarks.learning --table                          # docs/evidence.md again, from the published results
    python -m benchmarks.learning --selection --work learning-3/   # the third, with the same options

Once the learning rates are there a second process can take other seeds: --seeds 1 3 5 in the one, --seeds 2 4 in
the other. The first experiment
is python -m benchmarks.learning.run.
"""

from __future__ import annotations

import argparse
import json
import shutil
from pathlib import Path
from typing import Any

from benchmarks.learning.chains import summary as weights_summary
from benchmarks.learning.selection import summary as selection_summary

PAGE = Path(__file__).resolve().parents[2] / "docs" / "evidence.md"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--work", type=Path, help="Folder of policies, pools and results.")
    parser.add_argument("--seeds", type=int, nargs="+", help="Default: those of the plan, one after the other.")
    parser.add_argument("--arms", nargs="+", help="Names as in the table; default: all.")
    parser.add_argument("--selection", action="store_true", help="The third experiment instead of the second.")
    parser.add_argument("--calibrate", action="store_true", help="Only what the plan's numbers rest on; no arm.")
    parser.add_argument("--rates", action="store_true", help="Only the learning rates, on the pilot.")
    parser.add_argument("--table", action="store_true", help="Only make the page again.")
    parser.add_argument("--publish", action="store_true", help="Only publish finished arms, and make the page again.")
    arguments = parser.parse_args()
    if arguments.table:
        renew_page()
        return
    if arguments.work is None:
        parser.error("--work names the folder of the experiment")
    published = selection_summary.PUBLISHED if arguments.selection else weights_summary.PUBLISHED
    if arguments.publish:
        publish(arguments.work, published)
        return
    if arguments.selection:
        if arguments.calibrate:
            parser.error("the numbers of the third experiment are those of the second")
        from benchmarks.learning.selection.trial import PLAN as SELECTION_PLAN
        from benchmarks.learning.selection.trial import Selections

        experiment, seeds = Selections(arguments.work, SELECTION_PLAN), SELECTION_PLAN.seeds
    else:
        from benchmarks.learning.chains.trial import PLAN, Trials

        experiment, seeds = Trials(arguments.work, PLAN), PLAN.seeds
    if arguments.calibrate:
        from benchmarks.learning.chains.calibrate import calibrate

        calibrate(experiment)
        return
    from benchmarks.learning.chains.schedule import run

    run(experiment, published, [] if arguments.rates else arguments.seeds or seeds, arguments.arms)


def renew_page() -> None:
    """docs/evidence.md with the published results of both experiments."""
    weights_summary.renew_page(PAGE)
    selection_summary.renew_page(PAGE)


def publish(work: Path, published: Path) -> None:
    """Copy what is finished, and make the page again; a result that is published already has to be the same."""
    for path in sorted(work.glob("rates/*.json")) + sorted(work.glob("arms/*.json")):
        target = published / path.parent.name / path.name
        target.parent.mkdir(parents=True, exist_ok=True)
        if not target.exists():
            shutil.copyfile(path, target)
            print(f"published {path.name}")
        elif figures(path) != figures(target):
            raise SystemExit(f"{target} is published with other figures than {path}")
        else:
            print(f"{path.name} has the published figures")
    renew_page()


def figures(path: Path) -> Any:
    """A result without how long it took."""

    def without_seconds(value: Any) -> Any:
        if isinstance(value, dict):
            return {key: without_seconds(inner) for key, inner in value.items() if key != "cpu_seconds"}
        return value

    return without_seconds(json.loads(path.read_text()))


if __name__ == "__main__":
    main()
