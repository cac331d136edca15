"""The head of a comparison's report: verdict, what was compared on what, how rows were made, and the protocol."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from benchmarks.literature.report_document import Block, Bullets, Code, Heading, Strong, Table, paragraph
from benchmarks.literature.report_figures import OVERRUN, Comparison, reason_of, time_used, verdict, why_not_first
from benchmarks.literature.systems import READS, SHORT, SHORT_HISTORY

FACTS = ("commit", "cpu", "versions", "threads")  # of how a row was made


def head(comparison: Comparison) -> list[Block]:
    """Verdict, what was compared on what, and how."""
    report = comparison.report
    machine, dataset = report["machine"], report["dataset"]
    memory = f", {machine['memory_gb']:g} GB of memory" if machine.get("memory_gb") else ""
    load = f", load {machine['load_before']:g} when this was written" if machine.get("load_before") is not None else ""
    versions = ", ".join(f"{name} {version}" for name, version in machine.get("versions", {}).items())
    rows = [
        ["dataset", f"{dataset['name']} ({dataset['content_hash'][:12]})"],
        [
            "sizes",
            f"{dataset['users']:,} viewers, {dataset['titles']:,} titles ({dataset['cold_titles']:,} cold), "
            f"{dataset['events']:,} events; {comparison.requests('overall'):,} test requests",
        ],
        ["date", report["date"]],
        ["command", Code(report["command"])],
        ["machine", f"{machine['cpu']}{memory}{load}; GPU: {machine.get('gpu') or 'none'}"],
        ["versions", f"{versions}; commit {machine.get('commit', 'unknown')}"],
    ]
    why = why_not_first(comparison)
    blocks: list[Block] = [paragraph(verdict(comparison), kind="verdict")]
    if why:
        blocks.append(paragraph(Strong("Where the distance lies."), *why))
    own = comparison.own
    if own is not None and len(comparison.rows) > 1 and round(100 * (share := time_used(comparison, own))) > OVERRUN:
        said = f"A training of M5 took {100 * share:.0f}% of the time allowed; the cost table has the others' shares."
        blocks.append(paragraph(said))
    if comparison.absent:
        names = ", ".join(f"{record['name']} ({reason_of(record)})" for record in comparison.absent)
        blocks.append(paragraph(f"Without results: {names}."))
    blocks += [Table(["item", "value"], rows, kind="long"), *made(comparison)]
    return [*blocks, Heading("Protocol"), Bullets(protocol(comparison))]


def protocol(comparison: Comparison) -> list[str]:
    """What all systems share, a sentence or two each."""
    setup = comparison.report["setup"]
    seen = (
        "Watched titles are left out of the lists." if setup["filter_seen"] else "Watched titles may be listed again."
    )
    part = "" if setup["max_targets"] is None else f" A random part of at most {setup['max_targets']:,} is ranked."
    cells = len(comparison.cells())
    said = [
        f"The task is matching: rank all titles that the viewer's rights allow at that time, and find the one watched. "
        f"All systems share the split, the requests, the candidates and the evaluator. {seen}{part}",
        reading(comparison),
        f"A system has {setup['seconds']:g} s of training altogether. A third is for tuning: at most {setup['trials']} "
        f"settings, chosen on validation NDCG@10 of at most {setup['validation_targets']:,} targets. The rest is for "
        f"{setup['seeds']} seeds, {comparison.allowed_seconds:.1f} s each. Systems without chance are trained once.",
        "So training time is bounded, and systems that learn slowly are undertrained here. The figures say what a "
        "system reaches in that time, not what it can reach. The cost table says who used it all.",
        f"Systems ran {setup.get('jobs', 1)} at a time and shared the machine's cores evenly.",
        f"M5 starts from the preset {setup['preset']}.",
        "Intervals are 95% each, from a paired bootstrap over viewers of M5's NDCG@10 less the system's, the mean over "
        "seeds, given these trainings. “Clear” means that the interval does not hold 0 and that a randomisation test "
        "over viewers agrees (2.5% on its side), for which at least six viewers are needed. The standard deviation "
        "over seeds is apart from that.",
    ]
    if cells:
        said.append(
            f"Intervals are not corrected for the number of cells: there are {cells} (a system in a slice), and of as "
            f"many without any difference about {0.05 * cells:.0f} would look clear by chance."
        )
    return said


def reading(comparison: Comparison) -> str:
    """What systems read of a viewer's behaviours."""
    history, others = comparison.report["setup"]["history"], dict[str, list[str]]()
    for row in comparison.rows:
        if row.name in SHORT:
            others.setdefault(f"the last {min(history, SHORT_HISTORY)} behaviours", []).append(row.label)
        elif row.name in READS:
            others.setdefault(READS[row.name], []).append(row.label)
    but = "; ".join(
        f"{', '.join(names)} {'read' if len(names) > 1 else 'reads'} {what}" for what, names in others.items()
    )
    return f"A system reads the last {history} behaviours of a viewer.{f' But {but}.' if but else ''}"


def made(comparison: Comparison) -> list[Block]:
    """When, beside how much else, and with what each row was made, where rows differ in more than hours and load."""
    made_of = [(row, row.record["made"]) for row in comparison.rows if "made" in row.record]
    other = [fact for fact in FACTS if len({_told(facts[fact]) for _, facts in made_of}) > 1]
    if not other and len({facts["date"][:10] for _, facts in made_of}) < 2:
        return []
    rows = [
        [row.label, facts["date"], f"{facts['load']:g}", *(_told(facts[fact]) for fact in other)]
        for row, facts in made_of
    ]
    note = "Rows were not all made alike; what is above is as of this page. How each was made, where they differ:"
    return [paragraph(note), Table(["system", "date", "load before", *other], rows, kind="long")]


def _told(fact: Any) -> str:
    if isinstance(fact, Mapping):
        return ", ".join(f"{name} {version}" for name, version in fact.items())
    return str(fact or "unknown")
