"""Does PEAR help where its weights differ? The second experiment, as plan-2.md registers it.

    python -m benchmarks.learning --calibrate --work learning-2/   # what the plan's numbers rest on: no arm
    python -m benchmarks.learning --rates --work learning-2/       # each arm's learning rate, on the pilot
    python -m benchmarks.learning --work learning-2/               # one core; run it again to continue
    python -m benchmarks.learning --work learning-2/ --arms uniform token --seeds 1    # two arms, to compare the digits
    python -m benchmarks.learning --publish --work learning-2/     # finished arms to results-2, and the page again
    python -m benchmarks.learning --table                          # docs/evidence.md again, from the published results

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

from benchmarks.learning.chains.summary import PUBLISHED, renew_page

DOCS = Path(__file__).resolve().parents[2] / "docs"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--work", type=Path, help="Folder of policies, pools and results.")
    parser.add_argument("--seeds", type=int, nargs="+", help="Default: those of the plan, one after the other.")
    parser.add_argument("--arms", nargs="+", help="Names as in the table; default: all.")
    parser.add_argument("--calibrate", action="store_true", help="Only what the plan's numbers rest on; no arm.")
    parser.add_argument("--rates", action="store_true", help="Only the learning rates, on the pilot.")
    parser.add_argument("--table", action="store_true", help="Only make the page again.")
    parser.add_argument("--publish", action="store_true", help="Only publish finished arms, and make the page again.")
    arguments = parser.parse_args()
    if arguments.table:
        renew_page(DOCS / "evidence.md")
        return
    if arguments.work is None:
        parser.error("--work names the folder of the experiment")
    if arguments.publish:
        publish(arguments.work)
        return
    from benchmarks.learning.chains.schedule import calibrate_pilot, run

    if arguments.calibrate:
        calibrate_pilot(arguments.work)
        return
    run(arguments.work, [] if arguments.rates else arguments.seeds, arguments.arms)


def publish(work: Path) -> None:
    """Copy what is finished, and make the page again; a result that is published already has to be the same."""
    for path in sorted(work.glob("rates/*.json")) + sorted(work.glob("arms/*.json")):
        target = PUBLISHED / path.parent.name / path.name
        target.parent.mkdir(parents=True, exist_ok=True)
        if not target.exists():
            shutil.copyfile(path, target)
            print(f"published {path.name}")
        elif figures(path) != figures(target):
            raise SystemExit(f"{target} is published with other figures than {path}")
        else:
            print(f"{path.name} has the published figures")
    renew_page(DOCS / "evidence.md")


def figures(path: Path) -> Any:
    """A result without how long it took."""

    def without_seconds(value: Any) -> Any:
        if isinstance(value, dict):
            return {key: without_seconds(inner) for key, inner in value.items() if key != "cpu_seconds"}
        return value

    return without_seconds(json.loads(path.read_text()))


if __name__ == "__main__":
    main()
