"""`m5 adapt`: a new value of a scenario, a region or a plan, joins a trained model, which is not trained again.

1. The run's weights are carried over to the new dataset's vocabularies (`m5.carry_over`).
2. The new value's rows start as a blend of those of the known values that it is nearest to (`m5.zero_shot`).
3. Three rows are trained, on the new value's requests of the training period: its embedding E(x), and the expert that
   it owns in each branch. Everything else is frozen; the validation of the new value's requests chooses among the
   blend and what came of it after each epoch.

Where is the gate in that? An expert's weight is softmax(G_x z + G_s E(x) + b), and w, between the branches, reads E(x),
too. G is everybody's, so a step on it would move the answers in every other region. But what the gate says of the new
value is a function of E(x): G_s has A rows, one an active expert, and D > A columns, so that moving E(x) moves the A
logits wherever they should be: an offset of the gate for the new value alone would add nothing. So the gate is trained
by its response to E(x), and no weight that another value reads is touched: their queries stay bit by bit what the
carried-over weights give (and those are the run's own answers, but for what the new dataset's bucket boundaries and
content vectors change). What this cannot have is a gate that reads the interests z otherwise than elsewhere; for that
the new value has an expert of its own.

Titles that only the new value's viewers watch keep the row of titles without an ID embedding, since a title's key is
everybody's: their content carries them until the next training.
"""

from __future__ import annotations

import os
import sys
from collections.abc import Iterable
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import nn
from torchrec import EmbeddingCollection, JaggedTensor, KeyedJaggedTensor

from m5.assemble import build_model
from m5.best import load_weights, read_record, refuse_other_content
from m5.carry_over import State, carry_over, expert_keys
from m5.config import ConfigError, RunConfig, changed, parse_override, validated
from m5.evaluate import in_scenario, select_requests
from m5.parallel import World
from m5.progress import TrainingLog
from m5.resume import Position, Resume
from m5.schema import TRAIN, DataError, PreparedDataset
from m5.train import Beat, Trainer, train, training_model
from m5.zero_shot import blend_weights, nearness, with_row

# What differs from the run's settings: few rows, few requests, weights that are good to begin with. None of the numbers
# was tuned; validation keeps the blend where they do harm.
SETTINGS: dict[str, Any] = {
    "optimizer.lr": 0.002,
    "optimizer.warmup_steps": 10,
    "optimizer.weight_decay": 0.0,  # of rows, which the tables' own optimizer does not decay either
    "training.epochs": 10,
    "training.max_minutes": None,
    "training.evaluate_every": 1,
    "training.patience": 3,
    "training.compile": False,  # one process, few steps: `Adapter` builds the model as it is
}
# What an override may change, by section. The model's form is the run's, and no table is sharded here.
MAY_CHANGE = {
    "sequences": ("requests", "sequences", "sequences_per_epoch"),
    "optimizer": ("lr", "eps", "warmup_steps", "schedule", "final_lr", "clip"),
    "training": (
        *("epochs", "max_minutes", "evaluate_every", "patience", "metric", "validation_targets", "filter_seen"),
        *("threads", "device", "autocast", "checkpoint_minutes", "checkpoint_every", "stall_seconds", "log_every"),
    ),
}
UNTRAINED = "untrained"  # in the record: values that stand in a vocabulary with the rows of the unknown value


@dataclass(frozen=True)
class Start:
    """What an adaptation begins with.

    Attributes:
        name, value: of the scenario, e.g. region and XX.
        state: weights for the new dataset, the blend in the new value's rows.
        blend: known value -> its weight in it.
        origin: for the record of the new run: which weights it came from, and how.
    """

    name: str
    value: str
    state: State
    blend: dict[str, float]
    origin: dict[str, Any]


def adapt(
    run: Path, scenario: tuple[str, str], data: Path, out: Path, overrides: Iterable[str] = (), resume: Resume = "no"
) -> dict[str, float]:
    """Make the run NEW that also knows a new value of a scenario.

    Args:
        run: folder of `m5 train`, or of an earlier `m5 adapt`.
        scenario: name and new value, e.g. ("region", "XX").
        data: prepared dataset whose vocabulary has the value.
        out: folder of the new run.
        overrides: settings, as of `m5 train`; those of MAY_CHANGE.
        resume: as of `m5.train.train`.

    Returns:
        Validation metrics of the new value's requests, of the weights that were kept.

    Raises:
        ConfigError: no run, a setting that cannot change, several processes, or NEW is taken.
        DataError: the run and the dataset do not fit each other, or the value is not new.
    """
    if int(os.environ.get("WORLD_SIZE", "1")) > 1:
        raise ConfigError("m5 adapt trains a few rows and runs in one process; start it without torchrun.")
    if Path(out).resolve() == Path(run).resolve():
        raise ConfigError(f"--out {out} is the run itself, which stays as it is; choose another folder.")
    config = settings(Path(run), Path(data), Path(out), overrides, value=scenario[1])
    start = starting_point(Path(run), *scenario, PreparedDataset(data))
    if lost := start.origin["adapted"]["ids_lost"]:
        print(
            f"m5: {lost:,} titles that {run} knows by their watches have none in the training period of {data}, so "
            "their ID embedding is not used: content alone carries them. Prepare tables that hold the earlier events.",
            file=sys.stderr,
        )
    return train(config, resume, partial(Adapter, start=start))


