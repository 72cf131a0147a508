/** One image, large: where it comes from, what D says of it, its files, and its neighbours in latent space. */

import { address, ask, askJson, download, fromBase64, hasKey, withQuery } from "./api.js";
import { hasDiscriminator, labelInQuery, pinned } from "./bundles.js";
import { $, announce, copyButton, grouped, h, settled } from "./dom.js";
import { COUNT, formatWalk, neighboursOf, parseWalk, walked } from "./neighbours.js";
import { clearNotice, showNotice } from "./notice.js";
import { placeOf, sampleFields } from "./sheets.js";
import { change } from "./state.js";
import { verdictView, worth } from "./verdict.js";

const FORMATS = ["png", "webp", "jpeg", "json", "zip", "npy"];
const REACH = 25; // percent, at first

let controller = new AbortController();
let shown = null; // {subject, index, steps, drawn, latent}
let reach = REACH;
let codeChanged = () => {};

/** What is open as a request, for the lines of code; null where nothing is. */
export function shownRequest() {
  if (!shown) return null;
  if (shown.steps.length) return shown.latent && { route: "sample", body: latentBody(shown.latent), file: "neighbour.png" };
  return { route: "sample", fields: { ...sampleFields(shown.subject, shown.index, 1), format: "png" }, file: "image.png" };
}

export function closeDetail() {
  controller.abort();
  shown = null;
  clearNotice($("detail-notice")); // or its retry would open the panel again
  $("detail").hidden = true;
}

/** The picture's room, before it comes. A small image's pixels grow by one whole factor, unless that is a large one. */
function room({ width, height }) {
  const wide = $("picture").clientWidth;
  const factor = wide / width;
  const shown = factor >= 8 || factor < 1 ? wide : Math.floor(factor) * width;
  $("image").classList.toggle("is-enlarged", factor > 2);
  Object.assign($("image").style, { width: `${shown}px`, height: `${(shown * height) / width}px` });
}

/** Open an image of a subject, or the one that a walk from it leads to. */
export async function openDetail(subject, index, walk) {
  controller.abort();
  controller = new AbortController();
  const { signal } = controller;
  const steps = parseWalk(walk);
  if (shown?.subject.bundle !== subject.bundle) $("image").removeAttribute("src");
  shown = { subject, index, steps };
  $("detail").hidden = false;
  clearNotice($("detail-notice"));
  room(subject.bundle.image);
  title();
  facts();
  files();
  try {
    const fields = { ...sampleFields(subject, index, 1), format: "json", latents: true };
    const drawn = await (await ask(withQuery("sample", fields), { signal })).json();
    Object.assign(shown, { drawn, latent: walked(drawn.latents[0], steps, subject.bundle.latent.distribution) });
    await show(steps.length ? await pngOf(shown.latent, signal) : fromBase64(drawn.images[0]), signal);
  } catch (error) {
    if (!signal.aborted) showNotice($("detail-notice"), error, () => openDetail(subject, index, walk));
  }
}

async function show(png, signal) {
  const { subject: { bundle }, drawn } = shown;
  const picture = $("image");
  URL.revokeObjectURL(picture.src);
  picture.src = URL.createObjectURL(png);
  picture.alt = $("detail-title").textContent;
  facts(drawn);
  codeChanged();
  await Promise.all([judged(bundle, png, signal), neighbours(signal)]);
}

function title() {
  const { index, steps } = shown;
  const far = steps.length ? `, ${steps.length} ${steps.length === 1 ? "step" : "steps"} away` : "";
  $("detail-title").textContent = `Image ${grouped(index)}${far}`;
  $("detail-previous").disabled = index === 0;
  $("detail-next").disabled = index === Number.MAX_SAFE_INTEGER;
  $("detail-ends").hidden = steps.length > 0; // an interpolation's ends have a seed
}

function facts(drawn = null) {
  const { subject: { bundle, seed, truncation }, index, steps } = shown;
  const link = steps.length ? location.href : address(withQuery("sample", { ...sampleFields(shown.subject, index, 1), format: "png" }));
  const name = drawn?.label_names?.[0];
  const rows = [
    ["Bundle", pinned(bundle)], ["Seed", seed], ["Index", index], name !== undefined && ["Class", name],
    bundle.labels && name === undefined && ["Class", "…"],
    truncation !== 1 && ["Truncation", truncation],
  ].filter(Boolean);
  const row = (term, given, ...content) => h("div", {}, h("dt", {}, term), h("dd", given, ...content));
  $("facts").replaceChildren(...rows.map(([term, value]) => row(term, {}, `${value}`)),
    row("Address", { class: "link" }, h("a", { href: link }, link), copyButton(() => link, "Copy the address")));
}

