"""The HTTP service of an artifact (FastAPI). `m5 serve` runs it; `build_app` gives it to any ASGI server."""

from __future__ import annotations

import asyncio
import contextlib
import time
from collections.abc import AsyncIterator, Awaitable, Callable
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path
from typing import Annotated, Any

import numpy as np
from fastapi import FastAPI, HTTPException, Query, Request, Response
from fastapi.exceptions import RequestValidationError
from fastapi.responses import FileResponse, JSONResponse
from starlette.types import ASGIApp

from m5.serving import api
from m5.serving.batching import Batcher, Busy
from m5.serving.index import IndexKind
from m5.serving.limits import CHARGE, ApiKeys, Limits, RateLimit
from m5.serving.measures import Measures
from m5.serving.reload import Current
from m5.serving.retriever import Answer, Ask, Retriever

PAGE = Path(__file__).parent / "page"
TYPES = {".css": "text/css", ".js": "text/javascript"}
ASSETS = {path.name: TYPES[path.suffix] for path in PAGE.iterdir() if path.suffix in TYPES}
EXPLAINED_TITLES, EXPLAINED_BEHAVIOURS, CARRIERS, TAKEN_AWAY = 60, 24, 3, 12
LEAST_BURST = 20  # requests at once however low the rate: the page asks for about five before it shows anything
Responses = dict[int | str, dict[str, Any]]  # by status, for OpenAPI
MISTAKES = 10  # of a malformed body that are told
POLICY = "default-src 'self'; img-src 'self' data:; frame-ancestors 'none'; base-uri 'none'; form-action 'none'"


@dataclass(frozen=True)
class Settings:
    """How a service runs.

    Attributes:
        index: exact, int8, hnsw or ivfpq.
        compiled: run the user tower as machine code, compiled when an artifact is loaded.
        largest_batch: asks in a pass of the model.
        queue: asks that may wait.
        largest_body: bytes.
        rate: requests per second of a client, None: no limit.
        api_keys: none: everybody may ask.
        clock: what "now" is, in seconds; None: the time of the dataset's last event, of whichever artifact answers.
        look_every: seconds between looks at the artifact's folder.
    """

    index: IndexKind = "exact"
    compiled: bool = False
    largest_batch: int = 64
    queue: int = 2_048
    largest_body: int = 2**20
    rate: float | None = None
    api_keys: list[str] = field(default_factory=list)
    clock: Callable[[], float] | None = time.time
    look_every: float = 2.0


def build_app(artifact: Path, settings: Settings = Settings()) -> ASGIApp:
    """The service, guarded by its limits.

    Raises:
        DataError: no whole artifact.
    """
    service = Service(artifact, settings)
    app = FastAPI(
        title="M5", version="1", description=__doc__, docs_url=None, redoc_url=None, lifespan=service.lifespan
    )
    service.add_routes(app)
    app.add_exception_handler(RequestValidationError, _malformed)
    app.add_exception_handler(Exception, _fault)
    keys = ApiKeys(settings.api_keys)
    rate = RateLimit(settings.rate, burst=max(LEAST_BURST, int(2 * (settings.rate or 0))))
    return service.measured(Limits(app, keys=keys, rate=rate, largest=settings.largest_body))


