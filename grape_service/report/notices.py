"""What a reader should know before training: plain sentences, each with what to change."""

from __future__ import annotations

from grape_service.display import short
from grape_service.json_types import JsonObject
from grape_service.report.facts import Facts, SelectReport, WeightsReport
from grape_service.report.families import families_of, is_same_model
from grape_service.report.misled import misled, own_family
from grape_service.report.warning import MIN_PROMPTS, ReportWarning, compared_prompts, share


def warnings_of(facts: Facts) -> list[ReportWarning]:
    """All warnings of a release, from its manifest's counts, config and statistics."""
    report = facts["statistics"].get("report") or {}
    found = _pool(facts) + _checks(facts)
    found += _singletons(facts) + _self_written(facts) + own_family(facts)
    if report.get("select"):
        checked = any(check["name"] == "sources" for check in facts["statistics"].get("checks") or [])
        found += [] if checked else _sources(facts, report["select"])
        found += _choice(facts, report["select"]) + misled(facts, report["select"])
    if report.get("weights"):
        found += _weights(facts, report["weights"])
    return found


def _pool(facts: Facts) -> list[ReportWarning]:
    pool, select = facts["counts"].get("pool") or {}, facts["counts"].get("select") or {}
    found = []
    rejected = share(pool.get("rejected", 0), pool.get("rows_in", 0))
    if rejected > 0.02:
        reasons = pool.get("rejected_by_reason") or {"?": 0}
        worst = max(reasons, key=lambda reason: reasons[reason])
        found.append(
            ReportWarning(
                f"{rejected:.1%} of the pool's rows could not be used; most often: {short(worst, 80)}.",
                "Look at them with `grape rejects`, and fix the pool or pool.columns.",
            )
        )
    truncated = share(pool.get("truncated", 0), pool.get("rows", 0))
    if truncated > 0.02:
        found.append(
            ReportWarning(
                f"{truncated:.1%} of the candidates were cut off by a length limit, and a model trained on them "
                "learns not to end.",
                "Set pool.truncated: reject, or sample them again with a higher limit.",
            )
        )
    for reason, count in (select.get("prompts_left_out") or {}).items():
        left = share(count, select.get("prompts", 0))
        if left > 0.1:
            found.append(
                ReportWarning(
                    f"{left:.1%} of the prompts were left out: {short(reason, 60)}.",
                    "Check select.min_margin, the token limits and max_source_share, and the failures of the run.",
                )
            )
    return found


def _singletons(facts: Facts) -> list[ReportWarning]:
    """Prompts with nothing to choose from."""
    select = facts["counts"].get("select") or {}
    alone, prompts = select.get("singletons", 0), select.get("kept_prompts", 0)
    if share(alone, prompts) <= 0.1 or (facts["config"].get("select") or {}).get("method") == "all":
        return []
    return [
        ReportWarning(
            f"{alone:,} of {prompts:,} kept prompts ({alone / prompts:.0%}) have one response, with nothing to choose.",
            "Set select.min_candidates: 2 to leave them out, or sample more responses for them.",
        )
    ]


def _self_written(facts: Facts) -> list[ReportWarning]:
    """Kept rows that the target, or a model of its family, wrote, as far as names show it."""
    config, select = facts["config"], facts["counts"].get("select") or {}
    target = str((config.get("target") or {}).get("model") or "")
    writers = (config.get("behavior") or {}).get("sources") or {}
    families = families_of(target)
    own = of_family = 0
    for source, counts in (select.get("sources") or {}).items():
        writer = writers.get(source)  # "none" of people
        names = [source, str(writer.get("model") or "") if isinstance(writer, dict) else ""]
        if target and any(is_same_model(name, target) for name in names):
            own += counts["kept"]
        elif families and any(families & families_of(name) for name in names):
            of_family += counts["kept"]
    kept = select.get("kept_rows", 0)
    found = []
    if share(own, kept) > 0.05:
        found.append(
            ReportWarning(
                f"{own:,} of {kept:,} kept rows ({own / kept:.0%}) were written by the target itself.",
                "Self-distillation hurt in GRAPE's tables: leave its own samples out with pool.where, or limit them "
                "with select.max_source_share.",
            )
        )
    if share(of_family, kept) > 0.5:
        found.append(
            ReportWarning(
                f"{of_family:,} of {kept:,} kept rows ({of_family / kept:.0%}) were written by models of the target's "
                f"family ({', '.join(sorted(families))}).",
                "Winners lean to the target's own family: compare with select.max_source_share before training.",
            )
        )
    return found


