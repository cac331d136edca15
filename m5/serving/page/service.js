/** The service: questions, answers, refusals in words, the names of titles. */

const NAMED_AT_ONCE = 50; // titles whose names are asked for in one request

/** Why there is no answer, in words for the visitor. */
export class Refusal extends Error {
  constructor(message, status = 0) {
    super(message);
    this.status = status;
  }
}

export const key = {
  get: () => sessionStorage.getItem("m5-key"),
  set: (value) => sessionStorage.setItem("m5-key", value),
  headers: () => (key.get() ? { Authorization: `Bearer ${key.get()}` } : {}),
};

/**
 * A request's JSON answer; with a body it is a POST.
 * @throws {Refusal}
 * @throws {DOMException} an AbortError, where a newer request took this one's place.
 */
export async function ask(path, { body, signal } = {}) {
  const headers = { ...key.headers(), ...(body && { "Content-Type": "application/json" }) };
  let response, answer;
  try {
    response = await fetch(path, {
      method: body ? "POST" : "GET",
      headers,
      body: body && JSON.stringify(body),
      signal,
    });
    answer = await response.json();
  } catch (error) {
    if (error.name === "AbortError") throw error;
    if (!response) throw new Refusal(navigator.onLine ? "The service cannot be reached." : "You are offline.");
    answer = {}; // of something before the service that speaks no JSON
  }
  if (response.ok) return answer;
  const wait = response.headers.get("Retry-After");
  const words = {
    401: key.get() ? "This key is not accepted." : "The service asks for an API key.",
    413: "This history is too long for the service.",
    429: `The service has too many requests just now. ${wait ? `It asks to wait ${wait} s.` : "Wait a moment."}`,
  };
  const detail = typeof answer.detail === "string" ? answer.detail : `status ${response.status}`;
  throw new Refusal(words[response.status] ?? `The service could not answer: ${detail}.`, response.status);
}

/** An <img> sends no key, so with one the artwork is fetched, and put in as a data URL. */
export async function loadWithKey(image, source) {
  const response = await fetch(source, { headers: key.headers() }).catch(() => null);
  if (!response?.ok) return image.onerror();
  const reader = new FileReader();
  reader.onload = () => (image.src = reader.result);
  reader.readAsDataURL(await response.blob());
}

// ---- names -----------------------------------------------------------------------------------------------------------

const names = new Map();

export const nameOf = (id) => names.get(id)?.title ?? id;
export const known = (id) => names.get(id) ?? { title_id: id, title: id, category: "" };

/** Keep the names that an answer brought. */
export function remember(titles) {
  for (const { title_id, title, category } of titles) names.set(title_id, { title_id, title, category });
}

/** Ask for the names of titles of which only the id is known. */
export async function learn(ids, signal) {
  const missing = [...new Set(ids)].filter((id) => !names.has(id));
  const parts = [];
  for (let n = 0; n < missing.length; n += NAMED_AT_ONCE) parts.push(missing.slice(n, n + NAMED_AT_ONCE));
  const query = (part) => new URLSearchParams([["limit", NAMED_AT_ONCE], ...part.map((id) => ["id", id])]);
  const found = await Promise.all(parts.map((part) => ask(`/v1/titles?${query(part)}`, { signal })));
  found.forEach(remember);
}
