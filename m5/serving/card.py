"""The model card of an artifact, as Markdown."""

from __future__ import annotations

from typing import Any

from m5.serving.artifact import ArtifactManifest

SHOWN = ("hr@10", "ndcg@10", "hr@50", "hr@200")


def model_card(manifest: ArtifactManifest) -> str:
    """What the model is, what it was trained on, how good it is and for whom; every number is the run's own."""
    data, model = manifest.dataset, manifest.model
    content = f"; content branch on {', '.join(model.content)}" if model.content else "; no content branch"
    scenarios = ", ".join(f"{v.name} ({len(v.values)} values)" for v in manifest.scenarios) or "none"
    lines = [
        f"# {manifest.name}: candidate retrieval",
        "",
        "M5, a multi-modal, multi-interest, multi-scenario matching model (Zhao et al., KDD 2023). It answers a",
        "viewer's history, scenario and context with titles that the viewer may play.",
        "",
        f"- Exported {manifest.created} from the checkpoint with sha256 `{manifest.weights_sha256}`.",
        f"- Trained on *{data['name']}* (content hash `{data['content_hash']}`): {data['users']:,} users, "
        f"{data['titles']:,} titles, {data['events']:,} events.",
        f"- Width {model.width}, {model.blocks} transformer blocks, mixing `{model.mixing}`{content}; reads the last "
        f"{manifest.history} behaviours.",
        f"- Scenarios: {scenarios}. Seed {manifest.seed}.",
        f"- Titles: {manifest.n_titles:,}, {manifest.n_titles - manifest.n_trained:,} of them added after training.",
        f"- Keys: {manifest.keys}.",
        f"- Versions: {', '.join(f'{name} {found}' for name, found in manifest.versions.items())}.",
        "",
        "## Quality",
        "",
        *_quality(manifest.metrics),
        "",
        "## Limits",
        "",
        "- Measured offline, on what viewers chose from what they were shown then, not on what they would choose.",
        "- A value of a scenario that was not seen in training is served as unknown: shared experts, and only rights",
        "  that hold for any value.",
        "- Watch histories are personal data. This artifact holds none unless it was exported with `--viewers`.",
        *[f"- {note}" for note in data["notes"]],
        "",
    ]
    return "\n".join(lines)


def _quality(metrics: dict[str, Any]) -> list[str]:
    rows = [("validation", metrics["valid"])]
    if "test" in metrics:
        rows += [("test", metrics["test"]["overall"]), *metrics["test"]["scenarios"].items()]
        rows.append(("titles launched after the training period", metrics["test"]["cold"]))
    shown = [f"| {name} | {row['n']:,} | {_cells(row)} |" for name, row in rows if row["n"]]
    table = [f"| | requests | {' | '.join(name.upper() for name in SHOWN)} |", "|---|---|---|---|---|---|", *shown]
    if "test" not in metrics:
        table += ["", "The test split was not evaluated with these weights: run `m5 evaluate` before `m5 export`."]
    return table


def _cells(row: dict[str, Any]) -> str:
    return " | ".join(f"{row[name]:.4f}" if name in row else "-" for name in SHOWN)
