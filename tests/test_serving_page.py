"""The page at `/`: what is served, and in headless Chromium what a visitor sees, switches, searches and is told."""

from __future__ import annotations

import itertools
import json
import os
import re
import shutil
import subprocess
import sys
import urllib.request
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from m5.schema import PreparedDataset
from m5.serving.export import Options, export
from m5.serving.service import PAGE
from tests.chromium import Page, browser, find_chromium
from tests.serving import get, recommend, served, wait_for, write_run
from tests.world import REGIONAL

HOSTILE = '<img src="x" onerror="window.harmed = 1">'
KEY = "k" * 24


# ---- services ----------------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def artifact(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Titles 0 and 1 have posters; all names are hostile."""
    folder = tmp_path_factory.mktemp("page")
    run = write_run(folder)
    titles = PreparedDataset(folder / "data").titles
    titles.assign(title=[f"Title {n} {HOSTILE}" for n in range(len(titles))]).to_parquet(
        folder / "data" / "titles.parquet"
    )
    return export(run, folder / "artifact", Options(viewers=3, program=False)).folder


@pytest.fixture(scope="module")
def site(artifact: Path) -> Iterator[str]:
    """Address of `m5 serve` in a process of its own."""
    command = [
        sys.executable,
        "-m",
        "m5.cli",
        "serve",
        str(artifact),
        "--port",
        "0",
        "--now",
        "dataset",
        "--threads",
        "1",
    ]
    environment = os.environ | {"PYTHONUNBUFFERED": "1"}
    with subprocess.Popen(command, stdout=subprocess.PIPE, text=True, env=environment) as process:
        assert process.stdout is not None
        try:
            address = re.search(r"http://\S+/", process.stdout.readline())
            assert address is not None
            yield wait_for(address[0])
        finally:
            process.terminate()


# ---- what is served ----------------------------------------------------------------------------------------------


def test_files_have_their_types_and_a_strict_policy(site: str) -> None:
    assert sorted(path.suffix for path in PAGE.iterdir() if path.suffix not in (".js", ".css")) == [".html"]
    for name in ["", *(f"page/{path.name}" for path in PAGE.iterdir() if path.suffix != ".html")]:
        with urllib.request.urlopen(site + name, timeout=20) as answer:
            kind = {".css": "text/css", ".js": "text/javascript"}.get(Path(name).suffix, "text/html")
            assert answer.headers["Content-Type"].split(";")[0] == kind
            assert "default-src 'self'" in answer.headers["Content-Security-Policy"]
            assert "unsafe" not in answer.headers["Content-Security-Policy"]
            assert answer.headers["X-Content-Type-Options"] == "nosniff"


def test_nothing_comes_from_elsewhere_and_no_text_becomes_markup() -> None:
    for path in PAGE.iterdir():
        text = path.read_text()
        assert set(re.findall(r"https?:[^\s'\"]*", text)) <= {"http://www.w3.org/2000/svg"}, path.name
        assert not re.search(r"innerHTML|outerHTML|insertAdjacentHTML|document\.write|\beval\(|new Function", text)
        assert len(text.splitlines()) < (450 if path.suffix == ".js" else 300)
    html = (PAGE / "index.html").read_text()
    assert not re.search(r"\s(style|on\w+)=|<style|<script(?![^>]*\ssrc=)", html)
    linked = set(re.findall(r'(?:src|href)="/page/([^"]+)"', html))
    for path in PAGE.glob("*.js"):
        linked |= set(re.findall(r'from "\./([^"]+)"', path.read_text()))
    assert linked == {path.name for path in PAGE.iterdir()} - {"index.html"}


@pytest.mark.skipif(shutil.which("node") is None, reason="needs node")
def test_scripts_parse(tmp_path: Path) -> None:
    for path in PAGE.glob("*.js"):
        module = tmp_path / f"{path.stem}.mjs"
        shutil.copy(path, module)
        subprocess.run(["node", "--check", module], check=True, timeout=20)


# ---- what a visitor sees -----------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def window(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Page]:
    if find_chromium() is None:
        pytest.skip("needs Chromium: apt-get install chromium")
    with browser(tmp_path_factory.mktemp("chromium")) as page:
        page.prefer(reduced_motion="reduce")
        yield page


