"""Reads everything that a run would read and runs nothing: what `grape check` prints."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from functools import partial
from typing import Protocol

import numpy as np
import numpy.typing as npt
import orjson
import pyarrow as pa

from grape_service.checks.evaluation_sets import evaluation_items
from grape_service.config.checks import Contamination
from grape_service.config.gather import VerifyConfig
from grape_service.config.policy import BehaviorConfig, PolicyConfig, RecordedBehavior
from grape_service.config.schema import Config
from grape_service.display import size_of_model
from grape_service.errors import UserError
from grape_service.estimate.finding import Finding, Table
from grape_service.estimate.finding import look as _look
from grape_service.estimate.look import PoolLook, chosen_candidates, look_into
from grape_service.estimate.pool_checks import dry_run, pool_findings
from grape_service.estimate.tokens import look_at_tokens
from grape_service.gather.prompts import prompts_config
from grape_service.gather.verdicts import judge_of, verifier_name
from grape_service.models.files import resolve_model
from grape_service.models.newest import resolved
from grape_service.models.vocabulary import incompatible_ids, refuse_unspelled
from grape_service.models.weights import Weights, check_policy, check_values
from grape_service.release.manifest import secret_places
from grape_service.release.pools import with_released_candidates
from grape_service.render.loading import load_renderer
from grape_service.render.renderer import Renderer
from grape_service.rows.candidate import Candidate, Rejection, Rendered
from grape_service.rows.columns import LOSS_TOKEN
from grape_service.rows.ragged import TokenBatch
from grape_service.storage.options import StorageOptions
from grape_service.storage.probe import check_writable
from grape_service.storage.storage import Storage
from grape_service.storage.workspace import open_workspace
from grape_service.weigh.align import align, one_to_one, written_of
from grape_service.weigh.behavior import RECORDED, row_behaviors

RESCORED_ROWS = 8
SUSPICIOUS_MEAN = 0.02
"""Mean difference per token, recorded against scored again, above which recorded values are not the policy's."""

SECRETS_ARE_HIDDEN = (
    "{} may hold a secret: *** stands for it in the workspace, in manifests and in Prefect's database "
    "(`grape deploy` keeps it in a secret block there)"
)


class Models(Protocol):
    """What looks at models for the caller, perhaps beside other work: each function that it gives waits for it."""

    def weights(self, policy: PolicyConfig, folder: str) -> Callable[[], Weights]:
        """What `check_weights` says of a policy's files; the function raises its UserError."""

    def scores(
        self, policy: PolicyConfig, folder: str, batch: TokenBatch, temperature: float
    ) -> Callable[[], npt.NDArray[np.float32]]:
        """Log-probabilities [L] of a batch."""


Probe = Callable[[], tuple[str, str]]
"""Looks at something that only the caller can reach; (status, detail)."""


