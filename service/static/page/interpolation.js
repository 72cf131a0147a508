/** The way from one image to another: its frames as a film, and as a file to keep. */

import { ask, download, withQuery } from "./api.js";
import { labelInQuery, pinned } from "./bundles.js";
import { $, fill, h, icon, movesLess, settled } from "./dom.js";
import { clearNotice, showNotice } from "./notice.js";
import { change, current, freshSeed, typed } from "./state.js";

const EXPORTS = { gif: "GIF", webp: "WebP", apng: "APNG", png: "PNG strip" };
const STRIP_SIDE = 16_384; // pixels that browsers decode into one picture
const STRIP_PIXELS = 2 ** 24;
const ENDS = ["from", "to"];

let bundle = null;
let controller = new AbortController();
let film = null; // {frames: ImageBitmap, steps}
let playing = null; // {started, from}: when, and at which position from 0 to 1
let codeChanged = () => {};
let fields = null; // what was asked for last, but for the format

const parseEnd = (text) => text.split(":").map(Number);

/** Frames that one strip can hold. */
const mostSteps = ({ width, height }) =>
  Math.max(2, Math.min(256, Math.floor(STRIP_SIDE / width), Math.floor(STRIP_PIXELS / (width * height))));

/** The query of GET /interpolate, but for the format. */
async function fieldsOf(state, signal) {
  const [seedFrom, indexFrom] = parseEnd(state.from);
  const [seedTo, indexTo] = parseEnd(state.to);
  const [label, labelTo] = await Promise.all(ENDS.map((end) => labelOf(state, end, signal)));
  return {
    bundle: pinned(bundle), seed_from: seedFrom, seed_to: seedTo, index_from: indexFrom || null, index_to: indexTo || null,
    steps: Math.min(state.steps, mostSteps(bundle.image)), method: state.method,
    label: labelInQuery(bundle, label), label_to: labelInQuery(bundle, labelTo),
    truncation: state.truncation === 1 ? null : state.truncation,
  };
}

/** An end's class: the chosen one or, so that it is the image that the wall shows, its own. */
async function labelOf(state, end, signal) {
  if (!bundle.labels || state[`label_${end}`] !== null) return state[`label_${end}`];
  const [seed, index] = parseEnd(state[end]);
  const route = withQuery("sample", { bundle: pinned(bundle), seed, first_index: index, format: "json" });
  return (await (await ask(route, { signal })).json()).labels[0];
}

export function shownRequest() {
  return fields && { route: "interpolate", fields: { ...fields, duration_ms: current().duration, format: "gif" }, file: "interpolation.gif" };
}

/** Show the interpolation of a state; ends that are not chosen are drawn. */
export async function openInterpolation(found, state) {
  bundle = found;
  const missing = ENDS.filter((end) => state[end] === null);
  if (missing.length) {
    const seed = state.seed ?? freshSeed();
    return change(Object.fromEntries(missing.map((end) => [end, `${seed}:${end === "from" ? state.index : (state.index + 1) % 2 ** 53}`])));
  }
  controls(state);
  controller.abort();
  controller = new AbortController();
  const { signal } = controller;
  clearNotice($("interpolation-notice"));
  $("film").ariaBusy = "true";
  try {
    const asked = await fieldsOf(state, signal);
    const route = withQuery("interpolate", { ...asked, format: "png" });
    const frames = await createImageBitmap(await (await ask(route, { signal })).blob());
    if (signal.aborted) return frames.close();
    film?.frames.close();
    fields = asked;
    codeChanged();
    film = { frames, steps: Math.round(frames.width / bundle.image.width) };
    strip();
    draw(playing ? position() : Number($("scrubber").value));
    ends();
    if (!playing && !movesLess.matches) play();
  } catch (error) {
    if (!signal.aborted) showNotice($("interpolation-notice"), error, () => openInterpolation(bundle, current()));
  } finally {
    if (!signal.aborted) $("film").ariaBusy = "false";
  }
}

export function closeInterpolation() {
  controller.abort();
  clearNotice($("interpolation-notice"));
  pause();
}

function controls(state) {
  for (const end of ENDS) {
    const [seed, index] = parseEnd(state[end]);
    fill($(`seed-${end}`), seed);
    fill($(`index-${end}`), index);
    const select = $(`label-${end}`);
    select.closest("label").hidden = !bundle.labels;
    select.replaceChildren(new Option("its own", ""), ...(bundle.labels ?? []).map((name, place) => new Option(name, place)));
    select.value = state[`label_${end}`] ?? "";
  }
  $("steps").max = mostSteps(bundle.image);
  $("steps").value = state.steps;
  $("shown-steps").textContent = $("steps").value;
  $("duration").value = state.duration;
  $("shown-duration").textContent = `${(state.duration / 1000).toFixed(1)} s`;
  for (const input of document.getElementsByName("method")) input.checked = input.value === state.method;
}

