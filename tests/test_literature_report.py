"""The pages of `m5 compare`, from small reports made by hand: every expected figure is worked out here."""

from __future__ import annotations

import itertools
import math
import re
from html.parser import HTMLParser
from pathlib import Path
from typing import Any
from xml.etree import ElementTree

import pytest

from benchmarks.literature.plots import Box, place
from benchmarks.literature.report import write_pages
from benchmarks.literature.report_figures import Comparison, number, signed, verdict, why_not_first

REQUESTS = {"overall": 1000, "region=US": 950, "region=BR": 50, "warm": 800, "cold": 200}
SETUP = {
    "preset": "default",
    "history": 50,
    "seconds": 90.0,
    "trials": 3,
    "seeds": 3,
    "filter_seen": True,
    "validation_targets": 2000,
    "max_targets": None,
    "jobs": 2,
}


def metrics(ndcg: float, requests: int) -> dict[str, Any]:
    """Hit rates rise by a tenth of NDCG from cutoff to cutoff, so that each figure of a page is known."""
    found: dict[str, Any] = {"n": requests, "ci": {}}
    for step, k in enumerate((10, 50, 200)):
        found |= {f"hr@{k}": ndcg + 0.1 * (step + 1), f"ndcg@{k}": ndcg, f"mrr@{k}": ndcg / 2}
        found |= {f"coverage@{k}": 0.5, f"debiased_hr@{k}": ndcg / 4}
    return found


def system(name: str, *overall: float, seconds: float = 10.0, **parts: float) -> dict[str, Any]:
    """A record with a run for each of `overall`; slices are as overall unless named (region_US for region=US)."""
    named = {part.replace("_", "=", 1): value for part, value in parts.items()}
    return {
        "name": name,
        "title": f"title of {name}",
        "source": f"Author of {name}, doi 10.1145/1.{name}",
        "built_on": f"library of {name}",
        "departures": f"departures of {name}",
        "by_chance": len(overall) > 1,
        "tuning": [
            {"settings": {"lr": 0.01}, "ndcg@10": 0.3, "seconds": 2.0},
            {"settings": {"lr": 0.02}, "ndcg@10": 0.4, "seconds": 3.0},
        ],
        "chosen": {"lr": 0.02},
        "cost": {
            "train_seconds": seconds,
            "tuning_seconds": 5.0,
            "peak_memory_mb": 600.0,
            "query_ms": 0.5,
            "parameters": None if name == "ease" else 12345,
        },
        "seeds": [
            {part: metrics(named.get(part, value), requests) for part, requests in REQUESTS.items()}
            for value in overall
        ],
        "head": [0.4] * len(overall),
        "head_of_targets": 0.25,
        "warnings": ["region=BR: only 50 requests; read its numbers with their intervals."],
    }


def report(*records: dict[str, Any], width: float = 0.01) -> dict[str, Any]:
    """With intervals of `width` to both sides of each difference."""
    measured = {record["name"]: record for record in records if "seeds" in record}
    against: dict[str, Any] = {}
    if "m5" in measured:
        for name, record in measured.items():
            if name != "m5":
                against[name] = {
                    part: beside(mean(measured["m5"], part) - mean(record, part), name, width)
                    for part in record["seeds"][0]
                    if record["seeds"][0][part]["n"]
                }
    return {
        "date": "2026-11-27 04:06",
        "command": "m5 compare --data DATA --systems all --out OUT",
        "machine": {
            "cpu": "CPU, 2 cores",
            "memory_gb": 8.0,
            "gpu": None,
            "versions": {"torch": "2.0"},
            "commit": "abc",
        },
        "dataset": {
            "name": "synthetic",
            "content_hash": "0123456789abcdef",
            "users": 5000,
            "titles": 1000,
            "events": 200000,
            "cold_titles": 70,
            "notes": ["image: made up"],
        },
        "setup": SETUP,
        "systems": list(records),
        "against_m5": against,
    }


def beside(difference: float, name: str, width: float) -> dict[str, Any]:
    low, high = difference - width, difference + width
    return {
        "difference": difference,
        "low": low,
        "high": high,
        "better": "m5" if low > 0 else name if high < 0 else None,
    }


def mean(record: dict[str, Any], part: str) -> float:
    return sum(seed[part]["ndcg@10"] for seed in record["seeds"]) / len(record["seeds"])


