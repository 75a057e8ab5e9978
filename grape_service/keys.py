"""Keys: what is stored is found again by a digest of everything that it was made of. All of them are made here.

    key of              made of                                                where it stands
    a policy's scores   model files, adapter, policy section, temperature      scores/<model>-<key>/
    a prepared pool     pool files, renderer, config, libraries of text        prepared/<key>/
    a finished scoring  prepared pool, statistics, what a race may stop, or
                        how windows are cut                                    scores/<policy>/complete/<key>.json
    a release           config, pool files, model files, code, environment     released/<name>/<key>.json
    rounds              config                                                 <output>/<name>/rounds/<key>.json

A key leaves out by name, it does not take in by name. `settings_of` gives every field of a section of the config, at
every depth, but those that a dictionary names, each with the reason why it has no effect; `files_of_key` does the same
with the files of a folder. So a field or a file that is new is part of every key until someone has decided that it
has no effect; tests/grape_service/test_keys.py changes every field one by one and holds these lists to it.

Other stored things (a training run, a checkpoint) take the same two functions and `digest_of`:

    SAME_RUN = {"sft.attempts": "how often a job is started says nothing of what it makes"}
    key = digest_of({"release": digest, "train": settings_of(config.train, SAME_RUN)}, digits=16)
"""

from __future__ import annotations

import contextlib
import hashlib
import importlib.metadata
import sys
from collections.abc import Iterable, Mapping, Sequence
from fnmatch import fnmatchcase
from functools import cache
from pathlib import Path
from types import MappingProxyType
from typing import Any

import orjson
from pydantic import BaseModel

WithoutEffect = Mapping[str, str]
"""What a key leaves out: the path of a field, or the pattern of a file's name, with the reason why it has no effect."""


def digest_of(value: Any, digits: int = 64) -> str:
    """Hex sha256 of a JSON value, its first `digits`; the order of an object's keys does not count."""
    options = orjson.OPT_SORT_KEYS | orjson.OPT_NON_STR_KEYS
    return hashlib.sha256(orjson.dumps(value, option=options)).hexdigest()[:digits]


NOTHING: WithoutEffect = MappingProxyType({})


def settings_of(section: BaseModel | None, without: WithoutEffect = NOTHING) -> Any:
    """Every field of a section of the config as a JSON value, at every depth, but those that `without` names.

    A path is the names of fields with dots between (target.engine_args.max_num_seqs); * stands for every element of a
    list and every value of a dictionary (pool.path.*.path). Naming a section leaves out all that is in it.
    """
    return _value(section, (), frozenset(without))


def files_of_key(names: Iterable[str], without: WithoutEffect) -> list[str]:
    """Those of some files of a folder, by their path in it, that no pattern of `without` names, sorted."""
    return sorted(name for name in names if not any(fnmatchcase(name, pattern) for pattern in without))


_LEFT_OUT = object()


def _value(value: Any, path: tuple[str, ...], without: frozenset[str]) -> Any:
    if path and ".".join(path) in without:
        return _LEFT_OUT
    if isinstance(value, BaseModel):
        items: Iterable[tuple[str, Any]] = ((name, getattr(value, name)) for name in type(value).model_fields)
        return _entries(items, path, without, lambda name: name)
    if isinstance(value, Mapping):
        return _entries(value.items(), path, without, lambda name: name if _names(path, name, without) else "*")
    if isinstance(value, list | tuple):
        found = [_value(one, (*path, "*"), without) for one in value]
        return [one for one in found if one is not _LEFT_OUT]
    return value


# How much is computed at a time, and on what: the engine's numbers agree within the tolerance of its canary rows.
_AT_A_TIME = "how much is computed at a time changes no number beyond rounding, which canary rows hold each replica to"

SCORES_WITHOUT: WithoutEffect = {
    "model": "its files are in the key",
    "revision": "its files are in the key",
    "adapter": "its files are in the key",
    "system_prompt": "the rows that are scored hold it",
    "engine": "engines agree within the tolerance of the canary rows; workers.reuse: exact insists on one",
    "tensor_parallel": _AT_A_TIME,
    "allow_pickle": "it says whether weights may be read, not which",
    "engine_args.device": _AT_A_TIME,
    "engine_args.max_batch_tokens": _AT_A_TIME,
    "engine_args.logits_chunk_rows": _AT_A_TIME,
    "engine_args.max_num_batched_tokens": _AT_A_TIME,
    "engine_args.max_num_seqs": _AT_A_TIME,
    "engine_args.head_chunk_bytes": _AT_A_TIME,
    "engine_args.gpu_memory_utilization": _AT_A_TIME,
    "engine_args.kv_cache_memory_bytes": _AT_A_TIME,
    "engine_args.scoring_head": "another way through the same engine to the same numbers",
}
"""Of a policy's section, what its scores do not depend on."""

