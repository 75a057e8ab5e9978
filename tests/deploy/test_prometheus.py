"""Alert rules and the dashboard's queries, read and run by Prometheus' own promtool."""

from __future__ import annotations

import json
import shutil
import subprocess
from pathlib import Path
from typing import Any

import pytest
import yaml

from tests.jobs import ROOT

PROMTOOL = shutil.which("promtool")
pytestmark = pytest.mark.skipif(PROMTOOL is None, reason="promtool is not installed: apt-get install prometheus")
RULES = ROOT / "deploy" / "prometheus-rules.yml"
LABELS = {"dataset": "math", "policy": "p"}
OF_ALERTS = {
    "GrapePending": {"Name": "Replica"},  # Ray's own gauge of actors has no labels of ours
    "GrapeRunPending": {},
    "GrapeRunsUnseen": {"job": "prefect-runs", "instance": "prefect-metrics:8081"},
}


def promtool(*arguments: str | Path) -> str:
    done = subprocess.run([str(PROMTOOL), *arguments], capture_output=True, text=True, timeout=60)
    assert done.returncode == 0, done.stdout + done.stderr
    return done.stdout


def test_rules_and_queries_are_what_prometheus_takes(tmp_path: Path) -> None:
    assert "6 rules found" in promtool("check", "rules", RULES)
    dashboard = json.loads((ROOT / "deploy" / "grafana" / "dashboards" / "grape.json").read_text())
    queries = [target["expr"].replace("$dataset", ".*") for one in dashboard["panels"] for target in one["targets"]]
    records = [{"record": f"panel:{number}", "expr": query} for number, query in enumerate(queries)]
    written = tmp_path / "panels.yml"
    written.write_text(yaml.safe_dump({"groups": [{"name": "panels", "rules": records}]}))
    assert f"{len(queries)} rules found" in promtool("check", "rules", written)
    assert not any("_per_second" in query for query in queries)  # rates come from counters


@pytest.mark.parametrize(
    ("alert", "series", "minutes", "fires"),
    [
        ("GrapeNoProgress", {"ray_grape_queue_shards": "5x60", "ray_grape_tokens_scored_total": "7x60"}, 40, True),
        ("GrapeNoProgress", {"ray_grape_queue_shards": "5x60"}, 40, True),  # not a token, and no counter yet
        ("GrapeNoProgress", {"ray_grape_queue_shards": "5x60", "ray_grape_tokens_scored_total": "0+9x60"}, 40, False),
        ("GrapeNoProgress", {"ray_grape_queue_shards": "0x60", "ray_grape_tokens_scored_total": "7x60"}, 40, False),
        ("GrapeFailures", {"ray_grape_failures_total": "0 0 3x30"}, 20, True),
        ("GrapeFailures", {"ray_grape_failures_total": "0x30"}, 20, False),
        ("GrapeEngineRestarts", {"ray_grape_restarts_total": "0 1 2 3 4x30"}, 20, True),
        ("GrapeEngineRestarts", {"ray_grape_restarts_total": "0 0 1x30"}, 20, False),
        ("GrapePending", {"ray_actors": "1x60"}, 40, True),
        ("GrapePending", {"ray_actors": "1x10 0x50"}, 40, False),
        ("GrapeRunPending", {"grape_unstarted_seconds": "0 30+60x40"}, 30, True),
        ("GrapeRunPending", {"grape_unstarted_seconds": "0 30+60x9 0x50"}, 30, False),
        ("GrapeRunsUnseen", {"up": "0x40"}, 20, True),
        ("GrapeRunsUnseen", {"up": "1 0x5 1x40"}, 20, False),
    ],
)
def test_alerts_fire_when_they_should(
    alert: str, series: dict[str, str], minutes: int, fires: bool, tmp_path: Path
) -> None:
    rule = next(one for one in yaml.safe_load(RULES.read_text())["groups"][0]["rules"] if one["alert"] == alert)
    of_alert = OF_ALERTS.get(alert, LABELS)
    of_series = of_alert | ({"State": "PENDING_CREATION"} if "ray_actors" in series else {})
    summary = rule["annotations"]["summary"]
    for key, value in of_alert.items():
        summary = summary.replace(f"{{{{ $labels.{key} }}}}", value)
    expected: dict[str, Any] = {"exp_labels": {**of_alert, **rule["labels"]}, "exp_annotations": {"summary": summary}}
    labels = ", ".join(f'{key}="{value}"' for key, value in of_series.items())
    test = {
        "interval": "1m",
        "input_series": [{"series": f"{name}{{{labels}}}", "values": values} for name, values in series.items()],
        "alert_rule_test": [
            {"eval_time": f"{minutes}m", "alertname": alert, "exp_alerts": [expected] if fires else []}
        ],
    }
    written = tmp_path / "test.yml"
    written.write_text(yaml.safe_dump({"rule_files": [str(RULES)], "tests": [test]}))
    assert "SUCCESS" in promtool("test", "rules", written)
