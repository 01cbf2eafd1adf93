// Everything the page says, in two languages.

const english = {
  locale: "en",
  other: "中文",
  title: "Inspector",
  key: "This server wants a key:",
  connect: "Connect",
  generated: "tokens generated / s",
  computed: "prompt tokens / s",
  running: "requests running",
  waiting: "requests waiting",
  hits: "of prompt tokens cached",
  usage: "of blocks owned",
  blocks: "KV cache",
  blocksHint:
    "Every square is a block: room for the keys and values of a few tokens. A request owns the blocks in its table, " +
    "wherever they lie; it gets another one only when its last is full. Blocks with equal beginnings of texts are shared.",
  owned: "owned, in its request's colour, filled as far as written",
  shared: "of these shared",
  cached: "cached: free, but a prompt that begins the same finds it",
  free: "free",
  written: "written in this step",
  idle: "The engine sleeps: send it a request and watch.",
  step: "Step",
  stepHint: "One pass through the model: decodes first, then chunks of prompts.",
  chunks: "Chunks of prompts",
  decodes: "Decodes: one token each",
  queue: "Queue",
  tenants: "Tenants",
  table: "Block table",
  tableHint: "Which block holds which positions. Click a request or a block.",
  requests: "Requests that hold blocks",
  requestsHint: "Grey: cached. Light: prompt. Full: generated. The end: its limit.",
  noRequest: "no request",
  live: "Live",
  first: "To the oldest step (Home)",
  back: "A step back (←)",
  forward: "A step on (→)",
  play: "Pause or replay (space)",
  liveTitle: "Follow the engine (End)",
  speed: "Steps per second of a replay",
  timeline: "Steps",
  decodeTokens: "decodes (heights grow with the square root)",
  chunkTokens: "prompt tokens",
  decode: "decode",
  prefill: "prefill",
  theme: { light: "Dark", dark: "Light" },
  link: {
    live: "connected",
    lost: "not connected; trying again",
    hidden: "not connected while hidden",
    key: "a key is needed",
    dead: "the engine has died; waiting for the next",
  },
  tokens: (count) => `${count} ${count === 1 ? "token" : "tokens"}`,
  chunk: (name, start, count) => `#${name}: ${count} (positions ${start}–${start + count - 1})`,
  blockCount: (count) => `${count} ${count === 1 ? "block" : "blocks"}`,
  tenant: (running, waiting) => `${running} running, ${waiting} waiting`,
  more: (count) => (count > 0 ? `${count.toLocaleString("en")} more blocks, never used yet` : ""),
  where: (step, behind) => `step ${step ?? "–"}${behind ? `, ${behind} behind` : ""}`,
  facts: (each, out) =>
    `prompt ${each.prompt} (${each.cached} cached) + generated ${out}, at most ${each.limit} tokens` +
    (each.preemptions ? `; preempted ${each.preemptions}×` : "") +
    (each.priority ? `; priority ${each.priority}` : ""),
  cell: (block, refs, cached) =>
    `block ${block}: ` +
    [refs ? `${refs} ${refs === 1 ? "owner" : "owners"}` : "nobody's", cached ? "found by its content" : ""]
      .filter(Boolean)
      .join(", "),
  holds: (name, index, tokens, size) => `#${name}, part ${index} of its table, ${tokens} of ${size} tokens written`,
  padding: "block 0: never handed out, padding is written here",
  bar: (bar, milliseconds) =>
    `step ${bar.step ?? "–"}\n${bar.decode} decodes, ${bar.chunk} prompt tokens, ${bar.waiting} waiting` +
    (milliseconds === null ? "" : `\n${milliseconds.toFixed(1)} ms to the next`) +
    bar.gone.map(([name, why]) => `\n#${name}: ${why}`).join(""),
};

const chinese = {
  locale: "zh",
  other: "English",
  title: "引擎观察器",
  key: "此服务器需要密钥：",
  connect: "连接",
  generated: "每秒生成的 token",
  computed: "每秒计算的提示 token",
  running: "运行中的请求",
  waiting: "等待中的请求",
  hits: "的提示 token 命中缓存",
  usage: "的块被占用",
  blocks: "KV 缓存",
  blocksHint:
    "每个方格是一个块，存放若干 token 的键和值。请求拥有其块表中的块，块可以在任何位置；最后一块写满后才会得到下一块。" +
    "开头相同的文本共享块。",
  owned: "已占用：请求的颜色，填充到已写入处",
  shared: "其中共享",
  cached: "已缓存：空闲，但开头相同的提示可以命中",
  free: "空闲",
  written: "本步写入",
  idle: "引擎在休眠。发一个请求看看。",
  step: "步骤",
  stepHint: "模型的一次前向计算。token 预算先给解码，再分块给提示。",
  chunks: "提示的分块",
  decodes: "解码：每个请求一个 token",
  queue: "队列",
  tenants: "租户",
  table: "块表",
  tableHint: "各位置的 token 在哪个块中。点击请求或块来选择。",
  requests: "持有块的请求",
  requestsHint: "灰色：缓存命中。浅色：提示。深色：已生成。末端：上限。",
  noRequest: "没有请求",
  live: "实时",
  first: "到最早的步骤（Home）",
  back: "后退一步（←）",
  forward: "前进一步（→）",
  play: "暂停或回放（空格）",
  liveTitle: "跟随引擎（End）",
  speed: "回放时每秒的步数",
  timeline: "步骤",
  decodeTokens: "解码（高度按平方根）",
  chunkTokens: "提示 token",
  decode: "解码",
  prefill: "预填充",
  theme: { light: "深色", dark: "浅色" },
  link: {
    live: "已连接",
    lost: "未连接，正在重试",
    hidden: "页面隐藏时不连接",
    key: "需要密钥",
    dead: "引擎已停止，等待重新启动",
  },
  tokens: (count) => `${count} 个 token`,
  chunk: (name, start, count) => `#${name}：${count}（位置 ${start}–${start + count - 1}）`,
  blockCount: (count) => `${count} 块`,
  tenant: (running, waiting) => `${running} 个运行，${waiting} 个等待`,
  more: (count) => (count > 0 ? `另有 ${count.toLocaleString("zh")} 个块从未使用` : ""),
  where: (step, behind) => `第 ${step ?? "–"} 步${behind ? `，落后 ${behind} 步` : ""}`,
  facts: (each, out) =>
    `提示 ${each.prompt}（缓存命中 ${each.cached}）+ 已生成 ${out}，最多 ${each.limit} 个 token` +
    (each.preemptions ? `；被抢占 ${each.preemptions} 次` : "") +
    (each.priority ? `；优先级 ${each.priority}` : ""),
  cell: (block, refs, cached) =>
    `块 ${block}：` + [refs ? `${refs} 个所有者` : "无人占用", cached ? "可按内容命中" : ""].filter(Boolean).join("，"),
  holds: (name, index, tokens, size) => `#${name}，其块表第 ${index} 项，已写入 ${tokens}/${size} 个 token`,
  padding: "块 0：从不分配，填充写在这里",
  bar: (bar, milliseconds) =>
    `第 ${bar.step ?? "–"} 步\n${bar.decode} 个解码，${bar.chunk} 个提示 token，${bar.waiting} 个等待` +
    (milliseconds === null ? "" : `\n到下一步 ${milliseconds.toFixed(1)} 毫秒`) +
    bar.gone.map(([name, why]) => `\n#${name}：${why}`).join(""),
};

export const languages = { en: english, zh: chinese };
