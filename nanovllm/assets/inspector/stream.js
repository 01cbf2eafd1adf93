// The stream of frames, over fetch: unlike EventSource it can carry a key. Closed while nobody looks at the page.

const RETRY = 2000; // milliseconds

export class Stream {
  /** `onFrame` gets every frame, `onState` one of "live", "lost", "hidden", "key". */
  constructor(onFrame, onState) {
    this.onFrame = onFrame;
    this.onState = onState;
    this.abort = null;
    this.timer = 0;
    document.addEventListener("visibilitychange", () => (document.hidden ? this.close("hidden") : this.open()));
  }

  set key(value) {
    sessionStorage.setItem("nanovllm.key", value);
    this.close("lost");
    this.open();
  }

  close(state) {
    clearTimeout(this.timer);
    this.abort?.abort();
    this.abort = null;
    this.onState(state);
  }

  async open() {
    if (this.abort) return;
    const abort = (this.abort = new AbortController());
    const key = sessionStorage.getItem("nanovllm.key");
    try {
      const headers = key ? { Authorization: `Bearer ${key}` } : {};
      const answer = await fetch("inspector/events", { headers, signal: abort.signal, cache: "no-store" });
      if (answer.status === 401) {
        this.abort = null;
        this.onState("key");
        return;
      }
      if (!answer.ok) throw new Error(`status ${answer.status}`);
      this.onState("live");
      await this.read(answer.body.getReader());
    } catch (error) {
      if (abort.signal.aborted) return;
      console.info("inspector:", error.message);
    }
    if (this.abort !== abort) return;
    this.abort = null;
    this.onState("lost");
    this.timer = setTimeout(() => this.open(), RETRY);
  }

  async read(reader) {
    const decoder = new TextDecoder();
    let text = "";
    for (;;) {
      const { done, value } = await reader.read();
      if (done) return;
      text += decoder.decode(value, { stream: true });
      const events = text.split("\n\n");
      text = events.pop();
      for (const each of events) if (each.startsWith("data: ")) this.onFrame(JSON.parse(each.slice(6)));
    }
  }
}
