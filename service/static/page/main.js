/** Puts the page together: what the address says decides what is shown. */

import { bundleOptions, findBundle, hasDiscriminator, loadBundles, pinned, standIn } from "./bundles.js";
import { showCode, startCode } from "./code.js";
import { closeDetail, openDetail, shownRequest as detailRequest, startDetail } from "./detail.js";
import { $, announce, fill, grouped, icon, settled } from "./dom.js";
import { closeInterpolation, openInterpolation, shownRequest as interpolationRequest, startInterpolation } from "./interpolation.js";
import { openJudge, shownRequest as judgeRequest, startJudge } from "./judge.js";
import { markLabel, showLabels } from "./labels.js";
import { clearNotice, showNotice } from "./notice.js";
import { mostImages, sampleFields } from "./sheets.js";
import { change, current, freshSeed, onChange, typed } from "./state.js";
import { startStrip } from "./strip.js";
import { Wall } from "./wall.js";

const VIEWS = ["wall", "interpolate", "judge"];
// A change of one of these is a change of what is on the wall.
const SUBJECT = ["bundle", "seed", "label", "truncation", "size"];

let bundle = null;
let isStarted = false;
let isScrolling = false; // the address follows the wall, and not the other way round

const wall = new Wall({
  scroller: $("scroller"),
  opened(index) {
    const { pick, seed, label } = current();
    if (pick) change({ view: "interpolate", [pick]: `${seed}:${index}`, [`label_${pick}`]: label, pick: null }, { isStep: true });
    else change({ image: index, walk: null }, { isStep: true });
  },
  moved(index) {
    isScrolling = true;
    change({ index });
    isScrolling = false;
    showRange();
  },
  failed(error, retry) {
    if (error.code === "unknown_bundle") start(); // it was taken away while the page was open
    else showNotice($("wall-notice"), error, retry);
  },
  drawn() {
    if (!performance.getEntriesByName("first picture").length) performance.mark("first picture");
  },
});

function subject() {
  const { seed, label, truncation } = current();
  return { bundle, seed, truncation, label: bundle.labels?.[label] === undefined ? null : label };
}

/** Begin, or begin again after an error: everything hangs on the list of bundles. */
async function start() {
  clearNotice($("page-notice"));
  try {
    await loadBundles();
    await choose(current().bundle);
  } catch (error) {
    return showNotice($("page-notice"), error, start);
  }
  change({ bundle: pinned(bundle), seed: current().seed ?? freshSeed() });
  isStarted = true;
  show(current(), new Set(["view", ...SUBJECT, "index", "image"]));
}

/** Take up a bundle by name or name@version, and show what it has. One that is not there is told of. */
async function choose(name) {
  try {
    bundle = await findBundle(name);
  } catch (error) {
    if (error.status !== 404 || name === null) throw error;
    showNotice($("page-notice"), error, () => {});
    bundle = await findBundle(standIn(name));
  }
  $("bundle").replaceChildren(...bundleOptions(bundle));
  $("bundle").value = pinned(bundle);
  $("classes").hidden = !bundle.labels;
  showLabels($("labels"), bundle.labels ?? [], (label) => change({ label, index: 0, image: null, walk: null }));
  document.querySelector('[data-view="judge"]').hidden = !hasDiscriminator(bundle);
}

/** Show a state of which the named fields have changed. */
async function show(state, changed) {
  if (!isStarted) return;
  if (state.seed === null) return change({ seed: freshSeed() });
  if (state.bundle !== pinned(bundle)) {
    clearNotice($("page-notice"));
    try {
      await choose(state.bundle);
    } catch (error) {
      return showNotice($("page-notice"), error, () => show(state, changed));
    }
    return change({ bundle: pinned(bundle) }) || show(current(), new Set([...changed, "bundle"]));
  }
  const view = state.view === "judge" && !hasDiscriminator(bundle) ? "wall" : state.view;
  for (const name of VIEWS) $(name).hidden = name !== view;
  for (const link of document.querySelectorAll("[data-view]")) {
    if (link.dataset.view === view) link.setAttribute("aria-current", "page");
    else link.removeAttribute("aria-current");
  }
  document.title = `${{ wall: "Wall", interpolate: "Interpolation", judge: "Judge" }[view]} · ${bundle.name} · gan-service`;
  if (view !== "interpolate") closeInterpolation();
  if (view === "wall") showWall(state, changed);
  else if (view === "interpolate") openInterpolation(bundle, state);
  else openJudge(bundle, state.label);
  showDetail(view === "wall" && !state.pick ? state : { ...state, image: null }, changed);
  showRange();
}

