/** Elements, and the icons on them. */

/**
 * An element. Of `attributes`, those that begin with "on" are listeners, null and false are left out, true is the bare
 * attribute.
 */
export function h(name, attributes = {}, ...content) {
  return filled(document.createElement(name), attributes, content);
}

/** An element of SVG. */
export function svg(name, attributes = {}, ...content) {
  return filled(document.createElementNS("http://www.w3.org/2000/svg", name), attributes, content);
}

function filled(element, attributes, content) {
  for (const [key, value] of Object.entries(attributes)) {
    if (key.startsWith("on")) element.addEventListener(key.slice(2), value);
    else if (value === true) element.setAttribute(key, "");
    else if (value !== null && value !== undefined && value !== false) element.setAttribute(key, value);
  }
  element.append(...content.filter((one) => one !== null && one !== undefined && one !== false));
  return element;
}

export const $ = (id) => document.getElementById(id);

const PATHS = {
  close: "M5 5l10 10M15 5L5 15",
  next: "M8 4.5l5.5 5.5L8 15.5",
  previous: "M12 4.5L6.5 10l5.5 5.5",
  copy: "M7.5 7.5v-3h8v8h-3M4.5 7.5h8v8h-8z",
  done: "M4.5 10.5l3.5 3.5 7.5-8",
  play: "M6.5 4.5v11l9-5.5z",
  pause: "M7 4.5v11M13 4.5v11",
};

export function icon(name) {
  const drawn = { d: PATHS[name], fill: "none", stroke: "currentColor", "stroke-width": 1.6 };
  return svg("svg", { viewBox: "0 0 20 20", class: "icon", "aria-hidden": "true" },
    svg("path", { ...drawn, "stroke-linecap": "round", "stroke-linejoin": "round" }));
}

/** A button that copies what `text` gives, and shows that it did. */
export function copyButton(text, name = "Copy") {
  const button = h("button", { type: "button", class: "quiet-button copy", "aria-label": name }, icon("copy"));
  button.addEventListener("click", async () => {
    await copyText(text());
    button.replaceChildren(icon("done"));
    announce("Copied.");
    setTimeout(() => button.replaceChildren(icon("copy")), 1500);
  });
  return button;
}

/** The clipboard's own way needs a secure page; over plain HTTP from another host there is only the old one. */
async function copyText(text) {
  if (navigator.clipboard && window.isSecureContext) return navigator.clipboard.writeText(text);
  const area = h("textarea", { class: "off-screen", "aria-hidden": "true" }, text);
  document.body.append(area);
  area.select();
  document.execCommand("copy");
  area.remove();
}

/** Show a value in an input; what was wrong with the one before is over. */
export function fill(input, value) {
  input.value = value;
  input.setCustomValidity("");
}

/** Tell a screen reader. */
export function announce(text) {
  $("announcer").textContent = text;
}

export const grouped = (number) => number.toLocaleString("en");

/** Call `work` once, `ms` after the last of several calls. */
export function settled(work, ms) {
  let timer = 0;
  return (...given) => {
    clearTimeout(timer);
    timer = setTimeout(() => work(...given), ms);
  };
}

export const movesLess = matchMedia("(prefers-reduced-motion: reduce)");
