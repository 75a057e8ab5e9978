"""What the plan's numbers rest on: the pilot alone, and none of its arms.

The pilot's target learns from right solutions that the task wrote in the teacher's forms, which stands in for SFT on
the pool, and then goes through RL at each learning rate that is looked at.
"""

from __future__ import annotations

import copy
import json
import random
import time
from collections.abc import Sequence
from dataclasses import replace

import numpy as np

from benchmarks.learning.chains.measures import Evaluation, skill
from benchmarks.learning.chains.models import Written, read
from benchmarks.learning.chains.policies import write_whole
from benchmarks.learning.chains.task import problems, solution
from benchmarks.learning.chains.training import Rows, grpo, sft
from benchmarks.learning.chains.trial import PILOT, Trials

RL_RATES = (3e-4, 1e-4)
RL_STEPS = 240


def calibrate(trials: Trials, rates: Sequence[float] = RL_RATES, steps: int = RL_STEPS) -> None:
    """Write WORK/calibration.json, from its parts where they are there; about half an hour of one quiet core."""
    plan = trials.plan
    found = {"start": trials.start(PILOT)}
    print(json.dumps(found["start"]), flush=True)
    rng = random.Random(PILOT)
    asked = problems(plan.sizes.train_rows, 6000, plan.sizes.pool)
    responses = [Written(solution(problem, plan.sizes.teacher.forms, rng), True) for problem in asked]
    ones = [np.ones(response.length) for response in responses]
    rows = Rows([problem.prompt for problem in asked], responses, ones, ones)
    model = copy.deepcopy(trials.setting(PILOT).target)
    started = time.process_time()
    sft(model, rows, None, max(plan.rates), PILOT, plan.sft)
    found["stand_in"] = {
        "seconds": round(time.process_time() - started),
        "nll": round(-float(read(model, rows.prompts[:128], responses[:128]).mean()), 4),
        "skills": {name: trials.skill(model, kind) for name, kind in plan.kinds().items()},
    }
    print(json.dumps(found["stand_in"]), flush=True)
    for rate in rates:
        path = trials.folder / f"calibration-rl-{rate:g}.json"
        if not path.exists():
            trained = copy.deepcopy(model)
            sizes = replace(plan.rl, learning_rate=rate, steps=steps, measure_every=steps)
            metrics = grpo(trained, problems(plan.rl_problems, 7000, plan.sizes.pool), PILOT, sizes, lambda step: None)
            tens = [metrics[start : start + 10] for start in range(0, steps, 10)]
            means = {
                key: [round(float(np.mean([one[key] for one in some])), 3) for some in tens]
                for key in ("reward", "length", "useful", "grad_norm", "seconds")
            }
            end = skill(trained, Evaluation(plan.sizes.pool, trials.tests), model)
            write_whole(path, json.dumps({"rate": rate, "means_of_ten_steps": means, "end": end}))
        found[f"rl_{rate:g}"] = json.loads(path.read_text())
        print(json.dumps(found[f"rl_{rate:g}"]), flush=True)
    write_whole(trials.folder / "calibration.json", json.dumps(found, indent=1) + "\n")
