"""The user tower as a service runs it: embeddings of one viewer's history in, the query vector out.

The same modules as `m5.model.m5.M5`, fed with plain tensors instead of the training loop's jagged batch: one request a
sequence, at its last position; experts are gathered by request. Title embeddings come from outside, so that the
exported program stays as it is when a title is added. Dimension legend in `m5.batch`; X columns of integer features.
"""

from __future__ import annotations

import tempfile
import warnings
from collections.abc import Callable
from typing import cast

import torch
import torch._inductor
from torch import Tensor, nn
from torch.nn import functional

from m5.batch import ByCategory
from m5.model.m5 import M5, Tower
from m5.model.multi_interest_extraction import LastInterests
from m5.model.multi_modal_embedding import Situations, Subsidiary
from m5.model.multi_scenario_mixing import GatheredExperts


class UserTower(nn.Module):
    """History and situation -> query; built from a trained model, whose modules it shares.

    Args:
        model: the bare model, unsharded, with its weights.
    """

    def __init__(self, model: M5):
        super().__init__()
        self.towers, self.gate_crossing, self.matching = model.towers, model.gate_crossing, model.matching
        embedding = model.embedding
        self.subsidiary, self.features, self.scenarios = embedding.subsidiary, embedding.features, embedding.scenarios
        keys = (*self.subsidiary, *self.features, *self.scenarios)
        self.tables = nn.ParameterDict({key: _rows(model.tables, key) for key in keys})
        self.experts = nn.ParameterDict()
        if model.experts is not None:
            rows, hidden = model.expert_shape
            # One at a time: from a dict, ParameterDict would sort them, and the order is the scenarios'.
            for key in model.expert_keys:
                weight = _rows(model.experts, f"experts_{key}")
                self.experts[key] = nn.Parameter(weight.view(-1, rows, hidden), requires_grad=False)

    def forward(
        self,
        id_BLD: Tensor,
        cg_BLD: Tensor | None,
        category_BL: Tensor,
        subsidiary_BLX: Tensor,
        length_B: Tensor,
        feature_BX: Tensor,
    ) -> tuple[Tensor, Tensor]:
        """A query for every sequence.

        Args:
            id_BLD, cg_BLD: float32 embeddings of the positions: the start, then the behaviours, then anything.
                `cg_BLD` is None in a model without content branch.
            category_BL: int64 behaviour category, -1 at the start and after the last behaviour.
            subsidiary_BLX: int64 rows of the subsidiary features' tables, 0 at the start.
            length_B: int64 positions, the start included.
            feature_BX: int64 rows of the tables of user features, contexts, then scenarios.

        Returns:
            float32 query_BQ, and the ID branch's weight gate_B.
        """
        B, L, _ = id_BLD.shape
        subsidiary = self._subsidiary(subsidiary_BLX)
        situations = self._situations(feature_BX)
        scenario_BM = feature_BX[:, len(self.features) :]
        place_L = torch.arange(L, device=id_BLD.device)
        valid_BL = place_L < length_B.unsqueeze(-1)
        id_BLD = id_BLD * valid_BL.unsqueeze(-1)
        flat_B = torch.arange(B, device=id_BLD.device) * L + length_B - 1
        user: dict[str, Tensor] = {}
        for (branch, module), e_BLD in zip(self.towers.items(), (id_BLD, cg_BLD), strict=False):
            tower = cast(Tower, module)
            nothing = ByCategory(flat_B[:0], ())
            interests = tower.extraction(e_BLD, subsidiary, category_BL, valid_BL, nothing, flat_B)
            last = LastInterests.of(interests, length_B - 1)
            user[branch] = tower.mixing(last, situations, self._owned(branch, scenario_BM), scenario_BM).user_PD
        crossed_BX = None
        if self.gate_crossing is not None:
            crossed_BX = self.gate_crossing(situations.feature_JFD, situations.scenario_JMD)
        query_BQ, gate_B = self.matching(user["id"], user.get("cg"), crossed_BX, situations)
        return query_BQ, gate_B

    def _subsidiary(self, subsidiary_BLX: Tensor) -> Subsidiary:
        B, L, _ = subsidiary_BLX.shape
        flat_TX = subsidiary_BLX.flatten(0, 1)
        parts = [functional.embedding(flat_TX[:, x], self.tables[key]) for x, key in enumerate(self.subsidiary)]
        feature_TF = torch.cat(parts, dim=-1) if parts else flat_TX.new_zeros(B * L, 0, dtype=torch.float32)
        return Subsidiary(feature_TF, torch.arange(B * L, device=flat_TX.device).view(B, L))

    def _situations(self, feature_BX: Tensor) -> Situations:
        B, width = feature_BX.shape[0], self.matching_width
        keys = (*self.features, *self.scenarios)
        rows = [functional.embedding(feature_BX[:, x], self.tables[key]) for x, key in enumerate(keys)]
        row_BXD = torch.stack(rows, dim=1) if rows else feature_BX.new_zeros(B, 0, width, dtype=torch.float32)
        count = len(self.features)
        return Situations(row_BXD[:, :count], row_BXD[:, count:], torch.arange(B, device=feature_BX.device))

    def _owned(self, branch: str, scenario_BM: Tensor) -> list[GatheredExperts]:
        names = [key for key in self.experts if key.split("_")[0] == branch]
        return [GatheredExperts(self.experts[key], scenario_BM[:, m]) for m, key in enumerate(names)]

    @property
    def matching_width(self) -> int:
        """D."""
        return cast(Tower, self.towers["id"]).extraction.norm.normalized_shape[0]


