"""Everything in deploy/ that can be checked without a cluster: schemas, and that what is named exists."""

from __future__ import annotations

import inspect
import json
import re
import shlex
import subprocess
import sys
import tomllib
from collections.abc import Iterator
from importlib.metadata import distributions
from importlib.resources import files
from pathlib import Path
from typing import Any

import jsonschema
import kubernetes_validate
import pytest
import yaml
from packaging.specifiers import SpecifierSet

from flows.one_run import GONE
from grape_service.cli.app import app
from grape_service.config.loading import parse_config
from tests.jobs import ROOT

DEPLOY = ROOT / "deploy"
COMPOSE = yaml.safe_load((DEPLOY / "compose.yaml").read_text())
CODE = "\n".join(
    path.read_text() for package in ("grape_service", "workers", "flows") for path in (ROOT / package).rglob("*.py")
)
OWN = re.compile(r"\bGRAPE_[A-Z_]+\b")
RAY_CLUSTER_KEYS = {
    "rayVersion",
    "authOptions",
    "enableInTreeAutoscaling",
    "autoscalerOptions",
    "headGroupSpec",
    "workerGroupSpecs",
}
WORKER_KEYS = {"groupName", "replicas", "minReplicas", "maxReplicas", "rayStartParams", "template"}
RAY_JOB_KEYS = {
    "entrypoint",
    "runtimeEnvYAML",
    "backoffLimit",
    "shutdownAfterJobFinishes",
    "ttlSecondsAfterFinished",
    "activeDeadlineSeconds",
    "rayClusterSpec",
}


def _manifests() -> Iterator[tuple[str, dict[str, Any]]]:
    for path in sorted((DEPLOY / "kubernetes").glob("*.yaml")):
        for manifest in yaml.safe_load_all(path.read_text()):
            yield f"{path.name}-{manifest['kind']}", manifest


@pytest.mark.parametrize(
    ("name", "manifest"), list(_manifests()), ids=lambda value: value if isinstance(value, str) else ""
)
def test_manifests_follow_their_schemas(name: str, manifest: dict[str, Any]) -> None:
    if not manifest["apiVersion"].startswith("ray.io"):
        kubernetes_validate.validate(manifest, "1.34", strict=True)
        return
    assert manifest["apiVersion"] == "ray.io/v1"
    spec = manifest["spec"]
    if manifest["kind"] == "RayJob":
        assert set(spec) <= RAY_JOB_KEYS
        spec = spec["rayClusterSpec"]
    assert set(spec) <= RAY_CLUSTER_KEYS
    assert spec["rayVersion"] == _pinned("ray")
    assert set(spec["headGroupSpec"]) <= {"rayStartParams", "template"}
    groups = spec["workerGroupSpecs"]
    assert any("nvidia.com/gpu" in str(group["template"]) for group in groups)
    for group in groups:
        assert set(group) <= WORKER_KEYS
        assert group["minReplicas"] <= group["replicas"] <= group["maxReplicas"]
    for template in [spec["headGroupSpec"]["template"], *(group["template"] for group in groups)]:
        metadata = {"name": "pod", **template.get("metadata", {})}
        pod = {"apiVersion": "v1", "kind": "Pod", "metadata": metadata, "spec": template["spec"]}
        kubernetes_validate.validate(pod, "1.34", strict=True)


def _pinned(name: str) -> str:
    lines = (ROOT / "requirements" / "constraints.txt").read_text().splitlines()
    return next(line.split("==")[1] for line in lines if line.startswith(f"{name}=="))


def test_pinned_packages_take_the_oldest_python_that_we_take() -> None:
    """pip would look for other versions of all packages, for ten minutes, and end in a riddle."""
    oldest = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]["requires-python"].removeprefix(">=")
    refused = [
        f"{package.name} {package.version}: {package.metadata['Requires-Python']}"
        for package in distributions()
        if f"{oldest}.0" not in SpecifierSet(package.metadata.get("Requires-Python") or "")
    ]
    assert refused == []


