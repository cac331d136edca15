"""`m5 adapt`: the new value's rows alone are trained, viewers of all others notice nothing, what cannot fit is told."""

from __future__ import annotations

import argparse
import json
import os
import shutil
import signal
from pathlib import Path

import numpy as np
import pandas as pd
import pytest
import torch
from safetensors.torch import load_file

from benchmarks.adapt import ADAPTED, AFTER, BEFORE, BLEND, CLEAR, Asked, all_others
from benchmarks.left_out import without
from m5.adapt import Start, adapt, starting_point
from m5.assemble import build_model
from m5.best import read_record
from m5.cli_adapt import add_adapt
from m5.config import ConfigError, RunConfig
from m5.data.loader import cut_to
from m5.data.sequences import BatchBuilder, Windows
from m5.evaluate import evaluate, in_scenario
from m5.evaluate_run import evaluate_run
from m5.predict import Predictor
from m5.recommend import known_viewer, recommend_titles
from m5.resume import Stopped
from m5.schema import TRAIN, VALID, DataError, PreparedDataset
from m5.serving.export import Options, export
from m5.train import Trainer, train
from tests.handmade import write_handmade
from tests.world import tiny_config, write_world

TITLES, REGIONS = 24, 4
# How a viewer goes on after title n. The new region r3 is like r1 after even titles; after odd ones it has its own way.
LAWS = {
    1: lambda n: n + 1,
    2: lambda n: n + 7,
    3: lambda n: n + 1 if n % 2 == 0 else n + 12,
    4: lambda n: n + 7,
}
SETTINGS = ("sequences.sequences=32", "optimizer.lr=0.01", "optimizer.table_lr=0.3", "optimizer.expert_lr=0.1")
CHANGES = ("optimizer.lr=0.03", "training.epochs=25", "training.evaluate_every=5", "optimizer.warmup_steps=0")


def plant(folder: Path, *, seed: int = 0) -> PreparedDataset:
    """Viewers of four regions, each of which has a law by which the next title follows the last; with rights."""
    dataset = write_world(folder, users=240, titles=TITLES, regions=REGIONS, rights=True, seed=seed, longest=14)
    generator = np.random.default_rng(seed)
    region = np.zeros(dataset.manifest.n_events, dtype=np.int32)
    title = np.zeros(dataset.manifest.n_events, dtype=np.int32)
    for user, (first, last) in enumerate(zip(dataset.offsets, dataset.offsets[1:], strict=False)):
        region[first:last] = 1 + user % REGIONS
        now = int(generator.integers(TITLES))
        for event in range(first, last):
            title[event] = now
            now = LAWS[1 + user % REGIONS](now) % TITLES
    split = np.asarray(dataset.event_array("split"))
    np.save(folder / "events" / "title.npy", title)
    np.save(folder / "events" / "scenario_region.npy", region)
    titles = dataset.titles.copy()
    titles["train_count"] = np.bincount(title[split == TRAIN], minlength=TITLES)
    titles["cold"] = titles["train_count"] == 0
    titles.to_parquet(folder / "titles.parquet")
    # Title 5 belongs to region r1 alone; all else may be played everywhere.
    rights = pd.read_parquet(folder / "rights.parquet")
    rights["region"] = np.where(rights["title"] == 5, 1, 0).astype(np.int32)
    rights["end"] = rights["end"].max()
    rights.to_parquet(folder / "rights.parquet")
    return PreparedDataset(folder)


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """full: all regions; old: without r3 and r4; run: trained on old; new: run adapted to r3 on full."""
    folder = tmp_path_factory.mktemp("adapt")
    full = plant(folder / "full")
    without(without(full, "region", "r4", folder / "three"), "region", "r3", folder / "old")
    # The buckets of watch time stay full's, so that viewers of r1 and r2 are the same in both.
    old = PreparedDataset(folder / "old").manifest
    old.model_copy(update={"intensities": full.manifest.intensities}).write(folder / "old")
    settings = (*SETTINGS, "training.epochs=14", "training.evaluate_every=7", "model.scenario_dropout=0.1")
    train(tiny_config(folder / "old", folder / "run", *settings))
    adapt(folder / "run", ("region", "r3"), folder / "full", folder / "new", CHANGES)
    return folder