_UNSAID: dict[str, Any] = {"engine_args": {}, "trust_remote_code": False}
"""Fields that scores were not named by once, with the values that they had then: with these the names stay."""

CONFIG_JSON_WITHOUT: WithoutEffect = {
    "transformers_version": "which library wrote the file",
    "_name_or_path": "where the file was read from",
    "dtype": "the policy's section says which",
    "torch_dtype": "the policy's section says which",
    "use_cache": "how generation is done",
}
"""Keys of a config.json that no score depends on."""

NOT_READ: WithoutEffect = {
    ".*": "hidden: of git and of download tools",
    "*/.*": "hidden: of git and of download tools",
    "__pycache__/*": "compiled from the code beside it",
    "*/__pycache__/*": "compiled from the code beside it",
    "*.md": "for people",
    "LICENSE": "for people",
    "LICENSE.txt": "for people",
    "NOTICE": "for people",
    "NOTICE.txt": "for people",
    "*.png": "for people",
    "*.jpg": "for people",
    "*.svg": "for people",
    "*.gguf": "weights of another format, which no engine here reads",
    "*.onnx": "weights of another format, which no engine here reads",
    "*.h5": "weights of another format, which no engine here reads",
    "*.msgpack": "weights of another format, which no engine here reads",
    "checkpoint-*/*": "another model",
    "original/*": "the same weights in another format",
    "runs/*": "logs of a training",
    "wandb/*": "logs of a training",
    "optimizer*.pt": "state of a training",
    "optimizer*.bin": "state of a training",
    "optimizer*/*": "state of a training",
    "scheduler.pt": "state of a training",
    "rng_state*.pth": "state of a training",
    "trainer_state.json": "state of a training",
    "training_args.bin": "state of a training",
    "complete.json": "of our trainers: what a checkpoint was made from, and the sizes of its files",
}
"""Files of a model's or an adapter's folder that nothing here reads."""

_WEIGHTS: WithoutEffect = {
    f"*{suffix}": "those that are read are in the key as weights; others are not read"
    for suffix in (".safetensors", ".bin", ".pt", ".pth")
}

NOT_DOWNLOADED: WithoutEffect = {
    **{pattern: reason for pattern, reason in NOT_READ.items() if "/" in pattern or pattern.startswith(".")},
    **{f"*/{pattern}": "weights are read from the folder itself alone" for pattern in _WEIGHTS},
}
"""Files below an s3:// model folder that are left there."""

_TEXT = "the rows that are scored hold token ids"
SCORES_WITHOUT_FILES: WithoutEffect = {
    **NOT_READ,
    **_WEIGHTS,
    "config.json": "in the key by itself, without keys that change no score",
    "adapter_config.json": "in the key by itself",
    "generation_config.json": "it says how text is sampled and where it stops, which the names of samples hold",
    "*processor_config.json": "of images and sound, which are not scored",
    "tokenizer*.json": _TEXT,
    "special_tokens_map.json": _TEXT,
    "added_tokens.json": _TEXT,
    "vocab.json": _TEXT,
    "vocab.txt": _TEXT,
    "merges.txt": _TEXT,
    "*.model": _TEXT,
    "*.tiktoken": _TEXT,
    "chat_template*.jinja": _TEXT,
    "chat_template*.json": _TEXT,
    "additional_chat_templates/*": _TEXT,
}
"""Files of a model's or an adapter's folder, its weights apart, that scores do not depend on."""

TEXTS_WITHOUT_FILES: WithoutEffect = {
    **NOT_READ,
    **dict.fromkeys(_WEIGHTS, "weights decide no tokens"),
    "*.index.json": "it says in which file each weight is",
    "config.json": "what it says of lengths and stop tokens is in the renderer's digest",
    "adapter_config.json": "it says what the adapter's weights are",
}
"""Files of a model's or an adapter's folder that do not decide how text becomes tokens."""


def adapter_key(weights: str, config: str, others: str | None) -> str:
    """Names the files of an adapter by three digests; see `scores_key`."""
    return digest_of([weights, config, *([others] if others is not None else [])])