def test_the_compose_file_follows_its_schema() -> None:
    schema = files("check_jsonschema") / "builtin_schemas" / "vendor" / "compose-spec.json"
    jsonschema.validate(COMPOSE, json.loads(schema.read_text()))
    services = COMPOSE["services"]
    assert set(services) == {
        "postgres",
        "prefect-server",
        "prefect-worker",
        "prefect-metrics",
        "seaweedfs",
        "ray-head",
        "ray-worker",
        "prometheus",
        "grafana",
    }
    named = {volume.split(":")[0] for one in services.values() for volume in one.get("volumes", [])}
    for source in named:
        if source.startswith("./"):
            assert (DEPLOY / source).exists(), source
        else:
            assert source in COMPOSE["volumes"]
    for one in services.values():
        for port in one.get("ports", []):
            assert port.startswith("127.0.0.1:"), "nothing is open to the network unless somebody says so"
    for scraped in yaml.safe_load((DEPLOY / "prometheus.yml").read_text())["scrape_configs"]:
        for target in scraped["static_configs"][0]["targets"]:
            host, _, port = target.partition(":")
            option = f"--metrics-export-port={port}" if scraped["job_name"] == "ray" else port
            assert option in services[host]["command"]


def test_every_client_of_prefect_has_the_password_and_no_job_of_the_cluster() -> None:
    services = COMPOSE["services"]
    password = services["prefect-server"]["environment"]["PREFECT_SERVER_API_AUTH_STRING"]
    assert password.startswith("grape:${PREFECT_PASSWORD:?")
    for name, one in services.items():
        environment = one.get("environment", {})
        assert environment.get("PREFECT_API_AUTH_STRING") == (password if "PREFECT_API_URL" in environment else None)
        assert not (name.startswith("ray-") and any("PREFECT" in variable for variable in environment))


def test_addresses_name_services_and_their_ports() -> None:
    text = (DEPLOY / "compose.yaml").read_text() + (DEPLOY / "grafana" / "datasource.yaml").read_text()
    for host, port in re.findall(r"https?://([a-z-]+):(\d+)", text):
        if host != "localhost":
            service = COMPOSE["services"][host]
            assert any(str(entry).endswith(f":{port}") for entry in service["ports"]), (host, port)


def test_commands_exist() -> None:
    named = {command.name or command.callback.__name__ for command in app.registered_commands}
    named |= {group.name for group in app.registered_groups}
    text = "\n".join(path.read_text() for path in DEPLOY.rglob("*") if path.is_file())
    used = set(re.findall(r"`grape ([a-z]+)", text)) | set(re.findall(r"^ *grape ([a-z]+)", text, re.MULTILINE))
    assert used <= named, used - named
    used = set(re.findall(r"grape_service\.cli ([a-z]+)", text))
    assert used <= named


def test_environment_variables_exist_in_the_code() -> None:
    for path in DEPLOY.rglob("*"):
        if path.is_file():
            for name in set(OWN.findall(path.read_text())) - {"GRAPE_HOME", "GRAPE_IMAGE"}:
                assert f'"{name}"' in CODE, f"{path.name}: {name}"


def test_prefect_settings_exist() -> None:
    import prefect.settings
    from prefect.server.utilities import encryption

    assert "PREFECT_SERVER_ENCRYPTION_KEY" in inspect.getsource(encryption)  # read there alone
    others = {"PREFECT_SERVER_ENCRYPTION_KEY", "PREFECT_PASSWORD"}  # the second is the compose file's own
    for path in DEPLOY.rglob("*"):
        if path.is_file():
            for name in set(re.findall(r"\bPREFECT_[A-Z_]+\b", path.read_text())) - others:
                assert hasattr(prefect.settings, name), f"{path.name}: {name}"


def test_automations_are_what_prefect_takes() -> None:
    from prefect.events.schemas.automations import AutomationCore

    found = yaml.safe_load((DEPLOY / "automations.yaml").read_text())["automations"]
    made = {one["name"]: AutomationCore.model_validate(one) for one in found}
    assert set(made) == {"grape-lost-runs", "grape-never-started"}
    frequency = yaml.safe_load((DEPLOY / "prefect.yaml").read_text())["definitions"]["work_pool"]["job_variables"]
    beat = int(frequency["env"]["PREFECT_FLOWS_HEARTBEAT_FREQUENCY"])
    # A server that is away for two minutes, and two beats of a busy machine.
    assert made["grape-lost-runs"].trigger.within.total_seconds() >= 120 + 3 * beat
    for automation in made.values():  # of the run itself: another run would have the deployment's parameters
        assert [(action.type, action.state.value) for action in automation.actions] == [
            ("change-flow-run-state", "SCHEDULED")
        ]
        assert automation.actions[0].message.startswith(GONE)