def _checks(facts: Facts) -> list[ReportWarning]:
    found = []
    for check in facts["statistics"].get("checks") or []:
        if check.get("warning"):
            found.append(ReportWarning(check["warning"], check["change"]))
    return found


def _sources(facts: Facts, select: SelectReport) -> list[ReportWarning]:
    found: list[ReportWarning] = []
    contested = select["contested"]
    method = (facts["config"].get("select") or {}).get("method", "grape")
    if contested < MIN_PROMPTS or str(method).startswith("source:"):
        return found
    for name, present, wins in zip(select["names"], select["prompts_with"], select["wins"], strict=True):
        if present < MIN_PROMPTS or len(select["names"]) == 1:
            continue
        rate = wins / present
        if rate > 0.9:
            found.append(
                ReportWarning(
                    f"Source {short(name)} wins {rate:.0%} of the prompts that it competes in.",
                    "Read its examples; if it is not better, limit it with select.max_source_share or leave it out "
                    "with pool.where.",
                )
            )
        elif rate < 0.01:
            how_often = "almost never" if wins else "never"
            found.append(
                ReportWarning(
                    f"Source {short(name)} {how_often} wins ({wins:,} of {present:,} prompts).",
                    "Scoring it may be a waste: leave it out with pool.where, or check that its rows are rendered "
                    "as the target expects.",
                )
            )
    return found


def _choice(facts: Facts, select: SelectReport) -> list[ReportWarning]:
    found: list[ReportWarning] = []
    if select["contested"] < MIN_PROMPTS or (facts["config"].get("select") or {}).get("method", "grape") != "grape":
        return found
    ratio = share(select["winner_tokens"], select["rival_tokens"])
    if ratio and not 0.6 <= ratio <= 1.67:
        kind = "shorter" if ratio < 1 else "longer"
        found.append(
            ReportWarning(
                f"Winners are much {kind} than their rivals: {select['winner_tokens']:.0f} tokens on average against "
                f"{select['rival_tokens']:.0f}.",
                "The choice may be one of length: set select.min_response_tokens or max_response_tokens, and compare "
                "with the length-matched choice below.",
            )
        )
    within = select.get("within")
    if within is not None and abs(within) > 0.6:
        found.append(
            ReportWarning(
                f"Within a prompt, score and length go together (correlation {within:+.2f}).",
                "Candidates of like length would be a fairer choice: filter the pool by length or set the token "
                "limits of select.",
            )
        )
    margins = [sum(column) for column in zip(*select["margins"], strict=True)]
    from grape_service.report.statistics import MARGIN_EDGES

    tiny = sum(count for count, edge in zip(margins, MARGIN_EDGES[1:], strict=True) if edge <= 0.002)
    if share(tiny, sum(margins)) > 0.3:
        found.append(
            ReportWarning(
                f"{share(tiny, sum(margins)):.0%} of the choices are decided by less than 0.002 per token, "
                "which is within the noise of bf16 scoring.",
                "Set select.min_margin, or score with target.dtype: float32.",
            )
        )
    other = (select["agree"] or {}).get("turn end the other way")
    compared = compared_prompts(select)
    if other is not None and compared >= MIN_PROMPTS and share(other, compared) < 0.6:
        found.append(
            ReportWarning(
                f"Whether the turn end counts changes {1 - share(other, compared):.0%} of the choices.",
                "Answers are very short, or the target does not know the turn end: keep count_turn_end: false for a "
                "base model and set select.min_response_tokens.",
            )
        )
    return found


CENTERED = (
    "Leave weights.center out, or narrow weights.ratio_clip to the same bounds on both sides, such as [-0.02, 0.02]: "
    "centered log ratios that are clipped no longer add up to 0, so weights grow towards the start of a response. "
    "Such weights, worth 16% to 23% of the tokens, lost 31 points of accuracy after RL in docs/evidence.md."
)


