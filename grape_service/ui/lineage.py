"""The lineage of a version as a drawing: pool files and models, the version, training runs, their checkpoints."""

from __future__ import annotations

from dataclasses import dataclass, field

from grape_service.display import short
from grape_service.errors import UserError
from grape_service.release.lineage import trained_version, training_runs
from grape_service.release.load import Release
from grape_service.release.manifest import PolicyUse
from grape_service.release.reference import parse_reference
from grape_service.ui.guard import root

WIDTH, HEIGHT, GAP_X, GAP_Y, MARGIN = 230, 54, 70, 14, 4
MAX_BOXES = 12
"""Boxes of a column; the others are counted in the last."""


@dataclass
class Box:
    """One thing of the drawing."""

    kind: str  # pool, model, release, version, run, checkpoint, more
    title: str
    detail: str = ""
    href: str = ""
    x: int = 0
    y: int = 0


@dataclass
class Drawing:
    """Boxes in columns from left to right, and the lines between them."""

    columns: list[list[Box]] = field(default_factory=list)
    lines: list[tuple[Box, Box]] = field(default_factory=list)
    width: int = 0
    height: int = 0

    @property
    def boxes(self) -> list[Box]:
        return [box for column in self.columns for box in column]

    def path(self, start: Box, end: Box) -> str:
        """A line as an SVG path."""
        x1, y1, x2, y2 = start.x + WIDTH, start.y + HEIGHT // 2, end.x, end.y + HEIGHT // 2
        return f"M {x1} {y1} C {x1 + GAP_X // 2} {y1}, {x2 - GAP_X // 2} {y2}, {x2} {y2}"


def drawing_of(release: Release) -> Drawing:
    """What a version was made from and what was made from it. Raises UserError where its records cannot be read."""
    parents = release.manifest.parents
    files = [
        Box("pool", short(item.path.rpartition("/")[2], 60), f"{what}{item.size:,} bytes")
        for what, items in (("", parents.pool), ("prompts, ", parents.prompts))
        for item in items
    ]
    models = _models(release)
    older = []
    if parents.release:
        older = [Box("release", short(parents.release.rpartition("/")[2], 60), "weighed again", _link(release))]
    num_files = parents.num_files("pool") + parents.num_files("prompts")
    sources = [
        *_few(files, "pool files", num_files),
        *older,
        *_few(models, "models"),
    ]
    rows = release.row_count
    version = Box("version", f"{release.name} {release.version}", f"{rows:,} row{'' if rows == 1 else 's'}")
    drawing = Drawing([sources, [version]], [(box, version) for box in sources])
    runs: list[Box] = []
    ends: list[Box] = []
    for record in training_runs(release.storage, release.name):
        if trained_version(record) == release.version and len(runs) < MAX_BOXES:
            run = Box("run", short(record["id"], 60), str(record.get("state", "state unknown")))
            runs.append(run)
            drawing.lines.append((version, run))
            stages = record.get("stages")
            for stage, entry in stages.items() if isinstance(stages, dict) else ():
                if isinstance(entry, dict) and entry.get("checkpoint"):
                    checkpoint = str(entry["checkpoint"]).rstrip("/").rpartition("/")[2]
                    end = Box("checkpoint", short(checkpoint, 60), f"{short(stage, 20)} checkpoint")
                    ends.append(end)
                    drawing.lines.append((run, end))
    drawing.columns += [column for column in (runs, ends) if column]
    _place(drawing)
    return drawing


def _models(release: Release) -> list[Box]:
    """A box for each policy, with its roles."""
    boxes = []
    policies: dict[str, list[PolicyUse]] = {}
    for policy in release.manifest.parents.policies:
        policies.setdefault(policy.policy_id, []).append(policy)
    for policy_id, uses in policies.items():
        roles = ", ".join(dict.fromkeys(use.role for use in uses))
        temperature = (uses[0].model_extra or {}).get("temperature")
        at = f" at temperature {temperature}" if temperature else ""
        name = "/".join(uses[0].model.rstrip("/").split("/")[-2:])
        boxes.append(Box("model", short(name, 60), short(f"{roles}{at}, {uses[0].revision or policy_id}", 60)))
    return boxes


def _link(release: Release) -> str:
    """The page of the parent, where it lies in the same folder."""
    try:
        parent = parse_reference(release.manifest.parents.release or "")
    except UserError:
        return ""
    if parent.path != release.storage.root:
        return ""
    return f"{root()}/datasets/{parent.name}/{parent.version_or_tag}"


def _few(boxes: list[Box], what: str, number: int | None = None) -> list[Box]:
    """The first of some boxes; `number`: how many there would be, where not all are here."""
    number = len(boxes) if number is None else number
    if number <= MAX_BOXES:
        return boxes
    return [*boxes[: MAX_BOXES - 1], Box("more", f"{number - MAX_BOXES + 1:,} more {what}", "see the manifest")]


def _place(drawing: Drawing) -> None:
    tallest = max(len(column) for column in drawing.columns)
    drawing.height = tallest * (HEIGHT + GAP_Y) - GAP_Y + 2 * MARGIN
    drawing.width = len(drawing.columns) * (WIDTH + GAP_X) - GAP_X + 2 * MARGIN
    for place, column in enumerate(drawing.columns):
        height = len(column) * (HEIGHT + GAP_Y) - GAP_Y
        for at, box in enumerate(column):
            box.x = MARGIN + place * (WIDTH + GAP_X)
            box.y = (drawing.height - height) // 2 + at * (HEIGHT + GAP_Y)
