/** An answer of the service -> shelves, and their drawing: what stays is moved, what comes and goes is told. */

import { $, arrange, button, make, oneStop, poster, shares, walkable } from "./elements.js";
import { nameOf } from "./service.js";

const SHELF = 18; // titles on a shelf
const BEST = 1 + SHELF; // the hero and "For you"
const THREADS = 4; // watched titles that get a colour, and a shelf of what they carried
const CARRIED = 3; // titles that such a one carried at least

/**
 * @typedef {{title_id: string, title: string, category: string, rank: number, cold?: boolean, lost?: boolean,
 *   score: number, id_score?: number, cg_score?: number,
 *   because?: {title_id: string, id_drop: number, cg_drop: number}[]}} Title
 * @typedef {{key: string, heading: string, note?: string, titles: Title[], thread?: number}} Shelf
 * @typedef {{titles: Title[], lost: Title[], threads: Map<string, number>, shelves: Shelf[], eligible: number}} Front
 */

/** The watched title without which the score would fall most. */
export const carrierOf = (title) => title.because?.[0]?.title_id;

const capital = (text) => text.charAt(0).toUpperCase() + text.slice(1);

/** @returns {Front} of an answer to POST /v1/recommend; threads keep the colour that they had `before`. */
export function arranged(answer, info, before) {
  const titles = answer.titles.map((title, n) => ({ ...title, rank: n + 1 }));
  // The place that a title would have if nothing were taken away.
  const lost = (answer.taken_away ?? []).map((title, n) => ({
    ...title,
    lost: true,
    rank: 1 + n + titles.filter((other) => other.score > title.score).length,
  }));
  const threads = threadsOf(titles, before?.threads ?? new Map());
  return { titles, lost, threads, eligible: answer.eligible, shelves: toShelves(titles, lost, threads, info) };
}

/** The watched titles that carried most -> a number each, the one that they had if they had one. */
function threadsOf(titles, earlier) {
  const counts = new Map();
  for (const id of titles.map(carrierOf).filter(Boolean)) counts.set(id, (counts.get(id) ?? 0) + 1);
  const most = [...counts]
    .filter(([, count]) => count >= CARRIED)
    .sort((a, b) => b[1] - a[1])
    .slice(0, THREADS);
  const kept = most.map(([id]) => earlier.get(id)).filter(Boolean);
  const free = Array.from({ length: THREADS }, (_, n) => n + 1).filter((thread) => !kept.includes(thread));
  return new Map(most.map(([id]) => [id, earlier.get(id) ?? free.shift()]));
}

/** Each title stands on the first shelf that wants it. @returns {Shelf[]} */
function toShelves(titles, lost, threads, info) {
  const placed = new Set(titles.slice(0, 1));
  const take = (wanted) => {
    const taken = titles.filter((title) => !placed.has(title) && wanted(title)).slice(0, SHELF);
    taken.forEach((title) => placed.add(title));
    return taken;
  };
  const shelf = (key, heading, wanted, more) => ({ key, heading, titles: take(wanted), ...more });
  const where = Object.keys(info.scenario).join(" or ").replaceAll("_", " ");
  return [
    shelf("for-you", "For you", () => true),
    shelf("new", "New here", (title) => title.cold, {
      note: "found by their content alone: nobody had watched them in training",
    }),
    ...[...threads].map(([id, thread]) =>
      shelf(`because-${id}`, `Because you watched ${nameOf(id)}`, (title) => carrierOf(title) === id, { thread }),
    ),
    ...info.categories.map((category) =>
      shelf(`category-${category}`, capital(category), (title) => title.category === category),
    ),
    shelf("rest", "More", (title) => !info.categories.includes(title.category)),
    {
      key: "lost",
      heading: where ? `Not in your ${where}` : "Not playable now",
      note: "rights keep these away; the number is the place they would have had",
      titles: lost,
    },
  ].filter(({ titles }) => titles.length);
}

// ---- drawing ---------------------------------------------------------------------------------------------------------

const cards = new Map(); // "shelf/title id" -> its element
let headings = 0; // so far: each has its number as an id, since ids of titles and names of categories may hold spaces
const still = matchMedia("(prefers-reduced-motion: reduce)");

/**
 * @param {Front} front to show
 * @param {Front | null} before what it follows; null for another viewer
 * @param {{history: Watched[], present: number}} viewer whose history it is
 * @returns {{arrived: string[], left: string[]}} ids that came among the best, or went
 */
export function draw(front, before, viewer) {
  const changes = changesOf(front, before);
  const places = new Map([...cards].map(([key, element]) => [key, element.offsetLeft]));
  const focusAgain = keptFocus();
  drawHero(front, before);
  drawHistory(front, viewer);
  arrange(
    $("shelves"),
    front.shelves.map((shelf) => section(shelf, front, before)),
  );
  if (before) tellChanges(front, changes, viewer.history);
  for (const [key, element] of cards) if (!element.isConnected) cards.delete(key);
  if (!still.matches) slide(places);
  focusAgain();
  return changes;
}

