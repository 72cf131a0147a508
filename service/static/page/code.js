/** The lines of curl, Python and JavaScript that ask for exactly what is shown. */

import { address, hasKey, withQuery } from "./api.js";
import { $, copyButton, h } from "./dom.js";

const LANGUAGES = { curl, Python: python, JavaScript: javascript };
let language = "curl";
let lines = "";

/**
 * A request is {route, fields, file}, to which `body` (sent as JSON) or `upload` (a file's name and media type) may come.
 * A key is never shown: the lines take it from the environment.
 */
function curl({ route, fields = {}, body, upload, file }) {
  const parts = ["curl", file && `-o ${file}`, hasKey() && '-H "X-API-Key: $GAN_KEY"',
    body && `-H 'Content-Type: application/json' -d '${JSON.stringify(body).replaceAll("'", "'\\''")}'`,
    upload && `--data-binary @${upload.name} -H 'Content-Type: ${upload.type}'`, `'${urlOf(route, fields)}'`];
  return parts.filter(Boolean).join(" ");
}

function python({ route, fields = {}, body, upload, file }) {
  const headers = [hasKey() && '"X-API-Key": os.environ["GAN_KEY"]', body && '"Content-Type": "application/json"',
    upload && `"Content-Type": "${upload.type}"`].filter(Boolean);
  const data = [body && `json.dumps(${JSON.stringify(body)}).encode()`, upload && `open("${upload.name}", "rb").read()`].filter(Boolean);
  const given = [`"${urlOf(route, fields)}"`, ...data.map((one) => `data=${one}`),
    ...(headers.length ? [`headers={${headers.join(", ")}}`] : [])];
  const imports = [(body || !file) && "import json", hasKey() && "import os", "import urllib.request"].filter(Boolean);
  const asked = given.length === 1 ? given[0] : `urllib.request.Request(${given.join(", ")})`;
  const read = `urllib.request.urlopen(${asked})`;
  const kept = file ? `open("${file}", "wb").write(${read}.read())` : `print(json.load(${read}))`;
  return `${imports.join("\n")}\n\n${kept}`;
}

function javascript({ route, fields = {}, body, upload, file }) {
  const headers = [hasKey() && '"X-API-Key": key', body && '"Content-Type": "application/json"',
    upload && `"Content-Type": "${upload.type}"`].filter(Boolean);
  const options = [(body || upload) && 'method: "POST"', headers.length && `headers: { ${headers.join(", ")} }`,
    body && `body: JSON.stringify(${JSON.stringify(body)})`, upload && "body: image"].filter(Boolean);
  const given = options.length ? `, { ${options.join(", ")} }` : "";
  return `const reply = await fetch("${urlOf(route, fields)}"${given});\n` +
    (file ? "const picture = await reply.blob();" : "console.log(await reply.json());");
}

const urlOf = (route, fields) => address(withQuery(route, fields));

/** Show the lines for these requests. */
export function showCode(requests) {
  lines = requests.filter(Boolean).map(LANGUAGES[language]).join("\n\n");
  $("code-lines").textContent = lines;
}

/** Wire the panel: the tabs of the languages, the copy button, and what opens and closes it. */
export function startCode(changed) {
  const choose = (event) => {
    language = event.target.value;
    changed();
  };
  $("languages").append(...Object.keys(LANGUAGES).map((name) => h("label", {},
    h("input", { type: "radio", name: "language", value: name, checked: name === language, onchange: choose }),
    h("span", {}, name))));
  $("code-copy").replaceWith(copyButton(() => lines, "Copy the lines"));
  const toggle = () => {
    const isOpen = $("code").hidden;
    $("code").hidden = !isOpen;
    $("code-toggle").setAttribute("aria-expanded", isOpen);
    if (isOpen) changed();
  };
  $("code-toggle").addEventListener("click", toggle);
  $("code-close").addEventListener("click", () => {
    toggle();
    $("code-toggle").focus();
  });
}
