/** Elements of the page: posters, cards, bars, rows that a keyboard can walk along. */

import { key, loadWithKey, nameOf } from "./service.js";

export const $ = (id) => document.getElementById(id);

/** An element. Strings become text nodes; names with a dash are attributes, others properties; null is left out. */
export function make(tag, properties = {}, ...children) {
  const element = document.createElement(tag);
  for (const [name, value] of Object.entries(properties))
    if (name.includes("-")) element.setAttribute(name, value);
    else element[name] = value;
  element.append(...children.flat().filter((child) => child !== null && child !== undefined));
  return element;
}

/** A button; `act` and `title` tell page.js what a click on it means. */
export const button = (className, act, title, properties, ...children) =>
  make("button", { type: "button", className, "data-act": act, "data-title": title, ...properties }, ...children);

/** Make `parent` hold these children in this order, moving no more than it must: rows keep their scroll place. */
export function arrange(parent, children) {
  const wanted = new Set(children);
  for (const child of [...parent.children]) if (!wanted.has(child)) child.remove();
  children.forEach((child, n) => {
    if (parent.children[n] !== child) parent.insertBefore(child, parent.children[n] ?? null);
  });
}

// ---- posters ---------------------------------------------------------------------------------------------------------

/** Whether the service has any; where it has none, it is not asked for. */
export const artwork = { exists: true };

const whenSeen = new IntersectionObserver(
  (entries) => {
    for (const { target } of entries.filter((entry) => entry.isIntersecting)) {
      whenSeen.unobserve(target);
      target.load();
    }
  },
  { rootMargin: "300px" },
);

/** A title's artwork, before it comes a tint of its own, and its initials where there is none. */
export function poster(id, extra = "") {
  const image = make("img", { alt: "", loading: "lazy", decoding: "async", draggable: false });
  const frame = make(
    "span",
    { className: `poster ${extra}`, "aria-hidden": "true" },
    make("b", {}, initials(id)),
    image,
  );
  const hue = [...id].reduce((sum, letter) => (sum * 31 + letter.codePointAt(0)) % 360, 7);
  frame.style.setProperty("--hue", hue);
  image.onload = () => image.classList.add("there");
  image.onerror = () => frame.classList.add("bare");
  const source = `/v1/titles/${encodeURIComponent(id)}/poster`;
  if (!artwork.exists) image.onerror();
  else if (key.get()) whenSeen.observe(Object.assign(frame, { load: () => loadWithKey(image, source) }));
  else image.src = source;
  return frame;
}

const initials = (id) =>
  [
    ...nameOf(id)
      .replace(/^(the|an?) /i, "")
      .matchAll(/(?<![\p{L}\p{N}'’])[\p{L}\p{N}]/gu),
  ]
    .slice(0, 2)
    .map(([letter]) => letter.toUpperCase())
    .join("");

// ---- bars ------------------------------------------------------------------------------------------------------------

/** How large the parts of a score are, of both together; a part may lower it. */
export function shares(id, graph) {
  const whole = Math.abs(id) + Math.abs(graph) || 1;
  return [Math.abs(id) / whole, Math.abs(graph) / whole];
}

/** Two parts side by side, as shares of the bar's width; a part that lowers the score is hatched. */
export function bar(parts, signs, { label, thin = false } = {}) {
  const named = label ? { role: "img", "aria-label": label } : { "aria-hidden": "true" };
  const pieces = parts.map((part, n) => {
    const piece = make("i", { className: signs[n] < 0 ? "below" : "" });
    piece.style.width = `${100 * part}%`;
    return piece;
  });
  return make("div", { className: thin ? "bar thin" : "bar", ...named }, pieces);
}

// ---- a row is one stop of the keyboard, arrows walk along it -----------------------------------------------------------

/** Let the tab key stop at one item of a row: `item`, or where it stopped before, or the first. */
export function oneStop(row, item = row.querySelector('[tabindex="0"]')?.closest("li") ?? row.firstElementChild) {
  for (const stop of row.querySelectorAll("button")) stop.tabIndex = item?.contains(stop) ? 0 : -1;
}

function walk(event) {
  const items = [...event.currentTarget.children];
  const at = items.indexOf(event.target.closest("li"));
  const to = { ArrowRight: at + 1, ArrowLeft: at - 1, Home: 0, End: items.length - 1 }[event.key];
  if (to === undefined || !items[to]) return;
  event.preventDefault();
  items[to].querySelector("button").focus();
}

/** Make a list such a row. */
export function walkable(row) {
  row.addEventListener("keydown", walk);
  row.addEventListener("focusin", (event) => oneStop(row, event.target.closest("li")));
  return row;
}
