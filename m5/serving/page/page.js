/**
 * M5's front page: a viewer's shelves, what changes them, and why each title stands on them.
 *
 * One way for everything: a control changes the state, `refresh` asks the service, `draw` shows what it says. Text of
 * the service reaches the page as text nodes only.
 */

import { $, arrange, artwork, button, make, poster } from "./elements.js";
import { openPanel } from "./panel.js";
import { ask, key, learn, nameOf, Refusal, remember } from "./service.js";
import { arranged, draw } from "./shelves.js";
import * as choice from "./state.js";

const ASKED = 200; // titles of an answer
const FOUND = 8; // titles of a search
const SIDE_BY_SIDE = 6; // values of a switch; more become a list
const STRAYS = 4; // answers of other artifacts until the visitor is asked
const PAUSE = 500; // milliseconds before the second start; each pause is longer by as much

let info, viewers; // of the service
let shown = null; // the front on the page
let fresh = true; // whether the next front follows another viewer, with whom there is nothing to compare
let strays = 0; // answers in turn that came from another artifact than `info`
let newest = new AbortController(); // of the newest request: only its answer is drawn
let searching = new AbortController();

/** Do something; a refusal is told, with a button that does it again. */
async function attempt(action) {
  try {
    await action();
    $("trouble").hidden = true;
  } catch (error) {
    if (error.name === "AbortError") return;
    tell(error, action);
  }
}

function tell(error, action) {
  const locked = error.status === 401;
  if (!(error instanceof Refusal)) console.error(error);
  $("trouble-text").textContent =
    error instanceof Refusal ? error.message : "This page has a fault; reloading may help.";
  $("key-form").hidden = !locked;
  $("retry").hidden = locked;
  $("retry").onclick = () => attempt(action);
  $("key-form").onsubmit = (event) => {
    event.preventDefault();
    key.set($("key").value.trim());
    attempt(action);
  };
  $("trouble").hidden = false;
  $("main").ariaBusy = "false";
  if (locked) $("key").focus();
}

/** Change what is chosen, then show what the service says to it. */
function change(how, { another = false } = {}) {
  how();
  choice.writeHash();
  drawControls();
  if (another) fresh = true;
  return attempt(refresh);
}

async function refresh() {
  newest.abort();
  const { signal } = (newest = new AbortController());
  const body = { ...choice.requestBody(), k: ASKED, explain: true };
  $("main").ariaBusy = "true";
  const naming = learn(
    body.history.map((watched) => watched.title_id),
    signal,
  );
  naming.catch(() => {}); // awaited below, unless the answer fails first
  const began = performance.now();
  const answer = await ask("/v1/recommend", { body, signal });
  const milliseconds = Math.round(performance.now() - began);
  await naming;
  signal.throwIfAborted();
  if (answer.artifact !== info?.artifact) return startAgain(signal);
  strays = 0;
  remember(answer.titles);
  remember(answer.taken_away ?? []);
  const before = fresh ? null : shown;
  const front = arranged(answer, info, before);
  const changes = draw(front, before, { history: body.history, present: choice.present() });
  drawNumbers(front, milliseconds, before && changes);
  [shown, fresh] = [front, false];
  $("main").ariaBusy = "false";
}

/** The artifact was replaced (other values, other titles), or behind this address are several that differ. */
async function startAgain(signal) {
  if (strays === STRAYS) {
    strays = 0;
    throw new Refusal("Several services answer here, each from another artifact.");
  }
  await new Promise((done) => setTimeout(done, PAUSE * strays++));
  signal.throwIfAborted();
  return start();
}

function drawNumbers({ eligible }, milliseconds, changes) {
  const whole = `of ${info.titles.toLocaleString("en")} titles to choose from`;
  $("eligible").replaceChildren(make("b", {}, eligible.toLocaleString("en")), ` ${whole}`);
  $("eligible-share").style.width = `${(100 * eligible) / info.titles}%`;
  $("timing").textContent = `· ${milliseconds} ms`;
  $("artifact").textContent = `${info.dataset} · ${info.index} index · artifact ${info.artifact}`;
  $("told").textContent = `${eligible} ${whole}.${
    changes ? ` Among the best, ${changes.arrived.length} arrived and ${changes.left.length} left.` : ""
  }`;
}

// ---- controls --------------------------------------------------------------------------------------------------------

function makeControls() {
  const labels = viewers.map(({ scenario, context, user }, n) =>
    [n + 1, ...Object.values({ ...scenario, ...context, ...user })].join(" · "),
  );
  const options = labels.map((label, n) => make("option", { value: String(n) }, label));
  $("viewer").replaceChildren(...options, make("option", { value: choice.OWN }, "You: start with nothing"));
  $("viewer").disabled = false;
  $("viewer").onchange = () => change(() => choice.startAs($("viewer").value), { another: true });
  $("switches").replaceChildren(...choice.switches().map(makeSwitch));
}