def pages(tmp_path: Path, made: dict[str, Any]) -> tuple[str, str]:
    """compare.md and compare.html."""
    written = write_pages(made, tmp_path)
    assert [path.name for path in written] == ["compare.md", "compare.html"]
    assert sorted(path.name for path in tmp_path.iterdir()) == ["compare.html", "compare.md"]
    return written[0].read_text(), written[1].read_text()


def section(markdown: str, heading: str) -> str:
    return markdown.split(f"\n## {heading}\n")[1].split("\n## ")[0]


def cells(line: str) -> list[str]:
    return [cell.strip() for cell in line.strip("|").split(" | ")]


M5 = system("m5", 0.30, 0.32, 0.34)


def test_numbers_have_no_leading_zero() -> None:
    assert [number(value) for value in (0.12344, 1.0, 0.0, -0.5, None, math.nan)] == [
        ".1234",
        "1.0000",
        ".0000",
        "-.5000",
        "—",
        "—",
    ]
    assert [signed(value) for value in (0.0097, -0.0097)] == ["+.0097", "-.0097"]


def test_verdict_where_m5_is_first() -> None:
    assert verdict(Comparison(report(M5, system("als", 0.28), system("ease", 0.25)))) == (
        "M5 is first on NDCG@10 over all requests with .3200, ahead of als (.2800) by .0400 "
        "(95% interval of M5 less als: +.0300 to +.0500; clear)."
    )
    unclear = verdict(Comparison(report(M5, system("als", 0.28), width=0.1)))
    assert unclear.endswith("(95% interval of M5 less als: -.0600 to +.1400; not clear, it holds 0).")
    assert why_not_first(Comparison(report(M5, system("als", 0.28)))) == []


def test_verdict_where_m5_is_not_first() -> None:
    comparison = Comparison(report(M5, system("als", 0.325), system("ease", 0.42), system("svd", 0.1)))
    assert verdict(comparison) == (
        "M5 is not first on NDCG@10 over all requests: ease is, with .4200, ahead of M5 (.3200) by .1000 (95% interval "
        "of M5 less ease: -.1100 to -.0900; clear). M5 has place 3 of 4; 1 of the 2 above it clearly ahead."
    )


def test_the_distance_to_the_first_is_split_over_warm_and_cold_titles() -> None:
    ahead = system("ease", 0.34, warm=0.40, cold=0.10, region_BR=0.5)
    said = why_not_first(Comparison(report(system("m5", 0.32, seconds=19.0), ahead)))
    # 800 of 1,000 requests at .32 - .40, 200 at .32 - .10.
    assert said[0] == (
        "What adds up to M5 less ease: warm titles -.0640 (-.0800 on 800 requests), cold titles +.0440 (+.2200 on 200 "
        "requests)."
    )
    assert said[1] == "By scenario value it goes from -.1800 (region=BR) to -.0200 (region=US)."
    assert (
        said[2] == "A training took M5 19.0 s, ease 10.0 s, of 20.0 s allowed. M5 used all of it: more time may help."
    )


def test_verdict_without_m5_or_without_others() -> None:
    alone = Comparison(report(M5))
    assert verdict(alone) == "M5 alone has results here (NDCG@10 .3200): there is nothing to compare it with."
    failed = Comparison(report({"name": "m5", "failed": "ValueError: no"}, system("als", 0.2)))
    assert verdict(failed) == (
        "M5 has no results here (failed: ValueError: no), so nothing is compared with it. Of the others als is first "
        "with NDCG@10 .2000."
    )


def test_main_table_has_means_spreads_and_differences_best_first(tmp_path: Path) -> None:
    markdown, _ = pages(tmp_path, report(system("ease", 0.25), M5, system("als", 0.1, 0.2, 0.6)))
    lines = [cells(line) for line in section(markdown, "All requests").splitlines() if line.startswith("|")]
    assert [line[0] for line in lines[2:]] == ["**M5**", "als", "ease"]
    # Sample deviation: sqrt((.02^2 + 0 + .02^2) / 2) = .02; of .1, .2, .6: sqrt((.2^2 + .1^2 + .3^2) / 2) = .2646.
    own = (".3200", ".0200", ".4200", ".5200", ".6200", ".1600", ".5000", "—", "—")
    assert lines[2][1:] == [f"**{cell}**" for cell in own]
    assert lines[3][1:3] == [".3000", ".2646"]
    assert lines[4][1:3] == [".2500", "—"], "one run has no spread"
    assert lines[4][-2:] == ["+.0700 (+.0600 to +.0800)", "M5 better"]


