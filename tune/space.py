"""What a search may vary: a mapping of settings' dotted names to how their values are drawn.

    space:
      optimizer.lr: {loguniform: [5.0e-4, 1.0e-2]}
      model.dropout: {uniform: [0.0, 0.5], step: 0.05}
      model.mixing: {choice: [smoe, mlp]}
      optimizer.expert_lr: {loguniform: [0.002, 0.2], when: {model.mixing: smoe}}

`uniform` and `loguniform` draw whole numbers where the setting is one. `when` makes a setting part of the space only
where other settings of it have certain values; elsewhere it stays as the preset has it. Everything is checked against
the configuration's own model before anything is started, without torch and Ray, so that a mistake shows in a second.
"""

from __future__ import annotations

import itertools
import json
import math
import random
import types
import typing
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from typing import Any, Protocol

from pydantic import BaseModel, ValidationError

from m5.config import ConfigError, RunConfig, changed, require_setting, validated

RANGES = ("uniform", "loguniform")
COMBINATIONS = 2_000  # looked at when a space is checked
AT_AN_END = 0.2  # share of these draws that are an end of a range
# Not for a search: where a run lies, how trials are told apart, and what the search itself sets.
RESERVED = {
    "name": "every trial has one name",
    "preset": "--preset gives it",
    "data": "--data gives it",
    "out": "--out gives it",
    "seed": "trials share one, and the winner is retrained on others (search.seeds)",
    "training.metric": "trials are compared by it",
    "training.device": "trial.gpus decides it",
    "training.threads": "trial.cpus decides it",
    "training.validation_targets": "trials are compared on the same targets",
    "training.filter_seen": "trials are compared on the same candidates",
}


class Trial(Protocol):
    """What draws values: Optuna's Trial, or `Dice`."""

    def suggest_categorical(self, name: str, choices: Any) -> Any: ...
    def suggest_float(self, name: str, low: float, high: float, *, step: float | None, log: bool) -> float: ...
    def suggest_int(self, name: str, low: int, high: int, *, step: int, log: bool) -> int: ...


@dataclass(frozen=True)
class Parameter:
    """One setting of a space.

    Attributes:
        name: dotted, e.g. "optimizer.lr".
        choices: the values to choose from, or empty.
        low, high: ends of the range, both included, where there are no choices.
        step: distance of neighbouring values; None: any value of the range (integers: 1).
        log: whether the logarithm is uniform.
        integer: whether values are whole numbers.
        when: the values of other settings of the space under which this one is part of it.
    """

    name: str
    choices: tuple[Any, ...] = ()
    low: float = 0.0
    high: float = 0.0
    step: float | None = None
    log: bool = False
    integer: bool = False
    when: Mapping[str, tuple[Any, ...]] = field(default_factory=dict)

    def labels(self) -> tuple[Any, ...]:
        """Choices as Optuna takes them: what is no scalar as JSON."""
        return tuple(
            value if value is None or isinstance(value, bool | int | float | str) else json.dumps(value)
            for value in self.choices
        )

    def draw(self, trial: Trial) -> Any:
        if self.choices:
            labels = self.labels()
            return self.choices[labels.index(trial.suggest_categorical(self.name, labels))]
        if self.integer:
            step = 1 if self.step is None else int(self.step)
            return trial.suggest_int(self.name, int(self.low), int(self.high), step=step, log=self.log)
        value = trial.suggest_float(self.name, self.low, self.high, step=self.step, log=self.log)
        return value if self.step is None else round(value, 12)  # three steps of 0.05 are 0.15000000000000002

    def ends(self) -> tuple[Any, ...]:
        """The choices, or both ends of the range."""
        return self.choices or ((int(self.low), int(self.high)) if self.integer else (self.low, self.high))

    def holds(self, value: Any) -> bool:
        """Whether a value can be drawn."""
        if self.choices:
            return value in self.choices
        rounding = 1e-9 * (self.high - self.low)  # six steps of 0.05 are a little more than 0.3
        if not isinstance(value, int | float) or not self.low - rounding <= value <= self.high + rounding:
            return False
        return self.step is None or math.isclose(math.remainder(value - self.low, self.step), 0, abs_tol=1e-9)

    def describe(self) -> str:
        drawn = (
            "one of " + ", ".join(map(str, self.labels()))
            if self.choices
            else f"{'log' if self.log else ''}uniform from {self.low:g} to {self.high:g}"
            + (f" by {self.step:g}" if self.step else "")
        )
        conditions = " and ".join(f"{name} is {' or '.join(map(str, values))}" for name, values in self.when.items())
        return f"{drawn}{f', when {conditions}' if conditions else ''}"


