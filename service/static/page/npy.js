/** NumPy's format for uint8 arrays. */

/** The array of a file: its bytes and its shape. */
export function readNpy(buffer) {
  const view = new DataView(buffer);
  const long = view.getUint8(6) > 1;
  const start = long ? 12 : 10;
  const length = long ? view.getUint32(8, true) : view.getUint16(8, true);
  const header = new TextDecoder("latin1").decode(new Uint8Array(buffer, start, length));
  const shape = /'shape': \(([^)]*)\)/.exec(header)[1].split(",").filter((one) => one.trim()).map(Number);
  return { data: new Uint8Array(buffer, start + length), shape };
}

export function writeNpy(data, shape) {
  const header = `{'descr': '|u1', 'fortran_order': False, 'shape': (${shape.join(", ")}), }`;
  const length = Math.ceil((11 + header.length) / 64) * 64 - 10;
  const head = new Uint8Array(10 + length).fill(0x20);
  head.set([0x93, ...new TextEncoder().encode("NUMPY"), 1, 0, length & 255, length >> 8]);
  head.set(new TextEncoder().encode(header), 10);
  head[9 + length] = 0x0a;
  return new Blob([head, data], { type: "application/x-npy" });
}