/** The first and the last frame, as pictures of the ends. */
function ends() {
  for (const [place, end] of ENDS.entries()) drawFrame($(`picture-${end}`), place * (film.steps - 1));
}

function drawFrame(canvas, frame) {
  const { width, height } = bundle.image;
  if (canvas.width !== width || canvas.height !== height) Object.assign(canvas, { width, height });
  canvas.classList.toggle("is-enlarged", width < 280);
  canvas.getContext("2d").drawImage(film.frames, frame * width, 0, width, height, 0, 0, width, height);
}

/** A position from 0 to 1 on the screen, and on the scrubber. */
function draw(at) {
  const frame = Math.min(film.steps - 1, Math.floor(at * film.steps));
  drawFrame($("film"), frame);
  $("scrubber").value = at;
  $("scrubber").ariaValueText = `Frame ${frame + 1} of ${film.steps}`;
  $("shown-frame").textContent = `${frame + 1} / ${film.steps}`;
}

/** As many frames as fit, below the film. */
function strip() {
  const canvas = $("filmstrip");
  const { width, height } = bundle.image;
  const tall = canvas.clientHeight * devicePixelRatio;
  const wide = canvas.clientWidth * devicePixelRatio;
  const count = Math.max(2, Math.min(film.steps, Math.floor(wide / ((tall * width) / height))));
  Object.assign(canvas, { width: wide, height: tall });
  const pen = canvas.getContext("2d");
  pen.imageSmoothingEnabled = height > tall;
  const each = wide / count;
  const side = Math.min(each, (tall * width) / height);
  for (let place = 0; place < count; place += 1) {
    const frame = Math.round((place * (film.steps - 1)) / (count - 1));
    const left = Math.round(place * each + (each - side) / 2);
    pen.drawImage(film.frames, frame * width, 0, width, height, left, 0, Math.round(side), Math.round((side * height) / width));
  }
}

/** Where the film is, there and back again. */
function position() {
  const share = (performance.now() - playing.started) / current().duration + playing.from;
  const turned = share % 2;
  return turned < 1 ? turned : 2 - turned;
}

function play() {
  playing = { started: performance.now(), from: Number($("scrubber").value) % 1 };
  $("play").replaceChildren(icon("pause"), "Pause");
  const next = () => {
    if (!playing) return;
    if (film) draw(position());
    requestAnimationFrame(next);
  };
  next();
}

function pause() {
  playing = null;
  $("play").replaceChildren(icon("play"), "Play");
}

/** Wire the controls. */
export function startInterpolation({ shown }) {
  codeChanged = shown;
  $("play").addEventListener("click", () => (playing ? pause() : film && play()));
  $("scrubber").addEventListener("input", () => {
    pause();
    if (film) draw(Number($("scrubber").value));
  });
  const chosen = settled(change, 150);
  for (const end of ENDS) {
    for (const name of ["seed", "index"]) {
      $(`${name}-${end}`).addEventListener("input", () => {
        const [seed, index] = [typed("seed", $(`seed-${end}`)), typed("index", $(`index-${end}`))];
        if (seed !== undefined && index !== undefined) chosen({ [end]: `${seed}:${index}` });
      });
    }
    $(`fresh-${end}`).addEventListener("click", () => change({ [end]: `${freshSeed()}:0`, [`label_${end}`]: null }));
    $(`pick-${end}`).addEventListener("click", () => change({ view: "wall", pick: end }, { isStep: true }));
    $(`label-${end}`).addEventListener("change", ({ target }) => {
      change({ [`label_${end}`]: target.value === "" ? null : Number(target.value) });
    });
  }
  $("swap").addEventListener("click", () => {
    const { from, to, label_from: first, label_to: last } = current();
    change({ from: to, to: from, label_from: last, label_to: first });
  });
  for (const input of document.getElementsByName("method")) {
    input.addEventListener("change", () => change({ method: input.value }));
  }
  $("steps").addEventListener("input", () => {
    $("shown-steps").textContent = $("steps").value;
    chosen({ steps: Number($("steps").value) });
  });
  $("duration").addEventListener("input", () => {
    $("shown-duration").textContent = `${($("duration").value / 1000).toFixed(1)} s`;
    chosen({ duration: Number($("duration").value) });
  });
  $("exports").append(...Object.entries(EXPORTS).map(([format, name]) => h("button", { type: "button", onclick: () => keep(format) }, name)));
}

async function keep(format) {
  const state = current();
  if (!fields) return;
  const timed = format === "png" ? {} : { duration_ms: state.duration };
  const name = `${bundle.name}-${state.from}-${state.to}`.replaceAll(":", "-");
  const route = withQuery("interpolate", { ...fields, ...timed, format });
  clearNotice($("interpolation-notice"));
  await download(route, `${name}.${format}`).catch((error) => showNotice($("interpolation-notice"), error, () => keep(format)));
}
