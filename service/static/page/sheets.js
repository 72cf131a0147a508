/**
 * How the wall's images come: in sheets, pictures of many images in a grid, whose bounds depend on the image's size
 * alone, so that every window asks for the same ones and the browser keeps them.
 */

import { ask, withQuery } from "./api.js";
import { labelInQuery, pinned } from "./bundles.js";

const PIXELS = 2 ** 17; // of a sheet, about
const MOST = 256;
const LEAST = 4; // even of large images, so that a row is a few requests

/** Images on a sheet, a power of two. */
export function sheetSize({ height, width }) {
  const fitting = 2 ** Math.floor(Math.log2(PIXELS / (height * width)));
  return Math.min(MOST, Math.max(LEAST, fitting));
}

const columnsOf = (count) => 2 ** Math.ceil(Math.log2(count) / 2);

/** Images that a service gives in one picture, unless it is set otherwise. */
export const mostImages = ({ height, width }) => Math.max(1, Math.min(4096, Math.floor(64e6 / (height * width))));

/** Large images are shown smaller than they are: there JPEG is a tenth of the work of PNG, and looks the same. */
const formatOf = ({ height, width }) => (height * width > 2 ** 16 ? "jpeg" : "png");

/** The query of what a subject (bundle, seed, label, truncation) has at some indices. */
export function sampleFields({ bundle, seed, label, truncation }, first, count) {
  return {
    bundle: pinned(bundle),
    seed,
    first_index: first || null,
    count: count === 1 ? null : count,
    labels: labelInQuery(bundle, label),
    truncation: truncation === 1 ? null : truncation,
  };
}

/** Sheet `number` of `size` images as a bitmap, in which each image is `shown` = [width, height] large. */
export async function loadSheet(subject, number, size, shown, signal) {
  const { image } = subject.bundle;
  const first = number * size;
  const count = Math.min(size, 2 ** 53 - first);
  const columns = Math.min(columnsOf(size), count);
  const fields = { ...sampleFields(subject, first, count), columns: count === 1 ? null : columns, format: formatOf(image) };
  const blob = await (await ask(withQuery("sample", fields), { signal })).blob();
  const isReduced = shown[0] < image.width;
  const resized = { resizeWidth: columns * shown[0], resizeHeight: Math.ceil(count / columns) * shown[1], resizeQuality: "high" };
  return createImageBitmap(blob, isReduced ? resized : {});
}

/** Where an image lies on its sheet. */
export function placeOf(index, size, [width, height]) {
  const place = index % size;
  const columns = columnsOf(size);
  return [(place % columns) * width, Math.floor(place / columns) * height];
}
