"""deploy/prefect.yaml against the code: flows, parameters and names exist."""

from __future__ import annotations

import importlib
import inspect
from typing import Any

import pytest
import yaml

from grape_service.config.loading import parse_config
from tests.jobs import ROOT

VALUES = yaml.safe_load((ROOT / "deploy" / "prefect.yaml").read_text())


@pytest.mark.parametrize("deployment", VALUES["deployments"], ids=lambda deployment: deployment["name"])
def test_deployments_name_flows_and_parameters_that_exist(deployment: dict[str, Any]) -> None:
    path, _, name = deployment["entrypoint"].partition(":")
    assert (ROOT / path).is_file()
    found = getattr(importlib.import_module(path.removesuffix(".py").replace("/", ".")), name)
    assert found.name == deployment["name"]
    known = inspect.signature(found.fn).parameters
    assert set(deployment["parameters"]) <= set(known)
    if "config" in deployment["parameters"]:
        assert parse_config(deployment["parameters"]["config"]).name
    assert "grape" in deployment["tags"]
    assert "concurrency_limit" not in deployment  # a lease, which a run loses with the server


def test_the_three_deployments_are_there() -> None:
    assert [deployment["name"] for deployment in VALUES["deployments"]] == ["curate", "score-pool", "train"]