@pytest.mark.parametrize("name", ["Dockerfile.cpu", "Dockerfile.cuda"])
def test_container_files_copy_what_exists_and_their_shell_is_clean(name: str, tmp_path: Path) -> None:
    text = re.sub(r"\\\n\s*", " ", (DEPLOY / "docker" / name).read_text())
    for line in re.findall(r"^COPY (.*)$", text, re.MULTILINE):
        for source in shlex.split(line)[:-1]:
            assert (ROOT / source).exists(), source
    commands = re.findall(r"^RUN (.*)$", text, re.MULTILINE)
    script = tmp_path / "run.sh"
    script.write_text("#!/bin/sh\n" + "\n".join(commands) + "\n")
    checker = Path(sys.executable).parent / "shellcheck"
    done = subprocess.run([str(checker), str(script)], capture_output=True, text=True)
    assert done.returncode == 0, done.stdout
    assert "USER 10001" in text  # a number, by which Kubernetes knows that it is not root
    installed = re.findall(r"pip install (.*?)(?:&&|$)", " ".join(commands))
    assert all("--no-deps" in one and ("--require-hashes" in one or "-e ." in one) for one in installed), installed


def _pods() -> Iterator[tuple[str, dict[str, Any]]]:
    """The pod templates of the manifests."""
    for name, manifest in _manifests():
        spec = manifest.get("spec", {})
        spec = spec.get("rayClusterSpec", spec)
        groups = [spec["headGroupSpec"], *spec["workerGroupSpecs"]] if "headGroupSpec" in spec else [spec]
        for group in groups:
            if "template" in group:
                yield (
                    f"{name}-{group.get('groupName', 'head' if 'rayStartParams' in group else 'pod')}",
                    group["template"],
                )


@pytest.mark.parametrize(("name", "pod"), list(_pods()), ids=lambda value: value if isinstance(value, str) else "")
def test_pods_are_closed(name: str, pod: dict[str, Any]) -> None:
    spec, labels = pod["spec"], pod["metadata"]["labels"]
    assert spec["automountServiceAccountToken"] is False
    context = spec["securityContext"]
    assert context["runAsNonRoot"]
    assert context["runAsUser"] > 0
    assert context["seccompProfile"] == {"type": "RuntimeDefault"}
    for container in spec["containers"]:
        assert container["securityContext"] == {"allowPrivilegeEscalation": False, "capabilities": {"drop": ["ALL"]}}
        assert "kubernetes-token" not in str(container.get("volumeMounts"))  # the autoscaler's alone
        assert "memory" in container["resources"]["limits"]
        is_rays = labels["app"] == "grape-ray"  # to which KubeRay gives probes
        assert is_rays or "livenessProbe" in container
    assert labels["app.kubernetes.io/part-of"] == "grape"


def test_network_policies_close_every_pod_and_open_the_ports_that_are_there() -> None:
    policies = {m["metadata"]["name"]: m["spec"] for name, m in _manifests() if m["kind"] == "NetworkPolicy"}
    assert policies["grape-closed"] == {
        "podSelector": {"matchLabels": {"app.kubernetes.io/part-of": "grape"}},
        "policyTypes": ["Ingress"],
    }
    apps = {pod["metadata"]["labels"]["app"] for _, pod in _pods()}
    for name, spec in policies.items():
        selected = spec["podSelector"]["matchLabels"].get("app")
        assert selected in apps or name == "grape-closed"
        for way in spec.get("ingress", []):
            named = [one["podSelector"]["matchLabels"].get("app") for one in way["from"] if "podSelector" in one]
            assert {one for one in named if one} <= apps


def test_the_run_in_the_rayjob_has_a_good_config() -> None:
    manifests = dict(_manifests())
    text = manifests["rayjob.yaml-ConfigMap"]["data"]["config.yaml"]
    assert parse_config(yaml.safe_load(text)).name == "math-sft"
    environment = yaml.safe_load(manifests["rayjob.yaml-RayJob"]["spec"]["runtimeEnvYAML"])["env_vars"]
    assert environment == {"GRAPE_IN_CLUSTER": "1"}
