"""Run configuration: frozen pydantic models; presets are the YAML files in `m5/configs`.

`load_config` joins preset and dotted overrides (`model.width=128`), refuses unknown keys, and validates once.
"""

from __future__ import annotations

import copy
import difflib
from collections.abc import Mapping
from pathlib import Path
from typing import Any, Literal

import yaml
from pydantic import BaseModel, ConfigDict, Field, ValidationError, model_validator

PRESETS = Path(__file__).parent / "configs"
SECTIONS = ("model", "candidates", "sequences", "optimizer", "sharding", "training")
GIVEN_ELSEWHERE = ("preset", "data", "out")  # by --preset, --data and --out


class ConfigError(ValueError):
    """A user's mistake in a preset or an override; the command line prints it and exits with 2."""


class _Section(BaseModel):
    model_config = ConfigDict(frozen=True, extra="forbid")


class ModelConfig(_Section):
    width: int = Field(64, ge=4, multiple_of=4, description="D: width of embeddings, interests and user vectors.")
    blocks: int = Field(2, ge=0, description="Transformer blocks of the ID branch.")
    heads: int = Field(2, ge=1, description="Attention heads; must divide the width into even parts.")
    dropout: float = Field(0.2, ge=0, lt=1, description="On title embeddings, in the blocks and before the mixture.")
    attention: Literal["causal", "bidirectional"] = Field(
        "causal", description="causal: every position is a target; bidirectional: only the last one (the paper)."
    )
    content: tuple[Literal["graph", "text", "image"], ...] = Field(
        ("graph",), description="Content arrays joined into the CG branch's vectors; empty = no CG branch."
    )
    subsidiary: bool = Field(True, description="Decorate behaviours with watch intensity and age.")
    categories: bool = Field(True, description="One interest per behaviour category; false: a single interest.")
    mixing: Literal["smoe", "mmoe", "mlp"] = Field("smoe", description="mmoe and mlp (scenario-blind) are controls.")
    shared_experts: int = Field(2, ge=1, description="Experts that every request uses.")
    expert_hidden: int = Field(128, ge=4, multiple_of=4, description="H: hidden width of one expert.")
    mixing_width: int = Field(128, ge=4, description="I: width in which experts and gate read the crossed features.")
    score: Literal["cosine", "dot"] = Field("dot", description="Inner product of unit vectors or of plain ones.")
    id_dropout: float = Field(0.05, ge=0, lt=1, description="Share of titles that lose their ID embedding in a step.")
    scenario_dropout: float = Field(0.05, ge=0, lt=1, description="Share of scenario values forgotten in training.")
    mlm_weight: float = Field(0.0, ge=0, description="lambda of the masked-language-model loss (bidirectional only).")
    mlm_share: float = Field(0.15, ge=0, lt=1, description="Share of behaviours masked when lambda > 0.")

    @model_validator(mode="after")
    def _check(self) -> ModelConfig:
        if self.width % (2 * self.heads):
            raise ValueError(f"model.width={self.width} must be a multiple of 2 x model.heads={self.heads}")
        if self.mlm_weight and self.attention == "causal":
            raise ValueError(
                "model.mlm_weight needs model.attention=bidirectional; causal training predicts every title"
            )
        if self.mlm_weight and not self.blocks:
            raise ValueError("model.mlm_weight needs at least one of model.blocks")
        return self


class CandidatesConfig(_Section):
    kind: Literal["full", "sampled", "in-batch"] = Field(
        "full",
        description="Softmax over the whole catalogue, a sample of it, or the targets of the batch of all ranks.",
    )
    count: int = Field(1024, ge=1, description="Sampled negatives, shared by the batch.")
    precision: Literal["auto", "float32", "bfloat16"] = Field(
        "auto", description="Of the softmax's three matrix products. auto: bfloat16 where the hardware multiplies it."
    )
    power: float = Field(0.75, ge=0, le=1, description="Sampling probability is (training count + 1) to this power.")