def check(config: Config, models: Models, probes: dict[str, Probe] | None = None) -> Iterator[Finding | Table]:
    """Storage, pool, model files, tokens, behavior policies, recorded values; continues after errors."""
    yield _look("output", partial(_writable, Storage, config.output.path, config.storage))
    yield _look("workspace", partial(_writable, open_workspace, config.workspace_path, config.storage))
    if places := secret_places(config.model_dump(mode="json")):
        keys = ", ".join(".".join(map(str, place)) for place in places)
        yield Finding("secrets", "ok", SECRETS_ARE_HIDDEN.format(keys))
    if config.names_own_methods:
        yield _look("methods", partial(_methods, config))
    if config.checks.enabled():
        yield _look("checks", partial(_checks, config))
    for name, probe in (probes or {}).items():
        yield _look(name, probe)
    try:
        config, checkpoints = resolved(config)
    except UserError as error:
        yield Finding("checkpoint", "error", str(error))
        return
    for asked, newest in checkpoints.items():
        yield Finding("checkpoint", "ok", newest.sentence(asked))
    try:
        config, released = with_released_candidates(config)
    except UserError as error:
        yield Finding("pool", "error", str(error))
        return
    for asked, version in released.items():
        yield Finding("pool", "ok", f"{asked} is {version}")
    found: PoolLook | None = None
    try:
        looked_at = config if config.gather is None else prompts_config(config, config.target)
        found = look_into(looked_at)
    except UserError as error:
        yield Finding("pool", "error", str(error))
    if found is not None:
        yield from pool_findings(looked_at, found)
    candidates = chosen_candidates(found) if found is not None else []
    renderers: dict[str, Renderer] = {}
    try:
        folder = resolve_model(config.target, config.storage).folder
        target_weights = models.weights(config.target, folder)
        target = load_renderer(folder, config.target, config.render, storage_options=config.storage)
    except UserError as error:
        yield Finding("target", "error", str(error))
        return
    if config.gather is not None:
        yield from _gather(config, found, renderers, models)
    rendered = target.render(candidates) if config.gather is None else target.render_prompts(candidates)
    good = [(c, r) for c, r in zip(candidates, rendered, strict=True) if isinstance(r, Rendered)]
    rescored = [
        (f"recorded log-probabilities of {source}", _Rescored(config, recorded, _rows_of(good, source), target, models))
        for source, recorded in (config.behavior.recorded_sources if config.behavior else {}).items()
        if recorded.policy is not None and rendered
    ]
    about_tokens: list[Finding] = []  # made before the target's weights are waited for
    if rendered:
        assert found is not None, "there are candidates"
        about_tokens.append(dry_run(config, found, rendered))
        if config.gather is None:
            about_tokens.append(_look("tokens", lambda: look_at_tokens(target, candidates, rendered, folder)))
    yield _look("target", lambda: _policy("target", config.target, config, renderers, target_weights))
    yield from about_tokens
    if not rendered:
        return
    used = np.unique(np.concatenate([r.input_ids[r.loss_mask == LOSS_TOKEN] for _, r in good])) if good else None
    policies = config.behavior.policies() if config.behavior else []
    for place, policy in enumerate(policies, 1):
        name = f"behavior {place}: {policy.model}" if len(policies) > 1 else f"behavior: {policy.model}"
        yield _look(name, partial(_behavior, name, policy, config, renderers, models))
        if used is not None and name in renderers:
            if config.behavior is not None and config.behavior.align == "bytes":
                compare = partial(_aligned, config, policy, target, renderers[name], good)
                yield _look(f"{name}: tokens", compare)
                continue
            bad = incompatible_ids(target.vocabulary, renderers[name].vocabulary, used)
            if len(bad):
                yield Finding(name, "error", f"{len(bad)} token ids mean other text there: weights would be wrong")
    if config.behavior is not None and config.weights is not None:
        behavior, recorded_rows = config.behavior, [c for c, r in good if r.recorded_logprobs is not None]
        if recorded_rows and (behavior.column is not None or behavior.recorded_sources):
            yield _look("recorded log-probabilities", partial(_numbers, behavior, recorded_rows))
    for name, one in rescored:
        yield _look(name, one.look)


def _gather(
    config: Config, found: PoolLook | None, renderers: dict[str, Renderer], models: Models
) -> Iterator[Finding | Table]:
    """Who samples, and what says that a sample is right."""
    assert config.gather is not None
    for name in config.gather.policies:
        policy = config.gather.policy(name)
        yield _look(f"gather {name}", partial(_behavior, f"gather {name}", policy, config, renderers, models))
    verify = config.gather.verify
    if verify.asks_model:
        yield _look("judge", partial(_behavior, "judge", verify.judge, config, renderers, models))
    if verify.method != "none":
        yield _look("verify", partial(_verifier, verify, found))


