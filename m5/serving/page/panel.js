/** The panel of a title: why it is here, what carried it, and what is like it. */

import { $, bar, button, make, oneStop, poster, shares, walkable } from "./elements.js";
import { ask, known, nameOf, remember } from "./service.js";
import { originOf } from "./shelves.js";

const SIMILAR = 14;
/** Two decimals; a true minus, and none before a zero. */
const number = (value) =>
  value
    .toFixed(2)
    .replace(/^-(?=0\.00$)/, "")
    .replace("-", "−");
let newest = new AbortController(); // of the newest panel's request

/**
 * @param {string} id
 * @param {Front} front what is on the page
 * @param {{scenario: Object<string, string>, watched: string[], timestamp?: number}} viewer
 */
export async function openPanel(id, front, viewer) {
  const title = [...front.titles, ...front.lost].find((other) => other.title_id === id) ?? known(id);
  const panel = $("panel");
  const similar = make("div", { className: "like" });
  const close = make(
    "button",
    { type: "button", className: "close", "aria-label": "Close", onclick: () => panel.close() },
    "×",
  );
  panel.replaceChildren(make("div", { className: "panel" }, poster(id), ...about(title, viewer), similar), close);
  if (!panel.open) panel.showModal();
  panel.scrollTop = 0;
  close.focus();
  newest.abort();
  newest = new AbortController();
  const scenario = Object.entries(viewer.scenario).map((pair) => ["scenario", pair.join(":")]);
  const when = viewer.timestamp === undefined ? [] : [["timestamp", viewer.timestamp]];
  const query = new URLSearchParams([["k", SIMILAR], ...when, ...scenario]);
  try {
    const { titles } = await ask(`/v1/titles/${encodeURIComponent(id)}/similar?${query}`, { signal: newest.signal });
    remember(titles);
    similar.replaceChildren(...similarTitles(titles));
  } catch (error) {
    if (error.name !== "AbortError") similar.replaceChildren(make("p", { className: "quiet" }, error.message));
  }
}

function about(title, viewer) {
  const watched = viewer.watched.includes(title.title_id);
  const place = title.lost
    ? `would be no. ${title.rank}, but rights keep it away`
    : title.rank
      ? `no. ${title.rank} for this viewer`
      : watched
        ? "watched"
        : "not among this viewer's best";
  const head = make(
    "div",
    { className: "head" },
    make("h2", { id: "panel-title" }, title.title),
    make(
      "p",
      { className: "quiet cap" },
      [title.category, place].filter(Boolean).join(" · "),
      title.cold ? make("span", { className: "badge" }, "New") : null,
    ),
    title.lost || watched ? null : button("strong", "watched", title.title_id, {}, "I watched it"),
  );
  const why = make(
    "div",
    { className: "why" },
    title.id_score === undefined ? null : scoreOf(title),
    title.because ? carriersOf(title, viewer) : null,
  );
  return [head, why];
}

function scoreOf({ id_score: id, cg_score: graph, score, cold, ...title }) {
  const parts = shares(id, graph);
  const said = `ID branch ${number(id)}, content graph ${number(graph)}`;
  return [
    make("h3", {}, `Its score, ${number(score)}`),
    bar(parts, [id, graph], { label: said }),
    make(
      "p",
      { className: "key" },
      make("span", {}, `ID branch ${number(id)}`),
      make("span", {}, `content graph ${number(graph)}`),
    ),
    make(
      "p",
      { className: "quiet" },
      originOf({ ...title, id_score: id, cg_score: graph }),
      cold ? " Nobody had watched it in training, so it borrows the ID of unknown titles." : "",
    ),
  ];
}

function carriersOf({ because }, viewer) {
  if (!because.length) {
    const why = viewer.watched.length
      ? "No single watched title stands out, or it is too far down for reasons to be worked out."
      : "Nothing was watched yet: it is here by where and how this viewer watches.";
    return [make("h3", {}, "Carried by"), make("p", { className: "quiet" }, why)];
  }
  const drop = ({ id_drop: id, cg_drop: graph }) => Math.max(0, id) + Math.max(0, graph);
  const largest = Math.max(...because.map(drop)) || 1;
  const lines = because.map((carrier) => {
    const { title_id: id, id_drop, cg_drop } = carrier;
    const parts = [id_drop, cg_drop].map((one) => Math.max(0, one) / largest);
    return make(
      "li",
      { className: "line" },
      poster(id, "small"),
      make(
        "div",
        { className: "grow" },
        make("b", {}, nameOf(id)),
        bar(parts, [1, 1], { thin: true }),
        make("p", { className: "quiet" }, `ID ${number(id_drop)}, content graph ${number(cg_drop)}`),
      ),
    );
  });
  return [
    make("h3", {}, "Carried by"),
    make("p", { className: "quiet" }, "How far its score would fall without a watched title."),
    make("ul", {}, lines),
  ];
}

function similarTitles(titles) {
  if (!titles.length) return [make("p", { className: "quiet" }, "Nothing like it may be played here.")];
  const row = walkable(
    make(
      "ul",
      { className: "row" },
      titles.map((title) =>
        make(
          "li",
          { className: "card" },
          button(
            "open",
            "open",
            title.title_id,
            {},
            title.cold ? make("span", { className: "badge" }, "New") : null,
            poster(title.title_id),
            make("span", { className: "name" }, title.title),
            make("span", { className: "meta" }, `cosine ${number(title.cosine)}`),
          ),
        ),
      ),
    ),
  );
  oneStop(row);
  return [make("h3", {}, "Similar titles that may be played"), row];
}
