/** Errors, told where they happened, with what helps: a retry that waits as long as the service asks, or a key. */

import { setKey } from "./api.js";
import { h } from "./dom.js";

const stopping = new WeakMap();

export function clearNotice(place) {
  stopping.get(place)?.();
  stopping.delete(place);
  place.replaceChildren();
  place.hidden = true;
}

/** Show a problem in `place`. `retry` is called by the button, or by itself once a `Retry-After` is over. */
export function showNotice(place, problem, retry) {
  clearNotice(place);
  if (problem.name === "AbortError") return;
  const again = () => {
    clearNotice(place);
    retry();
  };
  const words = h("p", {}, titleOf(problem), " ", h("span", { class: "quiet" }, problem.message));
  place.append(h("div", { class: "notice", role: "alert" }, words, ...helps(place, problem, again)));
  place.hidden = false;
}

function titleOf({ status, code }) {
  const title = {
    401: "This service needs a key.",
    403: "This key does not allow it.",
    404: "That is not here.",
    413: "That is too large.",
    429: code === "rate_limited" ? "This key's limit is used up." : "The service is busy.",
    503: code === "draining" ? "The service is shutting down." : "The service is not ready.",
    0: "No connection.",
  }[status];
  return h("strong", {}, title ?? "That did not work.");
}

function helps(place, problem, again) {
  const { status } = problem;
  if (status === 401 || status === 403) return [keyForm(again)];
  if (status >= 400 && status < 500 && ![408, 429].includes(status)) return []; // it would be refused again
  const button = h("button", { type: "button", onclick: again }, "Try again");
  if (problem.retryAfterS !== null && problem.retryAfterS !== undefined) countDown(place, button, problem.retryAfterS, again);
  return [button];
}

/** The button waits, and then presses itself. */
function countDown(place, button, seconds, again) {
  let left = Math.max(1, Math.ceil(seconds));
  button.disabled = true;
  const tick = () => {
    button.textContent = `Trying again in ${left} s`;
    if (left === 0) again();
    left -= 1;
  };
  tick();
  const timer = setInterval(tick, 1000);
  stopping.set(place, () => clearInterval(timer));
}

function keyForm(again) {
  // No password field: browsers would offer to keep it.
  const input = h("input", { class: "secret", autocomplete: "off", spellcheck: "false", "aria-label": "Key", required: true });
  const submitted = (event) => {
    event.preventDefault();
    setKey(input.value);
    again();
  };
  return [h("form", { class: "key-form", onsubmit: submitted }, input, h("button", { class: "main" }, "Use key"),
    h("span", { class: "quiet" }, "It stays in this page's memory."))][0];
}
