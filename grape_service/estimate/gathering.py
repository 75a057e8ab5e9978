"""What sampling will take: samples and tokens of each policy, and what is left to score after it."""

from __future__ import annotations

from dataclasses import dataclass

from grape_service.config.policy import PolicyConfig
from grape_service.config.schema import Config
from grape_service.errors import UserError
from grape_service.estimate.survey import Survey, survey_of_prepared, survey_pool
from grape_service.gather.missing import Sampling, Stored, sampling_of, stored_samples
from grape_service.gather.prompts import prompts_config
from grape_service.models.files import policy_id, resolve_model
from grape_service.prepare.finish import load_prepared
from grape_service.prepare.plan import plan_prepare, rendering_of
from grape_service.prepare.reduce import shard_paths
from grape_service.prepare.result import Prepared
from grape_service.render.loading import load_renderer
from grape_service.render.renderer import Renderer
from grape_service.rows.candidate import Candidate, Rejection, Rendered
from grape_service.storage.storage import Storage

RATES = "estimates/sampling"
"""Where the workspace keeps what samplers did."""


@dataclass(frozen=True)
class Sampled:
    """What a sampler did before."""

    samples: int
    tokens: int
    seconds: float  # of one replica
    device: str


def rate_path(sampler: str) -> str:
    """Where a sampler's figures are kept, in the workspace."""
    return f"{RATES}/{sampler}.json"


def remember_rate(storage: Storage, sampler: str, samples: int, tokens: int, seconds: float, device: str) -> None:
    """Keep what a run's samplers did, for the next plan."""
    value = {"samples": samples, "tokens": tokens, "seconds": seconds, "device": device}
    storage.write_json(rate_path(sampler), value)


def known_rate(storage: Storage, sampler: str) -> Sampled | None:
    """What the last run's samplers did; None where there was none."""
    try:
        known = storage.read_note(rate_path(sampler))
        return None if known is None else Sampled(**known)
    except TypeError:
        return None


@dataclass(frozen=True)
class GatherEstimate:
    """One policy's samples."""

    name: str
    policy: PolicyConfig
    prompts: Survey  # tokens are those of prompts
    samples: float  # to be made, at the most
    length: float  # tokens of one
    length_is_known: bool  # else max_tokens, the most that they can be
    stored: Stored | None  # what there is, where the prompts were prepared before
    known: Sampled | None

    @property
    def tokens(self) -> float:
        """To be sampled."""
        return self.samples * self.length

    @property
    def there(self) -> int:
        """Samples that were made before."""
        return self.stored.samples if self.stored is not None else 0

    def rate(self, given: float | None) -> tuple[float, str]:
        """Sampled tokens a second of a replica, and where the figure is from. Raises UserError where nobody knows."""
        if given is not None:
            return given, "--tokens-per-second"
        if self.known is None or not self.known.seconds or not self.known.tokens:
            raise UserError(
                f"nobody has sampled gather.policies.{self.name} in this workspace yet: sample a few with `grape "
                "gather CONFIG --set gather.limit.tokens=100000`, which says how fast it is and how long its responses "
                "are, or give --tokens-per-second"
            )
        return self.known.tokens / self.known.seconds, f"measured as it sampled {self.known.samples:,} responses"


class _Prompts:
    """Renders prompts alone."""

    def __init__(self, renderer: Renderer):
        self.renderer = renderer

    def render(self, candidates: list[Candidate]) -> list[Rendered | Rejection]:
        return self.renderer.render_prompts(candidates)


def gather_estimates(config: Config, storage: Storage, exact: bool) -> list[GatherEstimate]:
    """What each policy of the gather section has still to sample. Raises UserError as the run would."""
    assert config.gather is not None
    found = []
    for name, sampled in config.gather.policies.items():
        policy, sampling = config.gather.policy(name), config.gather.sampling_of(name)
        own = prompts_config(config, policy)
        files = resolve_model(policy, config.storage)
        renderer = load_renderer(files.folder, policy, own.render, storage_options=config.storage)
        plan = plan_prepare(own, rendering_of(renderer, files), storage)
        prepared = load_prepared(plan, own, storage)
        prompts = survey_of_prepared(prepared) if prepared else survey_pool(plan.files, own, _Prompts(renderer), exact)
        how_sampled = sampling_of(config.gather, name, policy_id(policy, files), renderer.stop_ids)
        stored = _stored(storage, prepared, how_sampled) if prepared else None
        known = known_rate(storage, how_sampled.sampler)
        length = _length(known, stored)
        samples = prompts.prompts * sampled.samples if stored is None else float(stored.missing)
        found.append(
            GatherEstimate(
                name, policy, prompts, samples, length or sampling.max_tokens, length is not None, stored, known
            )
        )
    return found


def _stored(storage: Storage, prepared: Prepared, sampling: Sampling) -> Stored:
    """What there is of the samples of prompts, a partition at a time."""
    partitions = [name for name, totals in prepared.partitions.items() if totals.num_shards]
    counts = (stored_samples(storage, shard_paths(prepared, name), name, sampling) for name in partitions)
    return sum(counts, Stored())


def _length(known: Sampled | None, stored: Stored | None) -> float | None:
    """Tokens of a response, as many as those that there are have; None where there is none."""
    if known is not None and known.samples:
        return known.tokens / known.samples
    return stored.tokens / stored.samples if stored is not None and stored.samples else None


def gathered_survey(estimates: list[GatherEstimate]) -> Survey:
    """The candidates that the target scores after sampling: rows, tokens of prompts and responses."""
    rows = sum(one.samples + one.there for one in estimates)
    prompts = estimates[0].prompts
    sampled = sum(one.tokens + (one.stored.tokens if one.stored is not None else 0) for one in estimates)
    read = prompts.tokens / max(prompts.prompts, 1.0) * rows
    sources = {one.name: one.samples + one.there for one in estimates}
    counts = (rows, prompts.prompts, read + sampled, sampled, prompts.rejected, prompts.filtered)
    return Survey(*counts, False, sources, prompts.token_error, prompts.parts_read, prompts.parts)


def how(estimates: list[GatherEstimate]) -> str:
    """In words: what the numbers of samples rest on."""
    first = estimates[0].prompts
    told = f"{first.prompts:,.0f} prompts, {first.how()}"
    unknown = [one.name for one in estimates if not one.length_is_known]
    if unknown:
        told += f"; of {', '.join(unknown)} nobody knows how long responses are: max_tokens of each, at the most"
    if there := sum(one.there for one in estimates):
        told += (
            f"; {there:,} samples are there already and are not made again, whether they have scores is not looked at"
        )
    return told
