"""The report card of a run: slices, intervals and tests worked out by hand; a small trained run for the rest."""

from __future__ import annotations

import io
import json
import math
import re
import shutil
from itertools import combinations
from pathlib import Path

import numpy as np
import pytest
import torch
from rich.console import Console

from m5 import report
from m5.assemble import build_model
from m5.best import content_digest
from m5.cli import main, parse
from m5.config import ModelConfig
from m5.data.sequences import BatchBuilder
from m5.eligibility import Eligibility
from m5.evaluate import rank_rows, select_requests
from m5.predict import Predictor
from m5.report_compare import compare, holm
from m5.report_model import Gates, Typical, example_viewers, expert_names, inner_life, nearest_titles, typical_interests
from m5.report_page import page
from m5.report_slices import METRICS, measure_slices, tenure_slices
from m5.report_text import markdown, print_card
from m5.schema import TEST, TRAIN, PreparedDataset, Vocabulary
from m5.train import train
from tests.handmade import write_handmade
from tests.world import tiny_config, write_world

SAMPLES = 4_000
NO_MODEL = {"mixing": "mlp", "requests": 1, "experts": {}, "gate": None, "alike": {}, "viewers": []}


class Placed:
    """Ranks each target where it is told to: scores it between the titles of descending scores."""

    def __init__(self, dataset: PreparedDataset, rank_of_event, name: str):
        self.dataset, self.rank_of_event, self.name = dataset, rank_of_event, name
        self.config = type("Config", (), {"training": type("Training", (), {"filter_seen": True})})

    def score(self, event_index: np.ndarray) -> np.ndarray:
        titles = self.dataset.manifest.n_titles
        score_BN = np.tile(-np.arange(titles, dtype=np.float32), (len(event_index), 1))
        target = self.dataset.event_array("title")[event_index]
        for row, event in enumerate(event_index):
            # The target is the last title; title 0 was watched and is no candidate.
            score_BN[row, target[row]] = 0.5 - self.rank_of_event(int(event))
        return score_BN


# ---- slices ------------------------------------------------------------------------------------------------------


def history(before: int) -> list[tuple[int, int, int]]:
    return [*((0, time, TRAIN) for time in range(before)), (3, 1000, TEST)]


def test_tenure_counts_earlier_events(tmp_path: Path) -> None:
    counts = [0, 1, 4, 5, 19, 20, 49, 50, 200, 201]
    dataset = write_handmade(tmp_path / "d", [history(count) for count in counts], titles=4)
    requests = select_requests(dataset, "test", eligibility=None)
    expected = {"0": [0], "1-4": [1, 2], "5-19": [3, 4], "20-49": [5, 6], "50-199": [7], "200+": [8, 9]}
    slices = tenure_slices(dataset, requests)
    assert {name: rows.tolist() for name, rows in slices.items()} == {
        f"tenure={name}": rows for name, rows in expected.items()
    }
    # A second test event of a viewer has the first before it, and empty slices are not listed.
    dataset = write_handmade(tmp_path / "e", [[(0, 1, TEST), (1, 2, TEST)]], titles=4)
    requests = select_requests(dataset, "test", eligibility=None)
    assert {name: rows.tolist() for name, rows in tenure_slices(dataset, requests).items()} == {
        "tenure=0": [0],
        "tenure=1-4": [1],
    }
    dataset.manifest = dataset.manifest.model_copy(update={"scenarios": (Vocabulary(name="tenure", values=()),)})
    assert set(tenure_slices(dataset, requests)) == {"events before=0", "events before=1-4"}