def scores_key(policy: BaseModel, files: Mapping[str, str | None], temperature: float) -> str:
    """Names the scores of a policy by its section of the config, the digests of its files and the temperature.

    What was not part of the key once is so only where it is not what it was then.
    """
    settings = settings_of(policy, SCORES_WITHOUT)
    said = {name: value for name, value in settings.items() if name not in _UNSAID or value != _UNSAID[name]}
    given = {name: digest for name, digest in files.items() if name != "others" or digest is not None}
    tempered = {"temperature": float(temperature)} if temperature != 1.0 else {}
    return digest_of([{**said, **given, **tempered}], 12)


_POLICY = "which policy wrote a response, and how it is scored, is asked after rows are prepared"
_LATER = "of a stage that comes after rows are prepared"
_NO_TOKENS = "weights and engines decide no tokens"
PREPARED_WITHOUT: WithoutEffect = {
    "name": "of the dataset that is released",
    "pool.path": "its files are in the key, with the settings of their groups",
    "pool.max_reject_share": "it is looked at on every run",
    "target.model": "its tokenizer and template are in the key, in the renderer's digest and by their files",
    "target.revision": "its tokenizer and template are in the key, in the renderer's digest and by their files",
    "target.adapter": "its tokenizer and template are in the key, in the renderer's digest and by their files",
    "target.engine": _NO_TOKENS,
    "target.dtype": _NO_TOKENS,
    "target.quantization": _NO_TOKENS,
    "target.tensor_parallel": _NO_TOKENS,
    "target.allow_pickle": _NO_TOKENS,
    "target.engine_args": _NO_TOKENS,
    "render.chat_template_for": "which template renders a policy's text is in the renderer's digest",
    "behavior.policy": _POLICY,
    "behavior.missing": _POLICY,
    "behavior.align": _POLICY,
    "behavior.min_coverage": _POLICY,
    "behavior.recorded": "what recorded numbers are is asked where they are compared",
    "behavior.sources.*.recorded": "what recorded numbers are is asked where they are compared",
    "behavior.sources.*.policy": _POLICY,
    **{
        f"behavior.sources.*.{name}": _POLICY
        for name in (
            *("model", "revision", "adapter", "system_prompt", "engine", "dtype", "quantization", "tensor_parallel"),
            *("trust_remote_code", "allow_pickle", "engine_args"),
        )
    },
    "gather.release": "the candidates that are released are those that are prepared",
    "select": _LATER,
    "score": _LATER,
    "weights": _LATER,
    "checks": _LATER,
    "output": _LATER,
    "train": _LATER,
    "notify": "it tells of the run's end",
    "workspace": "the key is looked up there",
    "storage": "how files are reached; what they hold is in the key",
    "workers.replicas": "how much is done at a time",
    "workers.ray_address": "where it is done",
    "workers.max_failed_share": "it is looked at on every run",
    "workers.cpus": "how much is done at a time",
    "workers.reuse": "of scores",
}
"""Of a config, what the rows of a prepared pool do not depend on."""

RELEASE_WITHOUT: WithoutEffect = {
    "output": "its folder is in the key; tags are moved to a version that is there too",
    "workspace": "the key is looked up there",
    "storage": "how files are reached; what they hold is in the key",
    "train": "a release is trained on after it is made",
    "notify": "it tells of the run's end",
    "workers.replicas": "how much is done at a time",
    "workers.ray_address": "where it is done",
    "workers.max_failed_share": "a release that lacks a row is never given again for another run",
    "workers.cpus": "how much is done at a time",
}
"""Of a config, what a release does not depend on."""

ROUNDS_WITHOUT: WithoutEffect = {
    **{name: reason for name, reason in RELEASE_WITHOUT.items() if name != "train"},
    "train.rounds": "more rounds go on after those that are there",
    "train.refresh.max_churn": "it is looked at in every round",
    "train.gate": "it measures what a round made",
    **{
        f"train.{stage}.{name}": "how a job is run, not what it makes"
        for stage in ("sft", "rl")
        for name in ("attempts", "timeout_seconds", "resources")
    },
}
"""Of a config, what decides nothing of a job's rounds: their record is found again without it."""

TEXT_LIBRARIES = ("transformers", "tokenizers", "jinja2", "sentencepiece", "tiktoken", "pyarrow")
"""Libraries that decide what a pool's rows are and which tokens they get."""

