/** The discriminator asked about images that come from outside: drawn here, dropped, pasted or chosen. */

import { ask, fromBase64, withQuery } from "./api.js";
import { hasEncoder, labelInQuery, pinned } from "./bundles.js";
import { $, announce, h, settled } from "./dom.js";
import { Drawing } from "./drawing.js";
import { inkOf } from "./ink.js";
import { clearNotice, showNotice } from "./notice.js";
import { writeNpy } from "./npy.js";
import { spread, verdictView, worth } from "./verdict.js";

const SEEN = 96; // pixels of a card's picture, about
const MOST_FILES = 64;

let bundle = null;
let label = null;
let drawing = null;
let judging = new AbortController(); // what D was asked last of the drawing
const withoutEncoder = new WeakSet(); // bundles whose /encode said so

export function shownRequest() {
  if (!bundle) return null;
  return { route: "discriminate", fields: fieldsOf(), upload: { name: "image.png", type: "image/png" } };
}

const fieldsOf = () => ({ bundle: pinned(bundle), labels: labelInQuery(bundle, label) });

/** Show the view for a bundle. */
export async function openJudge(found, wanted) {
  const isNew = bundle !== found;
  bundle = found;
  label = wanted;
  $("judge-worth").textContent = worth(bundle);
  if (!isNew) return;
  $("cards").replaceChildren();
  $("drawing-card").replaceChildren();
  for (const place of ["judge-notice", "drawing-notice"]) clearNotice($(place));
  try {
    const ink = await inkOf(bundle);
    if (bundle !== found) return;
    drawing.open(bundle.image, ink.ground);
    brush(ink);
  } catch (error) {
    bundle = null;
    showNotice($("judge-notice"), error, () => openJudge(found, wanted));
  }
}

/** The brush is as wide as the bundle's strokes, and has its colours. */
function brush({ palette, ground, width }) {
  const input = $("brush");
  Object.assign(input, { min: 0.5, max: Math.max(4, Math.ceil(bundle.image.width / 6)), step: 0.1 });
  input.value = width;
  drawing.width = Number(input.value);
  shownBrush();
  const colours = [...palette, ground];
  const swatch = (colour, place) => {
    const name = place === palette.length ? "eraser" : palette.length === 1 ? "ink" : `colour ${place + 1}`;
    const chosen = () => {
      drawing.colour = colour;
    };
    const dot = h("span", { class: "swatch" });
    dot.style.backgroundColor = `rgb(${colour})`;
    return h("label", { title: name }, h("input", { type: "radio", name: "ink", checked: place === 0, onchange: chosen,
      "aria-label": name }), dot, h("span", {}, palette.length === 1 || place === palette.length ? name : ""));
  };
  drawing.colour = colours[0];
  $("inks").replaceChildren(...colours.map(swatch));
}

function shownBrush() {
  $("shown-brush").textContent = `${Number($("brush").value).toFixed(1)} px`;
}

async function verdicts(body, options = {}) {
  return (await ask(withQuery("discriminate", fieldsOf()), { method: "POST", body, ...options })).json();
}

/** Judge files, a card for each. */
async function judgeFiles(files) {
  const images = [...files].slice(0, MOST_FILES); // a copy: the input's own list empties with it
  if (!images.length || !bundle) return;
  clearNotice($("judge-notice"));
  $("cards").ariaBusy = "true";
  try {
    const form = new FormData();
    for (const file of images) form.append("images", file, file.name);
    const reply = await verdicts(form);
    $("cards").prepend(...reply.results.map((result, place) => card(images[place], result)));
    announce(`${images.length === 1 ? "The image is" : `${images.length} images are`} judged.`);
  } catch (error) {
    showNotice($("judge-notice"), error, () => judgeFiles(images));
  } finally {
    $("cards").ariaBusy = "false";
  }
}

/** A judged image: its picture, verdict, hint, and what the encoder makes of it. */
function card(file, result, { name = file.name, picture = pictureOf(file) } = {}) {
  const made = h("article", { class: "card" }, h("div", { class: "pictures" }, h("figure", {}, picture, h("figcaption", {}, name))));
  if (result.error) {
    made.append(h("p", { class: "hint" }, result.error.detail));
    return made;
  }
  const told = h("div", {}, verdictView(bundle, result));
  if (result.converted) told.append(h("p", { class: "quiet" }, "Converted to the bundle's size and colours."));
  if (result.hint) told.append(h("p", { class: "hint" }, result.hint));
  made.append(told);
  if (result.hint && file.type.startsWith("image/")) offerInverse(made, file).catch(() => {}); // the hint stands alone
  reconstruct(made, file);
  return made;
}

function pictureOf(file, alt = "") {
  const picture = h("img", { alt, src: URL.createObjectURL(file) });
  picture.onload = () => {
    URL.revokeObjectURL(picture.src);
    picture.classList.toggle("is-enlarged", picture.naturalWidth < SEEN);
  };
  picture.onerror = () => picture.remove();
  return picture;
}

