"""grape report, compare, explain: see what was chosen and why."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated, Any

import orjson
import typer
from rich.panel import Panel
from rich.text import Text

from grape_service.cli.completion import complete_reference
from grape_service.cli.output import (
    EndpointOption,
    JsonOption,
    ReferenceArgument,
    console,
    print_json,
    print_table,
    say,
    storage_options,
    write_file,
)

OutOption = Annotated[Path | None, typer.Option("--out", help="The file to write.", metavar="FILE")]


def register(app: typer.Typer) -> None:
    """Add these commands."""
    app.command(epilog="Example: grape report s3://team/datasets/math-sft@v0003 --out report.html")(report)
    app.command(epilog="Example: grape compare s3://team/datasets/math-sft@v0003 s3://team/datasets/math-sft@v0004")(
        compare
    )
    app.command(epilog="Example: grape explain s3://team/datasets/math-sft@v0003 3f2a9c41")(explain)


def report(
    reference: ReferenceArgument,
    out: OutOption = None,
    regenerate: Annotated[
        bool, typer.Option("--regenerate", help="Make the page again from the manifest and the workspace.")
    ] = False,
    open_it: Annotated[bool, typer.Option("--open", help="Open it in the browser.")] = False,
    endpoint: EndpointOption = None,
    as_json: JsonOption = False,
) -> None:
    """Write a version's report to a file: the one that it was published with, or a new one."""
    from grape_service.release.load import load_training_set
    from grape_service.report.page import report_page

    release = load_training_set(reference, storage_options(endpoint))
    path = out or Path(f"{release.name}-{release.version}-report.html")
    path = write_file(path, report_page(release, regenerate))
    print_json({"reference": release.reference, "report": str(path)}) if as_json else say(str(path))
    if open_it:
        typer.launch(path.as_uri())


def compare(
    first: Annotated[str, typer.Argument(help="A dataset version.", metavar="A", autocompletion=complete_reference)],
    second: Annotated[str, typer.Argument(help="Another one.", metavar="B", autocompletion=complete_reference)],
    out: OutOption = None,
    endpoint: EndpointOption = None,
    as_json: JsonOption = False,
) -> None:
    """Two versions side by side: rows, choices, scores and weights that differ, rankings, where they differ most."""
    from grape_service.release.compare import compare as compare_releases
    from grape_service.release.load import load_training_set

    options = storage_options(endpoint)
    found = compare_releases(load_training_set(first, options), load_training_set(second, options))
    if out is not None:
        from grape_service.report.page import render_comparison

        write_file(out, render_comparison(found))
    if as_json:
        print_json({key: value for key, value in found.items() if key != "text"})
        return
    ranking = found["ranking"]
    say(found["text"])
    say("")
    if found["agreement"] is not None:
        say(f"agreement of winners: {found['agreement']:.1%}")
    if ranking is None:
        say("the scores of one of them are gone or were never made: no ranks to compare")
    elif ranking["rank_correlation"] is not None:
        say(f"rank correlation within prompts: {ranking['rank_correlation']:.3f} over {ranking['prompts']:,} prompts")
        apart = ranking["score_difference"]
        if apart is not None:
            say(f"scores differ by {apart['mean']:.2g} on average and {apart['largest']:.2g} at most")
        rows = [
            [e["prompt_id"], _who(e["first"]), _who(e["second"]), f"{e['lost']:.3f}"] for e in ranking["most_different"]
        ]
        columns = ["prompt", "first choice of A (score in A / B)", "first choice of B (score in A / B)", "lost"]
        if rows:
            print_table("where they differ most", columns, rows)
            say("lost: what both lose together, in score, if each took the first choice of the other")
    if found["turnover"] is not None:
        show_turnover(found["turnover"])
    print_table("kept rows by source", ["source", "A", "B"], [[s, *counts] for s, counts in found["sources"].items()])
    if found["settings"]:
        rows = [
            [d["key"], *(orjson.dumps(d[side]).decode() for side in ("first", "second"))] for d in found["settings"]
        ]
        print_table("settings that differ", ["key", "A", "B"], rows)
    else:
        say("no setting differs, and no policy")


def show_turnover(moved: dict[str, Any]) -> None:
    """How much of the rows turned over in each version, and the prompts that keep changing their winner."""
    pairs = zip(reversed(moved["versions"]), reversed(moved["churn"]), strict=True)
    say(f"turnover: {', '.join(f'{churn:.0%} of the rows new or gone in {version}' for version, churn in pairs)}")
    if moved["most"]:
        rows = [[one["prompt_id"], f"{one['times']:,} of {len(moved['versions']):,}"] for one in moved["most"]]
        print_table("prompts that keep changing their winner", ["prompt", "versions"], rows)


def _who(choice: dict[str, Any]) -> str:
    who = f"{choice['source'] or '(no source)'} {choice['candidate_id'][:12]}"
    return f"{who} ({choice['score']:.3f} / {choice['score_other']:.3f})"


def explain(
    reference: ReferenceArgument,
    prompt: Annotated[
        str, typer.Argument(help="A prompt's id, the beginning of one, or words of it.", metavar="PROMPT")
    ],
    endpoint: EndpointOption = None,
    as_json: JsonOption = False,
) -> None:
    """Every candidate of a prompt with score, length, source and why it was kept or not; its tokens in colour."""
    from grape_service.display import counted, cut, short, visible
    from grape_service.release.load import load_training_set
    from grape_service.report.explain import explain as explain_prompt

    found = explain_prompt(load_training_set(reference, storage_options(endpoint)), prompt)
    if as_json:
        print_json(found)
        return
    screen = console()
    screen.print(
        Panel(Text(cut(found["prompt"], 4000)), title=Text(f"prompt {found['prompt_id']}"), title_align="left")
    )
    for candidate in found["candidates"]:
        score = "no score" if candidate["score"] is None else f"score {candidate['score']:.4f}"
        body = Text()
        body.append(f"candidate {short(candidate['candidate_id'], 80)}\n", style="dim")
        body.append(f"{score}, {counted(candidate['counted_tokens'], 'token')}; {candidate['reason']}\n", style="dim")
        for place, text in enumerate(candidate["texts"]):
            body.append(visible(text), style=_shade(candidate["logprobs"], place))
        screen.print(
            Panel(
                body,
                title=Text(short(candidate["source"] or "(no source)")),
                title_align="left",
                border_style="green" if candidate["kept"] else "dim",
            )
        )
    screen.print(Text("colour: log-probability, from -10 (red) to 0 (none)", style="dim"))


def _shade(logprobs: list[float | None] | None, place: int) -> str:
    value = logprobs[place] if logprobs is not None and place < len(logprobs) else None
    if value is None or value > -0.5:
        return ""
    strength = min(1.0, -value / 10)
    return f"white on rgb({round(70 + 130 * strength)},{round(50 - 20 * strength)},{round(50 - 20 * strength)})"