LATER_CODE: WithoutEffect = {
    "workers/*": "it runs what grape_service computes",
    **{
        f"grape_service/{name}/*": "it works on prepared rows"
        for name in ("score", "select", "weigh", "release", "checks", "report", "estimate", "exports", "ui", "cli")
    },
}
"""Our own code that makes no prepared rows."""


def prepared_key(config: BaseModel, files: Sequence[Any], groups: Sequence[BaseModel], rendering: Any, cut: Any) -> str:
    """Names a prepared pool: the config, its files as they are listed, how they are rendered and how they are cut.

    `rendering` is a digest of everything that makes tokens of text beside our code and its libraries.
    """
    made_of = {
        "config": settings_of(config, PREPARED_WITHOUT),
        "groups": [settings_of(group, {"path": "its files are in the key"}) for group in groups],
        "files": files,
        "rendering": rendering,
        "cut": cut,
        "libraries": text_libraries(),
        "code": code_digest(LATER_CODE),
    }
    return digest_of(made_of, 16)


def complete_key(prepared: str, statistics: Sequence[str], race: BaseModel | str = "off", select: Any = None) -> str:
    """Names a scoring of a prepared pool that has ended: which statistics every row of it has; of a race, every row
    that `select`, the section of the config, needs."""
    made_of: dict[str, Any] = {"prepared": prepared, "statistics": list(statistics)}
    if race != "off":
        made_of["race"] = race if isinstance(race, str) else settings_of(race)
        made_of["select"] = settings_of(select)
    return digest_of(made_of, 32)


def windows_key(prepared: str, step_end: str, window: BaseModel, form: int) -> str:
    """Names a scoring of the windows of a prepared pool that has ended: how its steps are cut, what stands before each,
    and the form that windows have."""
    cut = {"step_end": step_end, "window": settings_of(window), "form": form}
    return digest_of({"prepared": prepared, "windows": cut}, 32)


def release_key(config: BaseModel, made_of: Mapping[str, Any]) -> str:
    """Names what a run releases: its config, what that names (`made_of`: files and where they are released), our code
    and everything that is installed."""
    everything = {
        "config": settings_of(config, RELEASE_WITHOUT),
        **made_of,
        "code": code_digest(),
        "environment": environment(),
    }
    return digest_of(everything, 32)


def rounds_key(config: BaseModel) -> str:
    """Names the rounds of a job by its config as it was given. What each round makes has keys of its own."""
    return digest_of({"config": settings_of(config, ROUNDS_WITHOUT)}, 16)


@cache
def text_libraries() -> dict[str, str]:
    """The versions of those of TEXT_LIBRARIES that are installed."""
    found = {}
    for name in TEXT_LIBRARIES:
        with contextlib.suppress(importlib.metadata.PackageNotFoundError):
            found[name] = importlib.metadata.version(name)
    return found


@cache
def environment() -> list[str]:
    """Python's version and every distribution that is installed, by the names of their folders: name-version."""
    folders = [Path(place) for place in dict.fromkeys(sys.path) if place and Path(place).is_dir()]
    installed = {path.name for folder in folders for path in folder.iterdir() if path.suffix == ".dist-info"}
    return [sys.version, *sorted(installed)]


def code_digest(without: WithoutEffect = NOTHING) -> str:
    """A digest of this package's own files, but those whose path a pattern of `without` names."""
    files = _code()
    return digest_of({name: files[name] for name in files_of_key(files, without)})


@cache
def _code() -> dict[str, str]:
    """sha256 of each of our files, by its path."""
    root = Path(__file__).resolve().parents[1]
    paths = [path for package in ("grape_service", "workers") for path in (root / package).rglob("*")]
    return {
        path.relative_to(root).as_posix(): hashlib.sha256(path.read_bytes()).hexdigest()
        for path in paths
        if path.is_file() and "__pycache__" not in path.parts
    }


def _names(path: tuple[str, ...], name: str, without: frozenset[str]) -> bool:
    """Whether `without` speaks of an entry of a dictionary by its own name."""
    own = ".".join((*path, name))
    return any(one == own or one.startswith(f"{own}.") for one in without)


def _entries(items: Iterable[tuple[str, Any]], path: tuple[str, ...], without: frozenset[str], part: Any) -> Any:
    found = {str(name): _value(value, (*path, part(str(name))), without) for name, value in items}
    return {name: value for name, value in found.items() if value is not _LEFT_OUT}
