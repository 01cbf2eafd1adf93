// The page: takes frames, remembers them, and draws the step that is looked at.

import { Grid, Timeline, owners } from "./canvas.js";
import { History } from "./history.js";
import { element, figures, requests, step, table } from "./panels.js";
import { Stream } from "./stream.js";
import { languages } from "./words.js";

const IDLE = 1500; // milliseconds without a frame after which nothing is happening

const history = new History();
const grid = new Grid(element("blocks"));
const timeline = new Timeline(element("timeline"));

let place = null; // in the history; null: the latest, live
let playing = false;
let selected = null; // the name of a request that was chosen
let language = localStorage.getItem("nanovllm.language") ?? (navigator.language.startsWith("zh") ? "zh" : "en");
let heard = 0; // when the last frame came
let drawn = false; // nothing has changed since
let slept = false; // when it was drawn
let played = 0;
let pointer = null; // where tips are shown
let link = "lost";

const words = () => languages[language];
const here = () => (place === null ? history.to : Math.min(Math.max(place, history.from), history.to));
const redraw = () => (drawn = false);

// -- frames -----------------------------------------------------------------------------------------------------------

function onFrame(frame) {
  heard = performance.now();
  if (frame.lost) return onLink("dead");
  if (frame.full) history.begin(frame.full);
  for (const record of frame.records) history.push(record);
  if (link !== "live") onLink("live");
  redraw();
}

function onLink(state) {
  link = state;
  element("link").textContent = words().link[state];
  element("link").classList.toggle("on", state === "live");
  element("key").hidden = state !== "key";
}

const stream = new Stream(onFrame, onLink);

// -- drawing ----------------------------------------------------------------------------------------------------------

function draw(now) {
  requestAnimationFrame(draw);
  if (playing && place !== null && now - played > 1000 / Number(element("speed").value)) {
    played = now;
    if (here() >= history.to) setPlace(null);
    else setPlace(here() + 1, true);
  }
  const idle = now - heard > IDLE;
  if ((drawn && idle === slept) || history.latest === null) return;
  drawn = true;
  slept = idle;
  const at = here();
  const state = history.at(at);
  const shown = state.requests.has(selected) ? selected : state.requests.keys().next().value;
  const quiet = idle && place === null;
  figures(state, state.totals(), quiet ? [0, 0] : history.rates(at), words());
  step(state, words(), select);
  table(state, shown, words());
  requests(state, shown, words(), select);
  element("more").textContent = words().more(grid.draw(state, state.requests.has(selected) ? selected : null));
  element("blocks").setAttribute("aria-label", words().blocksHint);
  timeline.draw(history, at);
  element("timeline").setAttribute("aria-valuenow", String(state.step ?? 0));
  element("where").textContent = words().where(state.step, history.to - at);
  element("idle").hidden = link !== "live" || !idle || place !== null || history.latest.requests.size > 0;
  element("live").setAttribute("aria-pressed", String(place === null));
  element("play").classList.toggle("held", place !== null && !playing);
  if (pointer) tip();
}

function select(name) {
  selected = selected === name ? null : name;
  redraw();
}

// -- going through the history ----------------------------------------------------------------------------------------

/** Look at a place of the history; null: follow the engine. */
function setPlace(next, keepPlaying = false) {
  place = next === null ? null : Math.min(Math.max(next, history.from), history.to);
  playing = keepPlaying && place !== null;
  history.pinned = place;
  redraw();
}

const actions = {
  first: () => setPlace(history.from),
  back: () => setPlace(here() - 1),
  forward: () => setPlace(here() + 1),
  live: () => setPlace(null),
  play: () => {
    if (place === null) setPlace(history.to);
    else setPlace(place, !playing);
  },
};
for (const [id, act] of Object.entries(actions)) element(id).addEventListener("click", act);

const keys = { Home: "first", ArrowLeft: "back", ArrowRight: "forward", End: "live", " ": "play" };
document.addEventListener("keydown", (event) => {
  if (!keys[event.key] || event.target.closest("input, select, button")) return;
  event.preventDefault();
  actions[keys[event.key]]();
});