NARROW = (
    "Narrow weights.ratio_clip, such as to [-0.02, 0.02], and only then try weights.center: sequence too; grape weigh "
    "does both without scoring again."
)


def _weights(facts: Facts, weights: WeightsReport) -> list[ReportWarning]:
    figures = facts["statistics"].get("weights") or {}
    counts = facts["counts"].get("weigh") or {}
    config = facts["config"].get("weights") or {}
    if config.get("method", "pear") != "pear":
        return _other_weights(figures)
    is_centered = config.get("center", "none") != "none"
    found = []
    found += _recorded_numbers(counts)
    effective = figures.get("effective_share")
    if effective is not None and effective < 0.3:
        found.append(
            ReportWarning(
                f"The weights are worth {effective:.0%} of the tokens (effective sample size): few tokens carry the "
                "training.",
                CENTERED if is_centered else NARROW,
            )
        )
    low = figures.get("weight_low")
    if low is not None and low > 0.1:
        found.append(
            ReportWarning(
                f"{low:.0%} of the weights are at their lower bound: only the ends of responses train.",
                f"{NARROW} Or use a behavior policy nearer to the target.",
            )
        )
    last = weights.get("last_tenth")
    if last is not None and last > 0.4:
        found.append(
            ReportWarning(
                f"The last tenth of the responses holds {last:.0%} of the weight.",
                f"Weights collapse towards the start. {NARROW}",
            )
        )
    high = figures.get("weight_high")
    if high is not None and high > 0.01:
        found.append(
            ReportWarning(
                f"{high:.1%} of the weights are at their upper bound.",
                CENTERED
                if is_centered
                else "Use weights.normalize: sequence or a lower upper bound of weights.ratio_clip.",
            )
        )
    uniform = share(counts.get("uniform_rows", 0), counts.get("rows", 0))
    if uniform > 0.2:
        found.append(
            ReportWarning(
                f"{uniform:.0%} of the rows have no behavior policy and have weight 1 at each token.",
                "Name their policies in behavior.sources, or leave them out with behavior.missing: drop.",
            )
        )
    return found


MOST = 0.5


def _recorded_numbers(counts: JsonObject) -> list[ReportWarning]:
    """Sources whose recorded numbers are likely not what the config says, and whose ratios a clip holds."""
    found = []
    for name, tokens in (counts.get("recorded_tokens") or {}).items():
        same = share((counts.get("recorded_same") or {}).get(name, 0), tokens)
        if same > MOST:
            found.append(
                ReportWarning(
                    f"{same:.0%} of the log-probabilities recorded for source {short(name)} are the target's own "
                    "before the temperature.",
                    "They are raw, not processed: set behavior.recorded: raw, and weigh again.",
                )
            )
    for name, totals in (counts.get("sources") or {}).items():
        for clip, which in (("ratio_low", "lower"), ("ratio_high", "upper")):
            held = share(totals.get(clip, 0), totals.get("tokens", 0))
            if held > MOST:
                found.append(
                    ReportWarning(
                        f"{held:.0%} of the log ratios of source {short(name)} are at their {which} bound.",
                        "Are the numbers that policy's, and taken as behavior.recorded says (raw or processed)? If "
                        "they are, use a wider weights.ratio_clip.",
                    )
                )
    return found


def _other_weights(figures: JsonObject) -> list[ReportWarning]:
    """Of weights that compare with no behavior."""
    found = []
    effective = figures.get("effective_share")
    if effective is not None and effective < 0.3:
        found.append(
            ReportWarning(
                f"The weights are worth {effective:.0%} of the tokens (effective sample size): few tokens carry the "
                "training.",
                "Raise the lower bound of weights.weight_clip, or lower weights.alpha where the method is entropy.",
            )
        )
    for key, side in (("weight_low", "lower"), ("weight_high", "upper")):
        held = figures.get(key)
        if held is not None and held > 0.1:
            found.append(
                ReportWarning(
                    f"{held:.0%} of the weights are at their {side} bound.",
                    f"Look at the weights by source, and widen weights.weight_clip if its {side} bound is too near.",
                )
            )
    return found
