/**
 * The page's state: all of it stands in the address's fragment, so that a link shows the same thing and the browser's
 * back button works. What can't be read there counts as left out.
 */

const MOST = 2 ** 53 - 1;

const oneOf = (...texts) => (text) => (texts.includes(text) ? text : undefined);
const matching = (pattern) => (text) => (pattern.test(text) ? text : undefined);
const number = (least, most) => (text) => {
  const value = /^\d{1,16}(\.\d{1,4})?$/.test(text) ? Number(text) : NaN;
  return value >= least && value <= most ? value : undefined;
};
const whole = (least, most) => (text) => (/^\d+$/.test(text) ? number(least, most)(text) : undefined);
/** seed:index, as the text that it is. */
const place = (text) => (/^\d{1,16}:\d{1,16}$/.test(text) && text.split(":").every((one) => Number(one) <= MOST) ? text : undefined);

/** Of each field how it is read, and what it is where it is left out. */
const FIELDS = {
  view: [oneOf("wall", "interpolate", "judge"), "wall"],
  bundle: [matching(/^[^@]+(@[^@]+)?$/), null],
  seed: [whole(0, MOST), null],
  label: [whole(0, 1e6), null],
  truncation: [number(0.01, 1), 1],
  size: [oneOf("s", "m", "l"), "m"],
  index: [whole(0, MOST), 0], // the wall's first image
  image: [whole(0, MOST), null], // the one that is open
  walk: [matching(/^(\d+\.\d+,)*\d+\.\d+$/), null], // steps from it to neighbours; see neighbours.js
  from: [place, null], // the ends of an interpolation
  to: [place, null],
  label_from: [whole(0, 1e6), null],
  label_to: [whole(0, 1e6), null],
  method: [oneOf("spherical", "linear"), "spherical"],
  steps: [whole(2, 256), 32],
  duration: [whole(500, 20_000), 3000],
  pick: [oneOf("from", "to"), null], // which end a click on the wall chooses
};

const listeners = [];
let state = read();

function read() {
  const given = new URLSearchParams(location.hash.slice(1));
  return Object.fromEntries(Object.entries(FIELDS).map(([name, [parse, without]]) => {
    const text = given.get(name);
    return [name, (text === null ? undefined : parse(text)) ?? without];
  }));
}

function fragment() {
  const changed = Object.entries(state).filter(([name, value]) => value !== FIELDS[name][1]);
  return `#${new URLSearchParams(changed).toString().replaceAll("%40", "@").replaceAll("%3A", ":").replaceAll("%2C", ",")}`;
}

function tell(before) {
  const changed = new Set(Object.keys(state).filter((name) => state[name] !== before[name]));
  if (changed.size) for (const listener of listeners) listener(state, changed);
}

/** Call `listener(state, names)` after each change. */
export const onChange = (listener) => listeners.push(listener);

export const current = () => state;

/** What is typed into an input as the value of a field; undefined where it can't be one, and the input says so. */
export function typed(name, input) {
  const value = FIELDS[name][0](input.value.trim());
  input.setCustomValidity(value === undefined ? `A whole number, ${MOST} at most.` : "");
  return value;
}

/** Change some fields, and tell whether they were others. `isStep`: the browser's back button leads back. */
export function change(fields, { isStep = false } = {}) {
  const before = state;
  state = { ...state, ...fields };
  if (Object.keys(fields).every((name) => before[name] === state[name])) return false;
  history[isStep ? "pushState" : "replaceState"](null, "", fragment());
  tell(before);
  return true;
}

addEventListener("popstate", () => {
  const before = state;
  state = read();
  tell(before);
});

/** A random whole number below 2^53, all of which the browser holds exactly. */
export function freshSeed() {
  const [high, low] = crypto.getRandomValues(new Uint32Array(2));
  return (high >>> 11) * 2 ** 32 + low;
}