def settings(run: Path, data: Path, out: Path, overrides: Iterable[str], *, value: str) -> RunConfig:
    """The run's configuration with `SETTINGS` and overrides.

    Raises:
        ConfigError: no run, or an override of something else than MAY_CHANGE.
    """
    config = RunConfig.read(run / "config.yaml")
    chosen = dict(parse_override(override) for override in overrides)
    free = ["name", "seed", *(f"{section}.{name}" for section, names in MAY_CHANGE.items() for name in names)]
    if fixed := sorted(set(chosen) - set(free)):
        raise ConfigError(f"m5 adapt cannot change {fixed[0]}: it is the run's. What it can: {', '.join(free)}.")
    own = {"data": str(data), "out": str(out), "name": f"{config.name}+{value}"}
    made = changed(config.model_dump(mode="json"), own | SETTINGS | chosen)
    return validated(made, " ".join([f"run {run}", *overrides]))


def starting_point(run: Path, name: str, value: str, target: PreparedDataset) -> Start:
    """The zero-shot blend: carried over, with rows for the new value.

    Raises:
        ConfigError: no run.
        DataError: as of `adapt`.
    """
    config = RunConfig.read(run / "config.yaml")
    if config.model.mixing != "smoe":
        raise DataError(
            f"{run} has model.mixing={config.model.mixing}: its scenario values own no experts. `m5 adapt` needs smoe."
        )
    source = PreparedDataset(config.data)
    record = read_record(run)
    untrained = record.get(UNTRAINED, {})
    known = _known_values(run, source, name, value, set(untrained.get(name, ())), target)
    weights = load_weights(run, source.manifest)
    refuse_other_content(run, source, config.model.content)
    state, fit = carry_over(weights, source, target, config)
    vocabulary = target.manifest.scenario(name)
    others = np.array([vocabulary.index(other) for other in known], dtype=np.int64)
    near = nearness(target, name, vocabulary.index(value), others)
    weight = blend_weights(near, len(known))
    with_row(state, name, vocabulary.index(value), others, weight, hidden=config.model.expert_hidden)
    blend = dict(zip(known, weight.tolist(), strict=True))
    origin = {
        "adapted": {
            "run": str(run),
            "weights_sha256": record["weights_sha256"],
            "to": {name: value},
            "blend": blend,
            "content_fit": fit,
            "ids_lost": ids_lost(source, target),
        },
        UNTRAINED: _untrained(source, target, untrained, trained=(name, value)),
    }
    return Start(name, value, state, blend, origin)


def _known_values(
    run: Path, source: PreparedDataset, name: str, value: str, untrained: set[str], target: PreparedDataset
) -> list[str]:
    """Values that the run was trained on and the dataset has, the unknown one left out."""
    names = [vocabulary.name for vocabulary in source.manifest.scenarios]
    if name not in names:
        raise DataError(f"{run} knows no scenario '{name}'. Its scenarios: {', '.join(names) or 'none'}.")
    if name not in [vocabulary.name for vocabulary in target.manifest.scenarios]:
        raise DataError(f"{target.folder} has no scenario '{name}'; its dataset.yaml must name that column.")
    known = [one for one in source.manifest.scenario(name).values if one not in untrained]
    if value in known:
        raise DataError(f"{run} was trained with {name}={value} already: it is not new. Values: {', '.join(known)}.")
    values = target.manifest.scenario(name).values
    if value not in values:
        raise DataError(
            f"{target.folder} has no {name}={value} in the training period, only {', '.join(values) or 'nothing'}. "
            "Prepare tables that hold the new value's events."
        )
    if not (shared := [one for one in known if one in values]):
        raise DataError(
            f"{run} and {target.folder} have no value of {name} in common, so there is nothing to begin with."
        )
    return shared


def ids_lost(source: PreparedDataset, target: PreparedDataset) -> int:
    """How many titles of both datasets were watched in the training period of the first alone."""
    watched = source.titles["title_id"][~source.titles["cold"].to_numpy(bool)]
    idle = target.titles["title_id"][target.titles["cold"].to_numpy(bool)]
    return len(set(watched) & set(idle))


