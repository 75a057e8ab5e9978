"""What the Prefect server does about runs whose process or worker is gone: deploy/automations.yaml, made once."""

from __future__ import annotations

import sys
from pathlib import Path

import yaml
from prefect.client.orchestration import SyncPrefectClient, get_client
from prefect.events.schemas.automations import AutomationCore

RETIRED = ("grape-start-again",)
"""Of earlier versions: it started another run, with the deployment's parameters."""
FILE = Path(__file__).resolve().parents[1] / "deploy" / "automations.yaml"


def wanted() -> list[AutomationCore]:
    """The automations of the file."""
    return [AutomationCore.model_validate(one) for one in yaml.safe_load(FILE.read_text())["automations"]]


def ensure(client: SyncPrefectClient) -> list[str]:
    """Make the automations that the server lacks and replace those of their names that differ; the names changed.

    Two of one name would each act: the second is deleted.
    """
    changed = []
    for name in RETIRED:
        for retired in client.read_automations_by_name(name):
            client.delete_automation(retired.id)
            changed.append(name)
    for automation in wanted():
        found = client.read_automations_by_name(automation.name)
        for other in found[1:]:
            client.delete_automation(other.id)
        if not found:
            client.create_automation(automation)
        elif _content(found[0]) != _content(automation):
            client.update_automation(found[0].id, automation)
        elif len(found) == 1:
            continue
        changed.append(automation.name)
    return changed


def _content(automation: AutomationCore) -> object:
    names = set(AutomationCore.model_fields) - {"owner_resource"}
    return _plain(automation.model_dump(mode="json", include=names))


def _plain(value: object) -> object:
    """Without what the server adds to a trigger; sets of names have no order."""
    if isinstance(value, dict):
        return {key: _plain(inner) for key, inner in value.items() if key != "id"}
    if isinstance(value, list):
        texts = [inner for inner in value if isinstance(inner, str)]
        return sorted(texts) if len(texts) == len(value) else [_plain(inner) for inner in value]
    return value


if __name__ == "__main__":
    with get_client(sync_client=True) as server:
        sys.stdout.write(f"changed: {', '.join(ensure(server)) or 'nothing'}\n")
