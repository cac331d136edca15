"""Titles launched after the training period: hit rate of a run whose vectors of them come from onboarding alone.

Every title without an event in the training period is described as TITLE.json describes one, with its poster, and given
to `m5 onboard`'s encoder, which knows nothing else of it. The requests are the test events that such a title answers;
candidates are all titles that the viewer may play and has not watched, as in `m5 evaluate`.

    m5 bench cold --run RUN

Where the newest titles were held out, settings are chosen on the older ones of them, and measured on the others once:

    m5 prepare movielens ... --hold-out-newest 0.1 --out DATA
    m5 bench cold --run RUN --skip-newest 0.05
    m5 bench cold --run RUN --newest 0.05
"""

from __future__ import annotations

import argparse
import copy
import sys
import tempfile
import time
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
import scipy.sparse as sp
import torch

from benchmarks.harness import Promise, Report, run
from data_prep.new_title import check_title
from data_prep.onboard import Onboarding
from data_prep.sources.held_out import HELD_OUT
from m5.baselines import Interactions, Popularity
from m5.config import ConfigError
from m5.eligibility import Eligibility
from m5.evaluate import Candidates, Requests, Scorer, rank_targets, select_requests
from m5.metrics import bootstrap_intervals, hits
from m5.predict import Predictor
from m5.schema import ALWAYS, ContentKind, DataError, PreparedDataset

CUTOFFS = (10, 50, 200)
PROMISED = 3.0  # times random
SAMPLES = 1000  # of the bootstrap over viewers
EVER = 100_000  # days of popularity: whatever the window, these titles have no watch in it
ROWS_AT_A_TIME = 1024
ONBOARDED, PREPARED, KNN, RANDOM = "M5, title onboarded", "M5, title in `m5 prepare`", "content kNN", "random, expected"


def described(dataset: PreparedDataset, rows: np.ndarray) -> tuple[list[dict[str, Any]], list[Path | None]]:
    """TITLE.json and poster of titles of the dataset; int64 [n]."""
    manifest, titles = dataset.manifest, dataset.titles.iloc[rows]
    records = [
        {
            "title_id": title["title_id"],
            "title": title["title"],
            "description": title["description"],
            "category": manifest.categories.values[title["category"] - 1] if title["category"] else None,
            "released": None if title["released"] == ALWAYS else int(title["released"]),
            "metadata": {kind: list(title[kind]) for kind in manifest.metadata},
        }
        for title in titles.to_dict("records")
    ]
    paths = [dataset.folder / name if name else None for name in titles["artwork"]]
    return records, [path if path is not None and path.is_file() else None for path in paths]


class Onboarded:
    """Content vectors of titles as if they were new.

    Args:
        dataset: prepared dataset.
        rows: int64 [n], titles of it.
        kinds: side by side, as a model reads them.
        text, image_weights: as in `Onboarding`.

    Attributes:
        vectors: float32 [n, G].
        one: seconds for one title alone, models loaded before: the median of some.
        warnings: of all titles.
    """

    def __init__(
        self,
        dataset: PreparedDataset,
        rows: np.ndarray,
        kinds: tuple[ContentKind, ...],
        *,
        text: str | None,
        image_weights: str | None,
    ):
        self.warnings: list[str] = []
        onboarding = Onboarding(dataset.folder, text=text, image_weights=image_weights, warn=self.warnings.append)
        records, posters = described(dataset, rows)
        titles = [check_title(record, dataset.manifest) for record in records]
        alone = []
        for title, poster in list(zip(titles, posters, strict=True))[:9]:
            began = time.perf_counter()
            onboarding.encode([title], [poster])
            alone.append(time.perf_counter() - began)
        self.warnings.clear()
        self.one = float(np.median(alone[1:] or alone))
        found = onboarding.encode(titles, posters)
        self.vectors = np.stack([np.concatenate([one[kind] for kind in kinds]) for one in found])