@pytest.fixture(scope="module")
def start(folder: Path) -> Start:
    return starting_point(folder / "run", "region", "r3", PreparedDataset(folder / "full"))


def asked(data: Path, run: Path, state: dict[str, torch.Tensor], name: str = "m5") -> Predictor:
    dataset, config = PreparedDataset(data), RunConfig.read(run / "config.yaml")
    model = build_model(dataset, config)
    model.load_state_dict(state)
    predictor = Predictor(model, BatchBuilder(dataset, config), config, torch.device("cpu"))
    predictor.name = name
    return predictor


def queries(predictor: Predictor, events: np.ndarray) -> torch.Tensor:
    return torch.cat([predictor.forward(batch).query_PQ for batch in predictor.batches(events)])


def events_of(data: Path, *values: str) -> np.ndarray:
    dataset = PreparedDataset(data)
    return np.flatnonzero(np.any([in_scenario(dataset, "region", value) for value in values], axis=0))


# ---- what is trained -------------------------------------------------------------------------------------------------


def test_a_new_run_says_where_it_comes_from(folder: Path, start: Start) -> None:
    assert set(start.blend) == {"r1", "r2"}
    assert sum(start.blend.values()) == pytest.approx(1)
    record = read_record(folder / "new")
    assert record["adapted"]["blend"] == start.blend
    assert record["adapted"]["to"] == {"region": "r3"}
    assert record["untrained"] == {"region": ["r4"]}


def test_only_the_new_values_rows_have_changed(folder: Path, start: Start) -> None:
    """Region r3 is value 3 of 5: row 3 of the embeddings, and the fourth fifth of either table of experts."""
    after = load_file(folder / "new" / "best" / "weights.safetensors")
    assert after.keys() == start.state.keys()
    changed = {}
    for key, value in after.items():
        rows = (value != start.state[key]).flatten(1).any(1) if value.ndim > 1 else value != start.state[key]
        if rows.any():
            changed[key] = rows.view(REGIONS + 1, -1).any(1).tolist()
    tables = ("tables.embeddings.scenario_region", "experts.embeddings.experts_id_region")
    tables += ("experts.embeddings.experts_cg_region",)
    assert changed == {f"{table}.weight": [False, False, False, True, False] for table in tables}


def test_known_regions_get_the_same_answers_bit_by_bit(folder: Path, start: Start) -> None:
    events = events_of(folder / "full", "r1", "r2", "r4")
    before, after = asked(folder / "full", folder / "run", start.state), Predictor.load(folder / "new", "cpu")
    assert torch.equal(queries(after, events), queries(before, events))
    assert torch.equal(after.key_NQ, before.key_NQ)


def test_known_regions_get_the_runs_own_answers(folder: Path) -> None:
    """Viewers of r1 and r2 have the same events in both datasets, in the same order."""
    run, new = Predictor.load(folder / "run", "cpu"), Predictor.load(folder / "new", "cpu")
    old, full = events_of(folder / "old", "r1", "r2"), events_of(folder / "full", "r1", "r2")
    assert len(old) == len(full) > 800
    torch.testing.assert_close(queries(new, full), queries(run, old), atol=1e-6, rtol=0)


def test_adaptation_learns_the_new_regions_own_taste(folder: Path, start: Start) -> None:
    """Worth a training: what was learnt is far better than the unknown value, and than the blend it began with."""
    unknown = dict(start.state)
    for key in unknown:
        if key.endswith("_region.weight"):
            table = unknown[key].clone().view(REGIONS + 1, -1)
            table[3] = table[0]
            unknown[key] = table.view_as(unknown[key])
    rows = [
        asked(folder / "full", folder / "run", unknown, "unknown"),
        asked(folder / "full", folder / "run", start.state, "blend"),
        Predictor.load(folder / "new", "cpu"),
    ]
    rows[2].name = "adapted"
    found = evaluate(PreparedDataset(folder / "full"), rows, within=("region", "r3"), filter_seen=False, bootstrap=0)
    ndcg = {name: model["overall"]["ndcg@10"] for name, model in found["models"].items()}
    assert ndcg["unknown"] < 0.3
    assert ndcg["blend"] < 0.3
    assert ndcg["adapted"] > 0.6
    assert list(found["models"]["adapted"]["scenarios"]) == ["region=r3", "plan=unknown", "plan=ads", "plan=premium"]


