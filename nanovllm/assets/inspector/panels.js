// What is told in words and bars beside the drawings.

import { colour } from "./canvas.js";

const MOST_ROWS = 60;
const MOST_CELLS = 64;
const MOST_CHIPS = 160;

export const element = (id) => document.getElementById(id);

/** Make a container hold one element per item, reusing those that are there. */
function fill(container, items, make, update) {
  while (container.children.length > items.length) container.lastElementChild.remove();
  while (container.children.length < items.length) container.append(make());
  items.forEach((item, index) => update(container.children[index], item));
}

export function node(tag, className, ...children) {
  const made = document.createElement(tag);
  if (className) made.className = className;
  made.append(...children);
  return made;
}

/** How many tokens a request has generated. */
export function generated(request) {
  return request.computed >= request.prompt ? request.computed - request.prompt + 1 : request.known - request.prompt;
}

export function figures(state, totals, rates, words) {
  const put = (id, value) => (element(id).textContent = value);
  const share = (part, whole) => (whole ? `${((100 * part) / whole).toFixed(part && part < whole ? 1 : 0)} %` : "–");
  put("generated", Math.round(rates[0]).toLocaleString(words.locale));
  put("computed", Math.round(rates[1]).toLocaleString(words.locale));
  put("running", state.running);
  put("waiting", state.waiting);
  put("hits", share(state.hit, state.asked));
  put("usage", share(totals.owned, totals.usable));
  for (const name of ["owned", "shared", "cached", "free"]) put(name, totals[name]);
}

export function step(state, words, select) {
  element("step").textContent = state.step ?? "–";
  const decodes = state.decodes.length;
  fill(element("budget"), ["decode", "chunk"], () => node("div"), (bar, kind) => {
    bar.style.background = `var(--${kind})`;
    bar.style.width = `${(100 * (kind === "decode" ? decodes : state.chunkTokens)) / state.budget}%`;
  });
  element("budget").title = `${decodes + state.chunkTokens} / ${state.budget}`;
  element("chunk-count").textContent = words.tokens(state.chunkTokens);
  element("decode-count").textContent = decodes;
  element("queue-count").textContent = state.waiting;
  const most = Math.max(1, ...state.chunks.map(([, , count]) => count));
  fill(
    element("chunks"),
    state.chunks.slice(0, 6),
    () => node("div", "chunk-row", node("div", "bar"), node("span")),
    (row, [name, start, count]) => {
      row.firstChild.style.width = `${4 + (150 * count) / most}px`;
      row.firstChild.style.background = colour(name);
      row.lastChild.textContent = words.chunk(name, start, count);
      row.onclick = () => select(name);
    },
  );
  chips(element("decodes"), state.decodes, (chip, name) => {
    chip.style.background = colour(name);
    chip.onclick = () => select(name);
  });
  fill(
    element("queue"),
    state.queue,
    () => node("span", "chip plain"),
    (chip, [name, tokens]) => {
      chip.textContent = `#${name}`;
      chip.title = words.tokens(tokens);
    },
  );
  tenants(Object.entries(state.tenants).sort(([a], [b]) => (a < b ? -1 : 1)), words);
}

/** Tenants with a name that have requests: how many run, and how many wait. */
function tenants(found, words) {
  element("tenants-part").hidden = !found.length;
  const most = Math.max(1, ...found.map(([, [running, waiting]]) => running + waiting));
  fill(
    element("tenants"),
    found,
    () => node("li", "", node("span"), node("div", "bar", node("div"), node("div")), node("span", "right")),
    (row, [name, counts]) => {
      const [label, bar, right] = row.children;
      label.textContent = name;
      counts.forEach((count, index) => (bar.children[index].style.width = `${(100 * count) / most}%`));
      right.textContent = words.tenant(...counts);
    },
  );
}

function chips(container, names, paint) {
  const key = `${names.join(" ")} ${document.documentElement.dataset.theme}`;
  if (container.dataset.key === key) return;
  container.dataset.key = key;
  fill(container, names.slice(0, MOST_CHIPS), () => node("span", "chip"), (chip, name) => {
    chip.textContent = name;
    chip.title = `#${name}`;
    paint(chip, name);
  });
}

export function table(state, name, words) {
  const request = state.requests.get(name);
  element("selected").textContent = request ? `#${name}` : "";
  element("facts").textContent = request ? words.facts(request, generated(request)) : words.noRequest;
  const size = state.blockSize;
  const cells = request ? request.table.slice(0, MOST_CELLS) : [];
  fill(
    element("table"),
    cells.map((block, index) => ({ block, index })),
    () => node("li", "", node("span"), node("b")),
    (cell, { block, index }) => {
      const [positions, number] = cell.children;
      positions.textContent = `${index * size}–${(index + 1) * size - 1}`;
      number.textContent = state.refs[block] > 1 ? `${block} ×${state.refs[block]}` : block;
      number.style.background = colour(name);
      cell.title = words.cell(block, state.refs[block], state.cached[block]);
    },
  );
}

export function requests(state, selected, words, select) {
  fill(
    element("requests"),
    [...state.requests.entries()].slice(0, MOST_ROWS),
    () => node("li", "", node("b"), node("span"), node("div", "bar", node("div"), node("div"), node("div")),
      node("span", "right")),
    (row, [name, request]) => {
      const [label, phase, bar, right] = row.children;
      const computed = Math.min(request.computed, request.prompt) - request.cached;
      const output = Math.max(request.computed - request.prompt, 0);
      const parts = [
        [request.cached, "var(--cached)"],
        [Math.max(computed, 0), colour(name, 0.55)],
        [output, colour(name)],
      ];
      label.textContent = `#${name}`;
      label.style.color = colour(name);
      phase.textContent = request.computed > request.prompt ? words.decode : words.prefill;
      parts.forEach(([tokens, paint], index) => {
        bar.children[index].style.width = `${(100 * tokens) / request.limit}%`;
        bar.children[index].style.background = paint;
      });
      right.textContent = words.blockCount(request.table.length);
      row.classList.toggle("on", name === selected);
      row.title = words.facts(request, generated(request));
      row.onclick = () => select(name);
    },
  );
}