const scrub = (event) => setPlace(timeline.hit(event.offsetX));
element("timeline").addEventListener("pointerdown", (event) => {
  element("timeline").setPointerCapture(event.pointerId);
  scrub(event);
});
element("timeline").addEventListener("pointermove", (event) => event.buttons && scrub(event));

// -- tips -------------------------------------------------------------------------------------------------------------

function tip() {
  const state = history.at(here());
  const text = pointer.on === "blocks" ? blockTip(state) : barTip();
  element("tip").hidden = !text;
  if (!text) return;
  element("tip").textContent = text;
  element("tip").style.left = `${Math.min(pointer.x + 14, innerWidth - 290)}px`;
  element("tip").style.top = `${Math.max(pointer.y - 60, 4)}px`;
}

function blockTip(state) {
  const block = grid.hit(pointer.offsetX, pointer.offsetY);
  if (block < 0) return "";
  if (block === state.padding) return words().padding;
  const held = owners(state).owner.get(block);
  const lines = held?.names.map((name) => words().holds(name, held.index, held.tokens, state.blockSize)) ?? [];
  return [words().cell(block, state.refs[block], state.cached[block]), ...lines].join("\n");
}

function barTip() {
  const at = timeline.hit(pointer.offsetX);
  const entry = history.entry(at);
  const next = history.entry(at + 1);
  return entry ? words().bar(entry.bar, next ? 1000 * (next.bar.time - entry.bar.time) : null) : "";
}

for (const id of ["blocks", "timeline"]) {
  element(id).addEventListener("pointermove", (event) => {
    pointer = { on: id, x: event.clientX, y: event.clientY, offsetX: event.offsetX, offsetY: event.offsetY };
    if (history.latest) tip();
  });
  element(id).addEventListener("pointerleave", () => {
    pointer = null;
    element("tip").hidden = true;
  });
}
element("blocks").addEventListener("click", (event) => {
  const block = grid.hit(event.offsetX, event.offsetY);
  const held = history.latest && owners(history.at(here())).owner.get(block);
  selected = held && selected !== held.names[0] ? held.names[0] : null;
  redraw();
});

// -- settings ---------------------------------------------------------------------------------------------------------

function setLanguage(next) {
  language = next;
  localStorage.setItem("nanovllm.language", next);
  document.documentElement.lang = next;
  for (const each of document.querySelectorAll("[data-word]")) each.textContent = words()[each.dataset.word];
  for (const each of document.querySelectorAll("[data-title]")) each.title = words()[each.dataset.title];
  document.title = words().title;
  element("language").textContent = words().other;
  setTheme(document.documentElement.dataset.theme);
  onLink(link);
  redraw();
}

function setTheme(next) {
  document.documentElement.dataset.theme = next;
  element("theme").textContent = words().theme[next];
  redraw();
}

element("language").addEventListener("click", () => setLanguage(language === "en" ? "zh" : "en"));
element("theme").addEventListener("click", () => {
  const next = document.documentElement.dataset.theme === "dark" ? "light" : "dark";
  localStorage.setItem("nanovllm.theme", next);
  setTheme(next);
});
element("key").addEventListener("submit", (event) => {
  event.preventDefault();
  stream.key = element("key-value").value;
});
window.addEventListener("resize", redraw);

const dark = matchMedia("(prefers-color-scheme: dark)").matches;
document.documentElement.dataset.theme = localStorage.getItem("nanovllm.theme") ?? (dark ? "dark" : "light");
setLanguage(language);
requestAnimationFrame(draw);
stream.open();

/** What is shown, for whoever asks by program. */
window.inspector = {
  get place() {
    return { at: here(), from: history.from, to: history.to, live: place === null };
  },
  get link() {
    return link;
  },
  go: setPlace,
  select,
  cell: (block) => ({ ...grid.place(block), size: grid.size }),
  state: (at = here()) => {
    const state = history.at(at);
    return {
      step: state.step,
      running: state.running,
      waiting: state.waiting,
      tenants: state.tenants,
      decodes: state.decodes,
      chunks: state.chunks,
      totals: state.totals(),
      blocks: Array.from(state.refs, (refs, block) => [refs, state.cached[block]]),
      tables: Object.fromEntries([...state.requests].map(([name, each]) => [name, each.table.slice()])),
      computed: Object.fromEntries([...state.requests].map(([name, each]) => [name, each.computed])),
    };
  },
};
