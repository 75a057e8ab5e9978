"""Scoring engines, one policy at a time."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator
from typing import TYPE_CHECKING

from grape_service.config.policy import PolicyConfig
from grape_service.models.files import text_digests
from workers.run import Run
from workers.scoring.actor import ScoringSpec

if TYPE_CHECKING:
    from workers.scoring.replicas import Replicas


class Engines:
    """The engines of one policy at a time: policies take turns, and one that comes again at once stays up."""

    def __init__(self, run: Run):
        self.run = run
        self.replicas: Replicas | None = None

    def of(self, policy: PolicyConfig, num_units: int) -> Replicas:
        """Started engines for a policy; those of another policy are ended first."""
        if self.replicas is not None and self.are_up(policy):
            return self.replicas
        self.close()
        from workers.scoring.replicas import Replicas, num_replicas  # imports Ray

        policy_id = self.run.policy_id(policy)
        config = self.run.config
        texts = text_digests(self.run.files_of(policy).folder)
        spec = ScoringSpec(policy, policy_id, self.run.workspace, self.run.run_id, config.workers.reuse, texts)
        count = num_replicas(config, policy.tensor_parallel, num_units)
        with self.run.stage("engine start"):
            self.replicas = Replicas(config, spec, count)
        return self.replicas

    def are_up(self, policy: PolicyConfig) -> bool:
        """Whether engines of this policy are started."""
        return self.replicas is not None and self.replicas.spec.policy_id == self.run.policy_id(policy)

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