/** The inverse of an image with a hint is judged as well. Where that one has no hint, it is what was meant. */
async function offerInverse(old, file) {
  const inverse = await inverted(file);
  const { results: [result] } = await verdicts(inverse, { headers: { "Content-Type": inverse.type } });
  if (result.error || result.hint) return;
  const take = () => old.replaceWith(card(new File([inverse], file.name ?? "drawing"), result));
  old.lastElementChild.append(h("button", { type: "button", onclick: take }, "Invert it"));
}

/** A picture with every colour inverted, over the ground that the bundle puts under transparency. */
async function inverted(file) {
  const bitmap = await createImageBitmap(file);
  const canvas = new OffscreenCanvas(bitmap.width, bitmap.height);
  const pen = canvas.getContext("2d");
  pen.fillStyle = bundle.preparation?.background ?? "#000000";
  pen.fillRect(0, 0, canvas.width, canvas.height);
  pen.drawImage(bitmap, 0, 0);
  pen.globalCompositeOperation = "difference";
  pen.fillStyle = "white";
  pen.fillRect(0, 0, canvas.width, canvas.height);
  bitmap.close();
  return canvas.convertToBlob({ type: "image/png" });
}

/** What G draws where the encoder finds the image in latent space. */
async function reconstruct(made, file) {
  if (!hasEncoder(bundle) || withoutEncoder.has(bundle)) return;
  const asked = bundle;
  try {
    const options = { method: "POST", body: file, headers: { "Content-Type": file.type || "image/png" } };
    const { results: [result] } = await (await ask(withQuery("encode", fieldsOf()), options)).json();
    if (typeof result.error === "object") return;
    const picture = pictureOf(fromBase64(result.image), "Its reconstruction");
    const name = `as G draws it (error ${result.error.toFixed(4)})`;
    made.querySelector(".pictures").append(h("figure", {}, picture, h("figcaption", {}, name)));
  } catch {
    withoutEncoder.add(asked);
  }
}

/** The drawing is judged after each stroke, in a card that stays. */
const judgeDrawing = settled(async () => {
  judging.abort();
  judging = new AbortController();
  const { signal } = judging;
  const place = $("drawing-card");
  if (drawing.isEmpty) return place.replaceChildren(invitation());
  const { width, height, channels } = bundle.image;
  const pixels = drawing.pixels();
  const file = writeNpy(pixels, [1, height, width, channels]);
  try {
    const { results: [result] } = await verdicts(file, { signal });
    clearNotice($("drawing-notice"));
    const name = width < SEEN ? "as D sees it" : "your drawing";
    place.replaceChildren(card(file, result, { name, picture: seen(pixels) }));
    announce(`${(100 * result.probability_real).toFixed(0)} % likely to be real${result.label ? `, looks like ${result.label}` : ""}.`);
  } catch (error) {
    showNotice($("drawing-notice"), error, judgeDrawing);
  }
}, 200);

/** What stands where nothing is drawn yet: what D says of other images. */
function invitation() {
  const words = "Draw something: D says what it thinks after each stroke.";
  return h("div", { class: "empty" }, h("p", {}, words), spread(bundle));
}

/** The pixels that were sent, as a picture. */
function seen(pixels) {
  const { width, height, channels } = bundle.image;
  const canvas = h("canvas", { width, height, role: "img", "aria-label": "The drawing as D sees it", class: width < SEEN ? "is-enlarged" : null });
  const data = new ImageData(width, height);
  for (let at = 0; at < width * height; at += 1) {
    for (let channel = 0; channel < 3; channel += 1) data.data[4 * at + channel] = pixels[at * channels + (channel % channels)];
    data.data[4 * at + 3] = 255;
  }
  canvas.getContext("2d").putImageData(data, 0, 0);
  return canvas;
}

/** Wire the controls. `shown` opens the view for images that are dropped or pasted elsewhere. */
export function startJudge(shown) {
  drawing = new Drawing($("drawing"), () => {
    $("undo").disabled = $("clear").disabled = drawing.isEmpty;
    judgeDrawing();
  });
  $("undo").addEventListener("click", () => drawing.undo());
  $("clear").addEventListener("click", () => drawing.clear());
  $("brush").addEventListener("input", () => {
    drawing.width = Number($("brush").value);
    shownBrush();
  });
  $("files").addEventListener("change", () => {
    judgeFiles($("files").files);
    $("files").value = ""; // so that the same file can be chosen again
  });
  const taken = async (files) => {
    if (files?.length && (await shown())) judgeFiles(files);
  };
  addEventListener("paste", (event) => taken(event.clipboardData?.files));
  const hasFiles = (event) => event.dataTransfer.types.includes("Files"); // a text goes where it is dropped
  addEventListener("dragover", (event) => {
    if (!hasFiles(event)) return;
    event.preventDefault();
    document.body.classList.add("is-dropping");
  });
  addEventListener("dragleave", (event) => {
    if (!event.relatedTarget) document.body.classList.remove("is-dropping");
  });
  addEventListener("drop", (event) => {
    if (!hasFiles(event)) return;
    event.preventDefault();
    document.body.classList.remove("is-dropping");
    taken(event.dataTransfer.files);
  });
}
