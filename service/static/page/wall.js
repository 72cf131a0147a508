/**
 * The wall: all images of a seed, in rows without end. Only the rows in sight are there, each a line of canvases that
 * move on with the scrolling; images come in sheets. The scrolled height stands for a stretch of rows around those in
 * sight; near its ends the stretch moves on, so that 2^53 images fit into a browser's few million pixels.
 */

import { announce, grouped, h, settled } from "./dom.js";
import { SheetLoader } from "./loader.js";
import { loadSheet, placeOf, sheetSize } from "./sheets.js";

const GAP = 4;
const STRETCH = 20_000; // rows
const OVERSCAN = 2; // rows above and below
const SHEETS_KEPT = 24;
const TILE = { s: 36, m: 64, l: 112 }; // about how wide a tile is, in CSS pixels
const LARGE = 2.2; // images that are shown smaller than they are get more room

export class Wall {
  #rows = new Map(); // number of a row → its element
  #spare = [];
  #base = 0; // the stretch's first row
  #active = 0; // the index that the keyboard is at
  marked = null; // the one that is open
  most = Infinity; // images on a sheet
  #told = -1; // the index of which the cells' descriptions know as active
  #asked = { top: -1, ms: 0 };

  /**
   * @param scroller The element that scrolls.
   * @param opened Called with the index of an image that was clicked.
   * @param moved Called with the first index in sight once scrolling has settled.
   * @param failed Called with an error, and a function that tries again.
   * @param drawn Called when images have come.
   */
  constructor({ scroller, opened, moved, failed, drawn }) {
    Object.assign(this, { scroller, opened, failed, drawn });
    this.grid = h("div", { role: "grid", "aria-label": "Images", "aria-rowcount": -1, class: "grid" });
    this.grid.addEventListener("click", (event) => this.#clicked(event));
    this.grid.addEventListener("keydown", (event) => this.#pressed(event));
    scroller.append(this.grid);
    scroller.addEventListener("scroll", () => this.#scrolled(), { passive: true });
    this.moved = settled(() => moved(this.first), 250);
    this.askSettled = settled(() => this.#ask(), 60);
    new ResizeObserver(() => this.#resized()).observe(scroller);
  }

  /** Show a subject (bundle, seed, label, truncation) from an index on. */
  show(subject, size, first) {
    this.subject = subject;
    this.size = size;
    this.#layOut(first);
  }

  /** The index at the top left. */
  get first() {
    return this.columns ? this.#topRow * this.columns : 0;
  }

  /** The images wholly or partly in sight: first and count. */
  get range() {
    const rows = Math.ceil(this.scroller.clientHeight / this.pitch);
    const count = Math.min(rows * this.columns, Number.MAX_SAFE_INTEGER - this.first + 1);
    return { first: this.first, count, columns: Math.min(count, this.columns) };
  }

  /** Mark an image as the one that is open. */
  mark(index) {
    this.marked = index;
    if (index !== null) this.#active = index;
    for (const [number, row] of this.#rows) this.#describe(row, number);
  }

  /** Put the keyboard on an image, scrolling to it if it is out of sight. */
  focus(index) {
    this.#active = Math.max(0, Math.min(index, Number.MAX_SAFE_INTEGER));
    this.#reveal(this.#active);
    this.#cell(this.#active)?.focus({ preventScroll: true });
  }

  #reveal(index) {
    const row = Math.floor(index / this.columns);
    const top = (row - this.#base) * this.pitch;
    const { scrollTop, clientHeight } = this.scroller;
    if (row < this.#base || row >= this.#base + STRETCH) this.#goTo(index);
    else if (top < scrollTop) this.scroller.scrollTop = top;
    else if (top + this.pitch > scrollTop + clientHeight) this.scroller.scrollTop = top + this.pitch - clientHeight;
    this.#render();
  }

  goTo(index) {
    this.#goTo(index);
    this.#render();
    this.#ask();
  }

  get #topRow() {
    return this.#base + Math.floor((this.scroller.scrollTop + GAP) / this.pitch);
  }

  /** The first image stays where it was, and the one that is open in sight. */
  #resized() {
    if (!this.subject || !this.#layOut(this.first)) return;
    if (this.marked !== null) this.#reveal(this.marked);
  }

  /** Whether anything had to move. */
  #layOut(first) {
    const { width, height } = this.subject.bundle.image;
    const style = getComputedStyle(this.scroller);
    const room = this.scroller.clientWidth - parseFloat(style.paddingLeft) - parseFloat(style.paddingRight);
    if (room <= 0) return false; // the wall is hidden
    const wanted = width > TILE[this.size] ? TILE[this.size] * LARGE : TILE[this.size];
    // Small images grow by whole factors, so that each of their pixels is as large as the others.
    const grown = width <= wanted ? width * Math.round(wanted / width) : wanted;
    const tile = Math.min(Math.floor(grown), room);
    const key = JSON.stringify([this.subject.bundle.version, this.subject.bundle.name, this.subject.seed,
      this.subject.label, this.subject.truncation, tile, room, devicePixelRatio]);
    if (key === this.key) return false;
    this.key = key;
    this.tile = [tile, Math.round((tile * height) / width)];
    this.columns = Math.max(1, Math.floor((room + GAP) / (tile + GAP)));
    this.left = Math.floor((room - this.columns * (tile + GAP) + GAP) / 2);
    this.pitch = this.tile[1] + GAP;
    this.pixels = tile >= width ? [width, height] : this.tile.map((side) => Math.round(side * devicePixelRatio));
    this.#renew(first);
    return true;
  }

  #renew(first) {
    const hadFocus = this.grid.contains(document.activeElement);
    this.loader?.close();
    this.sheetSize = Math.min(this.most, sheetSize(this.subject.bundle.image));
    const { subject, sheetSize: size, pixels } = this;
    this.loader = new SheetLoader({
      load: (number, signal) => loadSheet(subject, number, size, pixels, signal),
      arrived: () => this.#draw(),
      failed: (error) => this.#refused(error),
      keep: SHEETS_KEPT,
    });
    this.grid.replaceChildren();
    this.#rows.clear();
    this.#spare = [];
    this.grid.setAttribute("aria-colcount", this.columns);
    this.grid.style.height = `${STRETCH * this.pitch}px`;
    this.grid.classList.toggle("is-enlarged", this.tile[0] >= this.subject.bundle.image.width);
    this.goTo(first);
    if (hadFocus) this.focus(this.#active);
  }

  /** A service that allows fewer images in a request is asked for fewer. */
  #refused(error) {
    if (error.status !== 422 || this.sheetSize === 1) {
      this.most = Infinity;
      return this.failed(error, () => this.loader.resume());
    }
    this.most = this.sheetSize / 2;
    this.#renew(this.first);
  }

  /** Scroll so that an index is in the first row; the stretch begins half its length earlier. */
  #goTo(index) {
    const row = Math.floor(index / this.columns);
    this.#base = Math.max(0, row - STRETCH / 2);
    this.scroller.scrollTop = (row - this.#base) * this.pitch;
    this.#clearRows();
  }

  #scrolled() {
    if (!this.subject || !this.columns) return;
    const { scrollTop, clientHeight } = this.scroller;
    const row = scrollTop / this.pitch;
    if (row > 0.8 * STRETCH || (row < 0.2 * STRETCH && this.#base > 0)) this.#moveStretch(row);
    this.#render();
    this.moved();
    // While it flies past nothing is asked for: it would be cancelled a moment later.
    const now = performance.now();
    const isFast = Math.abs(scrollTop - this.#asked.top) > clientHeight * Math.max(0.5, (now - this.#asked.ms) / 150);
    this.#asked = { top: this.scroller.scrollTop, ms: now };
    if (isFast) this.askSettled();
    else this.#ask();
  }

  #moveStretch(row) {
    const shift = Math.max(-this.#base, Math.round(row - STRETCH / 2));
    this.#base += shift;
    this.#clearRows();
    this.scroller.scrollTop -= shift * this.pitch;
  }

  #clearRows() {
    for (const row of this.#rows.values()) this.#spare.push(row);
    this.#rows.clear();
  }

  #inSight() {
    const rows = Math.ceil(this.scroller.clientHeight / this.pitch) + 1;
    return [Math.max(0, this.#topRow - OVERSCAN), this.#topRow + rows + OVERSCAN];
  }

  #render() {
    const [from, to] = this.#inSight();
    const activeRow = Math.floor(this.#active / this.columns);
    const hasFocus = this.grid.contains(document.activeElement);
    if (!hasFocus && (activeRow < this.#topRow || activeRow >= to)) this.#active = this.marked ?? this.first;
    const kept = hasFocus ? activeRow : -1; // or the focus would be lost with its row
    for (const [number, row] of this.#rows) {
      if ((number < from || number >= to) && number !== kept) {
        this.#rows.delete(number);
        this.#spare.push(row);
      }
    }
    for (let number = from; number < to; number += 1) if (!this.#rows.has(number)) this.#place(number);
    for (const row of this.#spare) row.hidden = true;
    if (this.#told !== this.#active) for (const [number, row] of this.#rows) this.#describe(row, number);
    this.#told = this.#active;
    this.#draw();
  }

  #place(number) {
    const row = this.#spare.pop() ?? this.#newRow();
    row.hidden = false;
    row.style.transform = `translate(${this.left}px, ${(number - this.#base) * this.pitch}px)`;
    row.setAttribute("aria-rowindex", number + 1);
    for (const cell of row.children) cell.classList.remove("is-there");
    this.#describe(row, number);
    this.#rows.set(number, row);
  }

  #newRow() {
    const cell = (_, column) => {
      const canvas = h("canvas", { width: this.pixels[0], height: this.pixels[1], role: "gridcell", tabindex: -1,
        "aria-colindex": column + 1 });
      [canvas.style.width, canvas.style.height] = this.tile.map((side) => `${side}px`);
      return canvas;
    };
    const row = h("div", { role: "row" }, ...Array.from({ length: this.columns }, cell));
    this.grid.append(row);
    return row;
  }

  /** What a screen reader says of the cells, and which of them Tab comes to. */
  #describe(row, number) {
    const { bundle, label } = this.subject;
    const known = bundle.labels?.[label];
    for (const [column, cell] of [...row.children].entries()) {
      const index = number * this.columns + column;
      cell.hidden = index > Number.MAX_SAFE_INTEGER;
      cell.ariaLabel = `Image ${grouped(index)}${known === undefined ? "" : `, class ${known}`}`;
      cell.ariaSelected = index === this.marked;
      cell.tabIndex = index === this.#active ? 0 : -1;
    }
  }

  /** Ask for the sheets in sight, those in the middle first. */
  #ask() {
    if (!this.loader) return;
    const [from, to] = this.#inSight();
    const [first, last] = [from, to].map((row) => Math.floor((row * this.columns) / this.sheetSize));
    const middle = Math.floor(((this.#topRow + 1) * this.columns) / this.sheetSize);
    const sheets = Array.from({ length: last - first + 1 }, (_, place) => first + place);
    const most = Math.floor(Number.MAX_SAFE_INTEGER / this.sheetSize);
    this.loader.want(sheets.filter((sheet) => sheet <= most).sort((a, b) => Math.abs(a - middle) - Math.abs(b - middle)));
  }

  #draw() {
    let isNew = false;
    for (const [number, row] of this.#rows) {
      for (const [column, cell] of [...row.children].entries()) {
        if (!cell.classList.contains("is-there")) isNew = this.#drawCell(cell, number * this.columns + column) || isNew;
      }
    }
    if (isNew) this.drawn();
  }

  #drawCell(cell, index) {
    const bitmap = this.loader.get(Math.floor(index / this.sheetSize));
    if (!bitmap) return false;
    const [width, height] = this.pixels;
    const pen = cell.getContext("2d");
    pen.drawImage(bitmap, ...placeOf(index, this.sheetSize, this.pixels), width, height, 0, 0, width, height);
    cell.classList.add("is-there");
    return true;
  }

  #cell(index) {
    return this.#rows.get(Math.floor(index / this.columns))?.children[index % this.columns];
  }

  #indexOf(cell) {
    return (cell.parentElement.ariaRowIndex - 1) * this.columns + (cell.ariaColIndex - 1);
  }

  #clicked({ target }) {
    if (target.role !== "gridcell") return;
    this.#active = this.#indexOf(target);
    this.opened(this.#active);
  }

  #pressed(event) {
    const page = Math.max(1, Math.floor(this.scroller.clientHeight / this.pitch) - 1) * this.columns;
    const column = this.#active % this.columns;
    const to = {
      ArrowLeft: -1, ArrowRight: 1, ArrowUp: -this.columns, ArrowDown: this.columns, PageUp: -page, PageDown: page,
      Home: event.ctrlKey ? -this.#active : -column, End: this.columns - 1 - column,
    }[event.key];
    if (to !== undefined) {
      event.preventDefault();
      if (this.#active + to >= 0 || to < -1) this.focus(Math.max(this.#active + to, to === -page ? 0 : column));
    } else if (event.key === "Enter" || event.key === " ") {
      event.preventDefault();
      this.opened(this.#active);
      announce(`Image ${grouped(this.#active)} is open.`);
    }
  }
}