class Dice:
    """Draws for the check of a space: often an end of a range, so that extremes meet."""

    def __init__(self, seed: int = 0):
        self.random = random.Random(seed)

    def suggest_categorical(self, name: str, choices: Any) -> Any:
        return self.random.choice(choices)

    def suggest_int(self, name: str, low: int, high: int, *, step: int, log: bool) -> int:
        if self.random.random() < AT_AN_END:
            return self.random.choice((low, high - (high - low) % step))
        return self.random.randrange(low, high + 1, step)

    def suggest_float(self, name: str, low: float, high: float, *, step: float | None, log: bool) -> float:
        if self.random.random() < AT_AN_END:
            return self.random.choice((low, high))
        if step is not None:
            return low + step * self.random.randint(0, int((high - low) / step + 1e-9))
        return math.exp(self.random.uniform(math.log(low), math.log(high))) if log else self.random.uniform(low, high)


class Space:
    """The settings that a search varies, in an order in which conditions come first.

    Args:
        parameters: by name.

    Raises:
        ConfigError: a condition is on no choice of the space, or conditions go round in a circle.
    """

    def __init__(self, parameters: Mapping[str, Parameter]):
        for parameter in parameters.values():
            for name, values in parameter.when.items():
                parent = parameters.get(name)
                if parent is None or not parent.choices:
                    raise ConfigError(f"{parameter.name}: `when` needs a `choice` of the space; {name} is none.")
                if strange := [value for value in values if value not in parent.choices]:
                    raise ConfigError(f"{parameter.name}: `when` {name} is {strange[0]}, which is none of its choices.")
        self.parameters: dict[str, Parameter] = {}
        waiting = dict(parameters)
        while waiting:
            ready = [name for name, one in waiting.items() if all(parent in self.parameters for parent in one.when)]
            if not ready:
                raise ConfigError(f"the conditions of {', '.join(waiting)} go round in a circle.")
            self.parameters |= {name: waiting.pop(name) for name in ready}

    def active(self, values: Mapping[str, Any]) -> Iterator[Parameter]:
        """Parameters whose conditions hold; reads `values` as it goes, so the caller may fill it meanwhile."""
        for parameter in self.parameters.values():
            if all(name in values and values[name] in allowed for name, allowed in parameter.when.items()):
                yield parameter

    def draw(self, trial: Trial) -> dict[str, Any]:
        """Values by name, of the parameters whose conditions hold."""
        values: dict[str, Any] = {}
        for parameter in self.active(values):
            values[parameter.name] = parameter.draw(trial)
        return values

    def of(self, settings: Mapping[str, Any]) -> dict[str, Any] | None:
        """The values that settings (by dotted name) have in this space; None where they lie outside."""
        values: dict[str, Any] = {}
        for parameter in self.active(values):
            value = settings[parameter.name]
            if not parameter.holds(value):
                return None
            values[parameter.name] = value
        return values

    def size(self) -> int | None:
        """How many combinations there are where no setting has others' conditions or a range; otherwise None."""
        if any(parameter.when or not parameter.choices for parameter in self.parameters.values()):
            return None
        return math.prod(len(parameter.choices) for parameter in self.parameters.values())

    def combinations(self) -> Iterator[dict[str, Any]]:
        """All combinations where there are few, else some of them, ends of ranges among them."""
        size = self.size()
        if size is not None and size <= COMBINATIONS:
            choices = [parameter.choices for parameter in self.parameters.values()]
            yield from (dict(zip(self.parameters, values, strict=True)) for values in itertools.product(*choices))
            return
        dice = Dice()
        yield from (self.draw(dice) for _ in range(COMBINATIONS))