def _verifier(verify: VerifyConfig, found: PoolLook | None) -> tuple[str, str]:
    if not verify.asks_model:
        judge_of(verify)
    detail = f"{verify.model} is asked" if verify.asks_model else verifier_name(verify)
    seen = {} if found is None else {name: one.rows for group in found.groups for name, one in group.other.items()}
    if verify.answer is None or found is None:
        return "ok", detail
    if verify.answer not in seen:
        raise UserError(f"gather.verify.answer names '{verify.answer}', which no row has (columns: {', '.join(seen)})")
    return "ok", f"{detail}; {seen[verify.answer]:,} prompts of the sample have an answer in '{verify.answer}'"


def _aligned(
    config: Config,
    policy: PolicyConfig,
    target: Renderer,
    own: Renderer,
    good: list[tuple[Candidate, Rendered]],
) -> tuple[str, str]:
    """How much of a sample's tokens is compared one with one with those of a behavior policy."""
    if target.vocabulary.digest == own.vocabulary.digest:
        return "ok", "its tokens are the target's"
    refuse_unspelled({config.target.model: target.vocabulary, policy.model: own.vocabulary})
    tokens = single = 0
    for (_, ours), theirs in zip(good, own.render([candidate for candidate, _ in good]), strict=True):
        found = None
        if isinstance(theirs, Rendered):
            found = align(written_of(ours, target.vocabulary), written_of(theirs, own.vocabulary))
        if found is not None:
            tokens, single = tokens + len(found[0]), single + int(one_to_one(*found)[0].sum())
    assert config.behavior is not None, "it is compared with"
    share, least = single / max(tokens, 1), config.behavior.min_coverage
    detail = f"another tokenizer: {share:.0%} of the sample's tokens are compared one with one"
    return ("ok", detail) if share >= least else ("warning", f"{detail}, and behavior.min_coverage is {least:g}")


def _writable(opened: Callable[[str, StorageOptions], Storage], path: str, options: StorageOptions) -> tuple[str, str]:
    storage = opened(path, options)
    check_writable(storage)
    return "ok", f"{storage.root} can be read and written"


def _methods(config: Config) -> tuple[str, str]:
    config.check_methods()
    return "ok", "; ".join(f"{method.kind}: {method.path}" for method in config.own_methods)


def _checks(config: Config) -> tuple[str, str]:
    enabled = config.checks.enabled()
    files = [file for one in enabled if isinstance(one, Contamination) for file in one.files]
    texts = sum(1 for _ in evaluation_items(files, config.storage))
    detail = f"data checks: {', '.join(check.name for check in enabled) or 'all are off'}"
    return "ok", f"{detail}; {texts:,} texts of evaluation sets" if files else detail


def _behavior(
    name: str, policy: PolicyConfig, config: Config, renderers: dict[str, Renderer], models: Models
) -> tuple[str, str]:
    weights = models.weights(policy, resolve_model(policy, config.storage).folder)
    return _policy(name, policy, config, renderers, weights)


def _policy(
    name: str, policy: PolicyConfig, config: Config, renderers: dict[str, Renderer], weights: Callable[[], Weights]
) -> tuple[str, str]:
    files = resolve_model(policy, config.storage)
    own = config.has_own_template(policy)
    renderer = renderers[name] = load_renderer(files.folder, policy, config.render, own, config.storage)
    if files.quantization is None:
        check_values(files.folder, policy)
    has_weights = config.weights is not None
    found = check_policy(
        policy, files.folder, files.quantization, renderer.tokenizer, renderer.vocabulary, has_weights, weights
    )
    detail = f"{files.architecture}, {size_of_model(files.num_parameters)} parameters, {renderer.mode} mode"
    if found.unchecked:
        return "warning", f"{detail}; its weights are not checked by name: {found.unchecked}"
    if renderer.mode == "plain" and config.render.mode == "auto":
        detail += ": it has no chat template, so prompt, separator and response are put together"
        return "warning", f"{detail}; set render.chat_template, or render.mode: plain where that is meant"
    return "ok", f"{detail}{', quantised: ' + files.quantization if files.quantization else ''}"


