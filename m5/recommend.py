"""Recommendations for one viewer: a known user, or an ad-hoc history, in a scenario; only titles they may play."""

from __future__ import annotations

import difflib
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
from rich.console import Console
from rich.markup import escape
from rich.table import Table
from torch import Tensor

from m5.config import RunConfig
from m5.data.sequences import Behaviours, age_bucket
from m5.eligibility import Eligibility
from m5.model.multi_modal_embedding import START
from m5.predict import Predictor
from m5.schema import DataError, PreparedDataset
from m5.serving.top import Found, nothing_found, ranked
from m5.viewer import Viewer


@dataclass(frozen=True)
class Recommendation:
    """One line of the answer; `cold` titles were never watched in the training period."""

    title_id: str
    title: str
    category: str
    score: float
    cold: bool


def known_viewer(dataset: PreparedDataset, user: str) -> Viewer:
    """A user of the dataset with all of their events; the request comes in the scenario of the last one."""
    rows = np.flatnonzero(dataset.users["user_id"].astype(str).to_numpy() == user)
    if not len(rows):
        examples = ", ".join(dataset.users["user_id"].astype(str).head(3))
        raise DataError(f"--user {user}: no such user in {dataset.folder}. Known users are e.g. {examples}.")
    first, last = dataset.offsets[rows[0]], dataset.offsets[rows[0] + 1]
    events = np.arange(first, last)
    manifest = dataset.manifest

    def latest(kind: str, vocabularies) -> dict[str, int]:
        return (
            {v.name: int(dataset.event_array(f"{kind}_{v.name}")[last - 1]) for v in vocabularies}
            if last > first
            else {}
        )

    return Viewer(
        title=np.asarray(dataset.event_array("title")[events], dtype=np.int64),
        timestamp=np.asarray(dataset.event_array("timestamp")[events]),
        intensity={
            i.name: np.asarray(dataset.event_array(f"intensity_{i.name}")[events]) for i in manifest.intensities
        },
        scenario=latest("scenario", manifest.scenarios),
        context=latest("context", manifest.contexts),
        user={v.name: int(dataset.users[v.name].iloc[rows[0]]) for v in manifest.user_features},
        at=latest_time(dataset),
    )


def ad_hoc_viewer(dataset: PreparedDataset, history: str) -> Viewer:
    """A viewer who watched `history`: names or ids separated by ";", oldest first, one a day until now."""
    names = [name.strip() for name in history.split(";") if name.strip()]
    title = np.array([find_title(dataset, name) for name in names], dtype=np.int64)
    at = latest_time(dataset)
    return Viewer(
        title=title,
        timestamp=at - 86_400 * np.arange(len(title), 0, -1),
        intensity={i.name: np.full(len(title), np.nan, dtype=np.float32) for i in dataset.manifest.intensities},
        scenario={},
        context={},
        user={},
        at=at,
    )


def latest_time(dataset: PreparedDataset) -> int:
    """The dataset's "now": the time of its last event."""
    return int(np.max(dataset.event_array("timestamp")))


def find_title(dataset: PreparedDataset, name: str) -> int:
    """Index of the title with this id or name, letter case aside.

    Raises:
        DataError: no such title, with the closest names.
    """
    titles = dataset.titles
    for column in ("title_id", "title"):
        rows = np.flatnonzero(titles[column].str.lower().to_numpy() == name.lower())
        if len(rows):
            return int(rows[0])
    close = difflib.get_close_matches(name, titles["title"].tolist(), n=3, cutoff=0.5)
    hint = f"Closest: {'; '.join(close)}." if close else "Title ids work too."
    raise DataError(f"--history: no title is called '{name}' in {dataset.folder}. {hint}")


def scenario_indices(dataset: PreparedDataset, scenario: dict[str, str]) -> dict[str, int]:
    """Raw values by scenario name -> vocabulary indices.

    Raises:
        DataError: a scenario or value that the dataset does not have.
    """
    known = {vocabulary.name: vocabulary for vocabulary in dataset.manifest.scenarios}
    indices = {}
    for name, value in scenario.items():
        if name not in known:
            raise DataError(
                f"--scenario {name}={value}: the dataset has no such scenario; it has {', '.join(known) or 'none'}."
            )
        if value not in known[name].values:
            shown = ", ".join(known[name].values[:20])
            raise DataError(
                f"--scenario {name}={value}: not seen in the training period; known are {shown}. Leave {name} out to "
                "ask for a viewer whose value is unknown."
            )
        indices[name] = known[name].index(value)
    return indices


def recommend_titles(predictor: Predictor, viewer: Viewer, *, k: int, filter_seen: bool = True) -> list[Recommendation]:
    """The k best playable titles; fewer where the viewer may not play as many."""
    dataset, builder = predictor.dataset, predictor.builder
    request = builder.ad_hoc_request(viewer.at, viewer.scenario, viewer.context, viewer.user)
    behaviours, position = _behaviours(predictor, viewer)
    batch = builder.assemble(behaviours, request._replace(position=position), None)
    score_PN = (predictor.forward(batch).query_PQ @ key_columns(predictor)).cpu()
    playable_N = torch.ones(score_PN.shape[1], dtype=torch.bool)
    eligibility = Eligibility.from_dataset(dataset, torch.device("cpu"))
    if eligibility is not None:
        playable_N = eligibility.mask(batch.rights_PM, batch.timestamp_P)[0]
    if filter_seen:
        playable_N[torch.from_numpy(viewer.title)] = False
    score_PN[:, ~playable_N] = -torch.inf
    found = best_titles(score_PN, k)
    listed = found.title_BR[0] >= 0
    titles, categories = dataset.titles, dataset.manifest.categories
    return [
        Recommendation(
            title_id=row.title_id,
            title=row.title,
            category=categories.values[row.category - 1] if row.category else "",
            score=score,
            cold=bool(row.cold),
        )
        for row, score in zip(
            titles.iloc[found.title_BR[0, listed]].itertuples(), found.score_BR[0, listed].tolist(), strict=True
        )
    ]


