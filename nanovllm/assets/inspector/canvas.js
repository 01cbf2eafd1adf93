// The two drawings: the grid of blocks, and the timeline of steps.

import { arrival } from "./history.js";

const GAP = 1;
const LARGEST = 26; // pixels of a block
const BAR = 5; // pixels of a step

/** The colour of a request: arrivals that follow each other differ most (golden angle). */
export function colour(name, alpha = 1) {
  const style = getComputedStyle(document.documentElement);
  const light = style.getPropertyValue("--owner-light");
  const saturation = style.getPropertyValue("--owner-saturation");
  const hue = (arrival(String(name)) * 137.508 + 215) % 360;
  return `hsl(${hue.toFixed(1)} ${saturation} ${light} / ${alpha})`;
}

function ink(name) {
  return getComputedStyle(document.documentElement).getPropertyValue(`--${name}`);
}

/** Make a canvas as large as its place; returns its context, in CSS pixels, wiped. */
function prepare(canvas, width, height) {
  const scale = window.devicePixelRatio || 1;
  if (canvas.width !== Math.round(width * scale) || canvas.height !== Math.round(height * scale)) {
    canvas.width = Math.round(width * scale);
    canvas.height = Math.round(height * scale);
    canvas.style.width = `${width}px`;
    canvas.style.height = `${height}px`;
  }
  const context = canvas.getContext("2d");
  context.setTransform(scale, 0, 0, scale, 0, 0);
  context.clearRect(0, 0, width, height);
  return context;
}

/** Who owns each block, how full it is, and what the step writes: read off the block tables. */
export function owners(state) {
  const owner = new Map();
  const written = new Set();
  const size = state.blockSize;
  for (const [name, request] of state.requests) {
    request.table.forEach((block, index) => {
      const tokens = Math.min(Math.max(request.computed - index * size, 0), size);
      const known = owner.get(block);
      if (known) known.names.push(name);
      else owner.set(block, { names: [name], index, tokens });
    });
  }
  const write = (name, first, last) => {
    const table = state.requests.get(name)?.table ?? [];
    for (let index = Math.floor(first / size); index <= Math.floor(last / size); index++) {
      if (table[index] !== undefined) written.add(table[index]);
    }
  };
  for (const name of state.decodes) {
    const computed = state.requests.get(name)?.computed ?? 1;
    write(name, computed - 1, computed - 1);
  }
  for (const [name, start, count] of state.chunks) write(name, start, start + count - 1);
  return { owner, written };
}

export class Grid {
  constructor(canvas) {
    this.canvas = canvas;
    this.shown = 0; // blocks
    this.size = 0; // pixels of a block, gap included
    this.columns = 1;
  }

  /** All blocks of a small cache; of a large one those up to the highest that was ever used. */
  choose(state) {
    const count = state.refs.length;
    let used = count;
    while (used > 1 && !state.refs[used - 1] && !state.cached[used - 1]) used -= 1;
    const wanted = Math.min(count, Math.max(256, 2 ** Math.ceil(Math.log2(used * 1.1))));
    if (wanted > this.shown || this.shown > count) this.shown = wanted;
  }

  layout(width, height) {
    let size = LARGEST;
    while (size > 2 && Math.floor(width / size) * Math.floor(height / size) < this.shown) size -= size > 8 ? 1 : 0.5;
    this.size = size;
    this.columns = Math.max(Math.floor(width / size), 1);
  }

