/** The live strip: the service's own state, from /metrics, asked every few seconds while the page is seen. */

import { ask } from "./api.js";
import { $ } from "./dom.js";
import { between, parseMetrics } from "./metrics.js";

const EVERY_MS = 5000;
let before = null;
let timer = 0;

async function look() {
  clearTimeout(timer);
  if (document.hidden) return;
  try {
    const now = parseMetrics(await (await ask("metrics", { cache: "no-store" })).text(), performance.now() / 1000);
    if (before) show(between(before, now));
    before = now;
    $("strip").dataset.state = now.isReady ? "ready" : "not-ready";
  } catch {
    before = null;
    $("strip").dataset.state = "gone";
    show({ imagesPerS: null, batch: null, queue: null, p95Ms: null });
  }
  timer = setTimeout(look, EVERY_MS);
}

function show({ imagesPerS, batch, queue, p95Ms }) {
  const round = (value) => (value === null ? "–" : value >= 10 ? Math.round(value).toLocaleString("en") : value.toFixed(1));
  $("strip-images").textContent = round(imagesPerS);
  $("strip-batch").textContent = round(batch);
  $("strip-queue").textContent = queue === null ? "–" : Math.round(queue).toLocaleString("en");
  $("strip-p95").textContent = p95Ms === null ? "–" : `${round(p95Ms)} ms`;
}

export function startStrip() {
  document.addEventListener("visibilitychange", () => {
    before = null; // a rate over the time away would say nothing of now
    look();
  });
  timer = setTimeout(look, 1000);
}
