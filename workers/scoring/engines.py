"""Scoring engines, one policy at a time."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator
from typing import TYPE_CHECKING

from grape_service.config.policy import PolicyConfig
from grape_service.gather.missing import Sampling
from grape_service.models.files import text_digests
from grape_service.score.store import ScoreStore
from workers.cluster.ray import is_private, need_ray
from workers.run import Run
from workers.scoring.actor import ScoringSpec
from workers.scoring.sampling import SamplingSpec

if TYPE_CHECKING:
    from workers.scoring.replicas import Replicas


ANY_UNITS = 2**30
"""More units than there are engines: how many there will be is not known yet."""


class Engines:
    """The engines of one policy at a time: policies take turns, and one that comes again at once stays up."""

    def __init__(self, run: Run):
        self.run = run
        self.replicas: Replicas | None = None

    def begin(self, policy: PolicyConfig) -> None:
        """Let the engine load beside what comes first, where it is sure to be needed and to be one of a private Ray."""
        if not is_private() or ScoreStore(self.run.workspace, self.run.policy_id(policy)).is_begun():
            return
        from workers.scoring.replicas import num_replicas

        need_ray()
        if num_replicas(self.run.config, policy.tensor_parallel, ANY_UNITS) == 1:
            self.replicas = self._begun(policy, 1)

    def of(self, policy: PolicyConfig, num_units: int, sampling: Sampling | None = None) -> Replicas:
        """Started engines for a policy, or samplers where `sampling` is given; others are ended first."""
        with self.run.stage("engine start"):
            if self.replicas is None or not self.are_up(policy, sampling):
                self.close()
                from workers.scoring.replicas import num_replicas  # imports Ray

                count = num_replicas(self.run.config, policy.tensor_parallel, num_units)
                self.replicas = self._begun(policy, count, sampling)
            self.replicas.wait_ready(1)
        return self.replicas

    def _begun(self, policy: PolicyConfig, count: int, sampling: Sampling | None = None) -> Replicas:
        from workers.scoring.replicas import Replicas

        config, policy_id = self.run.config, self.run.policy_id(policy)
        texts = text_digests(self.run.files_of(policy).folder)
        spec = ScoringSpec(policy, policy_id, self.run.workspace, self.run.run_id, config.workers.reuse, texts)
        return Replicas(config, spec if sampling is None else SamplingSpec(**vars(spec), sampling=sampling), count)

    def are_up(self, policy: PolicyConfig, sampling: Sampling | None = None) -> bool:
        """Whether engines of this policy are started, or its samplers where `sampling` is given."""
        if self.replicas is None or self.replicas.spec.policy_id != self.run.policy_id(policy):
            return False
        return getattr(self.replicas.spec, "sampling", None) == sampling

    def close(self) -> None:
        """End the engines and keep what they were and did for the manifest."""
        if self.replicas is None:
            return
        self.run.engines.extend(
            {"policy_id": self.replicas.spec.policy_id, **description} for description in self.replicas.descriptions()
        )
        self.run.events.extend(self.replicas.events.kept, self.replicas.events.left_out)
        self.replicas.close()
        self.replicas = None


@contextlib.contextmanager
def engines_of(run: Run) -> Iterator[Engines]:
    """Engines that are gone after the block."""
    started = Engines(run)
    try:
        yield started
    finally:
        started.close()
