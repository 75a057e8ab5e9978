"""The stages of a run on Ray: each takes the run and what the stage before it left, and gives back counts.

Prepare, select, weigh and release are Ray tasks over partitions; scoring is a pool of actors. The driver
holds counts, never rows. No Prefect here: flows call these functions.
"""

from __future__ import annotations

