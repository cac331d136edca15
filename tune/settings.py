"""What a search is asked for: the YAML file of `--space`, joined with a preset and checked as a whole."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

from pydantic import BaseModel, ConfigDict, Field, ValidationError, model_validator

from m5.config import (
    ConfigError,
    RunConfig,
    changed,
    parse_override,
    preset_settings,
    problems_of,
    read_yaml,
    require_setting,
    setting_names,
    validated,
)
from tune.space import Refused, Space, check_space, read_space


class _Section(BaseModel):
    model_config = ConfigDict(frozen=True, extra="forbid")


class SearchSettings(_Section):
    """How the space is searched."""

    trials: int = Field(20, ge=1, description="Settings to try; the first is the preset as it is.")
    sampler: Literal["tpe", "random"] = Field(
        "tpe", description="Optuna's tree-structured Parzen estimator, or chance."
    )
    random_trials: int = Field(6, ge=1, description="Drawn by chance before TPE goes by what it has seen.")
    scheduler: Literal["auto", "asha", "median", "none"] = Field(
        "auto", description="What ends weak trials early. auto: ASHA; none where several measures are objectives."
    )
    grace_epochs: int = Field(1, ge=1, description="Epochs before a trial may be ended early.")
    reduction: int = Field(3, ge=2, description="ASHA: of every so many trials at a rung one goes on.")
    retries: int = Field(1, ge=0, description="Further attempts of a trial that failed.")
    seeds: int = Field(3, ge=0, description="Of the winner's and the preset's trainings in the end. 0: none.")
    final: dict[str, Any] = Field(
        {}, description="Settings by dotted name that those trainings have instead, e.g. more epochs or all targets."
    )
    concurrent: int | None = Field(None, ge=1, description="Trials at a time; none: as many as the resources allow.")
    max_minutes: float | None = Field(
        None, gt=0, description="Start no trial after this long, counted anew after --resume."
    )


class ObjectiveSettings(_Section):
    """What the best trial is. Quality is the preset's training.metric, on validation targets."""

    kind: Literal["single", "constrained", "pareto"] = Field(
        "single",
        description="The best quality; the best of those under which no scenario loses more than the tolerance against "
        "a baseline; or the trials that no other one beats in all measures.",
    )
    tolerance: float = Field(0.02, ge=0, lt=1, description="Share of its metric that a scenario may lose.")
    baseline: Path | None = Field(None, description="Run to compare with; none: the preset, trained first.")
    # A validation tells a scenario's metric from 100 targets on (m5.metrics.SMALL_SLICE).
    smallest_scenario: int = Field(200, ge=100, description="Validation targets below which a scenario is not judged.")
    measures: tuple[Literal["quality", "targets_per_second", "memory"], ...] = Field(
        ("quality", "targets_per_second", "memory"), description="Of kind pareto; memory is to be small."
    )

    @model_validator(mode="after")
    def _check(self) -> ObjectiveSettings:
        for name in ("tolerance", "baseline", "smallest_scenario"):
            if self.kind != "constrained" and name in self.model_fields_set:
                raise ValueError(f"objective.{name} has an effect only with objective.kind=constrained")
        if self.kind != "pareto" and "measures" in self.model_fields_set:
            raise ValueError("objective.measures has an effect only with objective.kind=pareto")
        if len(set(self.measures)) < len(self.measures) or len(self.measures) < 2:
            raise ValueError("objective.measures must be two or three, each once")
        return self


class TrialSettings(_Section):
    """What one trial gets."""

    ranks: int = Field(1, ge=1, description="Processes; more than one through Ray Train.")
    cpus: int = Field(1, ge=1, description="Cores of each rank, and its threads.")
    gpus: float = Field(0, ge=0, le=1, description="Of each rank; 0.25: four small trials share one.")
    memory_gb: float | None = Field(
        None, gt=0, description="A rank that takes more of the host's memory ends the trial. none: no limit of its own."
    )

    @model_validator(mode="after")
    def _check(self) -> TrialSettings:
        if self.ranks > 1 and 0 < self.gpus < 1:
            raise ValueError(
                "trial.gpus must be 0 or 1 with trial.ranks above 1: ranks of one world cannot share a GPU"
            )
        return self


class SearchConfig(_Section):
    """The file of `--space`."""

    space: dict[str, Any] = Field(description="What is varied; see tune.space.")
    settings: dict[str, Any] = Field({}, description="Settings by dotted name that all trials have.")
    search: SearchSettings = SearchSettings()
    objective: ObjectiveSettings = ObjectiveSettings()
    trial: TrialSettings = TrialSettings()

    @model_validator(mode="after")
    def _check(self) -> SearchConfig:
        search, pareto = self.search, self.objective.kind == "pareto"
        if pareto and search.scheduler in ("asha", "median"):
            raise ValueError(
                f"search.scheduler={search.scheduler} ends trials by quality alone, so it has no place beside "
                "objective.kind=pareto; leave it at auto"
            )
        effective = {
            "random_trials": (search.sampler == "tpe", "search.sampler=tpe"),
            "grace_epochs": (self.scheduler != "none", "a search.scheduler"),
            "reduction": (self.scheduler == "asha", "search.scheduler=asha"),
        }
        for name, (has_effect, condition) in effective.items():
            if not has_effect and name in search.model_fields_set:
                raise ValueError(f"search.{name} has an effect only with {condition}")
        return self

    @property
    def scheduler(self) -> Literal["asha", "median", "none"]:
        if self.search.scheduler != "auto":
            return self.search.scheduler
        return "none" if self.objective.kind == "pareto" else "asha"