def _untrained(
    source: PreparedDataset, target: PreparedDataset, before: dict[str, list[str]], trained: tuple[str, str]
) -> dict[str, list[str]]:
    """Scenario values that stand in `target`'s vocabulary and that nothing was trained for: a later `m5 adapt` may."""
    found = {}
    for old, new in zip(source.manifest.scenarios, target.manifest.scenarios, strict=True):
        known = set(old.values) - set(before.get(new.name, ()))
        missing = [one for one in new.values if one not in known and (new.name, one) != trained]
        if missing:
            found[new.name] = missing
    return found


class TrainedRows(nn.Module):
    """Tables of which a few rows are trained. The others are frozen, and nobody keeps a gradient or moments for them.

    Args:
        frozen: the tables, unsharded.
        rows: first row and number of rows, by table; those of other tables are all frozen.
    """

    MARK = ".trained."  # in the names of the rows' weights, before TABLE:FIRST

    def __init__(self, frozen: EmbeddingCollection, rows: dict[str, tuple[int, int]]):
        super().__init__()
        self.frozen = frozen.requires_grad_(False)
        self.key = {config.name: config.feature_names[0] for config in frozen.embedding_configs()}
        self.trained = nn.ParameterDict()
        for table, (first, count) in rows.items():
            own_RX = frozen.embeddings[table].weight[first : first + count].clone()
            self.trained[f"{table}:{first}"] = nn.Parameter(own_RX)

    def embedding_configs(self) -> list[Any]:
        """As of the frozen tables."""
        return self.frozen.embedding_configs()

    def forward(self, asked: KeyedJaggedTensor) -> dict[str, JaggedTensor]:
        """As of the frozen tables, with the trained rows in place of theirs."""
        found = dict(self.frozen(asked))
        for name, own_RX in self.trained.items():
            table, first = name.split(":")
            key = self.key[table]
            place_T = asked[key].values() - int(first)
            is_own_T1 = ((place_T >= 0) & (place_T < len(own_RX))).unsqueeze(-1)
            own_TX = nn.functional.embedding(place_T.clamp(0, len(own_RX) - 1), own_RX)
            values_TX = torch.where(is_own_T1, own_TX, found[key].values())
            found[key] = JaggedTensor(values=values_TX, lengths=found[key].lengths())
        return found


class Adapter(Trainer):
    """`m5 train`'s loop over the requests of one scenario value, for the rows of that value.

    Args:
        config, place, beat: as of `Trainer`.
        start: what training begins with.
    """

    def __init__(self, config: RunConfig, place: World, beat: Beat = lambda where: None, *, start: Start):
        self.start, self.within, self.origin = start, (start.name, start.value), start.origin
        super().__init__(config, place, beat)
        self.identity |= {"adapted": start.origin["adapted"]["weights_sha256"], "to": "=".join(self.within)}
        split = np.asarray(self.dataset.event_array("split"))
        self.wanted = in_scenario(self.dataset, *self.within) & (split == TRAIN)
        select_requests(self.dataset, "valid", eligibility=None, within=self.within)  # raises where there are none

    def build(self) -> nn.Module:
        """The model with its loss, on this process, all frozen but the new value's rows."""
        start, model = self.start, build_model(self.dataset, self.config)
        model.load_state_dict(start.state)
        whole = training_model(self.dataset, self.config, model, self.place.device).requires_grad_(False)
        vocabulary = self.dataset.manifest.scenario(start.name)
        value, table = vocabulary.index(start.value), f"scenario_{start.name}"
        model.register_module("tables", TrainedRows(model.tables, {table: (value, 1)}))
        experts = {}
        for key in expert_keys(start.state, start.name):
            rows = len(start.state[key]) // vocabulary.size
            experts[key.split(".")[-2]] = (value * rows, rows)
        assert model.experts is not None
        model.register_module("experts", TrainedRows(model.experts, experts))
        return whole.to(self.place.device)

    def weights(self, prefix: str = "model.") -> State:
        """As of `Trainer`, the trained rows back in their tables."""
        return merged(super().weights(prefix))

    def before_the_first_step(self, position: Position, log: TrainingLog) -> None:
        """The blend is validated like every epoch's weights: it is kept where training does not make it better."""
        if not position.step:
            self.validate_and_keep(position, log)
            assert self.wanted is not None
            position.finished = not self.wanted.any()


def merged(state: State) -> State:
    """Weights by the names of a model without `TrainedRows`, its rows back in their tables."""
    found = {key.replace(".frozen.", "."): value for key, value in state.items() if TrainedRows.MARK not in key}
    for key, own_RX in state.items():
        if TrainedRows.MARK not in key:
            continue
        collection, _, of_table = key.partition(TrainedRows.MARK)
        table, first = of_table.split(":")
        whole = f"{collection}.embeddings.{table}.weight"
        found[whole] = torch.cat([found[whole][: int(first)], own_RX, found[whole][int(first) + len(own_RX) :]])
    return found
