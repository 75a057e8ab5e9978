"""A model that moves: `folder/@latest` and `folder/@step-1000` name the newest whole checkpoint of a training's folder,
and that of a step.

Checkpoints are folders whose names end in a step: checkpoint-500 (TRL, transformers and what builds on them, our
trainers), global_step_500 (verl), step-500, iter_0000500 and the like; in each, the model is the folder itself or one
of `PLACES`. The model that a training ends with lies in the folder itself, or in model/. A checkpoint is taken when
`check_whole` finds nothing missing, and what its trainer writes last is there:

    complete.json                           our trainers: written last, with the size of every file
    trainer_state.json                      in a checkpoint-<step>: transformers writes it after weights and tokenizer
    latest_checkpointed_iteration.txt       beside the checkpoints: verl and Megatron put the step into it at the end
    nothing of these                        no file of the folder was written to for QUIET_SECONDS
"""

from __future__ import annotations

import re
from collections.abc import Iterator
from dataclasses import dataclass, field
from typing import Any, Literal

import orjson

from grape_service.addresses import moving_checkpoint
from grape_service.config.gather import VerifyConfig
from grape_service.config.policy import BehaviorConfig, PolicyConfig, RecordedBehavior
from grape_service.config.schema import Config
from grape_service.errors import StageError, UserError
from grape_service.models.whole import MARKER, WEIGHT_SUFFIXES, check_whole
from grape_service.storage.options import StorageOptions
from grape_service.storage.storage import Storage

What = Literal["model", "adapter"]
CONFIGS: dict[What, str] = {"model": "config.json", "adapter": "adapter_config.json"}
FINAL_PLACES = {"model": ("model", ""), "adapter": ("adapter", "model", "")}
PLACES = ("", "model", "huggingface", "actor/huggingface", "hf")
"""Where a checkpoint's model may lie in its folder."""
QUIET_SECONDS = 60.0
"""How long nothing may have been written to a checkpoint that has no file which is written last."""
STATE_FILE = "trainer_state.json"
STEP_FILE = "latest_checkpointed_iteration.txt"
_STEP = re.compile(r"(?:checkpoint|global_step|step|iter|epoch)[-_]?(?P<step>\d+)(?:[-_]hf)?")
MAX_NAMED = 3


@dataclass(frozen=True)
class Newest:
    """What an address that moves stands for now."""

    folder: str
    """Full address of the model's or the adapter's folder."""
    passed_over: list[str] = field(default_factory=list)
    """Newer checkpoints, each with the reason."""

    def sentence(self, asked: str) -> str:
        """For people: what was asked is what, and what is passed over."""
        over = f" ({'; '.join(self.passed_over)})" if self.passed_over else ""
        return f"{asked} is {self.folder}{over}"


@dataclass(frozen=True)
class _Candidate:
    """A folder that may hold the model; without a step, what a training ended with."""

    place: Storage
    step: int | None


def newest(address: str, what: What, options: StorageOptions) -> Newest:
    """The newest whole checkpoint of an address that moves, or the one of its step.

    Raises UserError for an address that does not move, an empty folder, and one in which no checkpoint is whole.
    """
    parts = moving_checkpoint(address)
    if parts is None:
        raise UserError(f"{what} '{address}' does not end with @latest or @step-<number>")
    root, which = Storage(parts[0], options), parts[1]
    step = int(which.removeprefix("step-")) if which != "latest" else None
    written = _written_step(root)
    passed_over: list[str] = []
    final = _final(root, what, step, passed_over)
    for place in _step_folders(root, step):
        found = _whole_model(place, what, written)
        if isinstance(found, str):
            passed_over.append(f"{place.place.root.rpartition('/')[2]} {found}")
            continue
        if final is None or _is_newer(found, final):
            return Newest(found.place.root, passed_over)
        break
    if final is not None:
        return Newest(final.place.root, passed_over)
    wanted = "no checkpoint" if step is None else f"no checkpoint of step {step}"
    if not passed_over:
        raise UserError(
            f"{what} '{address}': there is {wanted} in {root.root} yet: a training writes checkpoint-<step> there, or "
            "correct the address"
        )
    named = "; ".join(passed_over[:MAX_NAMED])
    more = f" and {len(passed_over) - MAX_NAMED} more" if len(passed_over) > MAX_NAMED else ""
    raise UserError(f"{what} '{address}': {wanted} in {root.root} is whole: {named}{more}")


def _step_folders(root: Storage, step: int | None) -> Iterator[_Candidate]:
    """The folders of steps, newest first; of `step` alone where it is given."""
    found = [(int(match["step"]), name) for name in root.folders() if (match := _STEP.fullmatch(name))]
    for number, name in sorted(found, key=lambda item: (-item[0], item[1])):
        if step in (None, number):
            yield _Candidate(root.sub(name), number)


def _final(root: Storage, what: What, step: int | None, passed_over: list[str]) -> _Candidate | None:
    """The whole model that a training ended with, if there is one, and it is of the step that is asked for."""
    for name in FINAL_PLACES[what]:
        place = root.sub(name) if name else root
        if not place.exists(CONFIGS[what]):
            continue
        reason = _not_whole(place)
        if reason is None:
            found = _Candidate(place, _step_of(place))
            if step in (None, found.step):
                return found
        elif step is None:
            passed_over.append(f"{name or 'the model in the folder itself'} {reason}")
    return None


