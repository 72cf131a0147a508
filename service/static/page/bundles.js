/** The bundles that the service has, and what each of them can do. */

import { ask } from "./api.js";

const known = new Map(); // by name@version
let choices = []; // {name, versions} of each bundle, the newest first
let standard = null;

export const pinned = (bundle) => `${bundle.name}@${bundle.version}`;

export async function loadBundles() {
  const listed = await (await ask("bundles")).json();
  known.clear();
  for (const bundle of listed.bundles) known.set(pinned(bundle), bundle);
  choices = listed.bundles.map(({ name, version, versions }) => ({ name, versions: versions?.map((one) => one.version) ?? [version] }));
  standard = listed.default;
}

/** Every bundle in every version, as groups of options; `chosen` is among them even if it was not listed. */
export function bundleOptions(chosen) {
  const isListed = choices.some(({ name, versions }) => name === chosen.name && versions.includes(chosen.version));
  const groups = isListed ? choices : [...choices, { name: chosen.name, versions: [chosen.version] }];
  return groups.flatMap(({ name, versions }) => {
    const options = versions.map((version) => new Option(`${name} · ${version.slice(0, 6)}`, pinned({ name, version })));
    if (versions.length === 1) return options;
    const group = document.createElement("optgroup");
    group.label = name;
    group.append(...options);
    return [group];
  });
}

/** The bundle of this name, or name@version; the default one for null. One that is not listed is asked for. */
export async function findBundle(wanted) {
  const name = wanted ?? standard;
  const found = known.get(name) ?? [...known.values()].find((bundle) => bundle.name === name);
  if (found) return found;
  const bundle = await (await ask(`bundles/${encodeURIComponent(name)}`)).json();
  known.set(pinned(bundle), bundle);
  return bundle;
}

/** What stands in for a bundle that is not there: another version of it, else the default one. */
export function standIn(name) {
  const bare = name.split("@")[0];
  return choices.some((one) => one.name === bare) ? bare : null;
}

export const hasDiscriminator = (bundle) => bundle.networks?.includes("discriminator") ?? true;
export const hasEncoder = (bundle) => bundle.networks?.includes("encoder") ?? false;

/** A class in a query: its index, as JSON where another class is called by that number. */
export function labelInQuery(bundle, index) {
  if (index === null || !bundle.labels?.[index]) return null;
  const named = bundle.labels.indexOf(`${index}`);
  return named === -1 || named === index ? `${index}` : `[${index}]`;
}

export function verdictsOf(bundle) {
  const { real, generated } = bundle.evaluation?.verdicts ?? {};
  return Array.isArray(real) && Array.isArray(generated) ? { real, generated } : null;
}
