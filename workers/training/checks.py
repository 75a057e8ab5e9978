"""What a training job would fail on, found before it costs anything: by `grape check`, and before the first stage.

Each mistake is one sentence that names the key. What lies on a cluster's nodes (packages, models, a reward's module) is
known there alone, and a job of our own that finds it wrong is not tried again.
"""

from __future__ import annotations

import importlib.util
import itertools
import os
from dataclasses import fields
from pathlib import Path

from grape_service.config.jobs import Resources
from grape_service.config.training import Job, RlJob, SftJob, Stage, require_train_extra
from grape_service.display import nearest
from grape_service.errors import UserError
from grape_service.pool.listing import list_files
from grape_service.pool.reader import Segment, SegmentReader
from grape_service.release.load import Release
from grape_service.storage.options import StorageOptions
from grape_service.storage.probe import check_writable
from grape_service.storage.storage import Storage
from workers.cluster.jobs import JobServer, num_local_gpus
from workers.cluster.ray import usable_cores
from workers.training.batch_split import split_of
from workers.training.reward_functions import imported

LOOK_ROWS = 32
"""Rows at the beginning of a pool that say which columns it has."""
ARCHIVES = (".zip", ".tar.gz", ".tgz", ".tar.xz")
"""Files that Ray unpacks as a working folder."""
MAX_WORKING_DIR_BYTES = 100 * 2**20
"""What a Ray head takes as one upload."""


def refuse_settings(jobs: dict[Stage, Job], on_cluster: bool, where: str) -> None:
    """Raises UserError for what the sections and this machine say; `where` names the cluster, in words."""
    sft, rl = jobs.get("sft"), jobs.get("rl")
    if (
        isinstance(sft, SftJob)
        and sft.lora is not None
        and not sft.lora.merge
        and rl is not None
        and rl.kind == "builtin"
    ):
        raise UserError(
            "train.sft.lora.merge: false leaves an adapter, and RL starts from a whole model: set it to true "
            "(the adapter is kept beside the model)"
        )
    for stage, job in jobs.items():
        key = f"train.{stage}"
        if job.kind in ("builtin", "command"):
            _refuse_working_dir(key, job.working_dir)
        if on_cluster:
            _refuse_on_cluster(key, job, where)
        elif job.kind in ("builtin", "command"):
            _refuse_here(key, job)
        if job.kind == "builtin":
            _refuse_batch(key, job)


def refuse_outputs(jobs: dict[Stage, Job], on_cluster: bool, options: StorageOptions) -> None:
    """Raises UserError where a folder that a section names cannot be written: RL's is needed when SFT has ended. A
    local folder is the nodes' own where the jobs run on a cluster."""
    for stage, job in jobs.items():
        if job.output and (job.output.startswith("s3://") or not on_cluster):
            try:
                check_writable(Storage(job.output, options))
            except UserError as error:
                raise UserError(f"train.{stage}.output: {error}") from None


def _refuse_on_cluster(key: str, job: Job, where: str) -> None:
    if job.kind == "builtin" and job.resources.gpus is None:
        raise UserError(f"{key}.resources.gpus: say how many GPUs the job on {where} takes, or 0")
    if job.output and "://" not in job.output and not os.path.isabs(os.path.expanduser(job.output)):
        raise UserError(
            f"{key}.output: '{job.output}' is relative, and the job runs on {where}: give an s3:// folder, or the full "
            "path of one that every node has"
        )