class ContentKNN:
    """Cosine of a title's content vector and the mean of those that the viewer has watched.

    Args:
        data: histories.
        content_NG: float32 content vectors.
    """

    def __init__(self, data: Interactions, content_NG: np.ndarray):
        self.name, self.data, self.content_NG = KNN, data, content_NG
        self.unit_NG = content_NG / np.linalg.norm(content_NG, axis=1, keepdims=True).clip(min=1e-12)

    def score(self, event_index: np.ndarray) -> np.ndarray:
        """int64 [B] -> float32 [B, N]; 0 for a viewer without history."""
        history_BN: sp.csr_matrix = self.data.histories(event_index)
        mean_BG = history_BN @ self.content_NG
        return (mean_BG / np.linalg.norm(mean_BG, axis=1, keepdims=True).clip(min=1e-12)) @ self.unit_NG.T


def with_content(predictor: Predictor, content_NG: np.ndarray, name: str) -> Predictor:
    """The same model with other content vectors, float32 [N, G]."""
    model = copy.deepcopy(predictor.model)
    assert model.embedding.content is not None
    model.embedding.content.content[: len(content_NG)] = torch.from_numpy(content_NG)
    changed = Predictor(model, predictor.builder, predictor.config, predictor.device)
    changed.name = name
    return changed


def held_out(dataset: PreparedDataset, skip: float | None, most: float | None) -> np.ndarray | None:
    """Titles held out by age, as `data_prep.sources.held_out` has left them.

    Args:
        skip, most: at least `skip` and less than `most` of the watched titles are newer; None: no such bound.

    Returns:
        bool [N], or None without bounds.

    Raises:
        DataError: no titles were held out.
    """
    if skip is None and most is None:
        return None
    path = dataset.folder.with_name(f"{dataset.folder.name}-raw") / HELD_OUT
    if not path.is_file():
        raise DataError(
            f"{path} is missing, which tells the age of held-out titles for --newest and --skip-newest. "
            "`m5 prepare movielens ... --hold-out-newest 0.1` leaves it beside the dataset."
        )
    newer = pd.read_parquet(path).set_index("title_id")["newer"]
    newer_N = dataset.titles["title_id"].map(newer).to_numpy(np.float64)  # NaN for titles that were not held out
    return (newer_N >= (skip or 0)) & (newer_N < (np.inf if most is None else most))


def cold_requests(
    dataset: PreparedDataset, eligibility: Eligibility | None, among_N: np.ndarray | None = None
) -> Requests:
    """The test requests that a cold title answers; with bool [N], one of those.

    Raises:
        DataError: there are none.
    """
    found = select_requests(dataset, "test", eligibility=eligibility)
    cold_N = dataset.titles["cold"].to_numpy(bool)
    keep = (cold_N if among_N is None else cold_N & among_N)[found.target]
    if not keep.any():
        raise DataError(
            f"{dataset.folder}: no test event is of such a title without training events, so nothing can be asked. "
            "Split by time, or hold titles out: `m5 prepare movielens ... --hold-out-newest 0.05`."
        )
    of_each = {name: getattr(found, name)[keep] for name in ("event", "user", "target", "timestamp", "scenario")}
    return replace(found, **of_each)


class ColdCandidates(Candidates):
    """Only the titles without training events: does a row order these, whatever it thinks of all others?"""

    def of(self, rows: np.ndarray) -> torch.Tensor:
        """int64 [B] requests -> bool [B, N]."""
        return super().of(rows) & torch.tensor(self.dataset.titles["cold"].to_numpy(bool))


def guessed(candidates: Candidates, requests: int) -> dict[int, np.ndarray]:
    """By cutoff, float64 [R]: the exact probability that a random order of the candidates hits."""
    sizes = np.concatenate(
        [
            candidates.of(np.arange(first, min(first + ROWS_AT_A_TIME, requests))).sum(1).numpy()
            for first in range(0, requests, ROWS_AT_A_TIME)
        ]
    )
    return {k: np.minimum(k, sizes) / sizes for k in CUTOFFS}