function changesOf(front, before) {
  const best = (one) => one.titles.slice(0, BEST).map((title) => title.title_id);
  const [now, then] = [best(front), best(before ?? front)];
  return { arrived: now.filter((id) => !then.includes(id)), left: then.filter((id) => !now.includes(id)) };
}

function tellChanges(front, { arrived, left }, history) {
  const note = $("shelf-for-you")?.querySelector(".note");
  if (!note) return;
  const lost = front.lost.map((title) => title.title_id);
  const watched = history.map((one) => one.title_id);
  const why = (id) => (watched.includes(id) ? " (watched)" : lost.includes(id) ? " (rights)" : "");
  const gone = left.map((id) => nameOf(id) + why(id)).join(", ");
  note.textContent = note.title = `${arrived.length} arrived, ${left.length} left${gone ? `: ${gone}` : ""}`;
}

/** How a title's place among the best changed, or that it is new on its shelf, in a few characters. */
function movement(title, before, ranked) {
  const then = before?.titles.find((other) => other.title_id === title.title_id)?.rank;
  if (!before || title.lost || then === title.rank) return "";
  if (!then || (ranked && then > BEST)) return "● arrived";
  if (!ranked) return "";
  return then > title.rank ? `▲ ${then - title.rank}` : `▼ ${title.rank - then}`;
}

/** Cards in view slide from where they stood on their shelf; new ones appear. All is measured before anything moves. */
function slide(places) {
  const moves = [];
  for (const [key, element] of cards) {
    const from = places.get(key);
    const way = from === undefined ? 0 : from - element.offsetLeft;
    const { top, bottom, left } = element.getBoundingClientRect();
    if ((from === undefined || way) && bottom > 0 && top < innerHeight && left < innerWidth) moves.push([element, way]);
  }
  for (const [element, way] of moves) {
    const start = way ? { transform: `translateX(${way}px)` } : { opacity: 0, transform: "scale(.94)" };
    element.animate([start, {}], { duration: 340, easing: "cubic-bezier(.2, .7, .2, 1)" });
  }
}

/** Where the focus was, for a keyboard to go on from there: its card, the one in its place, or the hero's button. */
function keptFocus() {
  const active = document.activeElement;
  const card = active?.closest(".card");
  const row = card?.parentElement;
  const at = row ? [...row.children].indexOf(card) : -1;
  const act = active?.closest("#hero") ? active.dataset.act : null;
  return () => {
    if (document.activeElement === active && active.isConnected) return;
    const next = card?.isConnected ? card : (row?.children[at] ?? row?.lastElementChild);
    (act ? $("hero").querySelector(`[data-act="${act}"]`) : next?.querySelector("button"))?.focus();
  };
}

/** @param {Shelf} shelf */
function section(shelf, front, before) {
  const id = `shelf-${shelf.key}`;
  const element = $(id) ?? newSection(id, shelf);
  const row = element.querySelector(".row");
  const best = shelf.key === "for-you";
  element.querySelector(".note").textContent = shelf.note ?? "";
  if (shelf.thread) element.dataset.thread = shelf.thread;
  const drawn = shelf.titles.map((title) => {
    const place = title.lost ? `would be no. ${title.rank}` : best ? `no. ${title.rank}` : title.category;
    return card(shelf.key, title, place, movement(title, before, best), front.threads.get(carrierOf(title)));
  });
  arrange(row, drawn);
  oneStop(row);
  return element;
}

function newSection(id, shelf) {
  const row = walkable(make("ul", { className: "row" }));
  const arrow = (sign, label) => {
    const onclick = () =>
      row.scrollBy({ left: 0.8 * sign * row.clientWidth, behavior: still.matches ? "auto" : "smooth" });
    return make("button", { type: "button", className: "arrow", tabIndex: -1, "aria-hidden": "true", onclick }, label);
  };
  const heading = make("h2", { id: `heading-${++headings}` }, shelf.thread ? make("i") : null, shelf.heading);
  const head = make(
    "div",
    { className: "heading" },
    heading,
    make("p", { className: "note" }),
    arrow(-1, "‹"),
    arrow(1, "›"),
  );
  return make("section", { className: "shelf", id, "aria-labelledby": heading.id }, head, row);
}

/** @param {Title} title */
function card(shelf, title, place, moved, thread) {
  const key = `${shelf}/${title.title_id}`;
  if (!cards.has(key)) cards.set(key, newCard(title));
  const element = cards.get(key);
  colour(element, thread);
  element.querySelector(".meta").replaceChildren(place, moved && make("span", { className: "moved" }, `  ${moved}`));
  return element;
}