def _refuse_here(key: str, job: Job) -> None:
    """What a private Ray on this machine cannot do."""
    here = {
        "CPU": 2.0 * usable_cores(),
        "GPU": float(num_local_gpus() if job.resources.gpus else 0),
        "memory": float(os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")),
    }
    _refuse_resources(f"{key}.resources", job.resources, [here], "this machine")
    if job.kind != "builtin" or job.pip:
        return
    _refuse_trainer_settings(key, job)
    rewards = job.rewards if isinstance(job, RlJob) else []
    require_train_extra(*(["math_verify"] if any(reward.type == "math" for reward in rewards) else []))
    for reward in rewards:
        if reward.function is not None:
            imported(reward.function, job.working_dir)


def _refuse_batch(key: str, job: Job) -> None:
    """What cannot be split over the processes, one on each GPU."""
    gpus = num_local_gpus() if job.resources.gpus is None else job.resources.gpus
    try:
        split_of(job.own_settings(), max(1, gpus))
    except UserError as error:
        raise UserError(f"{key}: {error}") from None


def _refuse_trainer_settings(key: str, job: Job) -> None:
    """What transformers and TRL would refuse here: looked at where the settings are others than the default."""
    has_gpu = job.device == "auto" and num_local_gpus() > 0
    if job.optimizer != "adamw_torch":
        from transformers.training_args import OptimizerNames

        names = [name.value for name in OptimizerNames]
        if job.optimizer not in names:
            raise UserError(f"{key}.optimizer: there is no '{job.optimizer}'; {nearest(job.optimizer, names, most=3)}")
        if _is_of_bitsandbytes(job.optimizer) and importlib.util.find_spec("bitsandbytes") is None:
            raise UserError(
                f"{key}.optimizer: {job.optimizer} needs the package bitsandbytes: pip install bitsandbytes"
            )
    if job.attention == "flash_attention_2" and not (has_gpu and importlib.util.find_spec("flash_attn")):
        raise UserError(f"{key}.attention: flash_attention_2 needs a GPU and the package flash-attn: use sdpa")
    if not isinstance(job, RlJob):
        return
    if job.rollouts == "vllm" and not (has_gpu and importlib.util.find_spec("vllm")):
        raise UserError(f"{key}.rollouts: vllm needs a GPU and vLLM in the job's environment; use transformers")
    if job.extra:
        from trl import GRPOConfig

        known = [field.name for field in fields(GRPOConfig)]
        for name in job.extra:
            if name not in known:
                raise UserError(f"{key}.extra: trl.GRPOConfig has no '{name}'; {nearest(name, known, most=3)}")


def _is_of_bitsandbytes(optimizer: str) -> bool:
    """By transformers' names."""
    return "bnb" in optimizer or optimizer.startswith(("paged_", "lion_", "ademamix", "adamw_8bit"))


def _refuse_working_dir(key: str, folder: str | None) -> None:
    if folder is None or "://" in folder:
        return
    path = Path(folder).expanduser()
    if not path.exists():
        raise UserError(f"{key}.working_dir: there is no '{folder}': give a folder, or the address of a .zip")
    if path.is_file() and not path.name.endswith(ARCHIVES):
        raise UserError(f"{key}.working_dir: '{folder}' is a file: give a folder, or one of {', '.join(ARCHIVES)}")
    size = packed_bytes(path)
    if size > MAX_WORKING_DIR_BYTES:
        raise UserError(
            f"{key}.working_dir: '{folder}' holds {size >> 20:,} MiB, and Ray takes {MAX_WORKING_DIR_BYTES >> 20}: "
            "name what the job does not need in a .rayignore there, or give the address of a .zip in storage"
        )


def packed_bytes(path: Path) -> int:
    """Bytes of the files that Ray packs of a working folder: those that .gitignore and .rayignore leave."""
    if path.is_file():
        return path.stat().st_size
    from ray._private.runtime_env.packaging import _dir_travel

    sizes: list[int] = []
    _dir_travel(path, [], lambda file: sizes.append(file.stat().st_size if file.is_file() else 0), True)
    return sum(sizes)


def refuse_resources_of(server: JobServer, jobs: dict[Stage, Job]) -> None:
    """Raises UserError where no node of a cluster that does not grow has what a job asks for."""
    nodes = server.node_resources()
    for stage, job in jobs.items():
        if nodes and job.kind in ("builtin", "command"):
            whose = "this machine's own Ray" if server.is_private else f"the largest node of {server.address}"
            _refuse_resources(f"train.{stage}.resources", job.resources, nodes, whose)


def _refuse_resources(key: str, asked: Resources, nodes: list[dict[str, float]], whose: str) -> None:
    """Raises UserError where none of `nodes`, with what each has in Ray's names, has all that is asked for."""
    nodes = [{**node, "memory": node.get("memory", 0) / 2**30} for node in nodes]
    wanted: dict[str, tuple[str, str, float]] = {
        "cpus": ("CPUs", "CPU", asked.cpus or 0),
        "gpus": ("GPUs", "GPU", asked.gpus or 0),
        "memory_gb": ("GiB of memory", "memory", asked.memory_gb or 0),
        **{f"custom.{name}": (f"of '{name}'", name, amount) for name, amount in asked.custom.items()},
    }
    for name, (unit, resource, amount) in wanted.items():
        most = max(node.get(resource, 0) for node in nodes)
        if amount > most:
            raise UserError(
                f"{key}.{name}: {_number(amount)} {unit} of one node are asked for, and {whose} has {_number(most)}: "
                "ask for less, or give workers.ray_address the address of a cluster with such a node"
            )
    if not any(all(node.get(resource, 0) >= amount for _, resource, amount in wanted.values()) for node in nodes):
        given = ", ".join(name for name, (_, _, amount) in wanted.items() if amount)
        raise UserError(f"{key}: no one node has all of {given} that are asked for: ask for less, or add a node")


def _number(amount: float) -> str:
    """With one place after the point, where there is something."""
    return f"{amount:,.1f}".removesuffix(".0") if amount >= 0.1 else f"{amount:g}"


def refuse_prompts(rl: RlJob, paths: list[str], options: StorageOptions) -> None:
    """Raises UserError where none of the first rows of a pool's path has what RL reads: prompts, where they are taken
    from there, and right answers."""
    wanted = [("train.rl.rewards", reward.answer_column) for reward in rl.rewards if reward.type != "function"]
    if rl.prompts is not None:
        wanted.append(("train.rl.prompts.column", rl.prompts.column))
    for path in paths if wanted else []:
        files = list_files(path, options)
        if not files:
            raise UserError(f"train.rl.prompts.path: there is no file in {path}")
        rows = SegmentReader(files[0], Segment(0), options).rows()
        first = [row for _, row in itertools.islice(rows, LOOK_ROWS) if isinstance(row, dict)]
        known = sorted({name for row in first for name in row})
        for key, column in wanted:
            if first and column not in known:
                raise UserError(
                    f"{key}: no row at the beginning of {files[0].url} has a column '{column}': its columns are "
                    f"{', '.join(known)}"
                )


def refuse_release(jobs: dict[Stage, Job], release: Release) -> None:
    """Raises UserError where the release lacks what a job reads."""
    rl = jobs.get("rl")
    if not isinstance(rl, RlJob) or rl.kind != "builtin":
        return
    if rl.prompts is not None:
        refuse_prompts(rl, [rl.prompts.path], release.storage.options)
        return
    for reward in rl.rewards:
        if reward.type != "function" and reward.answer_column not in release.schema.names:
            known = ", ".join(name for name in release.schema.names if name not in ("input_ids", "loss_mask", "labels"))
            raise UserError(
                f"train.rl.rewards: {release.reference} has no column '{reward.answer_column}' with the right answer: "
                f"name another answer_column; its columns are {known}"
            )
