"""The `m5` command. Commands import what they need when they run: `m5 --help` is quick, and `m5 doctor` always starts.

Exit codes: 0 done, 1 `doctor` or `plan` found a problem or a system of `compare` failed, 2 the user's mistake (one
paragraph on stderr), 3 training has stalled, 4 `report --against` found a scenario that got worse, 130 Ctrl-C, 143
SIGTERM; training saves where it is before it leaves with one of the last two.
"""

from __future__ import annotations

import argparse
import os
import sys
from pathlib import Path

from m5.cli_adapt import add_adapt
from m5.cli_data import add_prepare, add_stages, add_synth
from m5.cli_options import add_command, add_world_sizes, count
from m5.cli_serving import add_export, add_onboard, add_serve
from m5.library_warnings import silence_known
from m5.mistakes import explain


def main(arguments: list[str] | None = None) -> int:
    """Run one command; see `m5 --help`. An exception that is no mistake of the user's goes through, with its trace."""
    options = parse(arguments)
    silence_known()
    try:
        return options.command(options) or 0
    except KeyboardInterrupt:
        print("\nm5: interrupted", file=sys.stderr)
        return 130
    except Exception as error:
        if (asked := getattr(error, "signal", None)) is not None:
            print(f"m5: {error}", file=sys.stderr)
            return 128 + asked
        explanation = explain(error)
        if explanation is None:
            raise
        print(f"m5: {explanation}", file=sys.stderr)
        return 2


def parse(arguments: list[str] | None = None) -> argparse.Namespace:
    """The options of one command; `command` is the function that runs it."""
    parser = build_parser()
    options, rest = parser.parse_known_args(arguments)
    # argparse gives a list of positionals only its first stretch: overrides behind a later option are left over.
    if rest and (not hasattr(options, "overrides") or any(text.startswith("-") for text in rest)):
        parser.error(f"unrecognized arguments: {' '.join(rest)}")
    if rest:
        options.overrides = [*options.overrides, *rest]
    return options


def build_parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        prog="m5", description="Multi-modal, multi-interest, multi-scenario matching for streaming services."
    )
    commands = parser.add_subparsers(title="commands", required=True, metavar="COMMAND")
    _add_doctor(commands)
    add_synth(commands)
    add_prepare(commands)
    add_stages(commands)
    _add_plan(commands)
    _add_train(commands)
    _add_replay(commands)
    _add_evaluate(commands)
    _add_report(commands)
    _add_recommend(commands)
    add_export(commands)
    add_serve(commands)
    add_onboard(commands)
    add_adapt(commands)
    _add_demo(commands)
    _add_bench(commands)
    _add_tune(commands)
    _add_compare(commands)
    return parser


def _add_doctor(commands) -> None:
    parser = add_command(commands, "doctor", _doctor, "which versions are installed, whether they match, what to do")
    parser.add_argument("--json", action="store_true", help="machine-readable output")


def _add_plan(commands) -> None:
    parser = add_command(commands, "plan", _plan, "memory and communication of training on a described cluster")
    cluster = parser.add_mutually_exclusive_group(required=True)
    cluster.add_argument("--cluster", type=Path, metavar="FILE", help="its description, e.g. of docs/plans")
    cluster.add_argument("--hardware", metavar="KIND", help="h100, h200, a100, l40s or cpu, and the next two")
    parser.add_argument("--nodes", type=count, help="default: 1")
    parser.add_argument("--ranks-per-node", type=count, help="default: 8")
    parser.add_argument("--dataset", type=Path, required=True, help="a description, or a prepared dataset")
    parser.add_argument("--preset", default="default", help="name in m5/configs, or a YAML file")
    parser.add_argument("--json", type=Path, metavar="FILE", help="write everything there, too")
    parser.add_argument("overrides", nargs="*", metavar="key.sub=value", help="e.g. model.width=128")


def _add_train(commands) -> None:
    parser = add_command(commands, "train", _train, "train a model; also under torchrun, as `torchrun -m m5.train`")
    parser.add_argument("--preset", default="default", help="name in m5/configs, or a YAML file")
    parser.add_argument("--data", type=Path, required=True, help="prepared dataset")
    parser.add_argument("--out", type=Path, required=True, help="folder of the run")
    earlier = parser.add_mutually_exclusive_group()
    earlier.add_argument("--resume", action="store_true", help="go on from the newest checkpoint in --out, if any")
    earlier.add_argument("--restart", action="store_true", help="start over, though --out holds an unfinished run")
    parser.add_argument("overrides", nargs="*", metavar="key.sub=value", help="e.g. model.width=128")