@dataclass(frozen=True)
class Refused:
    """Combinations of a space that the configuration refuses; a search leaves them out.

    Attributes:
        share: of those that were looked at.
        example: what was said of one.
    """

    share: float
    example: str


def read_space(entries: Any, where: str) -> Space:
    """The space in a YAML file.

    Raises:
        ConfigError: no mapping, an unknown setting or key, a range that is none, a wrong type.
    """
    if not isinstance(entries, dict) or not entries:
        raise ConfigError(f"{where}: `space` must map settings to how they are drawn, e.g. {_EXAMPLE}.")
    parameters = {}
    for name, entry in entries.items():
        place = f"{where}: {name}"
        require_setting(str(name), place)
        if (reason := RESERVED.get(name)) is not None:
            raise ConfigError(f"{place} is not searched: {reason}.")
        parameters[name] = _parameter(name, entry, place)
    try:
        return Space(parameters)
    except ConfigError as error:
        raise ConfigError(f"{where}: {error}") from None


_EXAMPLE = "`optimizer.lr: {loguniform: [1.0e-4, 1.0e-2]}`"


def _parameter(name: str, entry: Any, place: str) -> Parameter:
    kinds = ("choice", *RANGES)
    if not isinstance(entry, dict) or sum(kind in entry for kind in kinds) != 1:
        raise ConfigError(f"{place}: give one of {', '.join(kinds)}, e.g. {_EXAMPLE}.")
    if unknown := [str(key) for key in entry if key not in (*kinds, "step", "when")]:
        raise ConfigError(f"{place}: unknown key {unknown[0]}; there are {', '.join(kinds)}, step and when.")
    when = _conditions(entry.get("when", {}), place)
    if "choice" in entry:
        choices = entry["choice"]
        if not isinstance(choices, list) or not choices:
            raise ConfigError(f"{place}: choice must be a list with at least one value.")
        if "step" in entry:
            raise ConfigError(f"{place}: step has no meaning beside choice.")
        if any(value in choices[:index] for index, value in enumerate(choices)):
            raise ConfigError(f"{place}: choice has a value twice.")
        try:
            json.dumps(choices)
        except TypeError:
            raise ConfigError(f"{place}: choice has a value that no setting takes, such as a date.") from None
        return Parameter(name, choices=tuple(choices), when=when)
    kind = next(kind for kind in RANGES if kind in entry)
    return _range(name, kind, entry, when, place)


def _range(name: str, kind: str, entry: dict[str, Any], when: Mapping[str, tuple[Any, ...]], place: str) -> Parameter:
    types_of = field_types(name)
    if not types_of & {int, float}:
        raise ConfigError(f"{place}: {kind} needs a setting that is a number; give its values with choice.")
    ends, integer = entry[kind], float not in types_of
    numbers = [_number(value) for value in ends] if isinstance(ends, list) and len(ends) == 2 else [None]
    numbers += [_number(entry["step"])] if entry.get("step") is not None else []
    if None in numbers:
        raise ConfigError(f"{place}: {kind} must be two numbers, [lowest, highest], and step one.")
    low, high, step = [*(number for number in numbers if number is not None), None][:3]
    assert low is not None and high is not None
    if not low < high:
        raise ConfigError(f"{place}: {kind}: {low:g} to {high:g} is no range: the first must be below the second.")
    if kind == "loguniform" and low <= 0:
        raise ConfigError(f"{place}: loguniform begins above 0, and {low:g} is not.")
    if integer and any(number is not None and number != int(number) for number in numbers):
        raise ConfigError(f"{place} is a whole number, so its range and step must be whole numbers.")
    if step is not None:
        if kind == "loguniform":
            raise ConfigError(f"{place}: step has no meaning beside loguniform.")
        if not 0 < step <= high - low:
            raise ConfigError(f"{place}: step {step:g} does not fit between {low:g} and {high:g}.")
        if not math.isclose(math.remainder(high - low, step), 0, abs_tol=1e-9 * (high - low)):
            raise ConfigError(f"{place}: from {low:g}, steps of {step:g} do not reach {high:g}.")
    return Parameter(name, low=low, high=high, step=step, log=kind == "loguniform", integer=integer, when=when)