  /** Draws; returns how many blocks are not shown. */
  draw(state, selected) {
    const { width, height } = this.canvas.parentElement.getBoundingClientRect();
    this.choose(state);
    this.layout(width, height);
    const context = prepare(this.canvas, width, height);
    const { owner, written } = owners(state);
    const side = this.size - (this.size > 4 ? GAP * 2 : this.size > 2 ? GAP : 0);
    const [cell, cached, line, text] = ["cell", "cached", "line", "ink"].map(ink);
    const colours = new Map();
    const paint = (name, alpha) => {
      const key = `${name}/${alpha}`;
      if (!colours.has(key)) colours.set(key, colour(name, alpha));
      return colours.get(key);
    };
    context.font = `600 ${Math.round(side * 0.5)}px system-ui`;
    context.textAlign = "center";
    context.textBaseline = "middle";
    for (let block = 0; block < this.shown; block++) {
      const { x, y } = this.place(block);
      const held = owner.get(block);
      context.globalAlpha = selected && !held?.names.includes(selected) ? 0.3 : 1;
      if (block === state.padding) {
        context.strokeStyle = line;
        context.strokeRect(x + 0.5, y + 0.5, side - 1, side - 1);
        continue;
      }
      if (held) {
        const name = held.names.includes(selected) ? selected : held.names[0];
        const filled = (held.tokens / state.blockSize) * side;
        context.fillStyle = paint(name, 0.3);
        context.fillRect(x, y, side, side);
        context.fillStyle = paint(name, 1);
        context.fillRect(x, y + side - filled, side, filled);
        if (state.refs[block] > 1) {
          context.fillStyle = "#fff";
          if (side >= 14) context.fillText(state.refs[block], x + side / 2, y + side / 2 + 1);
          else if (side >= 4) context.fillRect(x + side / 3, y + side / 3, side / 3, side / 3);
        }
        if (written.has(block) && side >= 4) {
          context.strokeStyle = text;
          context.lineWidth = side >= 10 ? 2 : 1;
          context.strokeRect(x + 0.5, y + 0.5, side - 1, side - 1);
        }
      } else if (state.cached[block]) {
        context.fillStyle = cached;
        context.fillRect(x, y, side, side);
        if (side >= 6 && state.last[block] >= 0) {
          context.fillStyle = paint(state.last[block], 0.75);
          context.fillRect(x, y + side * 0.8, side, side * 0.2);
        }
      } else {
        context.fillStyle = cell;
        context.fillRect(x, y, side, side);
      }
    }
    context.globalAlpha = 1;
    return state.refs.length - this.shown;
  }

  place(block) {
    return { x: (block % this.columns) * this.size, y: Math.floor(block / this.columns) * this.size };
  }

  /** The block at a place of the canvas; -1: none. */
  hit(x, y) {
    const column = Math.floor(x / this.size);
    const block = Math.floor(y / this.size) * this.columns + column;
    return column < this.columns && block >= 0 && block < this.shown ? block : -1;
  }
}

export class Timeline {
  constructor(canvas) {
    this.canvas = canvas;
    this.first = 0; // place of the leftmost bar
  }

  draw(history, place) {
    const { width, height } = this.canvas.getBoundingClientRect();
    const context = prepare(this.canvas, width, height);
    const count = Math.floor(width / BAR);
    const ends = Math.min(history.to, Math.max(place + Math.floor(count / 2), history.from + count - 1));
    this.first = Math.max(history.from, ends - count + 1);
    const entries = history.entries.slice(this.first - history.from, ends - history.from + 1);
    const most = Math.max(8, ...entries.map(({ bar }) => bar.decode + bar.chunk));
    const queue = Math.max(1, ...entries.map(({ bar }) => bar.waiting));
    const [decode, chunk, wait, text, soft, line] = ["decode", "chunk", "wait", "ink", "soft", "line"].map(ink);
    const floor = height - 14;
    const tall = (tokens) => Math.sqrt(tokens / most) * (floor - 12);
    context.fillStyle = line;
    context.fillRect(0, floor, width, 1);
    context.font = "10px system-ui";
    context.textAlign = "left";
    entries.forEach(({ bar }, index) => {
      const x = index * BAR;
      const whole = tall(bar.decode + bar.chunk);
      context.fillStyle = chunk;
      context.fillRect(x, floor - whole, BAR - 1, whole);
      context.fillStyle = decode;
      context.fillRect(x, floor - tall(bar.decode), BAR - 1, tall(bar.decode));
      if (bar.gone.some(([, why]) => why === "preempted")) {
        context.fillStyle = wait;
        context.fillRect(x, floor + 2, BAR - 1, 3);
      }
      if (bar.step !== null && bar.step % 20 === 0) {
        context.fillStyle = soft;
        context.fillText(bar.step, x, height - 2);
      }
    });
    context.strokeStyle = wait;
    context.lineWidth = 1.5;
    context.beginPath();
    entries.forEach(({ bar }, index) => {
      context.lineTo(index * BAR + BAR / 2, floor - (bar.waiting / queue) * (floor - 12));
    });
    if (entries.some(({ bar }) => bar.waiting)) context.stroke();
    context.fillStyle = soft;
    context.textAlign = "right";
    context.fillText(`${most}`, width - 2, 10);
    context.fillStyle = text;
    context.fillRect((place - this.first) * BAR + BAR / 2 - 1, 0, 1.5, floor + 4);
  }

  /** The place in the history of a bar. */
  hit(x) {
    return this.first + Math.floor(x / BAR);
  }
}