def _add_replay(commands) -> None:
    parser = add_command(commands, "replay", _replay, "run the batch again whose loss was not finite")
    parser.add_argument("run", type=Path)


def _add_evaluate(commands) -> None:
    parser = add_command(
        commands, "evaluate", _evaluate, "test metrics, overall and per scenario, beside reference rows"
    )
    parser.add_argument("run", type=Path)
    parser.add_argument("--json", type=Path, metavar="FILE", help="default: RUN/evaluation.json")
    parser.add_argument("--row", action="append", default=[], metavar="NAME=RUN", help="another run on the same data")
    _add_seen(parser)
    parser.add_argument("--max-targets", type=count, help="evaluate a random part of the test targets")
    parser.add_argument("--no-references", action="store_true", help="leave popularity, item-kNN and EASE out")


def _add_seen(parser: argparse.ArgumentParser) -> None:
    seen = parser.add_mutually_exclusive_group()
    seen.add_argument("--keep-seen", action="store_true", help="titles that a viewer has watched stay candidates")
    seen.add_argument("--filter-seen", action="store_true", help="they do not (default: as in training)")


def _filter_seen(options: argparse.Namespace) -> bool | None:
    return False if options.keep_seen else True if options.filter_seen else None


def _add_report(commands) -> None:
    parser = add_command(commands, "report", _report, "report card of a run by scenario, as a page")
    parser.add_argument("run", type=Path)
    parser.add_argument("--against", type=Path, metavar="OTHER", help="exit with 4 where RUN is worse than this run")
    parser.add_argument("--out", type=Path, metavar="FOLDER", help="default: RUN/report")
    _add_seen(parser)
    parser.add_argument("--max-targets", type=count, help="a random part of the test targets")


def _add_recommend(commands) -> None:
    parser = add_command(commands, "recommend", _recommend, "what one viewer should see next")
    parser.add_argument("run", type=Path)
    viewer = parser.add_mutually_exclusive_group(required=True)
    viewer.add_argument("--user", help="a user of the dataset")
    viewer.add_argument("--history", help='titles or ids, oldest first: "title;title"')
    viewer.add_argument(
        "--all-users", action="store_true", help="everyone of the dataset, to --out; under torchrun, too"
    )
    parser.add_argument(
        "--out", type=Path, metavar="FOLDER", help="of --all-users: Parquet files; goes on with earlier ones"
    )
    parser.add_argument("--scenario", nargs="+", default=[], metavar="NAME=VALUE", help="e.g. region=US plan=ads")
    parser.add_argument("-k", type=count, default=20, help="how many titles (default: 20)")
    parser.add_argument("--keep-seen", action="store_true", help="recommend titles that were watched before, too")


def _add_demo(commands) -> None:
    parser = add_command(commands, "demo", _demo, "the whole main job on a synthetic world")
    add_world_sizes(parser)
    parser.add_argument("--out", type=Path, default=Path("runs/demo"))


def _doctor(options: argparse.Namespace) -> int:
    from m5.doctor import report

    return report(as_json=options.json)


def _plan(options: argparse.Namespace) -> int:
    from m5.config import load_config
    from m5.plan.report import read_cluster, read_dataset, report

    cluster = read_cluster(options.cluster, options.hardware, options.nodes, options.ranks_per_node)
    config = load_config(options.preset, options.overrides, options.dataset, Path("planned"))
    return report(cluster, read_dataset(options.dataset), config, options.json)


def _train(options: argparse.Namespace) -> None:
    from m5.config import load_config
    from m5.train import train

    config = load_config(options.preset, options.overrides, options.data, options.out)
    best = train(config, resume="yes" if options.resume else "over" if options.restart else "no")
    if os.environ.get("RANK", "0") == "0":
        shown = {key: value for key, value in best.items() if key.endswith("@10")}
        print(f"best validation: {', '.join(f'{key} {value:.4f}' for key, value in shown.items())}")
        print(f"next: m5 evaluate {options.out}")


def _replay(options: argparse.Namespace) -> None:
    from m5.replay import print_replay

    print_replay(options.run)


def _named(pairs: list[str], option: str) -> dict[str, str]:
    from m5.config import ConfigError

    named = dict(pair.partition("=")[::2] for pair in pairs)
    if len(named) < len(pairs) or not all(named.values()):
        raise ConfigError(f"{option} {' '.join(pairs)}: give each name once, as NAME=VALUE.")
    return named


