/** A canvas to draw on in a bundle's own ink, by pointer or by keyboard; it can undo and be cleared. */

const SIDE = 336; // pixels of the canvas across, about; D sees the image's own size

export class Drawing {
  #strokes = []; // {width, colour, points: [[x, y], …]} in the image's pixels
  #current = null;
  #pointer = null; // the one that draws: another finger does not
  #cursor = null; // where the keyboard is

  /**
   * @param canvas Where to draw.
   * @param changed Called after each stroke, undo and clear.
   */
  constructor(canvas, changed) {
    Object.assign(this, { canvas, changed, colour: [255, 255, 255], width: 2 });
    canvas.addEventListener("pointerdown", (event) => this.#down(event));
    canvas.addEventListener("pointermove", (event) => this.#move(event));
    for (const name of ["pointerup", "pointercancel"]) {
      canvas.addEventListener(name, (event) => event.pointerId === this.#pointer && this.#up());
    }
    canvas.addEventListener("keydown", (event) => this.#pressed(event));
    canvas.addEventListener("blur", () => {
      this.#up();
      this.#cursor = null;
      this.#paint();
    });
  }

  /** Begin anew with a bundle's size and ground. */
  open(image, ground) {
    Object.assign(this, { image, ground });
    this.factor = Math.max(1, Math.round(SIDE / image.width));
    Object.assign(this.canvas, { width: image.width * this.factor, height: image.height * this.factor });
    this.clear();
  }

  get isEmpty() {
    return this.#strokes.length === 0;
  }

  undo() {
    this.#strokes.pop();
    this.#paint();
    this.changed();
  }

  clear() {
    this.#strokes = [];
    this.#paint();
    this.changed();
  }

  /** The image as D sees it: uint8 (1, h, w, channels). */
  pixels() {
    const { width, height, channels } = this.image;
    const small = new OffscreenCanvas(width, height).getContext("2d", { willReadFrequently: true });
    small.imageSmoothingQuality = "high";
    this.#paint({ isPlain: true });
    small.drawImage(this.canvas, 0, 0, width, height);
    this.#paint();
    const rgba = small.getImageData(0, 0, width, height).data;
    return Uint8Array.from({ length: width * height * channels }, (_, at) => rgba[4 * Math.floor(at / channels) + (at % channels)]);
  }

  #place({ clientX, clientY }) {
    const box = this.canvas.getBoundingClientRect();
    return [((clientX - box.left) / box.width) * this.image.width, ((clientY - box.top) / box.height) * this.image.height];
  }

  #down(event) {
    if (event.button !== 0 || this.#pointer !== null) return;
    this.#up(); // a line that the keyboard was drawing
    this.#pointer = event.pointerId;
    this.#cursor = null;
    this.canvas.setPointerCapture(event.pointerId);
    this.#begin(this.#place(event));
  }

  #begin(place) {
    this.#current = { width: this.width, colour: this.colour, points: [place] };
    this.#strokes.push(this.#current);
    this.#paint();
  }

  #move(event) {
    if (!this.#current || event.pointerId !== this.#pointer) return;
    const events = event.getCoalescedEvents?.() ?? [];
    for (const one of events.length ? events : [event]) this.#current.points.push(this.#place(one));
    this.#paint();
  }

  #up() {
    this.#pointer = null;
    if (!this.#current) return;
    this.#current = null;
    this.changed();
  }

  /** Arrows move a cursor, space lifts and lowers the pen. */
  #pressed(event) {
    const steps = { ArrowLeft: [-1, 0], ArrowRight: [1, 0], ArrowUp: [0, -1], ArrowDown: [0, 1] };
    const { width, height } = this.image;
    this.#cursor ??= [width / 2, height / 2];
    if (steps[event.key]) {
      const unit = Math.max(1, width / 28);
      const moved = this.#cursor.map((at, axis) => at + unit * steps[event.key][axis]);
      this.#cursor = [Math.max(0, Math.min(width, moved[0])), Math.max(0, Math.min(height, moved[1]))];
      this.#current?.points.push(this.#cursor);
    } else if (event.key === " ") {
      if (this.#current) this.#up();
      else this.#begin(this.#cursor);
    } else if (event.key === "Escape" || event.key === "Backspace" || ((event.ctrlKey || event.metaKey) && event.key === "z")) {
      this.undo();
    } else {
      return;
    }
    event.preventDefault();
    this.#paint();
  }

  #paint({ isPlain = false } = {}) {
    if (!this.image) return;
    const pen = this.canvas.getContext("2d");
    pen.setTransform(1, 0, 0, 1, 0, 0);
    pen.fillStyle = `rgb(${this.ground})`;
    pen.fillRect(0, 0, this.canvas.width, this.canvas.height);
    pen.setTransform(this.factor, 0, 0, this.factor, 0, 0);
    Object.assign(pen, { lineCap: "round", lineJoin: "round" });
    for (const { width, colour, points } of this.#strokes) {
      Object.assign(pen, { lineWidth: width, strokeStyle: `rgb(${colour})`, fillStyle: `rgb(${colour})` });
      pen.beginPath();
      pen.arc(...points[0], width / 2, 0, 2 * Math.PI); // a line without a length would leave nothing
      pen.fill();
      pen.beginPath();
      for (const point of points) pen.lineTo(...point);
      pen.stroke();
    }
    if (this.#cursor && !isPlain) this.#paintCursor(pen);
  }

  #paintCursor(pen) {
    Object.assign(pen, { lineWidth: 2 / this.factor, strokeStyle: this.#current ? "#e07b2a" : "#8a9197" });
    pen.beginPath();
    pen.arc(...this.#cursor, Math.max(this.width / 2, 3 / this.factor), 0, 2 * Math.PI);
    pen.stroke();
  }
}