def _rows(collection: nn.Module, table: str) -> nn.Parameter:
    """Weights of one table of an unsharded TorchRec collection."""
    return nn.Parameter(collection.get_parameter(f"embeddings.{table}.weight").detach(), requires_grad=False)


def export_program(tower: UserTower, *, width: int, history: int) -> torch.export.ExportedProgram:
    """The tower as a program of any number of viewers and behaviours; without example inputs, which would be pickled.

    Args:
        tower: in evaluation mode.
        width: D.
        history: the longest history.
    """
    B, L = 3, min(5, history + 1)
    content = "cg" in tower.towers
    arguments = (
        torch.randn(B, L, width),
        torch.randn(B, L, width) if content else None,
        torch.zeros(B, L, dtype=torch.int64),
        torch.zeros(B, L, len(tower.subsidiary), dtype=torch.int64),
        torch.full((B,), L),
        torch.zeros(B, len(tower.features) + len(tower.scenarios), dtype=torch.int64),
    )
    viewers, positions = torch.export.Dim("B", min=1), torch.export.Dim("L", min=1, max=history + 1)
    sequence = {0: viewers, 1: positions}
    shapes = (sequence, sequence if content else None, sequence, sequence, {0: viewers}, {0: viewers})
    with torch.inference_mode(False), torch.no_grad():
        program = torch.export.export(tower, arguments, dynamic_shapes=shapes)
    program.example_inputs = None
    return program


def compiled(program: torch.export.ExportedProgram, example: tuple) -> Callable[..., tuple[Tensor, Tensor]]:
    """The program as machine code for this machine (AOTInductor); some seconds to a minute, and a C++ compiler.

    Args:
        program: of `export_program`.
        example: arguments of two viewers or more.

    Raises:
        RuntimeError: it cannot be compiled here; the message says why.
    """
    program.example_inputs = (example, {})
    with tempfile.TemporaryDirectory() as folder, warnings.catch_warnings():
        warnings.simplefilter("ignore")
        try:
            package = torch._inductor.aoti_compile_and_package(program, package_path=f"{folder}/tower.pt2")
            loaded = torch._inductor.aoti_load_package(package)
        except Exception as error:
            raise RuntimeError(f"{type(error).__name__}: {str(error).splitlines()[0] if str(error) else ''}") from error
    return loaded
