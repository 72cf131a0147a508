"use strict";

const $ = (id) => document.getElementById(id);
const bundles = new Map();

/** The reply, or an Error with the problem's detail. */
async function ask(url, options = {}) {
  const key = sessionStorage.getItem("key");
  const reply = await fetch(url, key ? { ...options, headers: { "X-API-Key": key } } : options);
  if (reply.ok) return reply;
  const given = reply.status === 401 ? prompt("This service needs a key:") : null;
  if (given) {
    sessionStorage.setItem("key", given);
    return ask(url, options);
  }
  const problem = await reply.json().catch(() => ({ detail: reply.statusText }));
  throw new Error(`${problem.detail} (${reply.status}${problem.request_id ? `, request ${problem.request_id}` : ""})`);
}

/** The whole address of a route, for other programs. */
function here(route) {
  return new URL(route, document.baseURI).href;
}

/** Run something, and show its failure where the user looks. */
async function guarded(place, work) {
  place.textContent = "";
  try {
    await work();
  } catch (error) {
    place.textContent = error.message;
  }
}

function query() {
  const fields = new URLSearchParams({ count: $("count").value, seed: $("seed").value, bundle: $("bundle").value });
  if ($("truncation").value !== "1") fields.set("truncation", $("truncation").value);
  if ($("labels").value) fields.set("labels", $("labels").value);
  return fields;
}

async function show() {
  const asked = query();
  history.replaceState(null, "", `#${asked}`);
  $("figure").ariaBusy = "true";
  await guarded($("error"), async () => {
    const reply = await ask(`sample?${asked}&format=png`);
    URL.revokeObjectURL($("picture").src);
    $("picture").src = URL.createObjectURL(await reply.blob());
    $("caption").textContent = `${reply.headers.get("X-Bundle")}, seed ${reply.headers.get("X-Seed")}`;
    $("curl-sample").textContent = `curl -o samples.png '${here("sample")}?${asked}'`;
  });
  $("figure").ariaBusy = "false";
}

function showBundle() {
  const bundle = bundles.get($("bundle").value);
  const names = bundle?.labels ?? [];
  $("classes").hidden = names.length === 0;
  $("labels").replaceChildren(new Option("any", ""), ...names.map((name, index) => new Option(name, labelOf(names, index))));
  $("worth").textContent = bundle ? worth(bundle) : "";
  $("curl-discriminate").textContent =
    `curl --data-binary @image.png -H 'Content-Type: image/png' '${here("discriminate")}?${judgeQuery()}'`;
}

/** A class in a query: its index, as JSON where another class is called by that number. */
function labelOf(names, index) {
  const named = names.indexOf(`${index}`);
  return named === -1 || named === index ? `${index}` : `[${index}]`;
}

/** What a bundle's verdicts are worth, and what the plots beside them show. */
function worth(bundle) {
  const calibration = bundle.calibration;
  const text = calibration
    ? `The AUC of ${bundle.name} is ${calibration.auc.toFixed(2)}: of a real image and a generated one it finds the ` +
      `real one more probable in ${Math.round(100 * calibration.auc)} of 100 cases, and 50 would be guessing.`
    : `${bundle.name} is not calibrated: it could not tell real images from generated ones, so its verdicts mean little.`;
  return hasVerdicts(bundle)
    ? `${text} The plots show what it says of real images (filled) and of generated ones (line) that it never saw, ` +
      "from 0 on the left to 1 on the right, with ½ in the middle; the mark is the image's own place."
    : text;
}

function hasVerdicts(bundle) {
  const verdicts = bundle?.evaluation.verdicts;
  return Array.isArray(verdicts?.real) && Array.isArray(verdicts?.generated);
}

function judgeQuery() {
  const fields = new URLSearchParams({ bundle: $("bundle").value });
  if ($("labels").value) fields.set("labels", $("labels").value);
  return fields;
}

function showTruncation() {
  $("shown-truncation").textContent = $("truncation").value;
}

/** A random whole number below 2^53, all of which the browser holds exactly. */
function freshSeed() {
  const [high, low] = crypto.getRandomValues(new Uint32Array(2));
  return (high >>> 11) * 2 ** 32 + low;
}

/** An element of SVG. */
function shape(name, attributes, ...content) {
  const made = document.createElementNS("http://www.w3.org/2000/svg", name);
  for (const [key, value] of Object.entries(attributes)) made.setAttribute(key, value);
  made.append(...content);
  return made;
}

/** The outline of a histogram, 200 wide and up to 40 high. */
function outline(counts, highest) {
  const width = 200 / counts.length;
  const steps = counts.map((count, bin) => `V${40 - (38 * count) / highest}H${(bin + 1) * width}`);
  return `M0,40${steps.join("")}V40`;
}

