"""A title launched a minute ago -> its content vectors, from text, artwork and metadata alone: nothing is trained.

Text and artwork go through the encoders that the manifest records, with the same weights and the statistics that the
dataset's own titles were brought into shape with; metadata joins the new node to the graph's values. What comes out is
what `m5 prepare` would have written for the title, were it in the catalogue without an event (but see
`data_prep.graph_encoder`).
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from functools import cached_property
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd

from data_prep.content_arrays import load_kept, pick_device
from data_prep.graph_encoder import GraphEncoder
from data_prep.image_encoder import ImageModel, Standardisation
from data_prep.new_title import NewTitle, check_title
from data_prep.prepare import say
from data_prep.text_encoder import CPU_BATCH, TextModel, locate_model, title_texts
from m5.schema import ContentKind, DataError, Encoder, PreparedDataset

BATCH = 32  # images
Vectors = dict[ContentKind, np.ndarray]


class Onboarding:
    """Encodes titles for one prepared dataset; models are loaded when first needed, and stay.

    Args:
        data: prepared dataset.
        text: the text encoder's folder, where the manifest's record is of a local one that has moved.
        image_weights: the file, where artwork was encoded with weights from a file.
        device: as torch names it; None takes the GPU where there is one.
        warn: called with a sentence for what could not be used.

    Raises:
        DataError: the dataset has no content graph, or was prepared by an earlier version.
    """

    def __init__(
        self,
        data: Path,
        *,
        text: str | None = None,
        image_weights: str | None = None,
        device: str | None = None,
        warn: Callable[[str], None] = say,
    ):
        self.data, self.text, self.image_weights = Path(data), text, image_weights
        self.device, self.warn = pick_device(device), warn
        self.graph = GraphEncoder.load(self.data)
        self.dataset = PreparedDataset(self.data)
        self.encoders = self.dataset.manifest.encoders

    def encode(self, titles: Sequence[NewTitle], posters: Sequence[Path | None]) -> list[Vectors]:
        """Content vectors of titles that are checked against this dataset.

        Args:
            titles: what is known of them.
            posters: artwork of each, or None.

        Returns:
            For each title, by kind (those that the dataset has), float32 [d] unit vectors; zero where the title lacks
            that kind.

        Raises:
            DataError: the encoders' weights are not to be had or are others than the dataset's, artwork that cannot be
                read, or a title with nothing to go by.
        """
        vectors = self._text(titles) | self._image(titles, posters)
        graph, unknown = self.graph.encode(vectors, [title.metadata for title in titles])
        for row, title in enumerate(titles):
            self._warn_of(title, unknown[row])
            known = sum(map(len, title.metadata.values())) - sum(map(len, unknown[row].values()))
            if not known and not any(array[row].any() for array in vectors.values()):
                raise DataError(
                    f"{title.title_id}: there is nothing to place it by: neither text nor artwork of a kind that the "
                    "dataset has, and no metadata value that a title of the training period has. Describe it."
                )
        vectors["graph"] = graph
        return [{kind: array[row] for kind, array in vectors.items()} for row in range(len(titles))]

    def _warn_of(self, title: NewTitle, unknown: Mapping[str, Sequence[str]]) -> None:
        for kind, values in unknown.items():
            shown = ", ".join(values[:5]) + (", ..." if len(values) > 5 else "")
            if kind not in self.graph.kinds:
                self.warn(
                    f"{title.title_id}: metadata.{kind} is ignored ({shown}): no title of the training period shares a "
                    "value of this kind with another title, so the content graph does without it."
                )
                continue
            self.warn(
                f"{title.title_id}: metadata.{kind}: {len(values)} of {len(title.metadata[kind])} values are not known "
                f"from the training period and are ignored: {shown}."
            )
        if title.category is not None and not self.dataset.manifest.categories.index(title.category):
            known = ", ".join(self.dataset.manifest.categories.values) or "none"
            self.warn(f"{title.title_id}: category: {title.category} is not known ({known} are) and is ignored.")

    # ---- text ------------------------------------------------------------------------------------------------

    @cached_property
    def _text_model(self) -> TextModel:
        record = self.encoders["text"]
        model = self.text or (None if record.weights == "bundled" else record.model)
        length = int(record.metrics.get("max_length", 128))
        encoder = TextModel(locate_model(model), self.device, length, CPU_BATCH)
        _refuse_other(record, encoder.weights_hash, "text", "--text")
        return encoder

    def _text(self, titles: Sequence[NewTitle]) -> Vectors:
        """float32 [n, d] as in text.npy, where the dataset has text."""
        if "text" not in self.encoders:
            return {}
        columns = ("title_id", "title", "description")
        frame = pd.DataFrame([{name: getattr(title, name) for name in columns} for title in titles], columns=columns)
        texts = title_texts(frame)
        array = np.zeros((len(titles), self.encoders["text"].dim), dtype=np.float32)
        rows = [row for row, text in enumerate(texts) if text]
        for row in set(range(len(titles))) - set(rows):
            self.warn(f"{titles[row].title_id}: it has neither a title nor a description.")
        if rows:
            for positions, found in self._text_model.encode([texts[row] for row in rows]):
                array[np.array(rows)[positions]] = found
        return {"text": array}

    # ---- artwork ---------------------------------------------------------------------------------------------

    @cached_property
    def _image_model(self) -> tuple[ImageModel, Standardisation]:
        record = self.encoders["image"]
        kept = load_kept(
            self.data, "image", self.dataset.manifest, f"`m5 encode {self.data}`, with its options, and `m5 graph`"
        )
        weights = self.image_weights or record.weights
        if weights not in ("hub", "random") and not Path(weights).expanduser().is_file():
            raise DataError(
                f"The dataset's artwork was encoded by {record.model} with the weights of a file named "
                f"{record.weights}, and no vector of other weights would fit. Name the file with --image-weights."
            )
        size = int(record.metrics["image_size"]) if "image_size" in record.metrics else None
        encoder = ImageModel(record.model, weights, self.device, size)
        _refuse_other(record, encoder.weights_hash, "artwork", "--image-weights")
        return encoder, Standardisation(kept["mean"], kept["scale"])

    def _image(self, titles: Sequence[NewTitle], posters: Sequence[Path | None]) -> Vectors:
        """float32 [n, d] as in image.npy, where the dataset has artwork."""
        rows = [row for row, poster in enumerate(posters) if poster is not None]
        paths = [Path(poster) for poster in posters if poster is not None]
        if "image" not in self.encoders:
            for row in rows:
                self.warn(f"{titles[row].title_id}: the dataset has no artwork, so the poster is ignored.")
            return {}
        array = np.zeros((len(titles), self.encoders["image"].dim), dtype=np.float32)
        for path in paths:
            if not path.is_file():
                raise DataError(f"{path} does not exist. Correct the poster's path, or leave it out.")
        if rows:
            encoder, standard = self._image_model
            bad: list[str] = []
            for positions, features in encoder.encode(paths, BATCH, bad):
                array[np.array(rows)[positions]] = standard.apply(features)
            if bad:
                raise DataError(f"{bad[0]} is no readable image. Give another file, or leave the poster out.")
        return {"image": array}


def _refuse_other(record: Encoder, found: str, what: str, option: str) -> None:
    if found != record.sha256:
        raise DataError(
            f"The dataset's {what} was encoded by {record.model} with weights of sha256 {record.sha256[:12]}, but "
            f"those found have {found[:12]}: their vectors do not fit. Name the same ones with {option}, or run "
            "`m5 encode` and `m5 graph` again, and train again."
        )


def encode_title(
    data: Path,
    title: NewTitle | Mapping[str, Any],
    poster: Path | None = None,
    *,
    text: str | None = None,
    image_weights: str | None = None,
    device: str | None = None,
    warn: Callable[[str], None] = say,
) -> Vectors:
    """Content vectors of one title that the dataset does not have; see `Onboarding` for several.

    Args:
        data: prepared dataset.
        title: as `data_prep.new_title` describes it, checked or as JSON gives it.
        poster: its artwork.
        text, image_weights, device, warn: as in `Onboarding`.

    Returns:
        By kind (those that the dataset has), float32 [d] unit vectors, as `m5 prepare` would have written them.

    Raises:
        DataError: a mistake in the title, artwork that cannot be read, a dataset of an earlier version, or encoders
            that are not to be had.
    """
    onboarding = Onboarding(data, text=text, image_weights=image_weights, device=device, warn=warn)
    checked = title if isinstance(title, NewTitle) else check_title(title, onboarding.dataset.manifest)
    return onboarding.encode([checked], [poster])[0]
