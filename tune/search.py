"""`m5 tune`: check everything, search, train the winner and the preset on several seeds, report."""

from __future__ import annotations

from contextlib import suppress
from pathlib import Path
from typing import TYPE_CHECKING, Any

from m5.config import ConfigError
from tune.records import PRESET
from tune.settings import Plan, read_plan

if TYPE_CHECKING:
    from tune.objective import Objective
    from tune.records import Folder, Record
    from tune.summary import Summary
    from tune.trial import TrialTrainer


def search(
    *,
    preset: str,
    data: str,
    space: Path,
    out: Path,
    overrides: list[str],
    address: str | None = None,
    resume: bool = False,
    trainer: type[TrialTrainer] | None = None,
) -> Summary:
    """Search, and leave in `out`: records/, trials/ and seeds/ (runs), trials.parquet, best.yaml, report.html.

    Args:
        preset: name in m5/configs, or a YAML file.
        data: prepared dataset: a folder that all nodes share, or an fsspec URL.
        space: the YAML file that says what is varied, and how.
        out: folder of the search, shared by all nodes.
        overrides: `key.sub=value` for all trials, or of the search itself, e.g. `search.trials=40`.
        address: of a Ray cluster; None: one is started on this machine.
        resume: go on with the search in `out`, if there is one.
        trainer: what trains a trial; `TrialTrainer`, or one that does more.

    Raises:
        ConfigError, DataError: the user's mistakes, before anything is started.
        KeyboardInterrupt: Ctrl-C; what is there is reported before.
    """
    # What needs neither torch nor Ray comes first: a mistake in the space shows in a second.
    plan = read_plan(preset, space, overrides)
    out = out.resolve()
    from m5.schema import PreparedDataset
    from tune.data import local_dataset
    from tune.engine import Engine, cluster
    from tune.records import opened
    from tune.trial import TrialTrainer

    dataset = PreparedDataset(local_dataset(data))
    _require_content(plan, dataset)
    baseline = _baseline(plan, dataset)
    identity = plan.identity() | {"dataset": dataset.manifest.content_hash}
    with opened(out, identity, resume) as folder, cluster(address, plan) as concurrent:
        where = data if "://" in data else str(Path(data).resolve())
        engine = Engine(plan, folder, data=where, concurrent=concurrent, trainer=trainer or TrialTrainer)
        return _Search(plan, folder, engine, baseline).run()


def _require_content(plan: Plan, dataset: Any) -> None:
    """Raises ConfigError where a trial would read content vectors that the dataset lacks."""
    kinds = set(plan.preset.model.content)
    if (parameter := plan.space.parameters.get("model.content")) is not None:
        kinds.update(kind for choice in parameter.choices for kind in choice)
    missing = [kind for kind in sorted(kinds) if not (dataset.folder / "content" / f"{kind}.npy").is_file()]
    if missing:
        raise ConfigError(f"{dataset.folder} has no content vectors of kind {', '.join(missing)}; see `m5 encode`.")


def _baseline(plan: Plan, dataset: Any) -> dict[str, float] | None:
    """Validation metrics of objective.baseline.

    Raises:
        ConfigError: they cannot be compared with those of trials.
    """
    run = plan.config.objective.baseline
    if run is None:
        return None
    from m5.best import read_record
    from m5.config import RunConfig

    record, config, ours = read_record(run), RunConfig.read(run / "config.yaml"), plan.preset
    if record["dataset"] != dataset.manifest.content_hash:
        raise ConfigError(f"objective.baseline: {run} was trained on another dataset than {dataset.folder}.")
    for name in ("metric", "validation_targets", "filter_seen"):
        theirs, own = getattr(config.training, name), getattr(ours.training, name)
        if theirs != own:
            raise ConfigError(f"objective.baseline: {run} has training.{name}={theirs}, and trials have {own}.")
    if ours.training.validation_targets is not None and config.seed != ours.seed:
        raise ConfigError(f"objective.baseline: {run} has seed {config.seed}, and so other validation targets.")
    if not any(name.startswith(f"{ours.training.metric}/") for name in record["valid"]):
        raise ConfigError(f"objective.baseline: {run} has no validation metrics per scenario. Train it again.")
    return record["valid"]


