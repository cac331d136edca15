"""What the service is asked and what it answers: pydantic models with their limits, and their way to indices and back.

No text of a request is ever repeated in an answer: an id that is not known is told by its place in the list.
"""

from __future__ import annotations

from typing import Annotated

import numpy as np
from pydantic import BaseModel, ConfigDict, Field, StringConstraints, field_validator

from m5.serving.retriever import Answer, Ask, Carrier, Retriever
from m5.viewer import Viewer

MAX_HISTORY, MAX_EXCLUDED, MAX_K, MAX_BATCH, MAX_VALUES = 2_000, 10_000, 1_000, 256, 64
MAX_TITLES = 20_000  # of all answers of a batch
MAX_ID = 1_000  # characters, as of a title that `m5 onboard` takes
LATEST_SECONDS = 2**40  # some 35,000 years: every sum of two times still fits
DAY = 86_400

Id = Annotated[str, StringConstraints(min_length=1, max_length=MAX_ID)]
Value = Annotated[str, StringConstraints(max_length=200)]
Values = Annotated[dict[Value, Value], Field(max_length=MAX_VALUES)]
Seconds = Annotated[int, Field(ge=-LATEST_SECONDS, le=LATEST_SECONDS, description="Seconds since the epoch, UTC.")]
Strength = Annotated[float, Field(allow_inf_nan=False)]


class _Body(BaseModel):
    model_config = ConfigDict(extra="forbid")


class Watched(_Body):
    """One behaviour."""

    title_id: Id
    timestamp: Seconds | None = Field(None, description="Without any, behaviours are taken to lie a day apart.")
    intensity: Annotated[dict[Value, Strength], Field(max_length=MAX_VALUES)] = Field(
        {}, description="How much was watched, by the kinds that GET /v1/info lists, e.g. {'completion': 0.9}."
    )


class RecommendBody(_Body):
    """Who asks, and for what."""

    history: list[Watched] = Field([], max_length=MAX_HISTORY, description="Oldest first.")
    scenario: Values = Field({}, description="e.g. {'region': 'US', 'plan': 'ads'}; GET /v1/info has the values.")
    context: Values = Field({}, description="e.g. {'device': 'tv'}.")
    user: Values = Field({}, description="The viewer's features, e.g. {'age_band': '30-44'}.")
    timestamp: Seconds | None = Field(None, description="Time of the request; the service's clock unless given.")
    k: int = Field(20, ge=1, le=MAX_K)
    exclude: list[Id] = Field([], max_length=MAX_EXCLUDED, description="Titles that are not wanted.")
    filter_seen: bool = Field(True, description="Leave watched titles out.")
    explain: bool = Field(
        False,
        description="Which watched titles carried each title, and what rights took away.",
    )


class BatchBody(_Body):
    requests: list[RecommendBody] = Field(
        min_length=1, max_length=MAX_BATCH, description=f"Their k may sum up to {MAX_TITLES:,}."
    )

    @field_validator("requests")
    @classmethod
    def _not_too_many(cls, requests: list[RecommendBody]) -> list[RecommendBody]:
        if sum(request.k for request in requests) > MAX_TITLES:
            raise ValueError(f"the k of a batch's requests may sum up to {MAX_TITLES:,}")
        return requests


class Carried(BaseModel):
    """A watched title without which the score would be lower by so much, by either branch."""

    title_id: str
    id_drop: float
    cg_drop: float


class Title(BaseModel):
    title_id: str
    title: str
    category: str
    cold: bool = Field(description="Nobody had watched it in the training period, or it was added since.")
    score: float
    id_score: float = Field(description="The part of the score that came by the ID branch.")
    cg_score: float = Field(description="The part that came by the content-graph branch.")
    because: list[Carried] | None = None


class TakenAway(BaseModel):
    """A title that would be among the answer's, but that the viewer may not play."""

    title_id: str
    title: str
    category: str
    score: float


class Ignored(BaseModel):
    """What of the request is not known here, and was left out or taken as unknown."""

    history: list[int] = Field([], description="Places of titles that the catalogue does not have.")
    exclude: list[int] = []
    scenario: list[str] = Field([], description="Names of scenarios whose value is unknown.")
    context: list[str] = []
    user: list[str] = []


class RecommendAnswer(BaseModel):
    titles: list[Title]
    eligible: int = Field(description="Titles that the viewer may play and that were not left out.")
    ignored: Ignored
    taken_away: list[TakenAway] | None = None
    artifact: str = Field(description="First digits of the sha256 of the artifact that answered.")


class BatchAnswer(BaseModel):
    answers: list[RecommendAnswer]


class SimilarTitle(BaseModel):
    title_id: str
    title: str
    category: str
    cold: bool
    cosine: float


class SimilarAnswer(BaseModel):
    titles: list[SimilarTitle]
    artifact: str


class Problem(BaseModel):
    """Why a request was not answered."""

    detail: str


