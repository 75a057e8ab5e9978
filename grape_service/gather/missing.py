"""Which samples of a policy there are of some prompts, and which are to be made."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass

from grape_service.config.gather import GatherConfig, SamplingConfig, VerifyConfig
from grape_service.gather.candidates import asked_of
from grape_service.gather.samples import SampleStore, StoredSample, prompt_keys, sample_key, sampler_id, verify_id
from grape_service.gather.verdicts import verifier_name
from grape_service.rows.columns import SHARD
from grape_service.rows.counts import Counts
from grape_service.storage.parquet import open_small
from grape_service.storage.storage import Storage


@dataclass(frozen=True)
class Sampling:
    """How the samples of one policy are made."""

    sampler: str  # sampler_id
    config: SamplingConfig
    samples: int  # of each prompt
    stop_ids: tuple[int, ...]  # tokens that end a response
    verify: VerifyConfig
    right: int | None  # no more samples for a prompt that has so many right ones


def sampling_of(gather: GatherConfig, name: str, policy_id: str, stop_ids: Iterable[int]) -> Sampling:
    """How a policy of a gather section, whose id is given, samples."""
    config, stop_ids = gather.sampling_of(name), tuple(sorted(stop_ids))
    return Sampling(
        sampler_id(policy_id, config, stop_ids),
        config,
        gather.policies[name].samples,
        stop_ids,
        gather.verify.while_sampling,
        gather.stop_after.right if gather.stop_after is not None else None,
    )


class KnownSamples:
    """The samples of a prompt that there are, and their verdicts."""

    def __init__(self, known: Iterable[StoredSample | None]):
        self.samples = {number: sample for number, sample in enumerate(known) if sample is not None}
        self.verdicts = {number: sample["verdict"] for number, sample in self.samples.items()}

    def next(self, sampling: Sampling) -> list[int]:
        """Numbers of the samples to be made next; none where there are enough."""
        missing = [number for number in range(sampling.samples) if number not in self.samples]
        if sampling.right is None:
            return missing
        right = sum(verdict == "right" for verdict in self.verdicts.values())
        return missing[: max(0, sampling.right - right)]


@dataclass
class Stored(Counts):
    """What there is of some prompts' samples, and what is missing."""

    samples: int = 0
    tokens: int = 0  # of those that there are
    missing: int = 0  # at the most: right ones may end a prompt earlier


def stored_samples(storage: Storage, shards: Sequence[str], partition: str, sampling: Sampling) -> Stored:
    """Count the samples of the prompts of a partition's shards. Raises StageError on a bad file."""
    keys: list[bytes] = []
    asked: list[str] = []
    for shard in shards:
        with open_small(storage, shard) as file:
            table = file.read(columns=["row_key"] if sampling.right is None else None)
        keys += prompt_keys(table)
        if sampling.right is not None:
            others = [name for name in table.column_names if name not in SHARD.names]
            asked += [asked_of(row, sampling.verify) for row in table.select(others).to_pylist()]
    wanted = [sample_key(key, number) for key in keys for number in range(sampling.samples)]
    known = SampleStore(storage, sampling.sampler).read(partition, wanted, lengths_only=True)
    here = verify_id(sampling.verify, verifier_name(sampling.verify))
    found = Stored()
    for start in range(0, len(known), sampling.samples):
        prompt = KnownSamples(known[start : start + sampling.samples])
        found.samples += len(prompt.samples)
        found.tokens += sum(sample["num_tokens"] for sample in prompt.samples.values())
        if sampling.right is not None:  # what another verifier said, or to another question, is judged again first
            told = here, asked[start // sampling.samples]
            samples = {n: (sample.get("verify_id"), sample["asked"]) for n, sample in prompt.samples.items()}
            prompt.verdicts = {n: v for n, v in prompt.verdicts.items() if samples[n] == told}
        if prompt.next(sampling):
            found.missing += sampling.samples - len(prompt.samples)
    return found