@pytest.fixture
def page(window: Page, site: str) -> Page:
    """The page, loaded anew where a test before left it elsewhere or changed its scripts."""
    if not window.evaluate(f"location.href.startsWith('{site}') && innerWidth === 1280 && !window.changed"):
        load(window, site)
    window.complaints.clear()
    return window


READY = "document.querySelector('#main').ariaBusy === 'false'"
IDS = "[...document.querySelectorAll('{}')].map((one) => one.dataset.title)"
visits = itertools.count()


def load(page: Page, site: str, state: str = "", **how: Any) -> None:
    page.open(f"{site}?{next(visits)}#{state}", **how)
    page.until(READY)


def visit(page: Page, state: str = "") -> None:
    """Another state of the loaded page, by its address."""
    busy = "document.querySelector('#main').ariaBusy = 'true'"
    page.evaluate(f"{busy}; location.hash = '{state}&visit={next(visits)}'")
    page.until(READY)


def switch(page: Page, name: str, value: str) -> None:
    page.evaluate(f'document.querySelector(\'input[name="{name}"][value="{value}"]\').click()')
    page.until(READY)


def shown(page: Page, where: str) -> list[str]:
    return page.evaluate(IDS.format(f"{where} > .card > .open"))


def text(page: Page, where: str) -> str:
    return page.evaluate(f"document.querySelector('{where}').textContent.trim()")


def complaints(page: Page) -> list[str]:
    """Of the page, other than that a title has no poster, which is an ordinary answer."""
    return [told for told in page.complaints if not re.search(r"404.*/poster$", told)]


def body_of(site: str, viewer: int, **scenario: str) -> dict[str, Any]:
    body = get(f"{site}v1/viewers")[viewer]
    return body | {"k": 200, "explain": True, "scenario": body.get("scenario", {}) | scenario}


@pytest.mark.parametrize(("width", "height", "phone"), [(1280, 900, False), (360, 800, True)])
def test_shelves_are_the_answer(page: Page, site: str, width: int, height: int, phone: bool) -> None:
    load(page, site, width=width, height=height, phone=phone)
    answer = recommend(site, body_of(site, 0))
    best = [title["title_id"] for title in answer["titles"]]
    assert page.evaluate("document.querySelector('#hero').dataset.best") == best[0]
    assert shown(page, "#shelf-for-you > .row") == best[1:19]
    shelved = page.evaluate(IDS.format(".shelf:not(#shelf-lost) .open"))
    assert sorted(shelved) == sorted(best[1:])  # each title once
    cold = {title["title_id"] for title in answer["titles"] if title["cold"]}
    marked = page.evaluate(
        "[...document.querySelectorAll('.shelf .badge')].map((one) => one.parentElement.dataset.title)"
    )
    assert set(marked) == cold - {best[0]}
    history = [watched["title_id"] for watched in body_of(site, 0)["history"]]
    assert shown(page, "#strip") == history[::-1]
    assert page.evaluate("document.querySelector('#strip .open').title").startswith("Title ")  # its name was asked for
    assert text(page, "#eligible").startswith(f"{answer['eligible']} of 30 ")
    assert re.fullmatch(r"· \d+ ms", text(page, "#timing"))
    assert page.evaluate("document.documentElement.scrollWidth") == width
    assert complaints(page) == []


def test_posters_cover_initials_which_stay_where_there_is_none(page: Page, site: str) -> None:
    visit(page, "viewer=own&region=r1&plan=ads")  # title 0 may be played in r1
    poster = "document.querySelector('.shelf [data-title={}] .poster, #hero[data-best={}] > .poster:not(.wash)')"
    page.until(f"{poster.format('t0', 't0')}.querySelector('img').matches('.there')")
    page.evaluate(f"{poster.format('t5', 't5')}.scrollIntoView()")
    page.until(f"{poster.format('t5', 't5')}.matches('.bare')")
    box = f"(({{ width, height }}) => 2 * height / width)({poster.format('t5', 't5')}.getBoundingClientRect())"
    assert page.evaluate(box) == pytest.approx(3, abs=0.1)  # the place that artwork would have