def _evaluate(options: argparse.Namespace) -> None:
    from m5.evaluate_run import evaluate_run

    evaluate_run(
        options.run,
        options.json,
        rows={name: Path(path) for name, path in _named(options.row, "--row").items()},
        filter_seen=_filter_seen(options),
        max_targets=options.max_targets,
        references=not options.no_references,
    )


def _report(options: argparse.Namespace) -> int:
    from m5.report import report_run

    return report_run(
        options.run,
        against=options.against,
        out=options.out,
        filter_seen=_filter_seen(options),
        max_targets=options.max_targets,
    )


def _recommend(options: argparse.Namespace) -> None:
    from m5.config import ConfigError
    from m5.recommend import recommend, recommend_all_users

    if options.out is not None and not options.all_users:
        raise ConfigError("--out belongs to --all-users; the list of one viewer is printed.")
    if options.all_users:
        recommend_all_users(
            options.run,
            options.out,
            scenario=_named(options.scenario, "--scenario"),
            k=options.k,
            filter_seen=not options.keep_seen,
        )
        return
    recommend(
        options.run,
        user=options.user,
        history=options.history,
        scenario=_named(options.scenario, "--scenario"),
        k=options.k,
        filter_seen=not options.keep_seen,
    )


def _demo(options: argparse.Namespace) -> None:
    from m5.demo import run_demo

    run_demo(options.out, users=options.users, titles=options.titles, events=options.events, seed=options.seed)


def _add_bench(commands) -> None:
    parser = add_command(commands, "bench", _bench, "measure speed and memory; without a name: list the benchmarks")
    parser.add_argument("name", nargs="?", help="e.g. step; `m5 bench step --help` shows its options")
    parser.add_argument("arguments", nargs=argparse.REMAINDER, help=argparse.SUPPRESS)


def _bench(options: argparse.Namespace) -> int:
    from benchmarks.run import run_benchmark

    return run_benchmark(options.name, options.arguments)


def _add_tune(commands) -> None:
    parser = add_command(commands, "tune", _tune, "search settings with Ray Tune")
    parser.add_argument("--preset", default="default", help="what trials start from: name or YAML file")
    parser.add_argument("--data", required=True, help="prepared dataset: a folder, or an fsspec URL, e.g. s3://...")
    parser.add_argument("--space", type=Path, required=True, help="what to vary, and how, e.g. tune/spaces/demo.yaml")
    parser.add_argument("--out", type=Path, required=True, help="folder of the search, the same on all nodes")
    parser.add_argument("--address", help="of a Ray cluster, e.g. auto (default: this machine)")
    parser.add_argument("--resume", action="store_true", help="go on with the search in --out, if there is one")
    parser.add_argument("overrides", nargs="*", metavar="key.sub=value", help="of all trials, or e.g. search.trials=40")


def _tune(options: argparse.Namespace) -> None:
    from tune.search import search

    search(**{name: value for name, value in vars(options).items() if name != "command"})


def _add_compare(commands) -> None:
    text = "the literature's systems beside M5 on one dataset, with one budget and one evaluator"
    parser = add_command(commands, "compare", _compare, text)
    parser.add_argument("--data", type=Path, required=True, help="prepared dataset")
    parser.add_argument("--systems", nargs="+", default=["all"], metavar="NAME", help="all (default), or row names")
    parser.add_argument("--out", type=Path, required=True, help="folder of the comparison; what is there is kept")
    parser.add_argument("--preset", default="default", help="what M5's row starts from: name or YAML file")
    parser.add_argument("--history", type=count, default=50, help="behaviours that a system reads (default: 50)")
    parser.add_argument("--seconds", type=float, default=90.0, help="of training for each system (default: 90)")
    parser.add_argument("--trials", type=count, default=3, help="settings that a system may try (default: 3)")
    parser.add_argument("--seeds", type=count, default=3, help="trainings of those chosen (default: 3)")
    parser.add_argument("--jobs", type=count, help="systems at a time (default: one a core)")
    parser.add_argument("--keep-seen", action="store_true", help="titles that a viewer has watched stay candidates")
    parser.add_argument("--max-targets", type=count, help="rank a random part of the test targets")


def _compare(options: argparse.Namespace) -> int:
    from benchmarks.literature.compare import compare

    return compare(**{name: value for name, value in vars(options).items() if name != "command"})


if __name__ == "__main__":
    sys.exit(main())