def key_columns(predictor: Predictor) -> Tensor:
    """float32 [Q, N], the keys as a service multiplies them: titles of equal keys get equal scores wherever they stand.

    A single query against rows is a dot product a title, and which numbers are added first depends on its place.
    """
    return predictor.key_NQ.T.contiguous()


def best_titles(score_BN: Tensor, k: int) -> Found:
    """The k best titles of some scores, equal ones by index, as a service has them.

    `torch.topk` leaves open which of several equal scores it takes: where it had a choice, the row is looked at again.

    Args:
        score_BN: float32 on any device; -inf is no title.
        k: R, at least 1; may be more than there are titles.
    """
    found = nothing_found(len(score_BN), k)
    value_BC, title_BC = torch.topk(score_BN, min(k, score_BN.shape[1]))
    last_B1 = value_BC[:, -1:]
    had_choice_B = ((score_BN >= last_B1).sum(1) > value_BC.shape[1]) & (last_B1[:, 0] > -torch.inf)
    rows = zip(had_choice_B.tolist(), value_BC.cpu().numpy(), title_BC.cpu().numpy(), strict=True)
    for row, (had_choice, score_C, title_C) in enumerate(rows):
        if had_choice:
            title_C, score_C = ranked(score_BN[row].cpu().numpy(), k)
        found.put(row, score_C, title_C)
    return found


def _behaviours(predictor: Predictor, viewer: Viewer) -> tuple[Behaviours, np.ndarray]:
    """The viewer's recent history as one sequence, and the flat position of the request at its end."""
    builder = predictor.builder
    recent = slice(max(0, len(viewer.title) - predictor.config.sequences.history), None)
    title, timestamp = viewer.title[recent], viewer.timestamp[recent]
    following = np.append(timestamp[1:], viewer.at)
    until = following if predictor.config.model.attention == "causal" else np.full_like(timestamp, viewer.at)
    not_given = np.full(len(viewer.title), np.nan, dtype=np.float32)
    intensity = [i.bucket(viewer.intensity.get(i.name, not_given)[recent]) for i in builder.intensities]
    behaviours = Behaviours(
        title=np.append(builder.n_titles + START, title)[None],
        intensity=np.stack([np.append(0, values) for values in intensity] or [np.zeros(len(title) + 1, int)], -1)[None],
        age=np.append(0, age_bucket(until - timestamp))[None],
        length=np.array([len(title) + 1]),
    )
    return behaviours, np.array([len(title)])


def recommend(
    run: Path,
    *,
    user: str | None = None,
    history: str | None = None,
    scenario: dict[str, str] | None = None,
    k: int = 20,
    filter_seen: bool = True,
) -> None:
    """Print recommendations of RUN for a user or a history.

    Raises:
        DataError: neither or both given, unknown user, title or scenario, or no trained run.
    """
    if (user is None) == (history is None):
        raise DataError('give either --user ID or --history "title;title".')
    predictor = Predictor.load(run)
    viewer = (
        known_viewer(predictor.dataset, user) if user is not None else ad_hoc_viewer(predictor.dataset, history or "")
    )
    chosen = viewer.scenario | scenario_indices(predictor.dataset, scenario or {})
    viewer = Viewer(**{**vars(viewer), "scenario": chosen})
    print_viewer(predictor, viewer, k=k, filter_seen=filter_seen)


def recommend_all_users(
    run: Path, out: Path | None, *, scenario: dict[str, str], k: int = 20, filter_seen: bool = True
) -> None:
    """Recommendations for every user of RUN's dataset, as `m5.serving.offline` writes them.

    Raises:
        DataError: no `out`, an unknown scenario, no trained run, or `out` holds something else.
    """
    from m5.serving.offline import recommend_all

    if out is None:
        raise DataError("--all-users needs --out FOLDER, where the lists go.")
    dataset = PreparedDataset(RunConfig.read(run / "config.yaml").data)
    written = recommend_all(run, out, scenario=scenario_indices(dataset, scenario), k=k, filter_seen=filter_seen)
    if written.users:
        print(f"{out}: {written}")


def print_viewer(predictor: Predictor, viewer: Viewer, *, k: int, filter_seen: bool = True) -> None:
    """A table of the viewer's last watches and of what comes next."""
    dataset = predictor.dataset
    place = ", ".join(
        f"{v.name}={v.values[viewer.scenario[v.name] - 1] if viewer.scenario.get(v.name) else 'unknown'}"
        for v in dataset.manifest.scenarios
    )
    console = Console()
    watched = "; ".join(dataset.titles["title"].iloc[viewer.title[-5:]]) or "nothing yet"
    console.print(f"Last watched: {watched}", markup=False, highlight=False)
    table = Table(title=escape(f"Recommended{f' ({place})' if place else ''}"), title_justify="left")
    for column in ("#", "id", "title", "category", "score"):
        table.add_column(column, justify="right" if column in "#score" else "left")
    titles = recommend_titles(predictor, viewer, k=k, filter_seen=filter_seen)
    for rank, item in enumerate(titles, start=1):
        name = item.title + (" (new)" if item.cold else "")
        table.add_row(str(rank), escape(item.title_id), escape(name), escape(item.category), f"{item.score:.3f}")
    console.print(table)
    if not titles:
        console.print(
            "This viewer may play no title that they have not watched. Where region or plan is unknown, only rights "
            "that hold for any value apply: give them with --scenario.",
            highlight=False,
        )
