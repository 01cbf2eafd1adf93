// What the engine was like at each of the last steps: a state, the records that change it, and a way back.

const KEPT = 600; // records
const KEPT_FOR_ONE = 2400; // so that the place somebody looks at stays
const KEY_EVERY = 24; // records between states that are kept whole

/** Requests, their block tables, and the blocks, while one step runs. */
export class State {
  /** From the whole state that begins a stream. */
  static whole(full) {
    const state = new State();
    state.blockSize = full.block_size;
    state.budget = full.budget;
    state.padding = full.padding_block;
    state.refs = new Uint16Array(full.num_blocks); // requests whose tables name the block
    state.cached = new Uint8Array(full.num_blocks); // whether the prefix cache finds it
    state.last = new Int32Array(full.num_blocks).fill(-1); // arrival number of whoever wrote it last
    let block = 0;
    for (const [count, refs, cached] of full.blocks) {
      state.refs.fill(refs, block, block + count);
      state.cached.fill(cached, block, block + count);
      block += count;
    }
    state.requests = new Map();
    for (const each of full.requests) {
      state.requests.set(each.name, { ...each });
      for (const one of each.table) state.last[one] = arrival(each.name);
    }
    Object.assign(state, { decodes: [], chunks: [], gone: [], asked: 0, hit: 0, step: null, sampled: 0 });
    state.count(full);
    return state;
  }

  clone() {
    const copy = Object.assign(new State(), this);
    copy.refs = this.refs.slice();
    copy.cached = this.cached.slice();
    copy.last = this.last.slice();
    copy.requests = new Map();
    for (const [name, each] of this.requests) copy.requests.set(name, { ...each, table: each.table.slice() });
    return copy;
  }

  /** Go one record on. */
  apply(record) {
    this.count(record);
    this.gone = record.gone ?? [];
    for (const [name] of this.gone) this.requests.delete(name);
    for (const start of record.starts ?? []) {
      this.requests.set(start.name, { ...start, table: [] });
      if (start.preemptions === 0) {
        this.asked += start.prompt;
        this.hit += start.cached;
      }
    }
    for (const [name, , blocks] of record.tables ?? []) {
      this.requests.get(name)?.table.push(...blocks);
      for (const block of blocks) if (!this.refs[block]) this.last[block] = arrival(name);
    }
    if (record.step === undefined) {
      this.decodes = [];
      this.chunks = [];
    } else if (record.decodes !== undefined) {
      this.decodes = record.decodes;
      this.chunks = record.chunks ?? [];
    }
    this.step = record.step ?? this.step;
    this.sampled = record.sampled ?? 0;
    for (const name of this.decodes) {
      const request = this.requests.get(name);
      if (request) request.computed += 1;
    }
    for (const [name, start, count] of this.chunks) {
      const request = this.requests.get(name);
      if (request) request.computed = start + count;
    }
    for (const [block, refs, cached] of record.blocks ?? []) {
      this.refs[block] = refs;
      this.cached[block] = cached;
    }
  }

  count(record) {
    this.time = record.time;
    this.running = record.running;
    this.waiting = record.waiting ?? 0;
    this.queue = record.queue ?? [];
    this.tenants = record.tenants ?? {}; // name -> [requests that run, that wait]
  }

  /** Of all blocks but the padding block, how many are in each state; shared ones are owned as well. */
  totals() {
    const found = { owned: 0, shared: 0, cached: 0, free: 0, usable: this.refs.length - 1 };
    for (let block = 0; block < this.refs.length; block++) {
      if (block === this.padding) continue;
      if (this.refs[block] > 0) {
        found.owned += 1;
        if (this.refs[block] > 1) found.shared += 1;
      } else if (this.cached[block]) found.cached += 1;
      else found.free += 1;
    }
    return found;
  }

  /** Tokens that the step computes for prompts. */
  get chunkTokens() {
    return this.chunks.reduce((sum, [, , count]) => sum + count, 0);
  }
}

/** The last records, and the state after any of them. Places are numbers that only grow. */
export class History {
  constructor() {
    this.entries = [];
    this.from = 0; // place of the first entry
    this.latest = null; // state after the last
    this.memory = null; // the place looked at last, and its state
    this.pinned = null; // the place somebody looks at
  }

  get to() {
    return this.from + this.entries.length - 1;
  }

  begin(full) {
    this.latest = State.whole(full);
    this.add({ bar: bar(this.latest), key: this.latest.clone() });
  }

  push(record) {
    if (this.latest === null) return;
    this.latest.apply(record);
    const keep = this.entries.length % KEY_EVERY === 0;
    this.add({ record, bar: bar(this.latest), key: keep ? this.latest.clone() : null });
  }

  add(entry) {
    this.entries.push(entry);
    if (this.entries.length <= KEPT) return;
    const next = this.entries.findIndex((each, index) => index > 0 && each.key);
    const wanted = this.pinned !== null && this.pinned <= this.from + next;
    if (wanted && this.entries.length < KEPT_FOR_ONE) return;
    this.entries.splice(0, next);
    this.from += next;
  }

  entry(place) {
    return this.entries[place - this.from];
  }

  /** The state after the record at a place. */
  at(place) {
    if (place >= this.to) return this.latest;
    let start = Math.max(place, this.from);
    while (!this.entry(start).key) start -= 1;
    let state = this.entry(start).key.clone();
    if (this.memory && this.memory.place >= start && this.memory.place <= place && this.memory.place >= this.from) {
      state = this.memory.state;
      start = this.memory.place;
    }
    for (let next = start + 1; next <= place; next++) {
      const entry = this.entry(next);
      if (entry.key) state = entry.key.clone();
      else state.apply(entry.record);
    }
    this.memory = { place, state };
    return state;
  }

  /** Tokens per second, over the second that ends at a place: generated, and computed for prompts. */
  rates(place) {
    const last = this.entry(place)?.bar;
    if (!last) return [0, 0];
    let generated = 0;
    let computed = 0;
    let since = last.time;
    for (let each = place; each > this.from; each--) {
      const one = this.entry(each).bar;
      if (last.time - one.time > 1) break;
      generated += one.sampled;
      computed += one.chunk;
      since = this.entry(each - 1).bar.time;
    }
    const seconds = Math.max(last.time - since, 1e-3);
    return [generated / seconds, computed / seconds];
  }
}

/** What the timeline shows of a state. */
function bar(state) {
  return {
    step: state.step,
    time: state.time,
    decode: state.decodes.length,
    chunk: state.chunkTokens,
    sampled: state.sampled,
    waiting: state.waiting,
    gone: state.gone,
  };
}

export function arrival(name) {
  return Number.parseInt(name, 10);
}
