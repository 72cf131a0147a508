/** The classes of a bundle as buttons or, where they need much room, as a list; "any" leaves the class to the seed. */

import { h } from "./dom.js";

const BUTTONS = 24;
const LETTERS = 100; // on all buttons together

/** Fill `place` with a choice of labels; `chosen` is called with an index, or null for any. */
export function showLabels(place, labels, chosen) {
  const areMany = labels.length > BUTTONS || labels.join("").length > LETTERS;
  place.classList.toggle("chips", !areMany);
  if (areMany) {
    const select = h("select", { "aria-label": "Class", onchange: ({ target }) => chosen(parse(target.value)) });
    select.append(new Option("any", ""), ...labels.map((name, index) => new Option(name, index)));
    return place.replaceChildren(select);
  }
  const button = (name, value) => h("label", {},
    h("input", { type: "radio", name: "label", value, onchange: () => chosen(parse(value)) }), h("span", {}, name));
  place.replaceChildren(button("any", ""), ...labels.map((name, index) => button(name, `${index}`)));
}

const parse = (value) => (value === "" ? null : Number(value));

/** Show which one is chosen. */
export function markLabel(place, index) {
  const value = index === null ? "" : `${index}`;
  for (const input of place.querySelectorAll("input")) input.checked = input.value === value;
  const select = place.querySelector("select");
  if (select) select.value = value;
}
