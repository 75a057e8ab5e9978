"""How a step's batch is split over a job's processes."""

from __future__ import annotations

from grape_service.config.training import RlSettings, SftSettings
from grape_service.errors import UserError


def split_batch(batch_size: int, micro_batch_size: int | None, processes: int) -> tuple[int, int]:
    """(rows at once in a process, times that it does so in a step). Raises UserError where they do not fit."""
    share, rest = divmod(batch_size, processes)
    if micro_batch_size is None and not rest:
        micro_batch_size = max(size for size in range(1, 9) if share % size == 0)
    if rest or not micro_batch_size or share % micro_batch_size:
        raise UserError(
            f"a batch of {batch_size} cannot be split evenly over {processes} processes "
            f"with a micro_batch_size of {micro_batch_size}: change one of them"
        )
    return micro_batch_size, share // micro_batch_size


def split_of(settings: SftSettings | RlSettings, processes: int) -> tuple[int, int]:
    """`split_batch` of SFT's rows or RL's answers."""
    if isinstance(settings, RlSettings):
        return split_batch(settings.prompts_per_step * settings.num_generations, settings.micro_batch_size, processes)
    return split_batch(settings.batch_size, settings.micro_batch_size, processes)