def test_hostile_names_are_text(page: Page, site: str) -> None:
    visit(page)
    page.evaluate("document.querySelector('#shelf-for-you .open').click()")
    page.until("document.querySelector('#panel .row')")
    assert HOSTILE in text(page, "#panel h2") and HOSTILE in text(page, "#shelf-for-you .name")
    assert page.evaluate("document.querySelector('img[src=x]') === null && window.harmed === undefined")


def test_a_switch_takes_titles_away_and_the_link_reproduces_it(page: Page, site: str) -> None:
    visit(page)
    switch(page, "region", "r1")
    before = recommend(site, body_of(site, 0, region="r1"))
    assert text(page, "#eligible").startswith(f"{before['eligible']} ")
    switch(page, "region", "r2")
    answer = recommend(site, body_of(site, 0, region="r2"))
    lost = [title["title_id"] for title in answer["taken_away"]]
    watched = {title["title_id"] for title in body_of(site, 0)["history"]}
    regional = {f"t{n}" for n in range(REGIONAL)} - watched
    assert regional <= set(lost) and not regional & set(page.evaluate(IDS.format(".shelf:not(#shelf-lost) .open")))
    assert shown(page, "#shelf-lost > .row") == lost
    above = sum(title["score"] > answer["taken_away"][0]["score"] for title in answer["titles"])
    assert text(page, "#shelf-lost .meta") == f"would be no. {above + 1}"
    assert page.evaluate("document.querySelector('#shelf-lost .did') === null")  # one cannot watch what one may not
    # What changed is told: in words to a screen reader, at the shelf, and at each title that came.
    best = [{title["title_id"] for title in one["titles"][:19]} for one in (before, answer)]
    arrived, left = len(best[1] - best[0]), len(best[0] - best[1])
    assert text(page, "#told").endswith(f"{arrived} arrived and {left} left.")
    assert text(page, "#shelf-for-you .note").startswith(f"{arrived} arrived, {left} left")
    assert left == 0 or "(rights)" in text(page, "#shelf-for-you .note")
    there = page.evaluate("location.hash").removeprefix("#")
    assert there.startswith("viewer=0&region=r2&")
    state = [shown(page, "#shelf-for-you > .row"), text(page, "#eligible")]
    load(page, site, there)
    assert [shown(page, "#shelf-for-you > .row"), text(page, "#eligible")] == state
    assert page.evaluate("document.querySelector('input[value=r2]').checked")


def test_unknown_values_have_an_answer(page: Page, site: str) -> None:
    visit(page, "viewer=0&region=nowhere&plan=")
    assert page.evaluate("document.querySelector('input[name=region][value=\"\"]').checked")
    body = body_of(site, 0) | {"scenario": {}}
    assert text(page, "#eligible").startswith(f"{recommend(site, body)['eligible']} ")
    assert complaints(page) == []


def test_a_history_from_nothing_by_keyboard(page: Page, site: str) -> None:
    visit(page, "viewer=own&region=r1")
    assert shown(page, "#strip") == [] and text(page, "#watched-note").startswith("nothing yet")
    assert shown(page, "#shelf-for-you > .row")  # where and how one watches is enough
    page.evaluate("document.querySelector('#search').focus()")
    page.write("title 7 ")
    page.until("document.querySelectorAll('#found button').length === 1")
    page.press("ArrowDown")
    page.press("Enter")
    page.until("document.querySelectorAll('#strip .card').length === 1")
    page.until(READY)
    assert shown(page, "#strip") == ["t7"] and "added=t7" in page.evaluate("location.hash")
    assert page.evaluate("document.activeElement.id") == "search" and not page.evaluate("search.value")
    assert "t7" not in page.evaluate(IDS.format(".shelf .open"))  # what was watched is not recommended
    second = shown(page, "#shelf-for-you > .row")[0]
    page.evaluate("document.querySelector('#shelf-for-you .open').focus()")
    page.press("Tab")
    page.press("Enter")
    page.until("document.querySelectorAll('#strip .card').length === 2")
    page.until(READY)
    assert page.evaluate("document.activeElement.closest('#shelf-for-you') !== null")  # goes on where it was
    assert shown(page, "#strip") == [second, "t7"]
    page.evaluate("document.querySelector('#strip [data-title=t7]').click()")
    page.until("document.querySelectorAll('#strip .card').length === 1")
    page.evaluate("document.querySelector('#undo').click()")
    page.until("document.querySelectorAll('#strip .card').length === 0")
    page.until(READY)
    assert complaints(page) == []