/** How a bundle's verdicts are spread over real and over generated images, and where one probability lies among them. */
function spread({ real, generated }, probability) {
  const shares = [real, generated].map((counts) => {
    const images = counts.reduce((sum, count) => sum + count, 0);
    return counts.map((count) => count / images);
  });
  const highest = Math.max(...shares.flat());
  const upright = (x, name) => shape("line", { x1: x, x2: x, y1: 0, y2: 40, class: name });
  return shape(
    "svg",
    { viewBox: "0 0 200 40", class: "spread", role: "img", "aria-label": "Among real and generated images" },
    shape("path", { d: outline(shares[0], highest), class: "real" }),
    shape("path", { d: outline(shares[1], highest), class: "generated" }),
    upright(100, "half"),
    upright(200 * probability, "mark"),
  );
}

async function verdicts(files) {
  const form = new FormData();
  for (const file of files) form.append("images", file);
  return (await ask(`discriminate?${judgeQuery()}`, { method: "POST", body: form })).json();
}

/** The table's row for one result of a reply. */
function row(file, reply, result) {
  const made = document.createElement("tr");
  const picture = new Image();
  picture.alt = file.name;
  picture.src = URL.createObjectURL(file);
  picture.onload = picture.onerror = () => URL.revokeObjectURL(picture.src);
  const cells = result.error
    ? [[], [result.error.detail]]
    : [probability(reply, result), notes(result, () => judgeInverted(made, picture, result))];
  for (const content of [[picture], ...cells]) made.insertCell().append(...content);
  return made;
}

function probability(reply, result) {
  const bundle = bundles.get(reply.bundle);
  const shown = `${(100 * result.probability_real).toFixed(1)} %`;
  const isKnown = bundle?.version === reply.version && hasVerdicts(bundle);
  return isKnown ? [shown, spread(bundle.evaluation.verdicts, result.probability_real)] : [shown];
}

function notes(result, invert) {
  const label = result.label === undefined ? [] : [`looks like ${result.label}`];
  const found = [[...label, ...(result.converted ? ["converted to fit"] : [])].join(", ")];
  if (result.hint) {
    const hint = document.createElement("p");
    hint.className = "hint";
    hint.append(result.hint);
    found.push(hint);
  }
  if (result.hint?.includes("invert")) {
    const button = document.createElement("button");
    button.append("Invert");
    button.addEventListener("click", invert);
    found.push(button);
  }
  return found;
}

/** Judge the inverted image of a row in its place. */
function judgeInverted(old, picture, result) {
  return guarded($("judge-error"), async () => {
    const file = await inverted(picture, result.hint);
    const reply = await verdicts([file]);
    old.replaceWith(row(file, reply, reply.results[0]));
  });
}

/** A picture with every colour inverted, as a file. */
async function inverted(picture, hint) {
  await picture.decode();
  const canvas = document.createElement("canvas");
  [canvas.width, canvas.height] = [picture.naturalWidth, picture.naturalHeight];
  const context = canvas.getContext("2d");
  const cover = (colour) => {
    context.fillStyle = colour;
    context.fillRect(0, 0, canvas.width, canvas.height);
  };
  cover(hint.includes("is dark on light") ? "white" : "black"); // under transparency lies the ground that was judged
  context.drawImage(picture, 0, 0);
  context.globalCompositeOperation = "difference";
  cover("white");
  const content = await new Promise((done) => canvas.toBlob(done, "image/png"));
  if (content === null) throw new Error("This browser can't invert so large an image.");
  return new File([content], picture.alt, { type: content.type });
}

async function judge(files) {
  if (files.length === 0) return;
  await guarded($("judge-error"), async () => {
    const reply = await verdicts(files);
    $("judged").hidden = false;
    $("judged").tBodies[0].replaceChildren(...reply.results.map((result, place) => row(files[place], reply, result)));
  });
}

$("ask").addEventListener("submit", (event) => {
  event.preventDefault();
  show();
});
$("fresh").addEventListener("click", () => {
  $("seed").value = freshSeed();
  show();
});
$("bundle").addEventListener("change", () => {
  showBundle();
  show();
});
$("labels").addEventListener("change", () => {
  const chosen = $("labels").value;
  showBundle();
  $("labels").value = chosen;
  show();
});
$("truncation").addEventListener("input", showTruncation);
$("truncation").addEventListener("change", show);
$("files").addEventListener("change", () => judge([...$("files").files]));
document.addEventListener("dragover", (event) => event.preventDefault());
document.addEventListener("drop", (event) => {
  event.preventDefault();
  judge([...event.dataTransfer.files]);
});

guarded($("error"), async () => {
  const listed = await (await ask("bundles")).json();
  for (const bundle of listed.bundles) {
    bundles.set(bundle.name, bundle);
    $("bundle").add(new Option(bundle.name));
  }
  const wanted = new URLSearchParams(location.hash.slice(1));
  $("bundle").value = bundles.has(wanted.get("bundle")) ? wanted.get("bundle") : listed.default;
  $("seed").value = wanted.get("seed") ?? freshSeed();
  $("count").value = wanted.get("count") ?? "64";
  $("truncation").value = wanted.get("truncation") ?? "1";
  showTruncation();
  showBundle();
  $("labels").value = wanted.get("labels") ?? "";
  await show();
});