def test_the_beaten_cells_are_exactly_those_planted(tmp_path: Path) -> None:
    made = report(
        M5,
        system("ease", 0.30, warm=0.36, region_BR=0.325),
        system("als", 0.20, cold=0.35),
    )
    markdown, page = pages(tmp_path, made)
    beaten = section(markdown, "Where a system beats M5")
    table, rest = beaten.split("Higher mean than M5")
    assert "Clearly better than M5 on NDCG@10 in 2 of 10 cells:" in table
    assert [cells(line) for line in table.splitlines() if line.startswith("|")][2:] == [
        ["ease", "warm", "800", ".3600", ".3200", "-.0400 (-.0500 to -.0300)"],
        ["als", "cold", "200", ".3500", ".3200", "-.0300 (-.0400 to -.0200)"],
    ]
    assert [line for line in rest.splitlines() if line.startswith("- ")] == [r"- ease: region=BR\* (-.0050)"]
    assert "fewer than 100 requests" in rest
    scenarios = section(markdown, "By scenario")
    assert r"| region=US | region=BR\* |" in scenarios
    assert "| ease | .3000 | .3250 △ |" in scenarios
    drawn = re.sub(r"<figcaption>.*?</figcaption>|<p .*?</p>", "", page)
    assert "▲" not in drawn, "besides where the sign is explained"
    assert "△" in drawn
    assert "▲" not in "".join(line for line in scenarios.splitlines() if line.startswith("|"))


def test_a_clear_cell_is_marked_by_a_sign_and_not_by_colour_alone(tmp_path: Path) -> None:
    markdown, page = pages(tmp_path, report(M5, system("ease", 0.30, region_US=0.4)))
    assert "| ease | **.4000 ▲** | .3000 |" in section(markdown, "By scenario")
    assert "<td><strong>.4000 ▲</strong></td>" in page


def test_nowhere_is_said_and_other_measures_are_compared(tmp_path: Path) -> None:
    cheap = system("ease", 0.30, seconds=0.5)
    cheap["seeds"][0]["overall"]["coverage@10"] = 0.75
    cheap["cost"]["query_ms"] = 0.0005
    markdown, _ = pages(tmp_path, report(M5, cheap))
    beaten = section(markdown, "Where a system beats M5")
    assert "Clearly, on NDCG@10: nowhere, in 5 cells." in beaten
    assert "Higher mean without being clear: nowhere." in beaten
    rows = {line[0]: line[1:] for line in map(cells, beaten.splitlines()) if len(line) == 3}
    assert rows["coverage@10"] == [".5000", "ease .7500"]
    assert rows["HR@50"] == [".5200", "none"]
    assert rows["seconds of a training"] == ["10.0", "ease 0.5"]
    assert rows["ms a request"] == ["0.5", "ease &lt;0.001"]


def test_skipped_and_failed_systems_stand_with_their_reasons(tmp_path: Path) -> None:
    skipped = {"name": "mu-wu", "title": "CNN", "skipped": "the dataset has no posters"}
    failed = {"name": "bert", "failed": "RuntimeError: out of memory"}
    for text in pages(tmp_path, report(M5, system("als", 0.2), skipped, failed)):
        assert "Without results: mu-wu (skipped: the dataset has no posters), bert (failed: RuntimeError" in text
        assert "mu-wu: skipped: the dataset has no posters" in text
        assert "bert: failed: RuntimeError: out of memory" in text
        assert "Published for predicting ratings: mu-wu." in text


def test_cost_says_how_much_of_the_time_was_used(tmp_path: Path) -> None:
    markdown, _ = pages(tmp_path, report(M5, system("ease", 0.2, seconds=30.0)))
    cost = section(markdown, "Cost")
    assert "| ease | 30.0 | 150% | 5 | 600 | 0.5 | — |" in cost
    assert "| **M5** | **10.0** | **50%** | **5** | **600** | **0.5** | **12,345** |" in cost
    assert "above 105%: ease 150%;" in cost
    assert "A training of M5 took" not in markdown
    markdown, _ = pages(tmp_path, report(system("m5", 0.3, seconds=50.0), system("ease", 0.2)))
    assert "\n\nA training of M5 took 250% of the time allowed;" in markdown, "beside the verdict"


def test_time_is_named_as_it_is_printed_and_in_tuning_too(tmp_path: Path) -> None:
    """20 s are allowed for a training and 10 s for a try of settings."""
    slow = system("ease", 0.2, seconds=21.0)
    slow["tuning"][1]["seconds"] = 10.6
    cost = section(pages(tmp_path, report(M5, slow, system("als", 0.1, seconds=21.2)))[0], "Cost")
    assert "| ease | 21.0 | 105% |" in cost
    assert "| als | 21.2 | 106% |" in cost
    assert "above 105%: ease 106% in tuning, als 106%;" in cost
    assert "above 105%: none;" in section(pages(tmp_path, report(M5, system("ease", 0.2, seconds=21.0)))[0], "Cost")


