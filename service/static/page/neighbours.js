/**
 * Images near one: their latents are its own, turned a little towards noise. The noise is a function of the step, so a
 * walk from neighbour to neighbour is a few numbers in the address and leads to the same image again.
 */

export const COUNT = 8;

/** mulberry32: numbers from 0 to 1. */
function uniforms(seed) {
  let state = seed | 0;
  return () => {
    state = (state + 0x6d2b79f5) | 0;
    let mixed = Math.imul(state ^ (state >>> 15), 1 | state);
    mixed = (mixed + Math.imul(mixed ^ (mixed >>> 7), 61 | mixed)) ^ mixed;
    return ((mixed ^ (mixed >>> 14)) >>> 0) / 2 ** 32;
  };
}

function normals(seed) {
  const next = uniforms(seed);
  return () => Math.sqrt(-2 * Math.log(1 - next())) * Math.cos(2 * Math.PI * next());
}

/**
 * Neighbour `place` of a latent, `reach` percent of the way to another one. Turning keeps a normal latent as long as
 * before, and so as typical; a uniform one is kept within its bounds.
 */
export function neighbour(latent, place, reach, distribution, depth) {
  const share = reach / 100;
  const seed = 1009 * depth + place;
  if (distribution === "uniform") {
    const next = uniforms(seed);
    return latent.map((value) => Math.max(-1, Math.min(1, value + share * (2 * next() - 1))));
  }
  const next = normals(seed);
  const [keep, add] = [Math.cos((share * Math.PI) / 2), Math.sin((share * Math.PI) / 2)];
  return latent.map((value) => Math.fround(keep * value + add * next()));
}

/** "5.30,2.30" → [[5, 30], [2, 30]]: the neighbour taken at each step, and how far away it was. */
export const parseWalk = (walk) => (walk ? walk.split(",").map((step) => step.split(".").map(Number)) : []);
export const formatWalk = (steps) => steps.map((step) => step.join(".")).join(",") || null;

/** Where a walk from a latent leads. */
export function walked(latent, steps, distribution) {
  return steps.reduce((at, [place, reach], depth) => neighbour(at, place, reach, distribution, depth), latent);
}

export function neighboursOf(latent, reach, distribution, depth) {
  return Array.from({ length: COUNT }, (_, place) => neighbour(latent, place, reach, distribution, depth));
}
