"use strict";

/** An element with text or other elements in it. */
function element(name, ...content) {
  const made = document.createElement(name);
  made.append(...content);
  return made;
}

function quiet(text) {
  const made = element("span", text);
  made.className = "quiet";
  return made;
}

function code(text) {
  return element("code", text);
}

/** Text, with what stands between backticks as code. */
function prose(text = "") {
  return element("span", ...text.split("`").map((part, place) => (place % 2 ? code(part) : part)));
}

/** A schema in a few words: type, bounds, choices. */
function words(schema) {
  if (!schema) return "";
  if (schema.$ref) return schema.$ref.split("/").pop();
  const options = schema.anyOf ?? schema.oneOf;
  if (options) return options.map(words).filter((one) => one !== "null").join(" or ");
  if (schema.const !== undefined) return JSON.stringify(schema.const);
  if (schema.enum) return schema.enum.join(", ");
  if (schema.type === "array") return `list of ${words(schema.items)}`;
  const bounds = [];
  if (schema.minimum !== undefined) bounds.push(`≥ ${schema.minimum}`);
  if (schema.exclusiveMinimum !== undefined) bounds.push(`> ${schema.exclusiveMinimum}`);
  if (schema.maximum !== undefined) bounds.push(`≤ ${schema.maximum}`);
  if (schema.exclusiveMaximum !== undefined) bounds.push(`< ${schema.exclusiveMaximum}`);
  if (schema.default !== undefined && schema.default !== null) bounds.push(`default ${JSON.stringify(schema.default)}`);
  return [schema.format ?? schema.type ?? "any", ...bounds].join(", ");
}

function table(rows) {
  const made = element("table");
  for (const cells of rows) {
    const row = made.insertRow();
    for (const cell of cells) row.insertCell().append(cell);
  }
  return made;
}

function fields(schema) {
  return table(Object.entries(schema.properties ?? {}).map(([name, one]) => [
    code(name + (schema.required?.includes(name) ? " *" : "")), quiet(words(one)), prose(one.description),
  ]));
}

function bodies(content) {
  return table(Object.entries(content ?? {}).map(([type, body]) => [code(type), quiet(words(body.schema))]));
}

function route(path, method, facts) {
  const name = element("span", method.toUpperCase());
  name.className = "method";
  const parts = [element("p", prose(facts.description))];
  if (facts.parameters?.length) {
    parts.push(element("h3", "Parameters"), table(facts.parameters.map((one) => [
      code(one.name), quiet(`${one.in}, ${words(one.schema)}`), prose(one.description),
    ])));
  }
  if (facts.requestBody) parts.push(element("h3", "Body"), bodies(facts.requestBody.content));
  parts.push(element("h3", "Replies"));
  for (const [status, reply] of Object.entries(facts.responses)) {
    parts.push(element("p", code(status), " ", prose(reply.description)));
    if (status === "200") {
      parts.push(bodies(reply.content), table(Object.entries(reply.headers ?? {}).map(([header, one]) => [
        code(header), prose(one.description),
      ])));
    }
  }
  return element("details", element("summary", name, code(path), " ", quiet(facts.summary ?? "")), element("div", ...parts));
}

(async () => {
  const reply = await fetch("openapi.json");
  if (!reply.ok) throw new Error(`openapi.json: ${reply.status}`);
  const api = await reply.json();
  document.getElementById("summary").prepend(`${api.info.summary} Version ${api.info.version}. `);
  for (const [path, methods] of Object.entries(api.paths)) {
    for (const [method, facts] of Object.entries(methods)) {
      document.getElementById("routes").append(route(path, method, facts));
    }
  }
  for (const [name, schema] of Object.entries(api.components.schemas)) {
    const text = element("p", prose(schema.description));
    document.getElementById("schemas").append(
      element("details", element("summary", code(name)), element("div", text, fields(schema))),
    );
  }
})().catch((error) => {
  document.getElementById("error").textContent = error.message;
});