def test_a_failed_try_has_its_reason_for_a_value(tmp_path: Path) -> None:
    broken = system("ease", 0.2)
    broken["tuning"][0] |= {"ndcg@10": None, "failed": "scored a title with NaN"}
    markdown, _ = pages(tmp_path, report(M5, broken))
    assert "| ease | — | 2 | failed: scored a title with NaN | lr 0.01 |" in markdown


def test_the_protocol_says_what_each_system_reads(tmp_path: Path) -> None:
    names = ("mind", "comirec", "ease", "popularity", "als")
    records = [M5, *(system(name, 0.3 - 0.01 * place) for place, name in enumerate(names))]
    assert (
        "A system reads the last 50 behaviours of a viewer. But mind, comirec read the last 20 behaviours; ease, als "
        "read all earlier behaviours; popularity reads no behaviour."
    ) in pages(tmp_path, report(*records))[0]
    assert "reads the last 50 behaviours of a viewer.\n" in pages(tmp_path, report(M5, system("sasrec", 0.2)))[0]


def made_on(record: dict[str, Any], **facts: Any) -> dict[str, Any]:
    usual = {"date": "2026-11-27 04:00", "commit": "abc", "cpu": "CPU, 2 cores", "versions": {"torch": "2.0"}}
    return record | {"made": usual | {"threads": 1, "load": 0.5} | facts}


def test_how_rows_were_made_is_printed_where_they_differ(tmp_path: Path) -> None:
    early = made_on(system("ease", 0.2), date="2026-11-26 23:00", commit="def", threads=2, load=3.25)
    markdown, _ = pages(tmp_path, report(made_on(M5), early))
    assert "| system | date | load before | commit | threads |" in markdown
    assert "| ease | 2026-11-26 23:00 | 3.25 | def | 2 |" in markdown
    assert "| M5 | 2026-11-27 04:00 | 0.5 | abc | 1 |" in markdown
    alike = made_on(system("ease", 0.2), date="2026-11-27 05:00", load=2)
    assert "load before" not in pages(tmp_path, report(made_on(M5), alike))[0]


def test_slices_of_few_viewers_are_marked(tmp_path: Path) -> None:
    made = report(M5, system("ease", 0.2)) | {"viewers": {"overall": 40, "region=US": 29, "region=BR": 40}}
    scenarios = section(pages(tmp_path, made)[0], "By scenario")
    assert r"| region=US\* | region=BR\* |" in scenarios
    assert "fewer than 100 requests or 30 viewers" in scenarios


def test_one_viewer_has_no_interval(tmp_path: Path) -> None:
    made = report(M5, system("ease", 0.2))
    made["against_m5"]["ease"]["overall"] |= {"low": None, "high": None, "better": None}
    markdown, _ = pages(tmp_path, made)
    assert "(95% interval of M5 less ease: one viewer, no interval; not clear, it holds 0)" not in markdown
    assert "+.1200 (one viewer, no interval) | not clear |" in markdown


def test_a_bar_in_code_ends_no_cell(tmp_path: Path) -> None:
    made = report(M5, system("ease", 0.2))
    made["command"] = "m5 compare --data 'a|b'"
    assert r"| command | `m5 compare --data 'a\|b'` |" in pages(tmp_path, made)[0]


def test_what_was_tuned_and_what_limits_the_comparison(tmp_path: Path) -> None:
    for text in pages(tmp_path, report(M5, system("ease", 0.2))):
        for said in (
            "90 s of training altogether",
            "20.0 s each",
            "systems that learn slowly are undertrained here",
            "Intervals are not corrected for the number of cells: there are 5",
            "docs/results/2026-11-27-search.md",
            "so that favours M5",
            "and of MovieLens-1M (a few one-epoch trials)",
            "image: made up",
            "only 50 requests",
            "Author of ease, doi 10.1145/1.ease",
            "at least .0500",
        ):
            assert said in text, said
    markdown, _ = pages(tmp_path, report(M5, system("ease", 0.2)))
    assert "| ease | .4000 | 3 | chosen | lr 0.02 |" in markdown
    assert "| ease | .3000 | 2 |  | lr 0.01 |" in markdown