class Service:
    """Routes and what they share."""

    def __init__(self, artifact: Path, settings: Settings):
        self.settings, self.measures = settings, Measures()
        self.current = Current(
            artifact,
            settings.index,
            lambda outcome: self.measures.reloads.labels(outcome).inc(),
            compiled=settings.compiled,
        )
        self.batcher = Batcher(
            largest=settings.largest_batch, queue=settings.queue, observe=self.measures.batch.observe
        )

    @contextlib.asynccontextmanager
    async def lifespan(self, app: FastAPI) -> AsyncIterator[None]:
        watching = asyncio.create_task(self.current.watch(self.settings.look_every))
        try:
            yield
        finally:
            watching.cancel()
            self.batcher.close()

    def measured(self, app: ASGIApp) -> ASGIApp:
        """Counts and times every request; the outermost layer, so that refusals count too."""

        async def run(scope, receive, send) -> None:
            if scope["type"] != "http":
                await app(scope, receive, send)
                return
            began, status = time.perf_counter(), 500

            async def watched_send(message) -> None:
                nonlocal status
                if message["type"] == "http.response.start":
                    status = message["status"]
                    message["headers"] = [*message["headers"], *SECURITY]
                await send(message)

            try:
                await app(scope, receive, watched_send)
            finally:
                # The route's template: a path of a request would let strangers make names without end.
                route = getattr(scope.get("route"), "path", "other").replace(":path", "")
                self.measures.requests.labels(route, str(status)).inc()
                self.measures.seconds.labels(route).observe(time.perf_counter() - began)

        return run

    def add_routes(self, app: FastAPI) -> None:
        app.post("/v1/recommend", response_model=api.RecommendAnswer, responses=problems(400, 422))(self.recommend)
        app.post("/v1/recommend/batch", response_model=api.BatchAnswer, responses=problems(400, 422))(
            self.recommend_batch
        )
        app.get("/v1/titles", responses=problems(422))(self.search_titles)
        app.get("/v1/titles/{title_id:path}/similar", response_model=api.SimilarAnswer, responses=problems(404, 422))(
            self.similar
        )
        image: Responses = {200: {"content": {"image/jpeg": {}}}}
        app.get("/v1/titles/{title_id:path}/poster", response_class=Response, responses=image | problems(404, 422))(
            self.poster
        )
        app.get("/v1/viewers", responses=problems())(self.viewers)
        app.get("/v1/info", responses=problems())(self.info)
        app.get("/v1/health")(self.health)
        app.get("/v1/ready", responses={503: {"description": "Its queue is full."}})(self.ready)
        text: Responses = {200: {"content": {"text/plain": {}}}}
        app.get("/metrics", response_class=Response, responses=text)(self.metrics)
        app.get("/", response_class=FileResponse, include_in_schema=False)(self.page)
        app.get("/page/{name}", response_class=FileResponse, include_in_schema=False)(self.asset)

    # ---- recommendations -------------------------------------------------------------------------------------

    async def recommend(self, body: api.RecommendBody, request: Request) -> Response:
        """The best titles for a viewer, among those that the viewer may play."""
        retriever = self.current.retriever
        ask, ignored = self._ask(retriever, body)
        if not body.explain:
            finish = partial(self._text, retriever, [(ask, ignored)])
            (text,) = await self._worked(request, self.batcher.ask(retriever, [ask], finish))
            return json_response(text)
        (answer,) = await self._worked(request, self.batcher.ask(retriever, [ask]))
        return json_response(
            await self._worked(request, self.batcher.run(self._explained, retriever, ask, ignored, answer))
        )

    async def recommend_batch(self, body: api.BatchBody, request: Request) -> Response:
        """The same for several viewers. Explanations are for single requests only."""
        if any(one.explain for one in body.requests):
            raise HTTPException(422, "explain: ask for explanations with POST /v1/recommend")
        request.scope[CHARGE](len(body.requests) - 1)  # each viewer is a request of the client's
        retriever = self.current.retriever
        pairs = await asyncio.to_thread(lambda: [self._ask(retriever, one) for one in body.requests])
        asks = [ask for ask, _ in pairs]
        texts = await self._worked(request, self.batcher.ask(retriever, asks, partial(self._text, retriever, pairs)))
        return json_response(b'{"answers":[' + b",".join(texts) + b"]}")

    def _ask(self, retriever: Retriever, body: api.RecommendBody) -> tuple[Ask, api.Ignored]:
        try:
            return api.to_ask(retriever, body, self._now(retriever))
        except api.UnknownName as error:
            raise HTTPException(422, str(error)) from None

    def _now(self, retriever: Retriever) -> int:
        return retriever.manifest.now if self.settings.clock is None else int(self.settings.clock())

    @staticmethod
    async def _worked(request: Request, work: Awaitable[Any]) -> Any:
        """What the model's thread gives, unless too much waits for it already, or the client hangs up."""
        working, listening = asyncio.ensure_future(work), asyncio.ensure_future(_hung_up(request))
        listening.add_done_callback(lambda _: working.cancel())
        try:
            return await working
        except Busy:
            raise HTTPException(429, "too many requests wait already", {"Retry-After": "1"}) from None
        except asyncio.CancelledError:
            if listening.done():
                raise HTTPException(499, "the client has hung up") from None  # nobody reads it; it is counted
            raise
        finally:
            listening.cancel()

    def _text(self, retriever: Retriever, pairs: list[tuple[Ask, api.Ignored]], place: int, answer: Answer) -> bytes:
        """JSON of an answer, made on the model's thread: a thousand titles would keep the event loop."""
        ask, ignored = pairs[place]
        text = api.to_answer(retriever, ask, answer, ignored).model_dump_json().encode()
        self._count(ask, answer, ignored, retriever)
        return text

    def _explained(self, retriever: Retriever, ask: Ask, ignored: api.Ignored, answer: Answer) -> bytes:
        shown = answer.title[:EXPLAINED_TITLES]
        carriers = retriever.carriers(ask.viewer, shown, behaviours=EXPLAINED_BEHAVIOURS, count=CARRIERS)
        carriers += [[] for _ in answer.title[EXPLAINED_TITLES:]]
        worst = float(answer.score[-1]) if len(answer.score) else -np.inf
        taken_away = retriever.taken_away(ask, worst, TAKEN_AWAY)
        self._count(ask, answer, ignored, retriever)
        return api.to_answer(retriever, ask, answer, ignored, carriers, taken_away).model_dump_json().encode()

    def _count(self, ask: Ask, answer: Answer, ignored: api.Ignored, retriever: Retriever) -> None:
        measures = self.measures
        cold = int(retriever.cold_N[answer.title].sum())
        measures.titles.labels("cold").inc(cold)
        measures.titles.labels("warm").inc(len(answer.title) - cold)
        measures.short.inc(len(answer.title) < ask.k)
        for what, places in ignored:
            measures.unknown.labels(what).inc(len(places))

    # ---- titles ----------------------------------------------------------------------------------------------

    def _title(self, retriever: Retriever, title_id: str) -> int:
        place = retriever.place.get(title_id)
        if place is None:
            raise HTTPException(404, "the catalogue has no such title")
        return place

    async def similar(
        self,
        request: Request,
        title_id: str,
        k: Annotated[int, Query(ge=1, le=api.MAX_K)] = 20,
        scenario: Annotated[list[str], Query(max_length=api.MAX_VALUES, description="name:value, e.g. region:US")] = [],  # noqa: B006
        timestamp: Annotated[api.Seconds | None, Query(description="The service's clock unless given.")] = None,
    ) -> Response:
        """Titles with the most similar keys, among those that may be played in a scenario."""
        retriever = self.current.retriever
        place = self._title(retriever, title_id)
        indices = {}
        for pair in scenario:
            name, colon, value = pair.partition(":")
            vocabulary = next((v for v in retriever.manifest.scenarios if v.name == name), None)
            if not colon or vocabulary is None:
                raise HTTPException(422, "scenario: give each as name:value, with a name that GET /v1/info lists")
            indices[name] = vocabulary.index(value)
        at = self._now(retriever) if timestamp is None else timestamp

        def text() -> str:
            return api.to_similar(retriever, *retriever.similar(place, k, indices, at)).model_dump_json()

        return json_response(await self._worked(request, self.batcher.run(text)))

    async def search_titles(
        self,
        q: Annotated[str, Query(max_length=200)] = "",
        limit: Annotated[int, Query(ge=1, le=100)] = 20,
        id: Annotated[list[api.Id], Query(max_length=100, description="These titles alone.")] = [],  # noqa: B006
    ) -> list[dict[str, str]]:
        """Titles whose name holds the words, or those with the ids that the catalogue has, or all in order."""
        retriever = self.current.retriever
        if id:
            return [api.named(retriever, retriever.place[one]) for one in id if one in retriever.place][:limit]
        return [api.named(retriever, title) for title in await asyncio.to_thread(retriever.find, q, limit)]

    async def poster(self, title_id: str) -> Response:
        """The title's artwork as JPEG."""
        retriever = self.current.retriever
        place = self._title(retriever, title_id)
        image = retriever.posters[place] if retriever.posters is not None else b""
        if not image:
            raise HTTPException(404, "this title has no poster")
        whose = "private" if self.settings.api_keys else "public"  # a shared cache would give it to those without a key
        return Response(image, media_type="image/jpeg", headers={"Cache-Control": f"{whose}, max-age=3600"})

    # ---- about the service -----------------------------------------------------------------------------------

    async def viewers(self) -> list[dict[str, Any]]:
        """Viewers to look at, as bodies for POST /v1/recommend; only if the artifact was exported with some."""
        return self.current.retriever.viewers

    async def info(self) -> dict[str, Any]:
        """What the artifact knows: names and values of scenarios, contexts and user features, sizes, quality."""
        retriever = self.current.retriever
        manifest = retriever.manifest
        groups = {"scenario": manifest.scenarios, "context": manifest.contexts, "user": manifest.user_features}
        return {
            "name": manifest.name,
            "artifact": api.short_digest(retriever),
            "created": manifest.created,
            "now": self._now(retriever),
            "titles": manifest.n_titles,
            "categories": manifest.categories.values,
            **{group: {v.name: v.values for v in vocabularies} for group, vocabularies in groups.items()},
            "intensities": [kind.name for kind in manifest.intensities],
            "history": manifest.history,
            "posters": retriever.posters is not None,
            "index": self.settings.index,
            "metrics": manifest.metrics,
            "dataset": manifest.dataset["name"],
        }

    async def health(self) -> dict[str, Any]:
        """Whether the process lives."""
        return {"status": "ok", "refused": self.current.refused}

    async def ready(self) -> JSONResponse:
        """Whether it takes requests: 503 while its queue is full."""
        full = self.batcher.depth >= self.settings.queue
        return JSONResponse({"status": "busy" if full else "ready"}, 503 if full else 200)

    async def metrics(self) -> Response:
        """For Prometheus."""
        self.measures.waiting.set(self.batcher.depth)
        self.measures.artifact.clear()
        self.measures.artifact.labels(api.short_digest(self.current.retriever)).set(1)
        self.measures.age.set(time.time() - self.current.loaded_at)
        return Response(self.measures.text(), media_type="text/plain; version=0.0.4; charset=utf-8")

    async def page(self) -> FileResponse:
        return FileResponse(PAGE / "index.html", media_type="text/html")

    async def asset(self, name: str) -> FileResponse:
        if name not in ASSETS:
            raise HTTPException(404, "no such file")
        return FileResponse(PAGE / name, media_type=ASSETS[name])