class DataConfig(_Section):
    history: int = Field(100, ge=1, description="Most recent behaviours that the model reads.")
    requests: int = Field(100, ge=1, description="Targets per training sequence; less than history overlaps sequences.")
    sequences: int = Field(64, ge=1, description="Sequences per batch, over all ranks.")
    sequences_per_epoch: int | None = Field(None, ge=1, description="Random part of the sequences in an epoch.")
    prefetch: int = Field(4, ge=1, description="Batches prepared ahead by a background thread.")


class OptimizerConfig(_Section):
    lr: float = Field(2e-3, gt=0, description="AdamW, dense part.")
    table_lr: float = Field(0.5, gt=0, description="Row-wise Adagrad of the sharded tables, fused into backward.")
    expert_lr: float = Field(0.02, gt=0, description="Row-wise Adagrad of the scenario-owned experts.")
    eps: float = Field(
        1e-6,
        gt=0,
        description="AdamW's. At its usual 1e-8 the rounding of a gradient near 0 becomes a full step, and runs that "
        "differ in rounding alone, as on 1 and 2 ranks, drift apart.",
    )
    weight_decay: float = Field(0.01, ge=0, description="AdamW's decoupled decay, matrices only.")
    warmup_steps: int = Field(100, ge=0, description="Linear warm-up of all learning rates.")
    schedule: Literal["constant", "cosine"] = Field("cosine", description="After warm-up, over the planned steps.")
    final_lr: float = Field(0.05, ge=0, le=1, description="Cosine ends at this share of the learning rates.")
    clip: float = Field(
        1.0,
        gt=0,
        description="Largest gradient norm of the dense part. Tables step inside backward, before any norm is known.",
    )
    accumulation: int = Field(
        1, ge=1, description="Only 1: tables step in every backward, so gradients of several cannot be added up first."
    )

    @model_validator(mode="after")
    def _refuse_accumulation(self) -> OptimizerConfig:
        if self.accumulation > 1:
            raise ValueError(
                "optimizer.accumulation above 1 cannot be had: the optimizer of the sharded tables steps inside every "
                "backward, so gradients of several batches would meet changed tables. Raise sequences.sequences "
                "instead, and spread it over more ranks if memory ends"
            )
        return self


ShardingType = Literal["row_wise", "table_wise", "column_wise"]


class ShardingConfig(_Section):
    default: Literal["auto", "row_wise", "table_wise", "column_wise"] = Field(
        "auto",
        description="How tables are cut. auto: not at all on one rank; row-wise on CPU; on CUDA TorchRec's planner "
        "chooses per table.",
    )
    tables: dict[str, ShardingType] = Field(
        {},
        description="Other choices by table, e.g. {title: row_wise}; `m5 plan` lists the tables. column_wise keeps a "
        "sum of squares for every part of a row: training then depends on the cut, and a checkpoint fits no other.",
    )