def test_the_looks_at_validation_data_are_told_of_any_dataset(tmp_path: Path) -> None:
    made = report(M5, system("ease", 0.2))
    made["dataset"]["name"] = "ml-1m"
    markdown, _ = pages(tmp_path, made)
    assert "validation data of the synthetic world (among them a search of 20 trials" in markdown
    assert "and of MovieLens-1M (a few one-epoch trials)" in markdown
    assert "so that favours M5" not in markdown


def test_text_is_escaped(tmp_path: Path) -> None:
    nasty = system("ease", 0.2) | {"title": '<img src="x"> | *y* `z`', "chosen": {"lr": 0.01}}
    made = report(M5, nasty, {"name": "bert", "failed": "<script>alert(1)</script>"})
    made["command"] = "m5 compare --data 'a|b`c<d>'"
    markdown, page = pages(tmp_path, made)
    assert "&lt;img src=&quot;x&quot;&gt; | *y* `z`" in page
    assert "&lt;script&gt;alert(1)" in page
    assert "<script" not in page + markdown
    assert "<img" not in page + markdown
    assert r'&lt;img src="x"&gt; \| \*y\* \`z\`' in markdown


class Balance(HTMLParser):
    """Whether tags that open also close, in order."""

    def __init__(self) -> None:
        super().__init__()
        self.open: list[str] = []
        self.names: list[str] = []

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.names += [value or "" for name, value in attrs if name == "id"]
        if tag not in ("meta", "br"):
            self.open.append(tag)

    def handle_startendtag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        pass

    def handle_endtag(self, tag: str) -> None:
        assert self.open.pop() == tag


def test_twenty_systems_on_a_page_that_loads_nothing(tmp_path: Path) -> None:
    names = [f"system-{index}" for index in range(19)]
    systems = [system(name, 0.3 - 0.01 * index, seconds=20.0) for index, name in enumerate(names)]
    markdown, page = pages(tmp_path, report(M5, *systems))
    assert len(page.encode()) < 300_000
    assert not re.search(r"https?://|url\(|@import|<script|<link|<img|\ssrc=|\shref=", page)
    parser = Balance()
    parser.feed(page)
    assert parser.open == []
    assert len(parser.names) == len(set(parser.names)), "an identifier stands twice"
    for name in ("M5", *names):
        assert re.search(rf"^\| \**{name}\** \|", markdown, re.MULTILINE)
        assert f">{name}<" in page
    drawings = re.findall(r"<svg.*?</svg>", page, re.DOTALL)
    assert len(drawings) == 2 + 2 + 1 + 1  # cost, wide and narrow; two scenario values; cold titles; popularity
    for drawing in drawings:
        root = ElementTree.fromstring(drawing)
        assert root[0].tag == "title"
        assert root[1].tag == "desc"
        texts = [text.text for text in root.iter("text")]
        assert {"M5", *names} <= set(texts)


def test_labels_of_points_in_a_column_keep_off_each_other() -> None:
    frame = Box(40, 20, 860, 420)
    places = [(600 + index % 3, 40.0 + 14 * index) for index in range(20)]
    boxes = place([f"system-{index}" for index in range(20)], places, frame)
    assert max(one.overlap(other) for one, other in itertools.combinations(boxes, 2)) == 0
    for box in boxes:
        assert box.overlap(frame) == pytest.approx((box.right - box.left) * (box.bottom - box.top))


def test_m5_alone_has_a_report(tmp_path: Path) -> None:
    markdown, page = pages(tmp_path, report(M5))
    assert "M5 alone has results here" in markdown
    assert "Where a system beats M5" not in markdown
    assert "| **M5** | **.3200** |" in markdown
    assert "<svg" in page


def test_no_system_with_results_has_a_report(tmp_path: Path) -> None:
    for text in pages(tmp_path, report({"name": "m5", "failed": "ValueError: no"})):
        assert "M5 has no results here (failed: ValueError: no), so nothing is compared with it." in text
        assert "All requests" not in text


def test_a_dataset_without_scenarios_and_without_cold_requests(tmp_path: Path) -> None:
    records = [system("m5", 0.3, 0.32, 0.34), system("ease", 0.25)]
    for record in records:
        for seed in record["seeds"]:
            del seed["region=US"], seed["region=BR"]
            seed["cold"] = dict.fromkeys(seed["cold"], math.nan) | {"n": 0}
    markdown, page = pages(tmp_path, report(*records))
    assert "The dataset has no scenarios." in markdown
    assert "No test request asks for a title launched after the training period." in markdown
    assert "nan" not in re.sub(r"<style>.*</style>", "", page, flags=re.DOTALL).lower()