def test_a_watched_title_can_be_taken_out_and_put_back(page: Page, site: str) -> None:
    visit(page)
    before = shown(page, "#strip")
    page.evaluate("document.querySelector('#strip .open').click()")
    page.until(f"document.querySelector('#strip [data-title={before[0]}]') === null")
    assert shown(page, "#strip") == [title for title in before if title != before[0]]
    assert f"removed={before[0]}" in page.evaluate("location.hash")
    page.until(READY)
    page.evaluate("document.querySelector('#undo').click()")
    page.until(f"document.querySelectorAll('#strip .card').length === {len(before)}")
    assert shown(page, "#strip") == before and page.evaluate("document.querySelector('#undo').hidden")


def test_a_row_is_one_stop_and_the_panel_gives_its_reasons(page: Page, site: str) -> None:
    visit(page)
    answer = recommend(site, body_of(site, 0))
    page.evaluate("document.querySelector('#shelf-for-you .open').focus()")
    page.press("ArrowRight")
    title = answer["titles"][2]
    focused = "document.activeElement.dataset.title"
    assert page.evaluate(focused) == title["title_id"]
    page.press("Tab")
    assert page.evaluate("document.activeElement.className") == "did"
    page.press("Tab")
    assert page.evaluate("document.activeElement.closest('#shelf-for-you') === null")
    page.press("Tab", shift=True)
    page.press("Tab", shift=True)
    assert page.evaluate(focused) == title["title_id"]
    page.press("Enter")
    page.until("document.querySelector('#panel').open && document.querySelector('#panel .row')")
    parts = [abs(title["id_score"]), abs(title["cg_score"])]
    widths = page.evaluate(
        "[...document.querySelectorAll('#panel .bar:not(.thin) i')].map((one) => parseFloat(one.style.width))"
    )
    assert widths == pytest.approx([100 * part / sum(parts) for part in parts], abs=0.1)
    lines = page.evaluate("[...document.querySelectorAll('#panel .why .line')].map((one) => one.textContent)")
    names = {named["title_id"]: named["title"] for named in get(f"{site}v1/titles?limit=100")}
    assert [line.partition("ID ")[0] for line in lines] == [
        f"{initials(names[one['title_id']])}{names[one['title_id']]}" for one in title["because"]
    ]
    scenario = "&".join(f"scenario={name}:{value}" for name, value in body_of(site, 0)["scenario"].items())
    when = body_of(site, 0)["timestamp"]
    similar = get(f"{site}v1/titles/{title['title_id']}/similar?k=14&timestamp={when}&{scenario}")["titles"]
    assert shown(page, "#panel .row") == [one["title_id"] for one in similar]
    page.press("Escape")
    page.until("!document.querySelector('#panel').open")
    assert page.evaluate(focused) == title["title_id"]  # where one was before
    assert complaints(page) == []


def initials(name: str) -> str:
    return "".join(word[0] for word in name.split()[:2]).upper()


def test_only_the_newest_answer_is_drawn(page: Page, site: str) -> None:
    visit(page)
    # The first request's answer is held back, deaf to its being given up, until the second's is on the page.
    page.evaluate("""{
      window.changed = true;
      const real = window.fetch;
      let first = true;
      window.held = new Promise((free) => (window.free = free));
      window.fetch = async (path, options) => {
        if (!path.startsWith("/v1/recommend") || !first) return real(path, options);
        first = false;
        const answer = await real(path, { ...options, signal: undefined });
        await window.held;
        return answer;
      };
    }""")
    page.evaluate("document.querySelector('input[value=r1]').click()")
    switch(page, "region", "r2")
    expected = recommend(site, body_of(site, 0, region="r2"))
    state = [text(page, "#eligible"), shown(page, "#shelf-for-you > .row")]
    page.evaluate("window.free(); window.held.then(() => new Promise((next) => requestAnimationFrame(next)))")
    page.until(READY)
    assert [text(page, "#eligible"), shown(page, "#shelf-for-you > .row")] == state
    assert state[1] == [title["title_id"] for title in expected["titles"][1:19]]