@dataclass(frozen=True)
class Plan:
    """A search that has been checked.

    Attributes:
        config: the file, with overrides.
        space: what is varied.
        fixed: settings of the preset and those fixed for all trials, by section.
        base: with those that `trial` decides, too; data and out are placeholders.
        where: the file, for messages.
        refused: combinations of the space that are left out.
    """

    config: SearchConfig
    space: Space
    fixed: dict[str, Any]
    base: dict[str, Any]
    where: str
    refused: Refused | None

    def run(self, values: dict[str, Any], *, seed: int, data: Path | str, out: Path) -> RunConfig:
        """One trial's configuration.

        Raises:
            ConfigError: values that do not go together.
        """
        settings = changed(self.base, values | {"data": str(data), "out": str(out), "seed": seed})
        return validated(settings, ", ".join(f"{name}={value}" for name, value in values.items()) or "the preset")

    @property
    def preset(self) -> RunConfig:
        return validated(self.base, "the preset")

    def identity(self) -> dict[str, Any]:
        """What must be the same when a search is resumed; how long and with what means it goes on may change."""
        objective = self.config.objective.model_dump(mode="json")
        if self.config.objective.baseline is not None:
            objective["baseline"] = str(self.config.objective.baseline.resolve())
        return {
            "settings": self.fixed,
            "space": self.config.space,
            "sampler": self.config.search.sampler,
            "objective": objective,
            "ranks": self.config.trial.ranks,
            "gpus": self.config.trial.gpus > 0,
        }


OWN = tuple(name for name in SearchConfig.model_fields if name not in ("space", "settings"))
# Decided by `trial`, so that they cannot be set for all trials either.
DECIDED = {"training.threads": "trial.cpus", "training.device": "trial.gpus"}


def read_plan(preset: str, space: Path, overrides: list[str]) -> Plan:
    """Read and check everything that can be checked without the data.

    Raises:
        ConfigError: the user's mistake, in the file, the preset or an override.
    """
    if not space.is_file():
        raise ConfigError(
            f"{space} does not exist; give a YAML file that says what to vary, e.g. tune/spaces/demo.yaml."
        )
    entries = read_yaml(space)
    own = [override for override in overrides if override.split(".")[0] in OWN]
    for override in own:
        _set_own(entries, override)
    try:
        config = SearchConfig.model_validate(entries)
    except ValidationError as error:
        raise ConfigError(f"{space}: {problems_of(error, 'search')}.") from None
    fixed = dict(parse_override(override) for override in overrides if override not in own)
    for where, names in (("settings", config.settings), ("search.final", config.search.final)):
        for name in names:
            require_setting(name, f"{space}: {where}")
            if where == "search.final" and name in config.space:
                raise ConfigError(f"{space}: search.final sets {name}, which the winner is to have as it was found.")
    fixed = config.settings | fixed
    for name in fixed:
        if name in config.space:
            raise ConfigError(f"{name} is in the space of {space} and fixed for all trials: take one of them away.")
    for name in (*fixed, *config.search.final):
        if name in DECIDED:
            raise ConfigError(f"{name} is decided by {DECIDED[name]}; set that.")
    whole = changed(preset_settings(preset), fixed)
    decided = {"training.threads": config.trial.cpus, "training.device": "cuda" if config.trial.gpus else "cpu"}
    base = changed(whole, decided) | {"data": "data", "out": "out"}
    validated(base, f"preset {preset} with {', '.join(fixed) or 'no changes'}")
    validated(changed(base, config.search.final), f"preset {preset} with search.final")
    varied = read_space(config.space, str(space))
    return Plan(config, varied, whole, base, str(space), check_space(varied, base, str(space)))


def _set_own(entries: dict[str, Any], override: str) -> None:
    """Apply e.g. `search.trials=40` to the file's entries."""
    import yaml

    key, separator, text = override.partition("=")
    section, _, name = key.partition(".")
    known = setting_names(SearchConfig)
    if not separator or key not in known:
        there = ", ".join(one for one in known if one.startswith(f"{section}."))
        raise ConfigError(f"override '{override}': there is no '{key}'; {section} has {there}.")
    if not isinstance(entries.setdefault(section, {}), dict):
        raise ConfigError(f"override '{override}': `{section}` of the file holds no settings.")
    try:
        entries[section][name] = yaml.safe_load(text)
    except yaml.YAMLError:
        raise ConfigError(f"override '{override}': '{text}' is not a value, e.g. 128, true, word or [a, b].") from None
