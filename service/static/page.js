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
  $("labels").replaceChildren(new Option("any", ""), ...names.map((name, index) => new Option(name, index)));
  $("curl-discriminate").textContent =
    `curl --data-binary @image.png -H 'Content-Type: image/png' '${here("discriminate")}?${judgeQuery()}'`;
}

function judgeQuery() {
  const fields = new URLSearchParams({ bundle: $("bundle").value });
  if ($("labels").value) fields.set("labels", $("labels").value);
  return fields;
}

/** A random whole number below 2^53, all of which the browser holds exactly. */
function freshSeed() {
  const [high, low] = crypto.getRandomValues(new Uint32Array(2));
  return (high >>> 11) * 2 ** 32 + low;
}

function notes(result) {
  const label = result.label === undefined ? [] : [`looks like ${result.label}`];
  return [...label, ...(result.converted ? ["converted to fit"] : [])].join(", ");
}

async function judge(files) {
  if (files.length === 0) return;
  await guarded($("judge-error"), async () => {
    const form = new FormData();
    for (const file of files) form.append("images", file);
    const reply = await (await ask(`discriminate?${judgeQuery()}`, { method: "POST", body: form })).json();
    const rows = reply.results.map((result, place) => {
      const row = document.createElement("tr");
      const picture = new Image();
      picture.alt = files[place].name;
      picture.src = URL.createObjectURL(files[place]);
      picture.onload = () => URL.revokeObjectURL(picture.src);
      const answer = result.error
        ? [result.error.detail, ""]
        : [`${(100 * result.probability_real).toFixed(1)} %`, notes(result)];
      for (const content of [picture, ...answer]) row.insertCell().append(content);
      return row;
    });
    $("judged").hidden = false;
    $("judged").tBodies[0].replaceChildren(...rows);
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
  showBundle();
  $("labels").value = wanted.get("labels") ?? "";
  await show();
});