def test_cards_can_be_opened_while_another_viewers_answer_is_awaited(page: Page, site: str) -> None:
    visit(page)
    hold_back_recommendations(page)
    page.evaluate("viewer.value = '1'; viewer.dispatchEvent(new Event('change'))")
    page.evaluate("document.querySelector('#shelf-for-you .open').click()")
    page.until("document.querySelector('#panel').open && document.querySelector('#panel .row')")
    assert "no. 2 for this viewer" in text(page, "#panel .cap")
    page.press("Escape")
    page.evaluate("window.free()")
    page.until(READY)
    assert shown(page, "#shelf-for-you > .row") == [
        title["title_id"] for title in recommend(site, body_of(site, 1))["titles"][1:19]
    ]
    assert text(page, "#shelf-for-you .note") == ""  # with another viewer there is nothing to compare
    assert complaints(page) == []


def hold_back_recommendations(page: Page) -> None:
    """Until window.free() is called."""
    page.evaluate("""{
      window.changed = true;
      const real = window.fetch;
      const held = new Promise((free) => (window.free = free));
      window.fetch = async (path, options) => {
        if (path.startsWith("/v1/recommend")) await held;
        return real(path, options);
      };
    }""")


def test_similar_titles_are_of_the_viewers_time(page: Page, site: str) -> None:
    visit(page)
    page.evaluate("""{
      window.changed = true;
      const real = window.fetch;
      window.asked = [];
      window.fetch = (path, options) => (window.asked.push(path), real(path, options));
    }""")
    page.evaluate("document.querySelector('#shelf-for-you .open').click()")
    page.until("document.querySelector('#panel .row')")
    when = body_of(site, 0)["timestamp"]
    assert [f"timestamp={when}" in path for path in page.evaluate("window.asked") if "/similar" in path] == [True]


def test_shelves_are_labelled_whatever_a_category_is_called(page: Page, site: str) -> None:
    visit(page)
    page.evaluate("""{
      window.changed = true;
      const real = window.fetch;
      window.fetch = async (path, options) => {
        const answer = await (await real(path, options)).json();
        if (path.startsWith("/v1/info")) answer.categories = ["stand up comedy"];
        for (const title of Array.isArray(answer.titles) ? answer.titles : [])
          Object.assign(title, { category: "stand up comedy", cold: false, because: [] });
        return Response.json(answer);
      };
    }""")
    visit(page)
    labels = page.evaluate(
        "[...document.querySelectorAll('#shelves section')]"
        ".flatMap((one) => one.getAttribute('aria-labelledby').split(' '))"  # a list of ids, as browsers read it
        ".map((id) => document.getElementById(id)?.textContent ?? null)"
    )
    assert "Stand up comedy" in labels and None not in labels


def test_a_page_before_services_that_differ_gives_up_after_a_few_attempts(page: Page, site: str) -> None:
    visit(page)
    page.evaluate("""{
      window.changed = true;
      window.real = window.fetch;
      window.starts = 0;
      window.fetch = async (path, options) => {
        window.starts += path.startsWith("/v1/info");
        const answer = await (await window.real(path, options)).json();
        if (path.startsWith("/v1/recommend")) answer.artifact = "another";
        return Response.json(answer);
      };
    }""")
    switch(page, "region", "r1")
    assert text(page, "#trouble-text") == "Several services answer here, each from another artifact."
    assert page.evaluate("window.starts") == 4
    page.evaluate("window.fetch = window.real; document.querySelector('#retry').click()")
    page.until("document.querySelector('#trouble').hidden")
    assert complaints(page) == []