def _whole_model(candidate: _Candidate, what: What, written: int | None) -> _Candidate | str:
    """Where in a step's folder its model is; or why it is not taken."""
    places = [candidate.place.sub(name) if name else candidate.place for name in PLACES]
    place = next((one for one in places if one.exists(CONFIGS[what])), None)
    if place is None:
        other: What = "adapter" if what == "model" else "model"
        if any(one.exists(CONFIGS[other]) for one in places):
            return f"holds {'an adapter and no whole model' if other == 'adapter' else 'a model and no adapter'}"
        return f"has no {CONFIGS[what]}"
    if written is not None:
        assert candidate.step is not None, "it is a step's folder"
        if candidate.step > written:
            return f"is being written: {STEP_FILE} says {written}"
        reason = _missing(place)
    else:
        reason = _not_whole(place, candidate)
    return reason if reason is not None else _Candidate(place, candidate.step)


def _not_whole(place: Storage, candidate: _Candidate | None = None) -> str | None:
    """Why a folder of a model is not taken; None where it is whole and nobody writes to it."""
    if (reason := _missing(place)) is not None or place.exists(MARKER):
        return reason
    if candidate is not None and candidate.place.root.rpartition("/")[2].startswith("checkpoint"):
        return None if _state(candidate.place) is not None else f"is being written: it has no whole {STATE_FILE} yet"
    youngest = max(info.modified for info in (candidate.place if candidate is not None else place).list())
    if place.now() - youngest < QUIET_SECONDS:
        return f"was written to in the last {QUIET_SECONDS:.0f} seconds"
    return None


def _missing(place: Storage) -> str | None:
    """What a folder lacks by its own files, in words."""
    try:
        check_whole(place)
    except FileNotFoundError:
        return "is being deleted"
    except StageError as error:
        return "is not whole: " + str(error).partition(": ")[2]
    except UserError as error:  # a JSON file that is cut off
        return f"is not whole: {error}"
    return None


def _state(place: Storage) -> dict[str, Any] | None:
    """What transformers says of a training's state; None where the file is not there, or not whole."""
    try:
        state = orjson.loads(place.read(STATE_FILE))
    except (FileNotFoundError, orjson.JSONDecodeError):
        return None
    return state if isinstance(state, dict) else None


def _written_step(root: Storage) -> int | None:
    """The step of the last checkpoint that verl or Megatron has written; None where they have written none here."""
    try:
        text = root.read(STEP_FILE).decode(errors="replace").strip()
    except FileNotFoundError:
        return None
    return int(text) if text.isdecimal() else None


def _step_of(place: Storage) -> int | None:
    """The step of a model that a training ended with; None where nobody says."""
    steps = place.read_json(MARKER).get("steps") if place.exists(MARKER) else (_state(place) or {}).get("global_step")
    return steps if isinstance(steps, int) else None


def _is_newer(one: _Candidate, final: _Candidate) -> bool:
    """Whether a step's checkpoint is newer than what a training ended with: by their steps, else by their weights."""
    if one.step is not None and final.step is not None:
        return one.step > final.step
    return _weights_written(one.place) > _weights_written(final.place)


def _weights_written(place: Storage) -> float:
    return max(
        (info.modified for info in place.list() if "/" not in info.path and info.path.endswith(WEIGHT_SUFFIXES)),
        default=0.0,
    )


Found = dict[str, Newest]
"""What each address that moves stands for, by the address."""


def resolved(config: Config, known: dict[str, str] | None = None) -> tuple[Config, Found]:
    """A config whose policies name checkpoints that stay, and what each address that moves was found to be.

    Each address is looked up once, so that the target and a policy that samples are the same checkpoint. `known` gives
    folders that addresses are to stand for. Raises UserError: see `newest`.
    """
    given = {address: Newest(folder) for address, folder in (known or {}).items()}
    found: Found = {}

    def of_policy(policy: PolicyConfig) -> PolicyConfig:
        update: dict[str, Any] = {}
        for what in CONFIGS:
            address = getattr(policy, what)
            if address is not None and moving_checkpoint(address) is not None:
                if address not in found:
                    found[address] = given.get(address) or newest(address, what, config.storage)
                update[what] = found[address].folder
        return policy.model_copy(update=update) if update else policy

    def of_source(source: Any) -> Any:
        if isinstance(source, RecordedBehavior):
            return source.model_copy(update={"policy": of_policy(source.policy)}) if source.policy else source
        return of_policy(source) if isinstance(source, PolicyConfig) else source

    update: dict[str, Any] = {"target": of_policy(config.target)}
    if config.behavior is not None:
        update["behavior"] = _of_behavior(config.behavior, of_policy, of_source)
    if config.gather is not None:
        policies = {name: of_policy(policy) for name, policy in config.gather.policies.items()}
        verify = config.gather.verify
        if verify.asks_model:
            verify = _of_judge(verify, of_policy)
        update["gather"] = config.gather.model_copy(update={"policies": policies, "verify": verify})
    models = [found[name].folder if name in found else name for name in config.render.chat_template_for]
    update["render"] = config.render.model_copy(update={"chat_template_for": models})
    return config.model_copy(update=update) if found else config, found


def _of_judge(verify: VerifyConfig, of_policy: Any) -> VerifyConfig:
    judge = of_policy(verify.judge)
    policy = {**verify.policy, "adapter": judge.adapter} if judge.adapter is not None else verify.policy
    return verify.model_copy(update={"model": judge.model, "policy": policy})


def _of_behavior(behavior: BehaviorConfig, of_policy: Any, of_source: Any) -> BehaviorConfig:
    sources = {name: of_source(source) for name, source in behavior.sources.items()} if behavior.sources else None
    policy = of_policy(behavior.policy) if behavior.policy is not None else None
    return behavior.model_copy(update={"sources": sources, "policy": policy})