def test_metrics_of_a_slice(tmp_path: Path) -> None:
    # 40 viewers of two regions; the first region's targets stand at 1, the second's at 12, of 30 candidates.
    histories = [[(0, 1, TRAIN), (30, 2, TEST)] for _ in range(40)]
    scenario = [[(1 + user % 2, 1)] * 2 for user in range(40)]
    dataset = write_handmade(tmp_path / "d", histories, titles=31, scenario=scenario)
    found = rank_rows(dataset, [Placed(dataset, lambda event: 1 if event // 2 % 2 == 0 else 12, "placed")])
    measured = measure_slices(found, found.rows[0], seed=0)
    assert list(measured) == ["overall", "region=US", "region=BR", "plan=ads", "cold"]
    first, second, both = (measured[name] for name in ("region=US", "region=BR", "overall"))
    assert (first["n"], first["users"], first["small"]) == (20, 20, True)
    assert all(first[metric] == 1 for metric in METRICS)
    assert all(first["ci"][metric] == (1, 1) for metric in METRICS)
    assert second["hr@10"] == second["ndcg@10"] == second["mrr@10"] == second["debiased_hr@10"] == 0
    assert second["hr@50"] == 1
    assert second["ndcg@50"] == pytest.approx(1 / math.log2(1 + 12))
    assert both["hr@10"] == both["debiased_hr@10"] == 0.5
    # All weights are equal, so both hit rates vary alike: by about 1.96 sqrt(1/4 / 40).
    assert both["ci"]["debiased_hr@10"] == pytest.approx(both["ci"]["hr@10"])
    assert both["ci"]["hr@10"] == pytest.approx((0.5 - 0.155, 0.5 + 0.155), abs=0.03)
    # The first region's lists show titles 1 .. 9 and the target, the second's 1 .. 10, of 30.
    assert first["coverage@10"] == second["coverage@10"] == pytest.approx(10 / 30)
    assert both["coverage@10"] == pytest.approx(11 / 30)
    assert "coverage@10" not in both["ci"]


def test_a_value_called_unknown_is_not_what_is_missing(tmp_path: Path) -> None:
    histories = [[(0, 1, TRAIN), (30, 2, TEST)] for _ in range(6)]
    plan = [0, 0, 0, 1, 1, 2]
    dataset = write_handmade(
        tmp_path / "d", histories, titles=31, scenario=[[(1, plan[user])] * 2 for user in range(6)]
    )
    values = (Vocabulary(name="region", values=("US",)), Vocabulary(name="plan", values=("unknown", "(unknown)")))
    dataset.manifest = dataset.manifest.model_copy(update={"scenarios": values})
    slices = rank_rows(dataset, [Placed(dataset, lambda event: 1, "placed")]).slices
    plans = {name: rows.tolist() for name, rows in slices.items() if name.startswith("plan")}
    assert plans == {"plan=((unknown))": [0, 1, 2], "plan=unknown": [3, 4], "plan=(unknown)": [5]}


def test_a_slice_of_few_users_is_small(tmp_path: Path) -> None:
    """29 users with four requests each are 116 requests, but no more than 29 that are independent."""
    sizes = []
    for users in (29, 30):
        histories = [[(0, 1, TRAIN), *((30, time, TEST) for time in range(2, 6))] for _ in range(users)]
        dataset = write_handmade(tmp_path / str(users), histories, titles=31)
        found = rank_rows(dataset, [Placed(dataset, lambda event: 1, "placed")], filter_seen=False)
        part = measure_slices(found, found.rows[0], seed=0)["overall"]
        gain = np.ones(part["n"])
        (difference,) = compare({"overall": found.slices["overall"]}, found.requests.user, gain, gain)
        sizes.append((part["n"], part["small"], difference.small))
        told = "overall: requests of only 29 users; read its numbers with their intervals."
        assert (told in found.warnings) == (users == 29)
    assert sizes == [(116, True, True), (120, False, False)]


# ---- comparison --------------------------------------------------------------------------------------------------


def test_holm() -> None:
    # Sorted .005, .01, .03, .04 times 4, 3, 2, 1; the last may not be below the one before it.
    assert holm([0.01, 0.04, 0.03, 0.005]) == pytest.approx([0.03, 0.06, 0.06, 0.02])
    assert holm([0.6, 0.5]) == [1.0, 1.0]
    assert holm([]) == []


def one_slice(run: list[float], user: list[int]):
    rows = np.arange(len(run))
    (difference,) = compare({"overall": rows}, np.array(user), np.array(run), np.zeros(len(run)))
    return difference


def test_p_values_by_hand() -> None:
    # Two users, -1 and +1: the resampled mean is not below 0 in 3 of 4, the signed sum at most 0 in 3 of 4.
    assert one_slice([-1, 1], [0, 1]).p == pytest.approx(3 / 4, abs=0.03)
    # -1, -1, +1: two of three draws below 0 in 20 of 27; but signs make -1 or -3 in 4 of 8, which is the larger p.
    assert one_slice([-1, -1, 1], [0, 1, 2]).p == pytest.approx(4 / 8, abs=0.03)
    # Three users that are all worse: no less than 2^-3, whatever the bootstrap says.
    assert one_slice([-1, -1, -1], [0, 1, 2]).p == pytest.approx(1 / 8, abs=0.02)
    # A hundred requests of one user are one user.
    assert one_slice([-1] * 100, [7] * 100).p == pytest.approx(1 / 2, abs=0.03)
    # Better: the bootstrap is never below 0.
    assert one_slice([0.1] * 50, list(range(50))).p == 1


def test_planted_differences() -> None:
    users = 150
    slices = {
        "bad": np.arange(users),
        "same": users + np.arange(users),
        "few": 2 * users + np.arange(3),
        "none": np.arange(0),
    }
    user = np.arange(2 * users + 3)
    other = np.full(len(user), 0.5)
    run = other.copy()
    run[slices["bad"]] -= 0.1 + 0.02 * (-1.0) ** np.arange(users)
    run[slices["few"]] -= 0.4
    bad, same, few = compare(slices, user, run, other)
    assert (bad.name, bad.requests, bad.users, bad.small, bad.worse) == ("bad", 150, 150, False, True)
    assert bad.difference == pytest.approx(-0.1)
    assert bad.interval == pytest.approx((-0.1 - 0.0032, -0.1 + 0.0032), abs=0.0006)  # 1.96 * .02 / sqrt(150)
    assert bad.p == 1 / (SAMPLES + 1)
    assert bad.adjusted_p == pytest.approx(3 / (SAMPLES + 1))
    assert (same.difference, same.interval, same.p, same.worse) == (0, (0, 0), 1, False)
    assert (few.small, few.worse) == (True, False)


def test_many_slices_get_samples_enough() -> None:
    slices = {f"region={index}": 20 * index + np.arange(20) for index in range(60)}
    user = np.arange(60 * 20)
    run = np.where(user // 20 == 59, 0.0, 0.5)
    assert [one.name for one in compare(slices, user, run, np.full(len(user), 0.5)) if one.worse] == ["region=59"]


@pytest.mark.parametrize("swapped", [False, True])
def test_a_region_that_got_worse_is_named_and_exits_4(
    swapped: bool, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """RUN serves US better and BR worse, so that nothing changes overall, by plan, or by tenure."""
    histories = [[(0, 1, TRAIN), (30, 2, TEST)] for _ in range(240)]
    scenario = [[(1 + user % 2, 1 + user // 2 % 2)] * 2 for user in range(240)]
    dataset = write_handmade(tmp_path / "d", histories, titles=31, scenario=scenario)
    placed = {
        "new": Placed(dataset, lambda event: 2 if event // 2 % 2 else 1, "new"),
        "old": Placed(dataset, lambda event: 1 if event // 2 % 2 else 2, "old"),
    }
    for name in placed:
        (tmp_path / name / "best").mkdir(parents=True)
        record = {"weights_sha256": f"sha-{name}", "step": 7, "epoch": 1}
        (tmp_path / name / "best" / "checkpoint.json").write_text(json.dumps(record))
    monkeypatch.setattr(Predictor, "load", lambda run: placed[Path(run).name])
    monkeypatch.setattr(report, "inner_life", lambda *arguments, **settings: NO_MODEL)
    run, other = ("old", "new") if swapped else ("new", "old")
    assert main(["report", str(tmp_path / run), "--against", str(tmp_path / other)]) == 4
    card = json.loads((tmp_path / run / "report" / "report.json").read_text())
    worse, better = ("region=US", "region=BR") if swapped else ("region=BR", "region=US")
    assert card["against"]["worse"] == [worse]
    found = {one["name"]: one for one in card["against"]["slices"]}
    assert set(found) == {"overall", "region=US", "region=BR", "plan=ads", "plan=premium", "cold", "tenure=1-4"}
    assert found[worse]["difference"] == pytest.approx(1 / math.log2(3) - 1)
    assert found[better]["difference"] == pytest.approx(1 - 1 / math.log2(3))
    assert found["overall"]["difference"] == pytest.approx(0)
    assert f"Significantly worse than in {tmp_path / other}: {worse} (7" in capsys.readouterr().out.replace("\n", " ")
    assert f'<p class="verdict bad">Significantly worse than in {tmp_path / other}: {worse}' in page(card)
    assert re.search(rf"\| {worse} .*\| worse \|", markdown(card))
    assert not re.search(rf"\| {better} .*\| worse \|", markdown(card))


# ---- a trained run -----------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A world with hostile names, a run on it, and a report of it against itself with its exit code."""
    folder = tmp_path_factory.mktemp("report")
    dataset = write_world(folder / "data", users=40, rights=True)
    titles = dataset.titles.assign(title=[f'<img src="x|{index}">' for index in range(dataset.manifest.n_titles)])
    titles.to_parquet(folder / "data" / "titles.parquet")
    users = dataset.users.assign(user_id=[f"<b>u{index}</b>" for index in range(len(dataset.users))])
    users.to_parquet(folder / "data" / "users.parquet")
    train(tiny_config(folder / "data", folder / "run", "training.epochs=2"))
    arguments = ["report", str(folder / "run"), "--against", str(folder / "run"), "--out", str(folder / "against")]
    (folder / "code").write_text(str(main(arguments)))
    return folder


@pytest.fixture(scope="module")
def card(folder: Path) -> dict:
    return json.loads((folder / "against" / "report.json").read_text())


@pytest.fixture(scope="module")
def predictor(folder: Path) -> Predictor:
    return Predictor.load(folder / "run")


def test_a_run_is_not_worse_than_itself(folder: Path, card: dict) -> None:
    assert (folder / "code").read_text() == "0"
    assert card["against"]["worse"] == []
    assert all((one["difference"], one["p"], one["adjusted_p"]) == (0, 1, 1) for one in card["against"]["slices"])
    assert {one["name"] for one in card["against"]["slices"]} == set(card["slices"])


def test_the_card_holds_every_scenario_and_says_which_are_small(card: dict) -> None:
    regions = {f"region={value}" for value in ("unknown", "r1", "r2", "r3")}
    assert {"overall", *regions, "plan=ads", "plan=premium", "warm", "cold", "tenure=5-19"} <= set(card["slices"])
    for name, part in card["slices"].items():
        assert part["small"] == (part["n"] < 100 or part["users"] < 30)
        assert (f"{name}: only {part['n']} requests; read its numbers with their intervals." in card["warnings"]) == (
            part["n"] < 100
        )
        assert all(part["ci"][metric][0] <= part[metric] <= part["ci"][metric][1] for metric in METRICS)
    assert card["checkpoint"]["weights_sha256"]
    assert card["settings"]["filter_seen"] is True


def test_the_page_is_whole_and_loads_nothing(folder: Path, card: dict) -> None:
    text = (folder / "against" / "report.html").read_text()
    assert text == page(card)
    assert len(text) < 300_000
    assert not re.search(r"https?:|url\(|@import|<script|<link|<img|\bsrc=[^&]*[\"']\s*>", text.replace("&quot;", "&q"))
    assert "<b>u" not in text
    assert "&lt;img src=&quot;x|" in text
    assert "&lt;b&gt;u" in text
    for name, part in card["slices"].items():
        assert f"<td>{name}{' *' if part['small'] else ''}</td><td>{part['n']:,}</td>" in text
        for metric in METRICS:
            assert f"{part[metric]:.4f}<small>[{part['ci'][metric][0]:.4f}, {part['ci'][metric][1]:.4f}]" in text
    for warning in card["warnings"]:
        assert f"<li>{warning}</li>" in text
    assert text.count("<div") == text.count("</div>")
    assert text.count("<span") == text.count("</span>")


def test_markdown_keeps_names_in_their_cells(folder: Path, card: dict) -> None:
    text = (folder / "against" / "report.md").read_text()
    assert text == markdown(card)
    tables = [line for line in text.splitlines() if line.startswith("|")]
    widths = [len(re.findall(r"(?<!\\)\|", line)) for line in tables]
    assert set(widths) == {9, 12, 6, 3, 5}  # comparison, metrics, experts, gate, interests
    assert '\\<img src="x\\|' in text
    assert not re.search(r"(?<!\\)<", text)


def test_the_terminal_shows_a_summary(folder: Path, card: dict) -> None:
    stream = io.StringIO()
    print_card(card, folder / "report.html", Console(file=stream))
    words = [line.split() for line in stream.getvalue().splitlines()]
    part = card["slices"]["region=r1"]
    low, high = part["ci"]["ndcg@10"]
    row = ["region=r1", "*", str(part["n"]), f"{part['ndcg@10']:.4f}", f"{low:.4f}", "to", f"{high:.4f}"]
    assert row in [line[: len(row)] for line in words]
    assert f"note: {card['warnings'][0]}" in stream.getvalue()
    assert stream.getvalue().endswith(f"report: {folder / 'report.html'}\n")


@pytest.mark.parametrize(
    ("mixing", "expected"),
    [
        ("smoe", ["shared 1", "shared 2", "region's own", "plan's own"]),
        ("mmoe", ["expert 1", "expert 2", "expert 3", "expert 4"]),
        ("mlp", []),
    ],
)
def test_experts_have_names(mixing: str, expected: list[str]) -> None:
    assert expert_names(ModelConfig(mixing=mixing), ("region", "plan")) == expected


def test_gates_are_means_over_the_requests_of_a_scenario(predictor: Predictor, card: dict) -> None:
    dataset, model = predictor.dataset, card["model"]
    found = rank_rows(dataset, [predictor])
    assert model["requests"] == len(found.requests.event)
    weights, loads = [], []
    for event in found.requests.event:
        (batch,) = predictor.batches(np.array([event]))
        scores = predictor.forward(batch)
        weights.append(float(scores.gate_P[0]))
        loads.append(scores.expert_PA["cg"][0].numpy())
    for name in ("overall", "region=r1", "plan=premium"):
        rows = found.slices[name]
        assert model["gate"][name] == pytest.approx(np.mean([weights[row] for row in rows]), abs=1e-5)
        load = np.mean([loads[row] for row in rows], axis=0)
        assert model["experts"]["cg"]["load"][name] == pytest.approx(load.tolist(), abs=1e-5)
    assert not any("tenure" in name or name in ("warm", "cold") for name in model["gate"])
    assert set(model["experts"]) == {"id", "cg"}


def test_nearest_titles_by_a_loop(predictor: Predictor, card: dict) -> None:
    dataset = predictor.dataset
    requests = select_requests(dataset, "test", eligibility=None)
    cold = dataset.titles["cold"].to_numpy(bool)
    table = predictor.model.tables.state_dict()["embeddings.title.weight"]
    user_of_name = {name: place for place, name in enumerate(dataset.users["user_id"])}
    viewers = card["model"]["viewers"]
    assert len(viewers) == len({viewer["user"] for viewer in viewers}) == 5
    typical = typical_interests(predictor, requests.event)
    assert viewers == example_viewers(predictor, requests, np.arange(len(requests.event)), typical)
    categories = ["unknown category", *dataset.manifest.categories.values]
    checked = 0
    for viewer in viewers:
        events = requests.event[requests.user == user_of_name[viewer["user"]]]
        if len(events) == 1:  # else the page does not say which it was
            (batch,) = predictor.batches(events)
            interest_KD = predictor.forward(batch).interests.each()[0]
            assert [one["category"] for one in viewer["interests"]] == categories
            for k, one in enumerate(viewer["interests"]):
                apart_D = interest_KD[k] - typical.mean_KD[k]
                for vector_D, named in ((interest_KD[k], one["nearest"]), (apart_D, one["apart"])):
                    if not named:
                        assert named is one["apart"] and one["learned_default"]
                        continue
                    cosine = {
                        index: float(torch.dot(vector_D, table[index]) / (vector_D.norm() * table[index].norm()))
                        for index in np.flatnonzero(~cold)
                    }
                    best = sorted(cosine, key=lambda index: -cosine[index])[:5]
                    assert [title["index"] for title in named] == best
                    assert [title["cosine"] for title in named] == pytest.approx([cosine[i] for i in best], abs=1e-5)
                    checked += 1
    assert checked >= 3


def test_interests_tell_what_was_watched(predictor: Predictor, card: dict) -> None:
    titles = predictor.dataset.titles
    category = dict(zip(titles["title"], titles["category"], strict=True))
    defaults: dict[str, list] = {}
    for viewer in card["model"]["viewers"]:
        assert 1 <= sum(one["behaviours"] for one in viewer["interests"]) <= 6  # of a history of 6 at most
        for place, one in enumerate(viewer["interests"]):
            assert {category[name] for name in one["last_watched"]} <= {place}
            assert len(one["last_watched"]) == min(5, one["behaviours"])
            assert one["learned_default"] == (one["behaviours"] == 0)
            if one["learned_default"]:
                known = defaults.setdefault(one["category"], [title["index"] for title in one["nearest"]])
                assert [title["index"] for title in one["nearest"]] == known
    scenarios = [viewer["scenario"] for viewer in card["model"]["viewers"]]
    assert len(set(scenarios)) > 1
    assert all(re.fullmatch(r"region=\w+, plan=\w+", scenario) for scenario in scenarios)
    defaults_said = page(card).count("no behaviour: learned default")
    assert defaults_said == sum(one["learned_default"] for v in card["model"]["viewers"] for one in v["interests"])


def test_nearest_titles_leave_out_what_may_not_be_named() -> None:
    key_ND = torch.tensor([[1.0, 0.0], [0.0, 2.0], [3.0, 3.0], [-1.0, 0.0]])
    allowed_N = torch.tensor([False, True, True, True])
    index, cosine = nearest_titles(torch.tensor([[5.0, 0.0]]), key_ND, allowed_N, 7)
    assert index.tolist() == [[2, 1, 3]]
    assert cosine[0].tolist() == pytest.approx([0.5**0.5, 0, -1])


def test_typical_interests_leave_defaults_out() -> None:
    interest_PKD = torch.tensor([[[1.0, 0.0], [9.0, 9.0]], [[0.0, 3.0], [5.0, 1.0]], [[1.0, 0.0], [9.0, 9.0]]])
    typical = Typical.of(interest_PKD, torch.tensor([[True, False], [True, True], [True, False]]))
    torch.testing.assert_close(typical.mean_KD, torch.tensor([[2 / 3, 1.0], [5.0, 1.0]]))
    assert typical.alike_K[0] == pytest.approx((0 + 0 + 1) / 3)  # cosines of the three pairs
    assert not typical.alike_K[1].isfinite()


def test_typical_interests_of_the_run(predictor: Predictor, card: dict) -> None:
    """One by one: the interests of viewers who watched a title of the category lately."""
    requests = select_requests(predictor.dataset, "test", eligibility=Eligibility.from_dataset(predictor.dataset))
    of_category: dict[int, list[torch.Tensor]] = {}
    for event in requests.event:
        (batch,) = predictor.batches(np.array([event]))
        interest_KD = predictor.forward(batch).interests.each()[0]
        start = max(predictor.dataset.offsets[predictor.dataset.user_of(np.array([event]))[0]], event - 6)
        for k in {int(predictor.builder.category[title]) for title in predictor.builder.title[start:event]}:
            of_category.setdefault(k, []).append(interest_KD[k])
    typical = typical_interests(predictor, requests.event)
    names = ["unknown category", *predictor.dataset.manifest.categories.values]
    assert set(of_category) == {0, 1, 2}
    for k, interests in of_category.items():
        torch.testing.assert_close(typical.mean_KD[k], torch.stack(interests).mean(0), atol=1e-5, rtol=1e-4)
        cosines = [torch.cosine_similarity(a, b, dim=0) for a, b in combinations(interests, 2)]
        assert card["model"]["alike"][names[k]] == pytest.approx(float(torch.stack(cosines).mean()), abs=1e-4)


@pytest.mark.parametrize("override", ["model.mixing=mlp", "model.content=[]", "model.categories=false"])
def test_models_without_a_part_say_so(override: str, folder: Path, card: dict) -> None:
    dataset = PreparedDataset(folder / "data")
    config = tiny_config(folder / "data", folder / "none", override)
    untrained = Predictor(build_model(dataset, config), BatchBuilder(dataset, config), config, torch.device("cpu"))
    requests = select_requests(dataset, "test", eligibility=None, max_targets=8)
    model = inner_life(untrained, requests, {"overall": np.arange(len(requests.event))}, seed=0)
    shown = [page(card | {"model": model}), markdown(card | {"model": model})]
    assert (
        (model["experts"] == {}) == (override == "model.mixing=mlp") == ("(mlp)" in shown[0]) == ("(mlp)" in shown[1])
    )
    assert (model["gate"] is None) == (override == "model.content=[]") == all("no content branch" in s for s in shown)
    one_category = [one["category"] for one in model["viewers"][0]["interests"]] == ["all categories together"]
    assert one_category == (override == "model.categories=false")


def test_a_sample_of_many_requests_is_read(predictor: Predictor, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("m5.report_model.GATED_REQUESTS", 5)
    requests = select_requests(predictor.dataset, "test", eligibility=None)
    read: list[np.ndarray] = []
    at = Gates.at
    monkeypatch.setattr(Gates, "at", lambda predictor, event: (read.append(event), at(predictor, event))[1])
    slices = {"overall": np.arange(len(requests.event)), "region=r1": np.arange(0)}
    model = inner_life(predictor, requests, slices, seed=3)
    assert len(set(read[0])) == model["requests"] == 5
    assert list(model["gate"]) == ["overall"]


# ---- the command -------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(("option", "expected"), [([], None), (["--keep-seen"], False), (["--filter-seen"], True)])
def test_options_reach_the_report(option: list[str], expected: bool | None, monkeypatch: pytest.MonkeyPatch) -> None:
    received: dict = {}
    monkeypatch.setattr(report, "report_run", lambda run, **settings: received.update(settings, run=run) or 0)
    assert main(["report", "RUN", "--against", "OTHER", "--out", "O", "--max-targets", "9", *option]) == 0
    assert received == {
        "run": Path("RUN"),
        "against": Path("OTHER"),
        "out": Path("O"),
        "filter_seen": expected,
        "max_targets": 9,
    }
    assert parse(["report", "RUN"]).against is None


def test_mistakes_are_told_and_leave_nothing(folder: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    run, empty, moved = folder / "run", tmp_path / "empty", tmp_path / "moved"
    empty.mkdir()
    shutil.copy(run / "config.yaml", empty / "config.yaml")
    other = write_world(tmp_path / "data", users=40, rights=True, seed=1)
    shutil.copytree(run, moved)
    config = (run / "config.yaml").read_text().replace(str(folder / "data"), str(tmp_path / "data"))
    (moved / "config.yaml").write_text(config)
    record = json.loads((moved / "best" / "checkpoint.json").read_text())
    content = content_digest(other, tiny_config(tmp_path / "data", moved).model.content)
    record |= {"dataset": other.manifest.content_hash, "content": content}
    (moved / "best" / "checkpoint.json").write_text(json.dumps(record))
    foreign = tmp_path / "foreign"
    foreign.mkdir()
    (foreign / "report.md").write_text("mine")
    (tmp_path / "file").write_text("mine")
    for arguments, words in [
        (["nowhere"], "is not a run of `m5 train`"),
        ([str(empty)], "has no checkpoint"),
        ([str(run), "--against", "nowhere"], "is not a run of `m5 train`"),
        ([str(run), "--against", str(moved)], "another dataset than"),
        ([str(run), "--out", str(tmp_path / "file")], "is a file"),
        ([str(run), "--out", str(foreign)], "is no report card"),
    ]:
        assert main(["report", *arguments]) == 2
        printed = capsys.readouterr()
        assert printed.err.startswith("m5: ")
        assert words in printed.err
        assert printed.err.count("\n") == 1
        assert not printed.out
    assert (foreign / "report.md").read_text() == (tmp_path / "file").read_text() == "mine"
    assert not (run / "report").exists()