def row(
    name: str, found: dict[int, np.ndarray], among_cold: np.ndarray, guess: dict[int, np.ndarray], user: np.ndarray
) -> dict[str, Any]:
    """A row of the table, from float64 [R] hits by cutoff, and those of the first 10 cold titles."""
    low, high = bootstrap_intervals({"hr": found[50]}, user, samples=SAMPLES, seed=0)["hr"]
    return {
        "row": name,
        "HR@50": f"{found[50].mean():.4f}",
        "95% interval": f"{low:.4f} - {high:.4f}",
        "times random": f"{found[50].mean() / guess[50].mean():.1f}",
        "HR@10": f"{found[10].mean():.4f}",
        "HR@200": f"{found[200].mean():.4f}",
        "HR@10 among cold": f"{among_cold.mean():.4f}",
    }


def measure(options: argparse.Namespace) -> Report:
    if options.smoke and options.run is None:
        with tempfile.TemporaryDirectory() as folder:
            return measured(small_run(Path(folder)), options)
    if options.run is None:
        raise ConfigError("--run RUN is needed: which trained run to measure.")
    return measured(options.run, options)


def measured(folder: Path, options: argparse.Namespace) -> Report:
    predictor = Predictor.load(folder)
    dataset, kinds = predictor.dataset, predictor.config.model.content
    if not kinds:
        raise ConfigError(f"{folder} has no content branch (model.content=[]), so a new title cannot have a vector.")
    eligibility = Eligibility.from_dataset(dataset)
    requests = cold_requests(dataset, eligibility, held_out(dataset, options.skip_newest, options.newest))
    cold = np.flatnonzero(dataset.titles["cold"].to_numpy(bool))
    new = Onboarded(dataset, cold, kinds, text=options.text, image_weights=options.image_weights)
    prepared_NG = np.concatenate([array for kind in kinds if (array := dataset.content(kind)) is not None], axis=1)
    content_NG = prepared_NG.copy()
    content_NG[cold] = new.vectors
    data = Interactions(dataset)
    predictor.name = PREPARED
    scorers: list[Scorer] = [with_content(predictor, content_NG, ONBOARDED), predictor, ContentKNN(data, content_NG)]
    scorers.append(Popularity(data, EVER))
    unseen = predictor.config.training.filter_seen
    candidates, cold_ones = (
        kind(dataset, requests, {}, eligibility=eligibility, filter_seen=unseen)
        for kind in (Candidates, ColdCandidates)
    )
    guess = guessed(candidates, len(requests.event))
    found = {one.scorer.name: {k: hits(one.rank, k) for k in CUTOFFS} for one in rank_targets(scorers, candidates)}
    among_cold = {one.scorer.name: hits(one.rank, 10) for one in rank_targets(scorers, cold_ones)}
    found[RANDOM], among_cold[RANDOM] = guess, guessed(cold_ones, len(requests.event))[10]
    ratio = float(found[ONBOARDED][50].mean() / guess[50].mean())
    return Report(
        title=f"Cold titles of {dataset.manifest.name}: {len(requests.event):,} requests, all titles as candidates",
        rows=[row(name, values, among_cold[name], guess, requests.user) for name, values in found.items()],
        notes=notes(predictor, requests, new, prepared_NG[cold]),
        promises=[Promise(f"HR@50 of '{ONBOARDED}' over random", ratio, PROMISED, at_least=True)],
        plot=lambda axes: draw(axes, found),
        spread_over="one evaluation; intervals are over viewers, by bootstrap",
        details={"hr": {name: {str(k): float(hit.mean()) for k, hit in one.items()} for name, one in found.items()}},
    )