function newCard(title) {
  const id = title.title_id;
  const open = button(
    "open",
    "open",
    id,
    {},
    poster(id),
    make("span", { className: "thread" }),
    make("span", { className: "name" }, title.title),
    make("span", { className: "meta" }),
  );
  const did = button("did", "watched", id, { title: "I watched it", "aria-label": `I watched ${title.title}` }, "✓");
  if (title.cold) open.prepend(make("span", { className: "badge" }, "New"));
  return make("li", { className: title.lost ? "card lost" : "card" }, open, title.lost ? null : did);
}

function colour(element, thread) {
  if (thread) element.dataset.thread = thread;
  else delete element.dataset.thread;
}

// ---- the best title and the history ----------------------------------------------------------------------------------

/** The best title, and the watched titles that carried most. @param {Front} front */
function drawHero(front, before) {
  const hero = $("hero");
  const [title] = front.titles;
  if (!title) {
    const words = "No title may be played with the values above. Choose ones that are known.";
    hero.replaceChildren(
      make("div", { className: "words" }, make("h2", {}, "Nothing to play here"), make("p", {}, words)),
    );
    delete hero.dataset.best;
    return;
  }
  const id = title.title_id;
  const about = [title.category, title.cold && "new here", movement(title, before, true)].filter(Boolean).join(" · ");
  const carrier = carrierOf(title);
  const words = make(
    "div",
    { className: "words" },
    make("p", { className: "quiet cap" }, about),
    make("h2", {}, title.title),
    make("p", {}, carrier ? ["Most of all because of ", make("b", {}, nameOf(carrier)), ". "] : null, originOf(title)),
    make(
      "div",
      { className: "actions" },
      button("strong", "open", id, {}, "Why it is here"),
      button("plain", "watched", id, {}, "I watched it"),
    ),
  );
  const posters =
    hero.dataset.best === id ? hero.querySelectorAll(":scope > .poster") : [poster(id, "wash small"), poster(id)];
  arrange(hero, [...posters, words, ...carriers(front)]);
  hero.dataset.best = id;
}

/** The watched titles with a thread, and how many titles each carried. */
function carriers({ titles, threads, shelves }) {
  if (!threads.size) return [];
  const counted = [...threads.keys()].map((id) => [id, titles.filter((title) => carrierOf(title) === id).length]);
  const lines = counted.map(([id, count]) => {
    const length = make("span", { className: "length" });
    length.style.width = `${(90 * count) / counted[0][1]}px`;
    const many = make("span", { className: "many" }, String(count), make("span", { className: "hidden" }, " titles"));
    const parts = [poster(id, "small"), make("span", { className: "grow" }, nameOf(id)), length, many];
    const hasShelf = shelves.some((shelf) => shelf.key === `because-${id}`);
    const hint = { title: "Go to the titles that it carried" };
    const line = hasShelf ? button("line", "shelf", id, hint, parts) : make("div", { className: "line" }, parts);
    return make("li", { "data-thread": threads.get(id) }, line);
  });
  return [
    make(
      "div",
      { className: "carriers" },
      make("h3", {}, "Watched titles that carried most of these"),
      make("ul", {}, lines),
    ),
  ];
}

/** Where a score comes from, as a sentence. */
export function originOf(title) {
  if (title.id_score < 0) return "Its content speaks for it; who watched it lowers its score.";
  if (title.cg_score < 0) return "Who watched it speaks for it; its content lowers its score.";
  const content = Math.round(100 * shares(title.id_score, title.cg_score)[1]);
  return `${content} % of its score comes from its content, ${100 - content} % from who watched it.`;
}

function drawHistory({ threads }, { history, present }) {
  const latest = [...history].reverse();
  const row = $("strip");
  $("watched-note").textContent = latest.length
    ? `${latest.length === 1 ? "one title" : `${latest.length} titles`}, latest first; choose one to take it out. A line ties it to what it carried`
    : "nothing yet: search for a title, or tick one below";
  const seen = new Map(); // how often so far: a title may be watched again
  const drawn = latest.map(({ title_id: id, timestamp }) => {
    seen.set(id, (seen.get(id) ?? 0) + 1);
    const key = `strip/${seen.get(id)}/${id}`;
    if (!cards.has(key)) cards.set(key, newWatched(id, timestamp === undefined ? "" : ago(present - timestamp)));
    colour(cards.get(key), threads.get(id));
    return cards.get(key);
  });
  arrange(row, drawn);
  oneStop(row);
}

function newWatched(id, when) {
  const label = { title: nameOf(id), "aria-label": `Take out ${nameOf(id)}, watched ${when || "before"}` };
  const parts = [poster(id, "small"), make("span", { className: "thread" }), make("span", { className: "meta" }, when)];
  return make("li", { className: "card" }, button("open", "remove", id, label, ...parts));
}

function ago(seconds) {
  const words = new Intl.RelativeTimeFormat("en", { numeric: "auto", style: "narrow" });
  for (const [unit, length] of [
    ["year", 31_556_952],
    ["month", 2_629_746],
    ["day", 86_400],
    ["hour", 3_600],
  ])
    if (seconds >= length) return words.format(-Math.floor(seconds / length), unit);
  return "just now";
}
