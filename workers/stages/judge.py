"""The judge: a model is asked of every candidate whether it is right, on the actors that sample."""

from __future__ import annotations

from typing import Any

from grape_service.config.gather import VerifyConfig
from grape_service.config.schema import Config, RenderConfig
from grape_service.display import counted
from grape_service.gather.candidates import GatherCounts
from grape_service.gather.judge import Judging, judge_sampling, write_judged, write_questions
from grape_service.gather.missing import Sampling
from grape_service.gather.samples import sampler_id
from grape_service.keys import digest_of
from grape_service.models.files import PolicyFiles
from grape_service.models.tokenizer import load_tokenizer
from grape_service.render.loading import load_renderer
from grape_service.storage.storage import Storage
from workers.cluster.tasks import run_tasks, together
from workers.run import Run
from workers.scoring.engines import Engines
from workers.scoring.failures import FailureLimit
from workers.stages.sample import Budget, sample_missing


def ask_judge(
    run: Run, engines: Engines, name: str, folder: str, candidates: int, budget: Budget
) -> tuple[str, GatherCounts, bool]:
    """Have the judge read the gathered files of a folder: the folder of the same files with its verdicts, counts of
    these, and whether it was asked of all: no limit was met, and no unit failed. What it said before is not asked
    again."""
    config = run.config
    assert config.gather is not None
    verify = config.gather.verify
    judge, render = verify.judge, _render_of(config, verify)
    files = run.files_of(judge)
    renderer = load_renderer(files.folder, judge, render, storage_options=config.storage)
    how = judge_sampling(verify)
    sampler = sampler_id(run.policy_id(judge), how, renderer.stop_ids)
    judging = Judging(verify, sampler, tuple(sorted(renderer.stop_ids)))
    out = f"{folder}-judged-{digest_of([judging.name, renderer.digest(), verify.answer], 16)}"
    gathered = sorted(info.path for info in run.workspace.list(folder))
    names = [path.rsplit("/", 1)[-1] for path in gathered]
    shards = [(name.rsplit("-", 1)[0], f"{out}-questions/{name}", number) for number, name in enumerate(names)]
    shared = {"storage": run.workspace, "model": run.shared_files_of(judge)}
    at_once = together(config.workers, candidates)
    asked = sum(
        run_tasks(
            write_questions_task,
            ({"path": path, "out": shard} for path, (_, shard, _) in zip(gathered, shards, strict=True)),
            config.workers,
            shared={**shared, "verify": verify, "render": render},
            together=at_once,
        )
    )
    sampling = Sampling(sampler, how, 1, judging.stop_ids, VerifyConfig(), None)
    limit = FailureLimit(run, config.workers.max_failed_share, asked, "candidate", f"judged by {verify.model}")
    totals = sample_missing(run, engines, f"judge of {name}", judge, sampling, shards, limit, budget)
    run.event(f"judge of {name}: {counted(totals.rows, 'candidate')} judged now, by {verify.model}")
    if totals.failed:
        run.event(f"judge of {name}: {counted(totals.failed, 'candidate')} could not be judged, and are unknown")
    verdicts = run_tasks(
        write_judged_task,
        (
            {"path": path, "questions": shard, "partition": partition, "out": f"{out}/{shard.rsplit('/', 1)[-1]}"}
            for path, (partition, shard, _) in zip(gathered, shards, strict=True)
        ),
        config.workers,
        shared={**shared, "judging": judging},
        together=at_once,
    )
    return out, sum(verdicts, GatherCounts()), not (totals.failed or budget.met)


def _render_of(config: Config, verify: VerifyConfig) -> RenderConfig:
    """How questions are rendered: by the judge's own template."""
    own: dict[str, Any] = {"chat_template": None, "template_kwargs": {}}
    return config.render.model_copy(
        update={**(own if config.has_own_template(verify.judge) else {}), "max_tokens": None}
    )


def write_questions_task(
    storage: Storage,
    model: PolicyFiles,
    verify: VerifyConfig,
    render: RenderConfig,
    path: str,
    out: str,
) -> int:
    """write_questions with the judge's renderer (a Ray task)."""
    renderer = load_renderer(model.here(), model.policy, render, storage_options=model.options)
    return write_questions(storage, path, out, verify, renderer)


def write_judged_task(
    storage: Storage,
    model: PolicyFiles,
    judging: Judging,
    path: str,
    questions: str,
    partition: str,
    out: str,
) -> GatherCounts:
    """write_judged with the judge's tokenizer (a Ray task)."""
    tokenizer = load_tokenizer(model.here(), model.policy)
    return write_judged(storage, path, questions, partition, judging, tokenizer, out)