def _number(value: Any) -> float | None:
    """A finite number; None for anything else. YAML 1.1 reads 1e-3, without a dot, as text."""
    try:
        number = math.nan if isinstance(value, bool) else float(value)
    except (TypeError, ValueError):
        return None
    return number if math.isfinite(number) else None


def _conditions(entry: Any, place: str) -> Mapping[str, tuple[Any, ...]]:
    if not isinstance(entry, dict):
        raise ConfigError(f"{place}: when must map settings to values, e.g. `when: {{model.mixing: smoe}}`.")
    if [] in entry.values():
        raise ConfigError(f"{place}: when has no value under which it holds.")
    return {name: tuple(values) if isinstance(values, list) else (values,) for name, values in entry.items()}


def field_types(name: str) -> set[Any]:
    """The types that a setting may have; of Literal and containers only that they are no numbers."""
    section: type[BaseModel] = RunConfig
    *sections, last = name.split(".")
    for one in sections:
        section = typing.cast(type[BaseModel], section.model_fields[one].annotation)
    annotation = section.model_fields[last].annotation
    union = typing.get_origin(annotation) in (typing.Union, types.UnionType)
    return set(typing.get_args(annotation) if union else (annotation,))


def check_space(space: Space, settings: dict[str, Any], where: str) -> Refused | None:
    """Check values and their combinations against the configuration's model.

    Args:
        settings: the preset's, by section, data and out included.
        where: the file, for messages.

    Returns:
        What part of the combinations is refused, if any is; none of the choices is refused in all of its combinations.

    Raises:
        ConfigError: a value that its setting cannot have, or a choice that is refused in every combination.
    """
    for parameter in space.parameters.values():
        for value in parameter.ends():
            _check_value(parameter.name, value, settings, where)
    refusals: list[str] = []
    combinations = 0
    accepted: dict[str, set[str]] = {name: set() for name in space.parameters}
    reason: dict[tuple[str, str], str] = {}
    for values in space.combinations():
        combinations += 1
        shown = {name: json.dumps(value) for name, value in values.items()}
        try:
            validated(changed(settings, values), ", ".join(f"{name}={value}" for name, value in shown.items()))
        except ConfigError as error:
            refusals.append(str(error))
            reason |= {(name, value): str(error) for name, value in shown.items() if (name, value) not in reason}
        else:
            for name, value in shown.items():
                accepted[name].add(value)
    for (name, value), said in reason.items():
        parameter = space.parameters[name]
        nothing = not accepted[name] if not parameter.choices else value not in accepted[name]
        if nothing:
            what = f"{name}={value}" if parameter.choices else name
            raise ConfigError(f"{where}: {what} is refused in every combination, e.g. {said}")
    return Refused(len(refusals) / combinations, refusals[0]) if refusals else None


def _check_value(name: str, value: Any, settings: dict[str, Any], where: str) -> None:
    """Raises ConfigError where the setting itself, whatever the others are, cannot have that value."""
    place = f"{where}: {name}: {json.dumps(value)}"
    try:
        config = RunConfig.model_validate(changed(settings, {name: value}))
    except ValidationError as error:
        for item in error.errors():
            if item["loc"][: len(name.split("."))] == tuple(name.split(".")):
                raise ConfigError(f"{place}: {item['msg']}.") from None
        return
    taken: Any = config
    for part in name.split("."):
        taken = getattr(taken, part)
    # Pydantic takes "0.001" and false for numbers; a search would then compare them with the preset's number.
    if isinstance(value, str | bool) and type(taken) is not type(value):
        hint = " YAML reads 1e-3 as text; write 1.0e-3." if isinstance(value, str) else ""
        raise ConfigError(f"{place} is {type(value).__name__}, and the setting is {type(taken).__name__}.{hint}")