def test_refusals_are_told_in_words_and_can_be_tried_again(page: Page, site: str) -> None:
    visit(page)
    page.evaluate("""
      window.changed = true;
      window.real = window.fetch;
      window.fetch = async () => new Response('{"detail": "too many requests"}',
        { status: 429, headers: { "Retry-After": "3" } });
    """)
    switch(page, "region", "r1")
    assert "too many requests" in text(page, "#trouble-text") and "3 s" in text(page, "#trouble-text")
    page.evaluate("window.fetch = window.real; document.querySelector('#retry').click()")
    page.until("document.querySelector('#trouble').hidden")
    assert text(page, "#eligible").startswith(f"{recommend(site, body_of(site, 0, region='r1'))['eligible']} ")
    offline = {"latency": 0, "downloadThroughput": -1, "uploadThroughput": -1}
    page.command("Network.emulateNetworkConditions", offline=True, **offline)
    switch(page, "region", "r2")
    assert text(page, "#trouble-text") == "You are offline."
    page.command("Network.emulateNetworkConditions", offline=False, **offline)
    page.until("document.querySelector('#trouble').hidden")  # by itself, when the line is back
    assert text(page, "#eligible").startswith(f"{recommend(site, body_of(site, 0, region='r2'))['eligible']} ")


def test_a_key_is_asked_for_and_posters_come_with_it(window: Page, artifact: Path) -> None:
    now = float(get_now(artifact))
    with served(artifact, api_keys=[KEY], clock=lambda: now) as site:
        load(window, site, "viewer=own&region=r1&plan=ads")
        assert text(window, "#trouble-text") == "The service asks for an API key."
        window.until("document.activeElement.id === 'key'")
        window.write("wrong")
        window.press("Enter")
        window.until("document.querySelector('#trouble-text').textContent === 'This key is not accepted.'")
        window.evaluate("document.querySelector('#key').select()")
        window.write(KEY)
        window.press("Enter")
        window.until("document.querySelector('#trouble').hidden && document.querySelectorAll('.card').length")
        window.until(
            "[...document.querySelectorAll('img.there')].some((image) => image.src.startsWith('data:image/jpeg'))"
        )
        assert window.evaluate("sessionStorage.getItem('m5-key')") == KEY
        # 401 was told twice; nothing was refused by the page's own policy.
        assert all("401" in told for told in complaints(window))


def get_now(artifact: Path) -> int:
    return json.loads((artifact / "artifact.json").read_text())["now"]


def test_nothing_moves_for_those_who_want_it_still(page: Page, site: str) -> None:
    visit(page, "viewer=0&region=r1")
    page.evaluate("window.moved = 0; Element.prototype.animate = () => (window.moved += 1); window.changed = true")
    switch(page, "region", "r2")
    assert page.evaluate("window.moved + document.getAnimations().length") == 0
    page.prefer(reduced_motion="no-preference")
    try:
        switch(page, "region", "r1")
        assert page.evaluate("window.moved") > 0
    finally:
        page.prefer(reduced_motion="reduce")


def test_everything_has_a_name_and_text_stands_out(page: Page, site: str) -> None:
    for scheme in ("dark", "light"):
        page.prefer(color_scheme=scheme, reduced_motion="reduce")
        unnamed = page.evaluate(
            "[...document.querySelectorAll('button:not([aria-hidden]), select, input')]"
            ".filter((one) => !(one.ariaLabel || one.textContent.trim() || one.labels?.length)).length"
        )
        assert unnamed == 0
        colours = "(name) => getComputedStyle(document.documentElement).getPropertyValue(name).trim()"
        for front, back in (
            ("--text", "--ground"), ("--soft", "--ground"), ("--soft", "--raised"), ("--accent", "--ground"),
            ("--on-accent", "--accent"), ("--soft", "--line"),
        ):  # fmt: skip
            pair = [page.evaluate(f"({colours})('{name}')") for name in (front, back)]
            assert contrast(*pair) >= 4.5, (scheme, front, back)  # WCAG 2.2, 1.4.3
    page.prefer(reduced_motion="reduce")


def contrast(one: str, other: str) -> float:
    """Ratio of two colours' luminances, as WCAG 2.2 defines it."""
    light, dark = sorted((luminance(one), luminance(other)), reverse=True)
    return (light + 0.05) / (dark + 0.05)


def luminance(colour: str) -> float:
    digits = colour.removeprefix("#")
    digits = digits if len(digits) == 6 else "".join(digit * 2 for digit in digits)
    channels = [int(digits[place : place + 2], 16) / 255 for place in (0, 2, 4)]
    linear = [c / 12.92 if c <= 0.04045 else ((c + 0.055) / 1.055) ** 2.4 for c in channels]
    return 0.2126 * linear[0] + 0.7152 * linear[1] + 0.0722 * linear[2]
