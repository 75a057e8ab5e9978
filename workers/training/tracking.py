"""Where a job's environment says that training reports to: MLflow, Weights & Biases."""

from __future__ import annotations

import importlib.util
from collections.abc import Mapping

from grape_service.install import install_command

VARIABLES = {
    "mlflow": ("MLFLOW_TRACKING_URI",),
    "wandb": ("WANDB_API_KEY", "WANDB_MODE", "WANDB_PROJECT"),
}
"""By package, the variables any of which says that the tracker is to be used."""


def configured(environment: Mapping[str, str]) -> dict[str, str]:
    """The packages of the trackers that an environment configures, and a variable that does so."""
    found = {}
    for package, names in VARIABLES.items():
        named = [name for name in names if environment.get(name)]
        if named and not (package == "wandb" and _is_off(environment)):
            found[package] = named[0]
    return found


def _is_off(environment: Mapping[str, str]) -> bool:
    """As wandb itself has it."""
    off = environment.get("WANDB_DISABLED", "").lower() in ("1", "true", "yes")
    return off or environment.get("WANDB_MODE", "").lower() == "disabled"


def missing(package: str, variable: str) -> str | None:
    """What to install for a tracker that is configured; None where it is there."""
    if importlib.util.find_spec(package) is not None:
        return None
    return (
        f"{variable} is set and the package '{package}' is not there, so this job reports nothing to it: "
        f"{install_command('tracking')}"
    )


def not_passed_on(environment: Mapping[str, str], job: Mapping[str, str], where: str) -> str | None:
    """A sentence on the trackers that this process's environment configures and a cluster's job is not told of."""
    told = configured(job)
    names = [name for package, name in configured(environment).items() if package not in told]
    if not names:
        return None
    return (
        f"{' and '.join(names)} {'is' if len(names) == 1 else 'are'} set here, and a job at {where} has the "
        "environment of its node: it reports there if that, or `environment` in its section, says so too"
    )