class Mistake(BaseModel):
    where: list[str | int]
    what: str


class Malformed(Problem):
    """422: what is wrong with a request, and where."""

    mistakes: list[Mistake] = Field([], description="None where names are right in form, but not known here.")


class UnknownName(ValueError):
    """A name of a scenario, context, user feature or intensity that is not known; the message lists those that are."""


def to_ask(retriever: Retriever, body: RecommendBody, now: int) -> tuple[Ask, Ignored]:
    """Ids and values -> indices.

    Raises:
        UnknownName: a name (not a value) is unknown.
    """
    manifest, at = retriever.manifest, now if body.timestamp is None else body.timestamp
    place = [retriever.place.get(watched.title_id, -1) for watched in body.history]
    known = [watched for watched, title in zip(body.history, place, strict=True) if title >= 0]
    steps = range(len(known), 0, -1)
    timestamp = [at - DAY * s if w.timestamp is None else w.timestamp for w, s in zip(known, steps, strict=True)]
    order = np.argsort(np.array(timestamp, dtype=np.int64), kind="stable")
    names = [kind.name for kind in manifest.intensities]
    for watched in known:
        if watched.intensity:
            _require(names, watched.intensity, "intensity")
    indices, unknown = {}, {}
    for group, vocabularies in (
        ("scenario", manifest.scenarios),
        ("context", manifest.contexts),
        ("user", manifest.user_features),
    ):
        values = getattr(body, group)
        _require([v.name for v in vocabularies], values, group)
        indices[group] = {v.name: v.index(values.get(v.name)) for v in vocabularies}
        unknown[group] = [name for name in values if not indices[group][name]]
    excluded = [retriever.place.get(title_id, -1) for title_id in body.exclude]
    viewer = Viewer(
        title=np.array([title for title in place if title >= 0], dtype=np.int64)[order],
        timestamp=np.array(timestamp, dtype=np.int64)[order],
        at=at,
        intensity={
            name: np.array([w.intensity.get(name, np.nan) for w in known], dtype=np.float32)[order] for name in names
        },
        **indices,
    )
    ask = Ask(viewer, body.k, np.array([title for title in excluded if title >= 0], dtype=np.int64), body.filter_seen)
    ignored = Ignored(
        history=[n for n, title in enumerate(place) if title < 0],
        exclude=[n for n, title in enumerate(excluded) if title < 0],
        **unknown,
    )
    return ask, ignored


def _require(known: list[str], given: dict, what: str) -> None:
    if not given.keys() <= set(known):
        raise UnknownName(f"{what}: a name is not known here; known are {', '.join(known) or 'none'}.")


def named(retriever: Retriever, title: int) -> dict[str, str]:
    """What every answer says of a title."""
    return {
        "title_id": retriever.title_ids[title],
        "title": retriever.names[title],
        "category": retriever.categories[title],
    }


def to_answer(
    retriever: Retriever,
    ask: Ask,
    answer: Answer,
    ignored: Ignored,
    carriers: list[list[Carrier]] | None = None,
    taken_away: tuple[np.ndarray, np.ndarray] | None = None,
) -> RecommendAnswer:
    """Indices -> ids and names."""
    columns = [column.tolist() for column in answer[:4]]
    titles = [
        Title(
            **named(retriever, title),
            cold=bool(retriever.cold_N[title]),
            score=score,
            id_score=id_score,
            cg_score=cg_score,
            because=None if carriers is None else _carried(retriever, ask, carriers[n]),
        )
        for n, (title, score, id_score, cg_score) in enumerate(zip(*columns, strict=True))
    ]
    lost = None
    if taken_away is not None:
        pairs = zip(*(column.tolist() for column in taken_away), strict=True)
        lost = [TakenAway(**named(retriever, title), score=score) for title, score in pairs]
    return RecommendAnswer(
        titles=titles, eligible=answer.eligible, ignored=ignored, taken_away=lost, artifact=short_digest(retriever)
    )


def _carried(retriever: Retriever, ask: Ask, carriers: list[Carrier]) -> list[Carried]:
    return [
        Carried(
            title_id=retriever.title_ids[ask.viewer.title[carrier.place]],
            id_drop=carrier.id_drop,
            cg_drop=carrier.cg_drop,
        )
        for carrier in carriers
    ]


def to_similar(retriever: Retriever, titles: np.ndarray, cosines: np.ndarray) -> SimilarAnswer:
    """int64 titles and float32 cosines -> ids and names."""
    shown = [
        SimilarTitle(**named(retriever, title), cold=bool(retriever.cold_N[title]), cosine=cosine)
        for title, cosine in zip(titles.tolist(), cosines.tolist(), strict=True)
    ]
    return SimilarAnswer(titles=shown, artifact=short_digest(retriever))


def short_digest(retriever: Retriever) -> str:
    return retriever.artifact.digest[:12]