class _Search:
    """The stages of one search."""

    def __init__(self, plan: Plan, folder: Folder, engine: Any, baseline: dict[str, float] | None):
        from tune.live import LiveTable
        from tune.objective import Objective

        self.plan, self.folder, self.engine = plan, folder, engine
        self.metric = plan.preset.training.metric
        self.objective: Objective = Objective(plan.config.objective, self.metric, baseline)
        self.table = LiveTable(folder, self.objective, plan.config.search.trials)
        self.note = ""

    def run(self) -> Summary:
        if self.plan.refused is not None:
            refused = self.plan.refused
            self.table.say(
                f"{refused.share:.0%} of the space's combinations are refused, and left out; e.g. {refused.example}"
            )
        try:
            with self.table:
                self._baseline()
                self._trials()
                self._seeds()
        except BaseException as error:
            # Whatever it is, what was found before is reported; and should that fail, too, the first error is told.
            with suppress(Exception):
                self._write(report=True)
            if isinstance(error, KeyboardInterrupt):
                page = self.folder.path / "report.html"
                self.table.say(f"stopped; the same command with --resume goes on. So far: {page}")
            raise
        summary = self._write(report=True)
        _print(summary, self.folder)
        return summary

    def _baseline(self) -> None:
        """Of a constrained search: what to compare with; without a run, the preset, the first trial, to its end."""
        if self.plan.config.objective.kind != "constrained":
            return
        if self.objective.baseline is None:
            self.objective.baseline = self._preset_as_baseline()
        if not self.objective.scenarios(self.objective.baseline):
            raise ConfigError(
                "objective.kind=constrained has nothing to hold: no scenario has as many validation targets as "
                f"objective.smallest_scenario={self.objective.settings.smallest_scenario} asks for."
            )

    def _preset_as_baseline(self) -> dict[str, float]:
        from tune.study import GivenSearcher, preset_record

        first = self.folder.records.get(PRESET)
        if first is None or first.status == "failed":
            first = preset_record(self.plan, self.folder)
        if not first.ended:
            self.engine.run(
                GivenSearcher([first], task=self.engine.task, concurrent=1), self._scheduler(early=False), self._changed
            )
        best = first.best(self.metric)
        if first.status != "finished" or best is None:
            raise ConfigError(
                f"the preset, with which scenarios are compared, was not trained to its end: {first.status}"
                f"{f', {first.reasons[-1]}' if first.reasons else ''}. Go on with --resume, or give objective.baseline."
            )
        return best

    def _trials(self) -> None:
        from tune.study import StudySearcher

        searcher = StudySearcher(
            self.plan, self.objective, self.folder, task=self.engine.task, concurrent=self.engine.concurrent
        )
        records = self.folder.of("search")
        if not searcher.waiting and len(records) >= self.plan.config.search.trials:
            return
        self.engine.run(searcher, self._scheduler(), self._changed)
        self.note = searcher.note

    def _scheduler(self, *, early: bool = True) -> Any:
        from tune.schedulers import make_scheduler

        return make_scheduler(self.plan, [one for one in self.folder.of("search") if one.ended], early=early)

    def _seeds(self) -> None:
        """Train the winner and the preset on seeds that the search has not seen."""
        from tune.records import Record
        from tune.study import GivenSearcher

        summary = self._summary()
        if summary.winner is None:
            return
        first = self.folder.records.get(PRESET)
        roles = {"preset": first.values} if first is not None else {}
        roles |= {"winner": summary.winner.values} if summary.winner is not first else {}
        for old in [*self.folder.of("preset"), *self.folder.of("winner")]:
            # Of an earlier winner, or of more seeds than are asked for now.
            asked = roles.get(old.role, {}) | self.plan.config.search.final
            if old.values != asked or old.seed > self.plan.preset.seed + self.plan.config.search.seeds:
                self.folder.forget(old)
        given: list[Record] = []
        for place in range(1, self.plan.config.search.seeds + 1):
            for role, values in roles.items():
                record = self.folder.records.get(f"{role}-{place}")
                if record is None:
                    record = Record(
                        name=f"{role}-{place}",
                        role=role,  # type: ignore[arg-type]
                        values=values | self.plan.config.search.final,
                        seed=self.plan.preset.seed + place,
                    )
                    self.folder.renew(record)
                if not record.ended:
                    given.append(record)
        if given:
            searcher = GivenSearcher(given, task=self.engine.task, concurrent=self.engine.concurrent)
            self.engine.run(searcher, self._scheduler(early=False), self._changed)

    def _changed(self, record: Record) -> None:
        from tune.outputs import write_hparams

        if record.ended:
            if record.role == "search":
                write_hparams(self.folder.run(record), record, self.metric)
            self._write(report=False)
        self.table.changed(record)

    def _summary(self) -> Summary:
        from tune.summary import Summary

        return Summary.of(self.folder, self.objective, self.note)

    def _write(self, *, report: bool) -> Summary:
        from tune.outputs import write_outputs

        summary = self._summary()
        write_outputs(self.plan, self.objective, self.folder, summary)
        if report:
            from tune.report import write_report  # Plotly, which no trial should wait for

            write_report(self.folder.path / "report.html", self.plan, self.objective, self.folder, summary)
        return summary


def _print(summary: Summary, folder: Folder) -> None:
    """The outcome, on stdout."""
    counts = ", ".join(f"{number} {status}" for status, number in summary.counts.items() if number)
    print(f"trials: {counts}{f' ({summary.note})' if summary.note else ''}")
    for record in summary.failed:
        print(f"failed: {record.name}, {record.attempts} attempts: {record.reasons[-1] if record.reasons else ''}")
    if summary.preset is not None:
        print(f"preset: {summary.metric} {summary.preset}")
    if summary.winner is not None:
        best = summary.winner.best(summary.metric)
        assert best is not None
        again = f", on other seeds {summary.again}" if summary.again is not None else ""
        print(f"best:   trial {summary.winner.name}, {summary.metric} {best[summary.metric]:.4f}{again}")
    for record in summary.pareto:
        print(f"pareto: trial {record.name}")
    print(summary.verdict())
    print(f"report: {folder.path / 'report.html'}")
    if summary.winner is not None:
        print(f"next:   m5 train --preset {folder.path / 'best.yaml'} --data DATA --out RUN")
