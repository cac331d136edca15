"""The model card of an artifact, as Markdown."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

from m5.serving.artifact import ArtifactManifest

SHOWN = ("hr@10", "ndcg@10", "hr@50", "hr@200")
# Measured by `m5 bench cold` (docs/results/2026-11-27-cold-*.md): 0.01 has failed; 0.1 and 0.2 have not; the default,
# 0.05, lies between them.
LEAST_ID_DROPOUT = 0.05


def model_card(manifest: ArtifactManifest) -> str:
    """What the model is, what it was trained on, how good it is and for whom; every number is the run's own."""
    data, model = manifest.dataset, manifest.model
    content = f"; content branch on {', '.join(model.content)}" if model.content else "; no content branch"
    scenarios = ", ".join(f"{v.name} ({len(v.values)} values)" for v in manifest.scenarios) or "none"
    doubt = doubt_of_new_titles(manifest)
    lines = [
        f"# {manifest.name}: candidate retrieval",
        "",
        "M5, a multi-modal, multi-interest, multi-scenario matching model (Zhao et al., KDD 2023). It answers a",
        "viewer's history, scenario and context with titles that the viewer may play.",
        "",
        f"- Exported {manifest.created} from the checkpoint with sha256 `{manifest.weights_sha256}`.",
        f"- {'Adapted to' if 'adapted' in data else 'Trained on'} *{data['name']}* (content hash "
        f"`{data['content_hash']}`): {data['users']:,} users, {data['titles']:,} titles, {data['events']:,} events.",
        *_origin(data),
        f"- Width {model.width}, {model.blocks} transformer blocks, mixing `{model.mixing}`{content}; reads the last "
        f"{manifest.history} behaviours.",
        f"- Scenarios: {scenarios}. Seed {manifest.seed}.",
        f"- Titles: {manifest.n_titles:,}, {manifest.n_titles - manifest.n_trained:,} of them added after training.",
        f"- Keys: {manifest.keys}.",
        f"- Versions: {', '.join(f'{name} {found}' for name, found in manifest.versions.items())}.",
        "",
        "## Quality",
        "",
        *_quality(manifest.metrics, data),
        "",
        "## Limits",
        "",
        "- Measured offline, on what viewers chose from what they were shown then, not on what they would choose.",
        "- A value of a scenario that was not seen in training is served as unknown: shared experts, and only rights",
        "  that hold for any value.",
        "- Watch histories are personal data. This artifact holds none unless it was exported with `--viewers`.",
        *([f"- {doubt}"] if doubt else []),
        *[f"- {note}" for note in data["notes"]],
        "",
    ]
    return "\n".join(lines)


def doubt_of_new_titles(manifest: ArtifactManifest) -> str | None:
    """What to tell of a model whose training has hardly ever, or never, shown it titles by their content alone."""
    share = manifest.model.id_dropout
    if not manifest.content_width or share >= LEAST_ID_DROPOUT:
        return None
    return (
        f"Trained with model.id_dropout={share:g}: titles added after training may hardly be found. A model learns to "
        "place them from titles that lose their ID embedding in training. On MovieLens-1M 0.01 found new titles 0.1 "
        f"times as often as chance does, 0.2 3.8 times. Train with {LEAST_ID_DROPOUT:g} or more."
    )


def _origin(data: dict[str, Any]) -> Iterator[str]:
    """Of a run of `m5 adapt`."""
    if "adapted" not in data:
        return
    adapted = data["adapted"]
    blend = ", ".join(f"{share:.0%} {other}" for other, share in sorted(adapted["blend"].items(), key=lambda x: -x[1]))
    yield (
        f"- By `m5 adapt` from the weights with sha256 `{adapted['weights_sha256']}`: {_added(adapted)} began as "
        f"{blend}, and its own rows alone were trained."
    )
    for name, values in data["untrained"].items():
        yield f"- Nothing was trained for {name} {', '.join(values)}: served as the unknown value."


def _added(adapted: dict[str, Any]) -> str:
    return ", ".join(f"{name}={value}" for name, value in adapted["to"].items())


def _quality(metrics: dict[str, Any], data: dict[str, Any]) -> list[str]:
    valid, test = metrics["valid"], metrics.get("test")
    alone = f", {_added(data['adapted'])} alone" if "adapted" in data else ""
    rows = [(f"validation{alone}", valid)]
    if test is not None:
        rows += [("test", test["overall"]), *test["scenarios"].items()]
        rows.append(("titles launched after the training period", test["cold"]))
    else:
        rows += _by_scenario(valid)
    shown = [f"| {name} | {row['n']:,} | {_cells(row)} |" for name, row in rows if row["n"]]
    table = [f"| | requests | {' | '.join(name.upper() for name in SHOWN)} |", "|---|---|---|---|---|---|", *shown, ""]
    if test is None:
        return [*table, "The test split was not evaluated with these weights: run `m5 evaluate` before `m5 export`."]
    return [*table, _asked(test["settings"])] if "settings" in test else table


def _by_scenario(valid: dict[str, Any]) -> Iterator[tuple[str, dict[str, Any]]]:
    """Rows of validation per scenario value: of the metric that training went by, where there were requests enough."""
    for key, requests in valid.items():
        kind, _, name = key.partition("/")
        if kind == "n" and name:
            metrics = {metric: valid[f"{metric}/{name}"] for metric in SHOWN if f"{metric}/{name}" in valid}
            yield f"validation, {name}", {"n": requests, **metrics}


def _asked(settings: dict[str, Any]) -> str:
    """How the test split was evaluated."""
    most = settings["max_targets"]
    requests = "all requests" if most is None else f"a random part of the requests, at most {most:,} (`--max-targets`)"
    seen = "no candidates" if settings["filter_seen"] else "candidates, too (as with `--keep-seen`)"
    return f"Test: {requests}; titles that a viewer had watched before are {seen}."


def _cells(row: dict[str, Any]) -> str:
    return " | ".join(f"{row[name]:.4f}" if name in row else "-" for name in SHOWN)
