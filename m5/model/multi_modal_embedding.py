"""Multi-modal embedding layer (paper: "multi-modal embedding layer"; map in README.md beside this file).

A title has two embeddings:
    E^ID(n) = row n of a sharded table, random start, trained;
    E^CG(n) = LayerNorm(W_2 gelu(W_1 g_n)), g_n the frozen node vector that GraphSAGE pre-trained on the metagraph.
User, scenario, context and subsidiary features are rows of tables E^SH that both branches share.

Rows N, N + 1 and N + 2 of the title table are not titles: the start position, the title that has no ID embedding
(cold, or dropped in training to teach the CG branch to carry it alone), and the masked title.

Source: Zhao et al., KDD 2023, doi 10.1145/3580305.3599863; the projection and the special rows are our decisions.
Dimension legend in `m5.batch`; G width of a content vector.
"""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor, nn
from torchrec import EmbeddingCollection, EmbeddingConfig, JaggedTensor

from m5.batch import Batch
from m5.model.keyed_dropout import KeyedDropout, position_keys

START, UNKNOWN, MASK = 0, 1, 2  # offsets behind the last title
SPECIAL_ROWS = 3


class Subsidiary(NamedTuple):
    """E^SH of the S distinct combinations of subsidiary features, concatenated, and each behaviour's combination.

    There are a few hundred combinations and many thousand behaviours: what depends on them alone is computed once.
    """

    feature_SF: Tensor
    place_BL: Tensor

    def each(self, x_SX: Tensor) -> Tensor:
        """What was computed per combination, for every behaviour: [S, X] -> [B, L, X]."""
        return nn.functional.embedding(self.place_BL, x_SX)


class Situations(NamedTuple):
    """What is known of the requests besides behaviours: E^SH of the J distinct situations, and each request's place."""

    feature_JFD: Tensor
    scenario_JMD: Tensor
    situation_P: Tensor

    def each(self, x_JX: Tensor) -> Tensor:
        """What was computed per situation, for every request: [J, X] -> [P, X]."""
        # An embedding look-up, because its gradient adds up repeated rows faster than index_select's.
        return nn.functional.embedding(self.situation_P, x_JX)


class Embedded(NamedTuple):
    """What the embedding layer hands on; the CG fields are None in a model without content branch."""

    id_BLD: Tensor
    cg_BLD: Tensor | None
    subsidiary: Subsidiary
    situations: Situations
    id_key_CD: Tensor
    cg_key_CD: Tensor | None


def sharded_tables(*, n_titles: int, features: dict[str, int], width: int, device: torch.device) -> EmbeddingCollection:
    """All tables of width D as one TorchRec collection: `title`, then one table per feature.

    Args:
        n_titles: N.
        features: rows of each feature's table, by the key it has in `Batch.sparse`.
    """
    tables = [
        EmbeddingConfig(
            name="title",
            num_embeddings=n_titles + SPECIAL_ROWS,
            embedding_dim=width,
            feature_names=["history", "candidates"],
        )
    ]
    tables += [
        EmbeddingConfig(name=name, num_embeddings=rows, embedding_dim=width, feature_names=[name])
        for name, rows in features.items()
    ]
    return EmbeddingCollection(tables=tables, device=device)


class ContentProjection(nn.Module):
    """E^CG: frozen content vectors behind a trained projection, with learned vectors for start and mask."""

    content: Tensor

    def __init__(self, *, content_NG: Tensor, width: int, device: torch.device | None = None):
        super().__init__()
        n_titles, content_width = content_NG.shape
        rows = torch.cat([content_NG, content_NG.new_zeros(SPECIAL_ROWS, content_width)])
        # Frozen and rebuilt from the prepared dataset, hence not part of the checkpoint.
        self.register_buffer("content", rows.to(device), persistent=False)
        self.special = nn.Parameter(torch.zeros(SPECIAL_ROWS, width, device=device))
        self.hidden = nn.Linear(content_width, 2 * width, device=device)
        self.output = nn.Linear(2 * width, width, device=device)
        # Without bias: one added to every key changes no softmax, and the behaviours' side has one in its decoration.
        self.norm = nn.LayerNorm(width, bias=False, device=device)
        self.n_titles = n_titles

    def forward(self, title_X: Tensor) -> Tensor:
        """int64 [X] rows (titles, or N + special) -> float32 [X, D]."""
        content_XG = nn.functional.embedding(title_X, self.content)
        vector_XD = self.norm(self.output(nn.functional.gelu(self.hidden(content_XG))))
        special_X = (title_X - self.n_titles).clamp(min=-1)
        learned_XD = nn.functional.embedding(special_X.clamp(min=0), self.special).to(vector_XD.dtype)
        return torch.where((special_X >= 0).unsqueeze(-1), learned_XD, vector_XD)


class MultiModalEmbedding(nn.Module):
    """Turns the looked-up rows of a batch into the layer's output; the tables stand beside it, in `M5`.

    Args:
        content: E^CG, or None for a model without content branch.
        subsidiary: keys of the subsidiary features, in order; empty switches decoration off.
        features: keys of user and context features, in order.
        scenarios: keys of the scenario features, in order.
        width: D.
        dropout: probability of zeroing an element of a behaviour's title embedding in training.
    """

    def __init__(
        self,
        *,
        content: ContentProjection | None,
        subsidiary: tuple[str, ...],
        features: tuple[str, ...],
        scenarios: tuple[str, ...],
        width: int,
        dropout: float,
    ):
        super().__init__()
        self.content = content
        self.subsidiary = subsidiary
        self.features = features
        self.scenarios = scenarios
        self.id_dropout = KeyedDropout(dropout, width)
        self.cg_dropout = KeyedDropout(dropout, width)

    def forward(self, looked_up: dict[str, JaggedTensor], batch: Batch) -> Embedded:
        """Rows and Batch -> Embedded: [B, L, D] behaviours, [J, ., D] features, [C, D] candidate keys, float32.

        Padding positions of the titles are zero.
        """
        rows = {key: value.values() for key, value in looked_up.items()}
        B, L = batch.size
        history_TD = rows["history"]
        width = history_TD.shape[-1]

        keys = (*self.features, *self.scenarios)
        situations = len(rows[keys[0]]) if keys else 1

        def stacked(keys: tuple[str, ...]) -> Tensor:
            if not keys:
                return history_TD.new_zeros(situations, 0, width)
            return torch.stack([rows[key] for key in keys], dim=1)

        draw_BL = position_keys(batch.draw_B, L)
        id_BLD = history_TD.new_zeros(B * L, width).index_copy(0, batch.history_T, history_TD).view(B, L, width)
        subsidiary_SF = torch.cat([rows[key] for key in self.subsidiary] or [history_TD[:0, :0]], dim=-1)
        cg_BLD = cg_key_CD = None
        if self.content is not None:
            # Behaviours and candidates share most titles: project each title once.
            rows_X = torch.cat([batch.title_BL.flatten(), batch.candidate_C])
            title_U, place_X = rows_X.unique(return_inverse=True)
            cg_XD = nn.functional.embedding(place_X, self.content(title_U))
            cg_BLD = self.cg_dropout(cg_XD[: B * L].view(B, L, width), draw_BL)
            cg_key_CD = cg_XD[B * L :]
        return Embedded(
            id_BLD=self.id_dropout(id_BLD, draw_BL),
            cg_BLD=cg_BLD,
            subsidiary=Subsidiary(subsidiary_SF, batch.subsidiary_BL),
            situations=Situations(stacked(self.features), stacked(self.scenarios), batch.situation_P),
            id_key_CD=rows["candidates"],
            cg_key_CD=cg_key_CD,
        )