async def _hung_up(request: Request) -> None:
    """Returns once the client does, or sends more than it may, which the limits see too."""
    with contextlib.suppress(Exception):
        while (await request.receive())["type"] != "http.disconnect":
            pass


def json_response(text: str | bytes) -> Response:
    return Response(text, media_type="application/json")


def problems(*statuses: int) -> Responses:
    """What OpenAPI tells of these statuses, and of those by which every guarded route may refuse."""
    told: Responses = {}
    for status in (*statuses, 401, 413, 429):
        told[status] = {"model": api.Malformed if status == 422 else api.Problem, "description": WHY[status]}
    return told


WHY = {
    400: "The body cannot be read.",
    401: "An API key is needed.",
    404: "No such title, or no poster.",
    413: "The request is too large.",
    422: "The request is malformed, or speaks of unknown names.",
    429: "Too many requests.",
}
SECURITY = [
    (b"content-security-policy", POLICY.encode()),
    (b"x-content-type-options", b"nosniff"),
    (b"referrer-policy", b"no-referrer"),
]


async def _malformed(request: Request, error: Exception) -> JSONResponse:
    """What is wrong and where; never what was sent, which may be anything."""
    assert isinstance(error, RequestValidationError)
    told = []
    for one in error.errors()[:MISTAKES]:
        # Names that the sender chose stand in the location too: of an unknown field, or a key of a mapping.
        known = [part for part in one["loc"] if isinstance(part, int) or part in FIELDS]
        told.append({"where": known, "what": WHAT.get(one["type"], one["msg"])})
    return JSONResponse({"detail": "the request is malformed", "mistakes": told}, 422)


FIELDS = {
    "body",
    "query",
    "path",
    "requests",
    "q",
    "limit",
    "id",
    *api.RecommendBody.model_fields,
    *api.Watched.model_fields,
}
WHAT = {"extra_forbidden": "there is no such field", "json_invalid": "this is no JSON"}


async def _fault(request: Request, error: Exception) -> JSONResponse:
    """The traceback goes to the log, which Starlette writes; the sender learns nothing of the inside."""
    return JSONResponse({"detail": "internal error"}, 500)