def _numbers(behavior: BehaviorConfig, candidates: list[Candidate]) -> tuple[str, str]:
    """Whether it is known what recorded numbers are, for rows with any."""
    columns = {
        "prompt_id": [c.prompt_id for c in candidates],
        "candidate_id": [c.candidate_id for c in candidates],
        "source": pa.array([c.source for c in candidates], pa.string()),
        "sampling": pa.array(
            [orjson.dumps(c.sampling).decode() if c.sampling else None for c in candidates], pa.string()
        ),
        "recorded_logprobs": pa.array([[0.0]] * len(candidates), pa.list_(pa.float32())),
    }
    found = row_behaviors(pa.table(columns), behavior)
    missing = int((found.policy < RECORDED).sum())
    detail = f"{len(candidates) - missing} of {len(candidates)} rows of the sample can be weighed by theirs"
    return ("warning" if missing and behavior.missing == "error" else "ok"), detail


Rows = list[tuple[Candidate, Rendered]]


def _rows_of(good: Rows, source: str) -> Rows:
    """The first rows of a source that bring log-probabilities."""
    return [(c, r) for c, r in good if c.source == source and r.recorded_logprobs is not None][:RESCORED_ROWS]


class _Rescored:
    """Recorded rows that are scored again: asked for early, looked at late."""

    def __init__(self, config: Config, recorded: RecordedBehavior, rows: Rows, target: Renderer, models: Models):
        self.num_given, self.num_rows = len(rows), 0
        self.asked: list[tuple[npt.NDArray[np.float32], Callable[[], npt.NDArray[np.float32]]]] = []
        self.problem: Exception | None = None
        try:
            self._ask(config, recorded, rows, target, models)
        except Exception as error:
            self.problem = error

    def _ask(self, config: Config, recorded: RecordedBehavior, rows: Rows, target: Renderer, models: Models) -> None:
        policy = recorded.policy
        assert policy is not None
        if not rows:
            return
        files = resolve_model(policy, config.storage)
        own_template = config.has_own_template(policy)
        renderer = load_renderer(files.folder, policy, config.render, own_template, config.storage)
        candidates, targets = [c for c, _ in rows], [r for _, r in rows]
        at_temperature: dict[float, list[tuple[Rendered, npt.NDArray[np.float32]]]] = {}
        for candidate, own, was in zip(
            candidates, renderer.render_behavior(candidates, targets, target.turn_end_id), targets, strict=True
        ):
            if isinstance(own, Rejection):
                continue
            sampling = candidate.sampling or {}
            said = sampling.get("logprobs", "unsaid")
            is_raw = (recorded.recorded if said == "unsaid" else said) == "raw"
            temperature = 1.0 if is_raw else float(sampling.get("temperature") or 1.0)
            assert was.recorded_logprobs is not None
            at_temperature.setdefault(temperature, []).append((own, was.recorded_logprobs))
            self.num_rows += 1
        for temperature, found in at_temperature.items():
            batch = TokenBatch.from_rows([(own.input_ids.tolist(), (own.loss_mask > 0).tolist()) for own, _ in found])
            were = np.concatenate([values for _, values in found])
            self.asked.append((were, models.scores(policy, files.folder, batch, temperature)))

    def look(self) -> tuple[str, str]:
        """How far recorded values are from the policy's own. Raises what went wrong."""
        if self.problem is not None:
            raise self.problem
        if not self.num_given:
            return "warning", "no row of the sample has recorded log-probabilities"
        if not self.asked:
            return "warning", "no row of the sample can be rendered for that policy"
        flat = np.concatenate([scores() - were for were, scores in self.asked])
        flat = flat[np.isfinite(flat)]
        detail = f"{self.num_rows} rows scored again: difference {flat.mean():+z.4f} ± {flat.std():.4f} a token"
        if abs(flat.mean()) > SUSPICIOUS_MEAN or flat.std() > 5 * SUSPICIOUS_MEAN:
            return "warning", f"{detail}: are they this policy's, at the recorded temperature?"
        return "ok", detail