function files() {
  const { subject, index, steps } = shown;
  const link = (format) => {
    const route = withQuery("sample", { ...sampleFields(subject, index, 1), format });
    const name = `${subject.bundle.name}-seed-${subject.seed}-image-${index}.${format}`;
    const clicked = (event) => {
      if (!hasKey() && !steps.length) return;
      event.preventDefault();
      if (steps.length && !shown.latent) return; // it is on its way
      const options = steps.length ? posted({ ...latentBody(shown.latent), format }) : undefined;
      download(steps.length ? "sample" : route, name, options).catch((error) => {
        showNotice($("detail-notice"), error, () => clearNotice($("detail-notice")));
      });
    };
    return h("a", { class: "button", href: route, download: name, onclick: clicked }, format);
  };
  $("files-of-image").replaceChildren(...FORMATS.map(link));
}

/** The body that draws latents as they are: they are multiplied by the truncation as a seed's would be. */
function latentBody(...latents) {
  const { subject: { bundle, truncation }, drawn } = shown;
  const label = drawn.labels?.[0];
  return {
    bundle: pinned(bundle), latents, ...(label === undefined ? {} : { labels: label }),
    ...(truncation === 1 ? {} : { truncation }),
  };
}

const posted = (body) => ({ method: "POST", headers: { "Content-Type": "application/json" }, body: JSON.stringify(body) });

async function pngOf(latent, signal) {
  return (await askJson("sample", { ...latentBody(latent), format: "png" }, { signal })).blob();
}

async function judged(bundle, png, signal) {
  $("detail-verdict").hidden = !hasDiscriminator(bundle);
  if (!hasDiscriminator(bundle)) return;
  const fields = { bundle: pinned(bundle), labels: labelInQuery(bundle, shown.drawn.labels?.[0] ?? null) };
  const headers = { "Content-Type": "image/png" };
  try {
    const reply = await (await ask(withQuery("discriminate", fields), { method: "POST", headers, body: png, signal })).json();
    $("verdict").replaceChildren(verdictView(bundle, reply.results[0]), h("p", { class: "quiet" }, worth(bundle)));
  } catch (error) {
    if (error.code === "no_discriminator") $("detail-verdict").hidden = true;
    else if (!signal.aborted) throw error;
  }
}

/** A strip of neighbours, cut into buttons. */
async function neighbours(signal) {
  const { subject: { bundle }, latent, steps } = shown;
  const drawn = reach; // the slider may move on before one of these is clicked
  const latents = neighboursOf(latent, drawn, bundle.latent.distribution, steps.length);
  const { width, height } = bundle.image;
  const body = { ...latentBody(...latents), format: width * height > 2 ** 16 ? "jpeg" : "png", columns: COUNT / 2 };
  const bitmap = await createImageBitmap(await (await askJson("sample", body, { signal })).blob());
  const buttons = Array.from({ length: COUNT }, (_, place) => {
    const canvas = h("canvas", { width, height, class: width <= 96 ? "is-enlarged" : null });
    const [x, y] = [(place % (COUNT / 2)) * width, Math.floor(place / (COUNT / 2)) * height];
    canvas.getContext("2d").drawImage(bitmap, x, y, width, height, 0, 0, width, height);
    const go = () => change({ walk: formatWalk([...steps, [place, drawn]]) }, { isStep: true });
    return h("button", { type: "button", class: "tile", "aria-label": `Neighbour ${place + 1}`, onclick: go }, canvas);
  });
  bitmap.close();
  $("neighbours").replaceChildren(...buttons);
}

/** Wire the panel's own controls. */
export function startDetail({ closed, shown: told }) {
  codeChanged = told;
  const step = (by) => {
    const index = shown.index + by;
    if (index >= 0 && Number.isSafeInteger(index)) change({ image: index, walk: null });
  };
  $("detail-close").addEventListener("click", closed);
  $("detail-previous").addEventListener("click", () => step(-1));
  $("detail-next").addEventListener("click", () => step(1));
  $("detail").addEventListener("keydown", (event) => {
    if (event.target.matches("input, a")) return;
    else if (event.key === "ArrowLeft") step(-1);
    else if (event.key === "ArrowRight") step(1);
  });
  addEventListener("keydown", (event) => event.key === "Escape" && shown && closed());
  const again = settled(() => shown && neighbours(controller.signal).catch((error) => {
    if (error.name !== "AbortError") showNotice($("detail-notice"), error, again);
  }), 120);
  $("reach").addEventListener("input", () => {
    reach = Number($("reach").value);
    $("shown-reach").textContent = `${reach} %`;
    if (shown?.latent) again();
  });
  for (const end of ["from", "to"]) {
    $(`use-${end}`).addEventListener("click", () => {
      const { subject: { seed, label }, index } = shown;
      change({ view: "interpolate", [end]: `${seed}:${index}`, [`label_${end}`]: label, image: null, walk: null }, { isStep: true });
      announce(`Image ${grouped(index)} is an end of the interpolation.`);
    });
  }
}