def test_rights_hold_for_the_new_region(folder: Path) -> None:
    """Title 5 may be played in r1 alone."""
    predictor = Predictor.load(folder / "new", "cpu")
    for user, may in (("u10", False), ("u8", True)):
        viewer = known_viewer(predictor.dataset, user)
        assert viewer.scenario["region"] == (1 if may else 3)
        shown = {one.title_id for one in recommend_titles(predictor, viewer, k=TITLES, filter_seen=False)}
        assert ("t5" in shown) == may
        assert len(shown) == TITLES - 1 + may


def test_a_new_run_is_an_ordinary_one(folder: Path, capsys: pytest.CaptureFixture[str]) -> None:
    report = evaluate_run(folder / "new", folder / "evaluation.json", references=False)
    assert report["models"]["m5+r3"]["scenarios"]["region=r3"]["n"] > 50
    config, run = (RunConfig.read(folder / name / "config.yaml") for name in ("new", "run"))
    assert config.model == run.model
    assert (config.data, config.out, config.name) == (folder / "full", folder / "new", "m5+r3")
    lines = [json.loads(line) for line in (folder / "new" / "metrics.jsonl").read_text().splitlines()]
    validations = [line["ndcg@10"] for line in lines if line["kind"] == "valid"]
    assert read_record(folder / "new")["valid"]["ndcg@10"] == max(validations)
    assert len(validations) == 1 + 25 / 5  # the blend, and every fifth epoch


def test_an_artifact_tells_that_it_was_adapted(folder: Path, tmp_path: Path) -> None:
    artifact = export(folder / "new", tmp_path / "artifact", Options(program=False))
    adapted = read_record(folder / "new")["adapted"]
    assert artifact.manifest.dataset["adapted"] == {key: value for key, value in adapted.items() if key != "run"}
    assert artifact.manifest.dataset["untrained"] == {"region": ["r4"]}
    card = (artifact.folder / "card.md").read_text()
    for text in (
        "Adapted to *tiny*",
        f"`{adapted['weights_sha256']}`: region=r3 began as ",
        "Nothing was trained for region r4: served as the unknown value.",
        "| validation, region=r3 alone |",
    ):
        assert text in card
    assert str(folder) not in card + (artifact.folder / "artifact.json").read_text()


def test_the_config_tells_that_nothing_was_compiled(folder: Path, tmp_path: Path) -> None:
    shutil.copytree(folder / "run", tmp_path / "run")
    config = RunConfig.read(folder / "run" / "config.yaml").model_dump(mode="json")
    config["training"]["compile"] = True
    RunConfig.model_validate(config).write(tmp_path / "run" / "config.yaml")
    adapt(tmp_path / "run", ("region", "r3"), folder / "full", tmp_path / "new", ["training.epochs=1"])
    assert not RunConfig.read(tmp_path / "new" / "config.yaml").training.compile


