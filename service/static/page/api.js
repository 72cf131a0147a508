/** Requests to the service. A key stays in this module's memory, and is gone with the page. */

let key = null;

export function setKey(given) {
  key = given || null;
}

export const hasKey = () => key !== null;

/** A reply that is no success, or none at all (status 0). */
class Problem extends Error {
  constructor(status, { code, detail, request_id: requestId }, retryAfterS = null) {
    super(detail);
    Object.assign(this, { status, code, requestId, retryAfterS });
  }
}

/** The reply of a route, or a Problem. `route` is relative, so that a proxy's prefix stays. */
export async function ask(route, { headers = {}, ...options } = {}) {
  const sent = key === null ? headers : { ...headers, "X-API-Key": key };
  let reply;
  try {
    reply = await fetch(route, { ...options, headers: sent });
  } catch (error) {
    if (error.name === "AbortError") throw error;
    throw new Problem(0, { code: "unreachable", detail: "The service can't be reached." }, 3);
  }
  if (reply.ok) return reply;
  const problem = await reply.json().catch(() => ({ code: "", detail: reply.statusText || `Status ${reply.status}.` }));
  const wait = Number(reply.headers.get("Retry-After") ?? NaN);
  throw new Problem(reply.status, problem, Number.isFinite(wait) ? wait : null);
}

export function askJson(route, body, options = {}) {
  const headers = { "Content-Type": "application/json" };
  return ask(route, { method: "POST", headers, body: JSON.stringify(body), ...options });
}

/** A route with its query; fields that are null or empty are left out. */
export function withQuery(route, fields) {
  const given = Object.entries(fields).filter(([, value]) => value !== null && value !== undefined && value !== "");
  const text = new URLSearchParams(given).toString().replaceAll("%40", "@").replaceAll("%2C", ",");
  return text ? `${route}?${text}` : route;
}

/** The whole address of a route, for other programs. */
export const address = (route) => new URL(route, document.baseURI).href;

/** Keep a reply as a file; works with a key, which a plain link could not send. */
export async function download(route, name, options) {
  const url = URL.createObjectURL(await (await ask(route, options)).blob());
  const link = document.createElement("a");
  Object.assign(link, { href: url, download: name });
  link.click();
  setTimeout(() => URL.revokeObjectURL(url), 10_000);
}

/** A picture from a JSON reply. */
export const fromBase64 = (text) => new Blob([Uint8Array.from(atob(text), (one) => one.charCodeAt(0))], { type: "image/png" });
