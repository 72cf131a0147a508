/** Sheets of images: a few requests at a time, cancelled when nobody wants them any more, the latest ones kept. */

const IN_FLIGHT = 3;

export class SheetLoader {
  #wanted = [];
  #running = new Map();
  #kept = new Map(); // in the order of their last use
  #isHeld = false;

  /**
   * @param load (number, signal) → a promise of an ImageBitmap.
   * @param arrived Called with the number of a sheet that is there now.
   * @param failed Called with the first error. Nothing is asked for until `resume`.
   * @param keep Sheets that are kept, beyond those wanted.
   */
  constructor({ load, arrived, failed, keep }) {
    Object.assign(this, { load, arrived, failed, keep });
  }

  get(number) {
    return this.#kept.get(number);
  }

  /** Those sheets, the most urgent first, and no others. */
  want(numbers) {
    this.#wanted = numbers;
    for (const [number, controller] of this.#running) if (!numbers.includes(number)) controller.abort();
    for (const number of numbers) this.#touch(number);
    this.#start();
  }

  resume() {
    this.#isHeld = false;
    this.#start();
  }

  /** Forget everything. */
  close() {
    this.#isHeld = true;
    for (const controller of this.#running.values()) controller.abort();
    for (const bitmap of this.#kept.values()) bitmap.close();
    this.#kept.clear();
  }

  #touch(number) {
    const bitmap = this.#kept.get(number);
    if (bitmap && this.#kept.delete(number)) this.#kept.set(number, bitmap);
  }

  #start() {
    for (const number of this.#wanted) {
      if (this.#isHeld || this.#running.size >= IN_FLIGHT) return;
      if (!this.#kept.has(number) && !this.#running.has(number)) this.#fetch(number);
    }
  }

  async #fetch(number) {
    const controller = new AbortController();
    this.#running.set(number, controller);
    try {
      const bitmap = await this.load(number, controller.signal);
      if (controller.signal.aborted) bitmap.close();
      else this.#keep(number, bitmap);
    } catch (error) {
      if (!controller.signal.aborted && !this.#isHeld) {
        this.#isHeld = true;
        this.failed(error);
      }
    } finally {
      this.#running.delete(number);
      this.#start();
    }
  }

  #keep(number, bitmap) {
    this.#kept.set(number, bitmap);
    for (const [old, dropped] of this.#kept) {
      if (this.#kept.size <= this.#wanted.length + this.keep) break;
      if (this.#wanted.includes(old)) continue;
      dropped.close();
      this.#kept.delete(old);
    }
    this.arrived(number);
  }
}
