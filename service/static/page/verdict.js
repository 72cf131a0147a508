/** What D says of an image, beside what it says of images of which the truth is known. */

import { verdictsOf } from "./bundles.js";
import { h, svg } from "./dom.js";

const WIDTH = 320;
const HEIGHT = 56;

/** The outline of a histogram. */
function outline(counts, highest) {
  const width = WIDTH / counts.length;
  const steps = counts.map((count, bin) => `V${HEIGHT - (HEIGHT * count) / highest}H${(bin + 1) * width}`);
  return `M0,${HEIGHT}${steps.join("")}V${HEIGHT}`;
}

/**
 * How a bundle's verdicts are spread over real and over generated images, and where one probability lies among them;
 * null for the spread alone.
 */
function plot({ real, generated }, probability) {
  const shares = [real, generated].map((counts) => {
    const images = counts.reduce((sum, count) => sum + count, 0);
    return counts.map((count) => count / images);
  });
  const highest = Math.max(...shares.flat());
  const upright = (x, name) => svg("line", { x1: x, x2: x, y1: -6, y2: HEIGHT, class: name });
  const drawn = svg(
    "svg",
    { viewBox: `0 -6 ${WIDTH} ${HEIGHT + 6}`, preserveAspectRatio: "none", role: "img",
      "aria-label": "Verdicts on real and on generated images, from 0 to 1" },
    svg("path", { d: outline(shares[0], highest), class: "real" }),
    svg("path", { d: outline(shares[1], highest), class: "generated" }),
    upright(WIDTH / 2, "half"),
    ...(probability === null ? [] : [upright(WIDTH * probability, "mark")]),
  );
  const axis = h("div", { class: "axis", "aria-hidden": "true" }, ...["0", "½", "1"].map((text) => h("span", {}, text)));
  const legend = h("p", { class: "legend" }, h("span", { class: "real" }, "real images"),
    h("span", { class: "generated" }, "generated ones"), probability !== null && h("span", { class: "mark" }, "this one"));
  return h("div", { class: "plot" }, drawn, axis, legend);
}

/** The spread alone; null where a bundle has no record of it. */
export function spread(bundle) {
  const verdicts = verdictsOf(bundle);
  return verdicts && plot(verdicts, null);
}

/** A bar where the bundle has no record of its verdicts. */
function bar(probability) {
  const track = svg("svg", { viewBox: `0 0 ${WIDTH} 8`, preserveAspectRatio: "none", "aria-hidden": "true" },
    svg("rect", { width: WIDTH * probability, height: 8, class: "real" }));
  return h("div", { class: "plot bar" }, track);
}

/** How much a bundle's verdicts are worth. */
export function worth(bundle) {
  if (!bundle.calibration) {
    return `${bundle.name} is not calibrated: it could not tell real images from generated ones, so this means little.`;
  }
  const { auc } = bundle.calibration;
  return `½ means that D can't tell. Of a real image and a generated one, it finds the real one more probable in ` +
    `${Math.round(100 * auc)} of 100 cases; 50 would be guessing.`;
}

/** A verdict: a number, its place among others, the class. */
export function verdictView(bundle, result) {
  const verdicts = verdictsOf(bundle);
  const percent = (100 * result.probability_real).toFixed(1);
  const label = result.label === undefined ? null : h("span", { class: "class-name" }, "looks like ", h("b", {}, result.label));
  return h("div", { class: "verdict" },
    h("p", { class: "probability" }, h("b", {}, `${percent} %`), " likely to be real", label),
    verdicts ? plot(verdicts, result.probability_real) : bar(result.probability_real));
}
