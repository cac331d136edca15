/** What the visitor chose: who watches, where and how, what was added to the history and taken out. The hash holds it. */

/** @typedef {{title_id: string, timestamp?: number, intensity?: Object<string, number>}} Watched */

export const OWN = "own"; // the viewer who starts with nothing watched
export const UNKNOWN = ""; // the value of a switch that tells nothing

export const state = { viewer: OWN, values: {}, added: [], removed: new Set() };
let info = { scenario: {}, context: {}, intensities: [], now: 0 };
let viewers = [];

/** What GET /v1/info and GET /v1/viewers say. */
export function learnOptions(newInfo, newViewers) {
  [info, viewers] = [newInfo, newViewers];
}

/** Every scenario and context, with its values. */
export const switches = () =>
  ["scenario", "context"].flatMap((group) =>
    Object.entries(info[group]).map(([name, values]) => ({ group, name, values })),
  );

const chosen = () => viewers[Number(state.viewer)] ?? { history: [] };

/** The time that the request is made for. */
export const present = () => chosen().timestamp ?? info.now;

/** @returns {Watched[]} oldest first */
export const history = () => [
  ...chosen().history.filter((watched) => !state.removed.has(watched.title_id)),
  ...state.added,
];

/** The body of POST /v1/recommend. */
export function requestBody() {
  const told = (group) =>
    Object.fromEntries(
      Object.keys(info[group]).flatMap((name) => (state.values[name] ? [[name, state.values[name]]] : [])),
    );
  return { ...chosen(), history: history(), scenario: told("scenario"), context: told("context") };
}

/** A viewer starts with their own values; who has none, with the first of each scenario, where titles may be played. */
export function startAs(viewer) {
  Object.assign(state, { viewer, added: [], removed: new Set() });
  for (const { group, name, values } of switches()) {
    const own = viewers[Number(viewer)];
    state.values[name] = own ? (own[group]?.[name] ?? UNKNOWN) : group === "scenario" ? values[0] : UNKNOWN;
  }
}

/** Watched to the end, at present. */
export function add(id) {
  const intensity = info.intensities.includes("completion") ? { completion: 1 } : {};
  state.added = [
    ...state.added.filter((watched) => watched.title_id !== id),
    { title_id: id, timestamp: present(), intensity },
  ];
}

export function remove(id) {
  state.added = state.added.filter((watched) => watched.title_id !== id);
  if (chosen().history.some((watched) => watched.title_id === id)) state.removed.add(id);
}

export function undo() {
  Object.assign(state, { added: [], removed: new Set() });
}

export function readHash() {
  const given = new URLSearchParams(location.hash.slice(1));
  const viewer = given.get("viewer") ?? "0";
  startAs(viewers[Number(viewer)] ? viewer : OWN);
  for (const { name, values } of switches())
    if (given.has(name)) state.values[name] = values.includes(given.get(name)) ? given.get(name) : UNKNOWN;
  given.getAll("added").forEach(add);
  given.getAll("removed").forEach(remove);
}

export function writeHash() {
  const pairs = [
    ["viewer", state.viewer],
    ...switches().map(({ name }) => [name, state.values[name]]),
    ...state.added.map((watched) => ["added", watched.title_id]),
    ...[...state.removed].map((id) => ["removed", id]),
  ];
  window.history.replaceState(null, "", `#${new URLSearchParams(pairs)}`);
}