class TrainingConfig(_Section):
    epochs: int = Field(20, ge=1, description="Passes over the training targets.")
    max_minutes: float | None = Field(None, gt=0, description="Stop after this long; the schedule follows the clock.")
    evaluate_every: int = Field(1, ge=1, description="Epochs between validations.")
    patience: int = Field(5, ge=1, description="Validations without a better metric before stopping.")
    metric: str = Field(
        "ndcg@10",
        pattern=r"^(hr|ndcg|mrr|debiased_hr)@(10|50|200)$",
        description="Validation metric that chooses the checkpoint, e.g. hr@200.",
    )
    validation_targets: int | None = Field(10_000, ge=1, description="Random part of the validation targets, fixed.")
    filter_seen: bool = Field(True, description="Whether evaluation leaves out titles that the viewer has watched.")
    threads: int | None = Field(
        None, ge=1, description="CPU threads per rank; none: OMP_NUM_THREADS, or all cores / local ranks."
    )
    device: Literal["auto", "cpu", "cuda"] = Field("auto", description="auto: CUDA where there is one.")
    autocast: bool = Field(False, description="bfloat16 for the dense part; the loss stays in float32.")
    compile: bool = Field(False, description="torch.compile for the interest extraction; shapes are dynamic.")
    pipeline: bool | Literal["auto"] = Field(
        "auto", description="Copy and distribute the next batches during a step. auto: on CUDA."
    )
    checkpoint_minutes: float = Field(10.0, gt=0, description="Between checkpoints of the whole training.")
    checkpoint_every: int | None = Field(None, ge=1, description="Steps between them, instead of minutes.")
    keep_checkpoints: int = Field(2, ge=1, description="How many of them to keep.")
    stall_seconds: float | None = Field(
        600.0, gt=0, description="Without progress of any rank for this long, report all stacks and end. none: never."
    )
    log_every: int = Field(20, ge=1, description="Steps between lines of metrics.jsonl.")


class RunConfig(_Section):
    """Everything a run depends on; written to RUN/config.yaml."""

    preset: str = Field("default", description="Where the settings started from.")
    name: str = Field("m5", description="Row name in evaluation reports.")
    data: Path
    out: Path
    seed: int = 0
    model: ModelConfig = ModelConfig()
    candidates: CandidatesConfig = CandidatesConfig()
    sequences: DataConfig = DataConfig()
    optimizer: OptimizerConfig = OptimizerConfig()
    sharding: ShardingConfig = ShardingConfig()
    training: TrainingConfig = TrainingConfig()

    @model_validator(mode="after")
    def _check(self) -> RunConfig:
        if self.model.attention == "bidirectional" and self.sequences.requests != 1:
            raise ValueError("model.attention=bidirectional sees the future, so it needs sequences.requests=1")
        if self.sequences.requests > self.sequences.history:
            raise ValueError("sequences.requests may be at most sequences.history")
        self._refuse_settings_without_effect()
        return self

    def _refuse_settings_without_effect(self) -> None:
        """A setting that was changed from its default, and that another setting switches off, is a mistake."""
        smoe = self.model.mixing == "smoe"
        effective = {
            ("candidates", "count"): (self.candidates.kind == "sampled", "candidates.kind=sampled"),
            ("candidates", "power"): (self.candidates.kind == "sampled", "candidates.kind=sampled"),
            ("model", "mlm_share"): (self.model.mlm_weight > 0, "model.mlm_weight above 0"),
            ("optimizer", "expert_lr"): (smoe, "model.mixing=smoe"),
            ("optimizer", "final_lr"): (self.optimizer.schedule == "cosine", "optimizer.schedule=cosine"),
        }
        for (section, name), (has_effect, condition) in effective.items():
            part = getattr(self, section)
            default = type(part).model_fields[name].default
            if not has_effect and getattr(part, name) != default:
                raise ValueError(f"{section}.{name} has an effect only with {condition}")

    def write(self, path: Path) -> None:
        path.write_text(yaml.safe_dump(self.model_dump(mode="json"), sort_keys=False))

    @classmethod
    def read(cls, path: Path) -> RunConfig:
        if not path.is_file():
            raise ConfigError(f"{path} does not exist: {path.parent} is not a run of `m5 train`.")
        return validated(read_yaml(path), str(path))


def read_yaml(path: Path) -> dict[str, Any]:
    """A YAML file that is a mapping of settings.

    Raises:
        ConfigError: it is not.
    """
    try:
        settings = yaml.safe_load(path.read_text()) or {}
    except (yaml.YAMLError, UnicodeDecodeError) as error:
        raise ConfigError(f"{path} is not valid YAML: {' '.join(str(error).split())}.") from None
    if not isinstance(settings, dict) or not all(isinstance(settings.get(name, {}), dict) for name in SECTIONS):
        raise ConfigError(f"{path}: expected settings by section, e.g. `model:` and below it `width: 128`.")
    return settings