def notes(predictor: Predictor, requests: Requests, new: Onboarded, prepared_CG: np.ndarray) -> list[str]:
    dataset, model = predictor.dataset, predictor.config.model
    asked, viewers = len(np.unique(requests.target)), len(np.unique(requests.user))
    cosine = (new.vectors * prepared_CG).sum(1) / np.maximum(
        np.linalg.norm(new.vectors, axis=1) * np.linalg.norm(prepared_CG, axis=1), 1e-12
    )
    images = dataset.manifest.encoders.get("image")
    found = [
        f"{len(prepared_CG):,} of {dataset.manifest.n_titles:,} titles have no event in the training period; "
        f"{asked:,} of them are asked for, by {viewers:,} viewers. A run's ID embedding knows nothing of these titles.",
        "Onboarded vectors against those of `m5 prepare`, which had the titles in its catalogue: cosine "
        f"{cosine.min():.6f} at least, {np.median(cosine):.6f} in the median. One title takes {1000 * new.one:.0f} ms "
        f"when the encoders are loaded. {len(new.warnings):,} warnings: metadata values not known from the training "
        "period.",
        "Random is the exact expectation over the candidates of each request. Popularity has no watch of these titles "
        "in the training period. Content kNN is the cosine to the mean vector of everything watched before, on the "
        "same vectors as the first row. 'Among cold' has titles without training events alone as candidates: the order "
        "of new titles, apart from how they stand against all others.",
        f"The run: preset {predictor.config.preset}, model.id_dropout {model.id_dropout:g}, the share of "
        "titles that a training step knows by content alone: that is how a run learns to place titles without an ID. "
        f"Dataset: {dataset.manifest.name}, content hash {dataset.manifest.content_hash[:12]}.",
    ]
    if images is not None and images.weights == "random":
        found.append(f"The artwork's encoder ({images.model}) has RANDOM weights: it sees colour and texture only.")
    return [*found, *dataset.manifest.notes]


def draw(axes: Any, found: dict[str, dict[int, np.ndarray]]) -> None:
    """HR@50 of every row, beside random and what is promised."""
    names = [name for name in found if name != RANDOM]
    guess = float(found[RANDOM][50].mean())
    axes.barh(names, [found[name][50].mean() for name in names])
    axes.axvline(guess, color="black", linestyle=":", label="random")
    axes.axvline(PROMISED * guess, color="black", linestyle="--", label=f"{PROMISED:g} times random")
    axes.invert_yaxis()
    axes.set_xlabel("HR@50")
    axes.legend()


def small_run(folder: Path) -> Path:
    """A synthetic service and a run on it that has learned next to nothing, for --smoke."""
    from data_prep.prepare import prepare_all, silent
    from data_prep.sources.synthetic import generate
    from data_prep.sources.tables import load
    from m5.config import load_config
    from m5.train import train

    generate(out=folder / "raw", users=600, titles=120, events=3600, seed=0, posters=True)
    prepare_all(
        load(folder / "raw" / "dataset.yaml"),
        folder / "data",
        image="test_resnet",
        image_weights="random",
        progress=silent,
    )
    tiny = ("width=16", "blocks=1", "expert_hidden=16", "mixing_width=16")
    settings = ["training.epochs=1", "training.threads=1", *(f"model.{one}" for one in tiny)]
    train(load_config("demo", settings, folder / "data", folder / "run"))
    return folder / "run"


def arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--run", type=Path, help="folder of `m5 train`")
    parser.add_argument("--text", help="the text encoder's folder, where the one of the dataset has moved")
    parser.add_argument("--image-weights", help="the file, where artwork was encoded with weights from a file")
    for option, which in (("--newest", "newest"), ("--skip-newest", "older")):
        parser.add_argument(option, type=float, metavar="SHARE", help=f"ask for the {which} held-out titles alone")


def main(argv: list[str] | None = None) -> int:
    return run(__spec__.name if __spec__ else __name__, __doc__ or "", measure, argv, arguments)


if __name__ == "__main__":
    sys.exit(main())
