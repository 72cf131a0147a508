/** What a bundle's images are drawn with, told from some of them: ground, ink, and how wide its strokes are. */

import { ask, withQuery } from "./api.js";
import { pinned } from "./bundles.js";
import { readNpy } from "./npy.js";

const IMAGES = 16;
const COLOURS = 6;
const known = new Map();

/** {ground, palette: [[r, g, b], …], width in pixels} of a bundle. */
export function inkOf(bundle) {
  const name = pinned(bundle);
  if (!known.has(name)) known.set(name, measure(bundle));
  known.get(name).catch(() => known.delete(name));
  return known.get(name);
}

async function measure(bundle) {
  const { width, height, channels } = bundle.image;
  const count = width * height > 2 ** 16 ? 2 : IMAGES;
  const reply = await ask(withQuery("sample", { bundle: pinned(bundle), seed: 0, count, format: "npy" }));
  const { data } = readNpy(await reply.arrayBuffer());
  return inkOfPixels(data, { count, width, height, channels });
}

/** The same of uint8 pixels (count, height, width, channels). */
function inkOfPixels(data, { count, width, height, channels }) {
  const size = width * height;
  const light = new Float32Array(count * size);
  for (let at = 0; at < light.length; at += 1) {
    for (let channel = 0; channel < channels; channel += 1) light[at] += data[at * channels + channel] / channels;
  }
  const border = [];
  for (let image = 0; image < count; image += 1) {
    for (let x = 0; x < width; x += 1) border.push(light[image * size + x], light[image * size + size - 1 - x]);
  }
  const ground = border.sort((a, b) => a - b)[border.length >> 1];
  const isDark = ground < 128;
  const plain = isDark ? [[255, 255, 255]] : [[0, 0, 0]];
  return {
    ground: Array(3).fill(channels === 1 ? (isDark ? 0 : 255) : Math.round(ground)),
    palette: channels === 1 ? plain : [...plain, ...frequent(data)],
    width: strokeWidth(light, { count, width, height }, ground),
  };
}

/** Strokes have twice their width's area for each pixel of their outline; corners make the outline longer. */
function strokeWidth(light, { count, width, height }, ground) {
  const threshold = Math.max(...[0, 255].map((end) => Math.abs(end - ground))) / 2;
  const isInk = (at) => Math.abs(light[at] - ground) > threshold;
  let [area, outline] = [0, 0];
  for (let at = 0; at < count * width * height; at += 1) {
    if (!isInk(at)) continue;
    area += 1;
    const x = at % width;
    if (x === 0 || !isInk(at - 1)) outline += 1;
    if (x === width - 1 || !isInk(at + 1)) outline += 1;
    if (at < width || !isInk(at - width)) outline += 1;
    if (at >= light.length - width || !isInk(at + width)) outline += 1;
  }
  const most = Math.max(1, width / 8);
  return Math.min(most, Math.max(1, outline ? (2.4 * area) / outline : most));
}

/** The most frequent colours, told apart by two bits of each channel. */
function frequent(data) {
  const counts = new Map();
  for (let at = 0; at + 2 < data.length; at += 3) {
    const key = ((data[at] >> 6) << 4) | ((data[at + 1] >> 6) << 2) | (data[at + 2] >> 6);
    counts.set(key, (counts.get(key) ?? 0) + 1);
  }
  const common = [...counts].sort(([, a], [, b]) => b - a).slice(0, COLOURS);
  return common.map(([key]) => [key >> 4, (key >> 2) & 3, key & 3].map((level) => level * 64 + 32));
}