def problems_of(error: ValidationError, whole: str) -> str:
    """What is wrong, field by field; `whole` names the thing where no single field is to blame."""
    return "; ".join(f"{'.'.join(map(str, item['loc'])) or whole}: {item['msg']}" for item in error.errors())


def validated(settings: dict[str, Any], where: str) -> RunConfig:
    """Settings by section as a configuration; a ConfigError that begins with `where` if they are none."""
    try:
        return RunConfig.model_validate(settings)
    except ValidationError as error:
        raise ConfigError(f"{where}: {problems_of(error, 'run')}.") from None


def setting_names(section: type[BaseModel] = RunConfig, prefix: str = "") -> list[str]:
    """Dotted names of every setting that an override may change, e.g. `model.width`."""
    names: list[str] = []
    for name, field in section.model_fields.items():
        kind = field.annotation
        if isinstance(kind, type) and issubclass(kind, BaseModel):
            names += setting_names(kind, f"{prefix}{name}.")
        elif prefix + name not in GIVEN_ELSEWHERE:
            names.append(prefix + name)
    return names


def parse_override(override: str) -> tuple[str, Any]:
    """`key.sub=value` as a setting's name and its value, which is read as YAML.

    Raises:
        ConfigError: another form, no setting of that name, or no YAML.
    """
    key, separator, text = override.partition("=")
    if not separator:
        raise ConfigError(f"override '{override}' is not of the form key.sub=value, e.g. model.width=128.")
    require_setting(key, f"override '{override}'")
    try:
        return key, yaml.safe_load(text)
    except yaml.YAMLError:
        raise ConfigError(f"override '{override}': '{text}' is not a value, e.g. 128, true, word or [a, b].") from None


def require_setting(key: str, where: str) -> None:
    """Raises ConfigError, with a suggestion, where there is no setting of that dotted name."""
    names = setting_names()
    if key not in names:
        close = difflib.get_close_matches(key, names, n=3, cutoff=0.5)
        hint = f" Did you mean {' or '.join(close)}?" if close else ""
        raise ConfigError(f"{where}: there is no setting '{key}'.{hint}")


def preset_settings(preset: str) -> dict[str, Any]:
    """What a preset (a name in m5/configs or a YAML file) sets, by section.

    Raises:
        ConfigError: there is no such preset, or it is none.
    """
    path = Path(preset) if preset.endswith((".yaml", ".yml")) else PRESETS / f"{preset}.yaml"
    if not path.is_file():
        known = ", ".join(sorted(file.stem for file in PRESETS.glob("*.yaml")))
        raise ConfigError(f"there is no preset '{preset}'. Presets: {known}; or give a YAML file.")
    settings = read_yaml(path)
    if stated := [name for name in ("data", "out") if name in settings]:
        raise ConfigError(f"{path} sets {' and '.join(stated)}; give --data and --out instead.")
    return {"preset": path.stem} | settings


def changed(settings: dict[str, Any], changes: Mapping[str, Any]) -> dict[str, Any]:
    """Settings by section, with some of them, by dotted name, replaced; the original stays as it is."""
    result = copy.deepcopy(settings)
    for key, value in changes.items():
        *sections, last = key.split(".")
        inner = result
        for section in sections:
            inner = inner.setdefault(section, {})
        inner[last] = value
    return result


def load_config(preset: str, overrides: list[str], data: Path, out: Path) -> RunConfig:
    """Preset (a name in m5/configs or a YAML file) with overrides applied.

    Raises:
        ConfigError: unknown preset, unknown key, or a value that does not fit.
    """
    settings = preset_settings(preset) | {"data": str(data), "out": str(out)}
    settings = changed(settings, dict(parse_override(override) for override in overrides))
    return validated(settings, " ".join([f"preset {preset}", *overrides]))