def test_id_embeddings_that_are_lost_are_told(folder: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """Titles 2 and 9 have lost their training events in the new dataset; the run knows both."""
    shutil.copytree(folder / "full", tmp_path / "full")
    titles = pd.read_parquet(tmp_path / "full" / "titles.parquet")
    assert not PreparedDataset(folder / "old").titles["cold"].any()
    titles["cold"] = titles["title_id"].isin(["t2", "t9"])
    titles.to_parquet(tmp_path / "full" / "titles.parquet")
    arguments = (folder / "run", ("region", "r3"), tmp_path / "full", tmp_path / "new", ["training.epochs=1"])
    adapt(*arguments)
    assert "m5: 2 titles that " in capsys.readouterr().err
    assert read_record(tmp_path / "new")["adapted"]["ids_lost"] == 2
    assert read_record(folder / "new")["adapted"]["ids_lost"] == 0


def test_where_the_blend_is_best_it_is_kept(folder: Path, tmp_path: Path, start: Start) -> None:
    adapt(
        folder / "run", ("region", "r3"), folder / "full", tmp_path / "new", ["optimizer.lr=1e-12", "training.epochs=2"]
    )
    record, kept = read_record(tmp_path / "new"), load_file(tmp_path / "new" / "best" / "weights.safetensors")
    assert record["step"] == 0
    assert all(torch.equal(value, start.state[key]) for key, value in kept.items())


def test_a_second_new_value_joins_later(folder: Path, tmp_path: Path) -> None:
    """r4 stands in full's vocabulary since r3 joined, with the unknown value's rows: it is new all the same."""
    with pytest.raises(DataError, match="was trained with region=r3 already"):
        starting_point(folder / "new", "region", "r3", PreparedDataset(folder / "full"))
    later = starting_point(folder / "new", "region", "r4", PreparedDataset(folder / "full"))
    assert set(later.blend) == {"r1", "r2", "r3"}
    assert later.origin["untrained"] == {}


def test_an_interrupted_adaptation_goes_on(folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    taken, steps = [], Trainer._steps

    def stopping(self, *arguments):
        for one in steps(self, *arguments):
            taken.append(one)
            if len(taken) == 5:
                os.kill(os.getpid(), signal.SIGTERM)
            yield one

    arguments = (folder / "run", ("region", "r3"), folder / "full", tmp_path / "new", CHANGES)
    with monkeypatch.context() as patch:
        patch.setattr(Trainer, "_steps", stopping)
        with pytest.raises(Stopped):
            adapt(*arguments)
    with pytest.raises(ConfigError, match="holds an unfinished training"):
        adapt(*arguments)
    adapt(*arguments, resume="yes")
    ours, theirs = (load_file(run / "best" / "weights.safetensors") for run in (tmp_path / "new", folder / "new"))
    assert all(torch.equal(value, theirs[key]) for key, value in ours.items())


# ---- refusals --------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("scenario", "message"),
    [
        (("country", "r3"), r"knows no scenario 'country'\. Its scenarios: region, plan"),
        (("region", "XX"), r"has no region=XX in the training period, only r1, r2, r3, r4"),
        (("region", "r1"), r"was trained with region=r1 already: it is not new\. Values: r1, r2"),
    ],
)
def test_what_is_not_new_is_refused(folder: Path, scenario: tuple[str, str], message: str) -> None:
    with pytest.raises(DataError, match=message):
        starting_point(folder / "run", *scenario, PreparedDataset(folder / "full"))


def changed_manifest(data: Path, **fields) -> None:
    PreparedDataset(data).manifest.model_copy(update=fields).write(data)


@pytest.mark.parametrize(
    ("what", "message"),
    [
        ("width", r"content has vectors of 5 numbers \(graph\), the run was trained on 6"),
        ("vectors", r"has other vectors .* and no linear map turns one into the other"),
        ("missing", r"graph\.npy is missing"),
        ("titles", r"no title of .* has a title_id that the run's dataset"),
        ("contexts", r"has the contexts none, but the run was trained with device"),
        ("scenario", r"has the scenarios region, but the run was trained with region, plan"),
    ],
)
def test_what_does_not_fit_is_refused(folder: Path, tmp_path: Path, what: str, message: str) -> None:
    data = tmp_path / "data"
    shutil.copytree(folder / "full", data)
    graph, manifest = data / "content" / "graph.npy", PreparedDataset(data).manifest
    if what == "width":
        np.save(graph, np.load(graph)[:, :5])
    elif what == "vectors":
        np.save(graph, np.load(graph)[::-1])
    elif what == "missing":
        graph.unlink()
    elif what == "titles":
        titles = pd.read_parquet(data / "titles.parquet")
        titles.assign(title_id="other " + titles["title_id"]).to_parquet(data / "titles.parquet")
    elif what == "contexts":
        changed_manifest(data, contexts=())
    else:
        changed_manifest(data, scenarios=manifest.scenarios[:1])
    with pytest.raises(DataError, match=message):
        starting_point(folder / "run", "region", "r3", PreparedDataset(data))


def test_a_blind_model_has_no_experts_to_train(folder: Path, tmp_path: Path) -> None:
    tiny_config(folder / "old", tmp_path, "model.mixing=mlp").write(tmp_path / "config.yaml")
    with pytest.raises(DataError, match=r"model\.mixing=mlp: its scenario values own no experts"):
        starting_point(tmp_path, "region", "r3", PreparedDataset(folder / "full"))


@pytest.mark.parametrize(
    ("override", "message"),
    [
        ("model.width=32", r"cannot change model\.width: it is the run's"),
        ("optimizer.table_lr=1", r"cannot change optimizer\.table_lr"),
        ("training.epochs=none", r"training\.epochs"),
        ("epochs=1", "there is no setting 'epochs'"),
    ],
)
def test_settings_that_cannot_change_are_refused(folder: Path, tmp_path: Path, override: str, message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        adapt(folder / "run", ("region", "r3"), folder / "full", tmp_path / "new", [override])
    assert not (tmp_path / "new").exists()


def test_a_folder_in_use_is_not_overwritten(folder: Path, tmp_path: Path) -> None:
    before = (folder / "new" / "metrics.jsonl").read_bytes()
    with pytest.raises(ConfigError, match=r"holds a finished training\. .*--restart"):
        adapt(folder / "run", ("region", "r3"), folder / "full", folder / "new", CHANGES)
    assert (folder / "new" / "metrics.jsonl").read_bytes() == before
    with pytest.raises(ConfigError, match="is the run itself"):
        adapt(folder / "run", ("region", "r3"), folder / "full", folder / "run", CHANGES, resume="over")
    (tmp_path / "thesis.tex").write_text("words")
    with pytest.raises(ConfigError, match="is not a run of m5"):
        adapt(folder / "run", ("region", "r3"), folder / "full", tmp_path, CHANGES)


def test_several_processes_are_refused(folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("WORLD_SIZE", "2")
    with pytest.raises(ConfigError, match="without torchrun"):
        adapt(folder / "run", ("region", "r3"), folder / "full", tmp_path / "new")


def test_a_value_without_events(folder: Path, tmp_path: Path) -> None:
    """None to validate: refused. None to train on: an even blend is the new run."""
    for name, parts in (("no valid", (VALID,)), ("no train", (TRAIN,))):
        data = tmp_path / name
        shutil.copytree(folder / "full", data)
        region, split = np.load(data / "events" / "scenario_region.npy"), np.load(data / "events" / "split.npy")
        region[(region == 3) & np.isin(split, parts)] = 0
        np.save(data / "events" / "scenario_region.npy", region)
    with pytest.raises(DataError, match=r"the valid split has no events of region=r3"):
        adapt(folder / "run", ("region", "r3"), tmp_path / "no valid", tmp_path / "refused")
    assert not (tmp_path / "refused").exists()
    adapt(folder / "run", ("region", "r3"), tmp_path / "no train", tmp_path / "new")
    record = read_record(tmp_path / "new")
    assert (record["step"], record["adapted"]["blend"]) == (0, {"r1": 0.5, "r2": 0.5})


# ---- parts -----------------------------------------------------------------------------------------------------------


def test_windows_are_cut_to_stretches_of_what_is_wanted(tmp_path: Path) -> None:
    """One viewer with ten events, of which 2, 3, 4, 7 and 9 are wanted; the second window has none."""
    dataset = write_handmade(tmp_path / "data", [[(0, at, TRAIN) for at in range(10)]], titles=1)
    builder = BatchBuilder(dataset, tiny_config(tmp_path / "data", tmp_path, "model.content=[]"))
    windows = Windows(start=np.array([0, 0, 2]), last=np.array([4, 6, 9]), first=np.array([0, 5, 7]))
    wanted = np.isin(np.arange(10), [2, 3, 4, 7, 9])
    cut = cut_to(windows, wanted, builder)  # a history of six
    assert list(zip(cut.start.tolist(), cut.first.tolist(), cut.last.tolist(), strict=True)) == [
        (0, 2, 4),
        (1, 7, 7),
        (3, 9, 9),
    ]
    assert len(cut_to(windows, np.zeros(10, dtype=bool), builder)) == 0


def test_a_copy_without_a_value(folder: Path, tmp_path: Path) -> None:
    full, old = PreparedDataset(folder / "full"), PreparedDataset(folder / "old")
    keep = np.isin(full.event_array("scenario_region"), [1, 2])
    for name in ("title", "timestamp", "split", "scenario_region", "scenario_plan", "intensity_seconds"):
        np.testing.assert_array_equal(old.event_array(name), full.event_array(name)[keep])
    assert [vocabulary.values for vocabulary in old.manifest.scenarios] == [("r1", "r2"), ("ads", "premium")]
    assert np.diff(old.offsets)[:8].tolist() == (np.diff(full.offsets)[:8] * [1, 1, 0, 0, 1, 1, 0, 0]).tolist()
    train_count = np.bincount(full.event_array("title")[keep & (full.event_array("split") == TRAIN)], minlength=TITLES)
    assert old.titles["train_count"].tolist() == train_count.tolist()
    assert old.manifest.n_events == keep.sum() == sum(old.manifest.split_counts.values())
    assert old.manifest.content_hash != full.manifest.content_hash
    rights = full.rights.assign(region=np.arange(TITLES, dtype=np.int32) % 5)
    shutil.copytree(folder / "full", tmp_path / "data")
    rights.to_parquet(tmp_path / "data" / "rights.parquet")
    left = without(PreparedDataset(tmp_path / "data"), "region", "r2", tmp_path / "left").rights
    assert left["region"].tolist() == [{0: 0, 1: 1, 3: 2, 4: 3}[n % 5] for n in range(TITLES) if n % 5 != 2]
    with pytest.raises(DataError, match="has no region=XX"):
        without(full, "region", "XX", tmp_path / "nowhere")


def test_what_all_other_regions_lose_is_measured(folder: Path, tmp_path: Path) -> None:
    """With the same bucket boundaries and content vectors they lose nothing; with other boundaries they do lose."""
    shutil.copytree(folder / "three", tmp_path / "three")
    changed_manifest(tmp_path / "three", intensities=PreparedDataset(folder / "full").manifest.intensities)
    adapt(folder / "run", ("region", "r3"), tmp_path / "three", tmp_path / "new", ["training.epochs=1"])
    old, run = PreparedDataset(folder / "old"), Predictor.load(folder / "run", "cpu")

    def asked() -> Asked:
        adapted = Predictor.load(tmp_path / "new", "cpu")
        return all_others(old, run, PreparedDataset(tmp_path / "three"), adapted, ("region", "r3"))

    same = asked()
    assert len(same.user) > 100
    np.testing.assert_allclose(same.ndcg[AFTER], same.ndcg[BEFORE], atol=1e-6)
    coarser = old.manifest.intensities[0].model_copy(update={"boundaries": (1e9, 2e9, 3e9)})
    changed_manifest(tmp_path / "three", intensities=(coarser,))
    assert (asked().ndcg[AFTER] != same.ndcg[AFTER]).any()


def test_an_adaptation_that_does_nothing_breaks_the_promise() -> None:
    rank = np.array([1.0, 3.0, 40.0, np.inf])
    asked = Asked.of(np.arange(4), {BLEND: rank, ADAPTED: rank.copy()})
    assert asked.gain(ADAPTED, BLEND) == (0, 0) < (CLEAR, CLEAR)
    better = Asked.of(np.arange(4), {BLEND: rank, ADAPTED: np.ones(4)})
    assert better.gain(ADAPTED, BLEND)[0] >= 0
    assert Asked.together([better, better]).ndcg[ADAPTED].tolist() == [1.0] * 8


def test_the_command(folder: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    parser = argparse.ArgumentParser()
    add_adapt(parser.add_subparsers())

    def command(*words: str) -> None:
        options = parser.parse_args(["adapt", str(folder / "run"), "training.epochs=1", *words])
        options.command(options)

    given = ("--data", str(folder / "full"), "--out", str(tmp_path / "new"))
    with pytest.raises(ConfigError, match="as region=XX"):
        command("--scenario", "r3", *given)
    command("--scenario", "region=r3", *given)
    shown = capsys.readouterr().out
    assert "region=r3 began as " in shown
    assert "best validation, region=r3 alone: hr@10 " in shown
    assert f"next: m5 evaluate {tmp_path / 'new'}" in shown
    command("--scenario", "region=r3", *given, "--restart")