/** Radio buttons, or a list where there are many values. */
function makeSwitch({ name, values }) {
  const said = name.replaceAll("_", " ");
  const set = (value) => change(() => (choice.state.values[name] = value));
  const all = [...values.map((value) => [value, value]), [choice.UNKNOWN, "unknown"]];
  if (all.length > SIDE_BY_SIDE) {
    const options = all.map(([value, label]) => make("option", { value }, label));
    const select = make("select", { name, onchange: () => set(select.value) }, options);
    return make("label", { className: "switch" }, make("span", {}, said), select);
  }
  const radios = all.map(([value, label]) =>
    make("label", {}, make("input", { type: "radio", name, value, onchange: () => set(value) }), label),
  );
  return make(
    "div",
    { className: "switch", role: "radiogroup", "aria-label": said },
    make("span", { "aria-hidden": "true" }, said),
    make("div", { className: "options" }, radios),
  );
}

function drawControls() {
  const { viewer, values, added, removed } = choice.state;
  $("viewer").value = viewer;
  $("undo").hidden = !added.length && !removed.size;
  for (const control of $("switches").querySelectorAll("input, select"))
    if (control.type === "radio") control.checked = control.value === values[control.name];
    else control.value = values[control.name];
}

/** Titles whose name holds the words; none: the list closes. */
async function search() {
  searching.abort();
  const { signal } = (searching = new AbortController());
  const words = $("search").value.trim();
  const query = new URLSearchParams({ q: words, limit: FOUND });
  const titles = words ? await ask(`/v1/titles?${query}`, { signal }) : [];
  remember(titles);
  const lines = titles.map(({ title_id: id, title, category }) =>
    make(
      "li",
      {},
      button(
        "line",
        "watched",
        id,
        {},
        poster(id, "small"),
        make("span", { className: "grow" }, title, make("span", { className: "meta" }, category)),
      ),
    ),
  );
  arrange($("found"), lines.length ? lines : [make("li", { className: "line quiet" }, "No title has these words.")]);
  $("found").hidden = !words;
  $("told").textContent = words ? `${titles.length} titles found` : "";
}

function closeSearch() {
  searching.abort();
  $("search").value = "";
  $("found").hidden = true;
}

function walkFound(event) {
  const stops = [$("search"), ...$("found").querySelectorAll("button")];
  const step = { ArrowDown: 1, ArrowUp: -1 }[event.key];
  if (event.key === "Escape") closeSearch();
  if (event.key === "Escape") $("search").focus();
  if (!step || $("found").hidden) return;
  event.preventDefault();
  stops[stops.indexOf(document.activeElement) + step]?.focus();
}

// ---- clicks and the start --------------------------------------------------------------------------------------------

const acts = {
  open: (id) => {
    const { scenario, timestamp, history } = choice.requestBody();
    openPanel(id, shown, { scenario, timestamp, watched: history.map((watched) => watched.title_id) });
  },
  watched: (id) => {
    $("panel").close();
    if (!$("found").hidden) $("search").focus();
    closeSearch();
    change(() => choice.add(id));
  },
  remove: (id) => change(() => choice.remove(id)),
  shelf: (id) => {
    $(`shelf-because-${id}`).scrollIntoView({ block: "center" });
    $(`shelf-because-${id}`).querySelector("button.open").focus({ preventScroll: true });
  },
};

document.addEventListener("click", (event) => {
  const { act, title } = event.target.closest("[data-act]")?.dataset ?? {};
  if (act) acts[act](title);
  else if (event.target === $("panel"))
    $("panel").close(); // beside it
  else if (!event.target.closest(".search")) $("found").hidden = true;
});
$("search").addEventListener("input", () => attempt(search));
$("search").parentElement.addEventListener("keydown", walkFound);
$("undo").addEventListener("click", () => change(choice.undo));
$("skip").addEventListener("click", (event) => {
  event.preventDefault(); // the hash holds the state
  $("main").focus();
});
addEventListener("hashchange", () => attempt(start));
addEventListener("online", () => $("trouble").hidden || $("retry").click());

/** Learn what the service knows, then show the state that the address tells. */
async function start() {
  [info, viewers] = await Promise.all([ask("/v1/info"), ask("/v1/viewers")]);
  choice.learnOptions(info, viewers);
  artwork.exists = info.posters ?? true;
  choice.readHash();
  makeControls();
  drawControls();
  fresh = true;
  await refresh();
}

attempt(start);
