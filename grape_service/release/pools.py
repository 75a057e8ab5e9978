"""Released candidates as a pool: `pool.path: <folder>/<name>@<version or tag>` names what another config gathered."""

from __future__ import annotations

import os

from grape_service.config.pool import PoolGroup
from grape_service.config.schema import NAME_PATTERN, Config
from grape_service.errors import UserError
from grape_service.gather.audit import refuse_drifted
from grape_service.release.load import load

Released = dict[str, str]
"""The version of each path that names candidates, by the path."""


def with_released_candidates(config: Config, proven: bool = False) -> tuple[Config, Released]:
    """A config whose pool names data files where it named released candidates, and which versions these are.

    `proven` reads every data file once and compares its digest with the manifest's. Raises UserError for a version that
    is not there, is no set of candidates or is not what its manifest says, and for weights of numbers that an audit
    found to be another policy's.
    """
    found: Released = {}

    def of_group(group: PoolGroup) -> PoolGroup:
        if not names_release(group.path):
            return group
        release = load(group.path, config.storage)
        if release.manifest.kind != "candidates":
            raise UserError(
                f"pool.path '{group.path}' is a training set, of which there is one response to a prompt: name "
                "candidates that gather.release made, or the files that you want read"
            )
        refuse_drifted(config, release.manifest.counts)
        if proven:
            release.check_files()
        found[group.path] = release.reference
        return group.model_copy(update={"path": f"{release.path}/data/*.parquet"})

    given = config.pool.path
    groups = [PoolGroup(path=given)] if isinstance(given, str) else given
    read = [of_group(group) for group in groups]
    if not found:
        return config, found
    path = read[0].path if isinstance(given, str) else read
    return config.model_copy(update={"pool": config.pool.model_copy(update={"path": path})}), found


def names_release(path: str) -> bool:
    """Whether a path is <folder>/<name>@<version or tag>, and no file or folder of this machine."""
    name, at, which = path.rstrip().rpartition("/")[2].partition("@")
    return bool(at and which) and NAME_PATTERN.fullmatch(name) is not None and not os.path.exists(path)