function showWall(state, changed) {
  fill($("seed"), state.seed);
  $("truncation").value = state.truncation;
  $("shown-truncation").textContent = state.truncation.toFixed(2);
  if (document.activeElement !== $("index")) fill($("index"), state.index);
  markLabel($("labels"), subject().label);
  for (const input of document.getElementsByName("size")) input.checked = input.value === state.size;
  $("picking").hidden = !state.pick;
  $("picking-end").textContent = state.pick === "from" ? "begins with" : "ends with";
  if (isScrolling) return;
  if (["view", ...SUBJECT].some((name) => changed.has(name))) {
    clearNotice($("wall-notice"));
    wall.show(subject(), state.size, state.index);
  } else if (changed.has("index")) {
    wall.goTo(state.index);
  }
}

function showDetail(state, changed) {
  const wasOpen = !$("detail").hidden;
  document.body.classList.toggle("has-detail", state.image !== null);
  wall.mark(state.image);
  const isCovered = state.image !== null && matchMedia("(max-width: 52rem)").matches;
  for (const one of document.querySelectorAll("body > :is(header, main, footer, #code)")) one.inert = isCovered;
  if (state.image === null) {
    if (!wasOpen) return;
    closeDetail();
    if (changed.has("image") && state.view === "wall") wall.focus(lastOpen);
  } else if (["image", "walk", ...SUBJECT.slice(0, 4), "view", "pick"].some((name) => changed.has(name))) {
    lastOpen = state.image;
    openDetail(subject(), state.image, state.walk);
    if (!wasOpen) $("detail-title").focus({ preventScroll: true });
  }
}

let lastOpen = 0;

/** Which images are in sight, and the lines of code that ask for them. */
function showRange() {
  const { view } = current();
  const { first, count } = view === "wall" && wall.columns ? wall.range : {};
  $("shown-range").textContent = count ? `images ${grouped(first)} to ${grouped(first + count - 1)}` : "";
  if (!$("code").hidden) showCode(requests());
}

function requests() {
  const state = current();
  if (state.view === "interpolate") return [interpolationRequest()];
  if (state.view === "judge") return [judgeRequest()];
  const opened = detailRequest();
  if (opened) return [opened];
  const { first, count, columns } = wall.range;
  const fields = sampleFields(subject(), first, Math.min(count, mostImages(bundle.image)));
  return [{ route: "sample", fields: { ...fields, columns, format: "png" }, file: "wall.png" }];
}

function startControls() {
  const close = () => change({ image: null, walk: null }, { isStep: true });
  $("detail-close").append(icon("close"));
  $("detail-previous").append(icon("previous"));
  $("detail-next").append(icon("next"));
  $("code-close").append(icon("close"));
  startDetail({ closed: close, shown: () => showRange() });
  startInterpolation({ shown: showRange });
  startCode(showRange);
  startJudge(() => {
    if (!bundle || !hasDiscriminator(bundle)) return false;
    change({ view: "judge" }, { isStep: true });
    return openJudge(bundle, current().label).then(() => true);
  });
  $("controls").addEventListener("submit", (event) => event.preventDefault());
  for (const [name, others] of Object.entries({ seed: { index: 0, image: null, walk: null }, index: {} })) {
    $(name).addEventListener("change", () => {
      const value = typed(name, $(name));
      if (value === undefined) $(name).reportValidity();
      else change({ [name]: value, ...others });
    });
  }
  $("fresh").addEventListener("click", () => {
    change({ seed: freshSeed(), index: 0, image: null, walk: null });
    announce("A new seed.");
  });
  const truncated = settled((truncation) => change({ truncation }), 120);
  $("truncation").addEventListener("input", () => {
    $("shown-truncation").textContent = Number($("truncation").value).toFixed(2);
    truncated(Number($("truncation").value));
  });
  for (const input of document.getElementsByName("size")) input.addEventListener("change", () => change({ size: input.value }));
  $("bundle").addEventListener("change", () => {
    change({ bundle: $("bundle").value, label: null, label_from: null, label_to: null, image: null, walk: null });
  });
  for (const link of document.querySelectorAll("[data-view]")) {
    link.addEventListener("click", (event) => {
      event.preventDefault();
      change({ view: link.dataset.view, pick: null, image: null, walk: null }, { isStep: true });
    });
  }
  $("picking-stop").addEventListener("click", () => change({ view: "interpolate", pick: null }, { isStep: true }));
  addEventListener("resize", settled(showRange, 200));
}

onChange(show);
startControls();
startStrip();
start();
