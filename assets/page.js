// The page's own behaviour: players, sound while it is being made, light and dark, Ctrl/Cmd+Enter.
// Everything listens on the document, because Gradio replaces the elements below as results come.
(() => {
  "use strict";

  // Gradio may insert this script before or after the page is parsed.
  const onceThere = (start) =>
    document.readyState === "loading" ? addEventListener("DOMContentLoaded", start) : start();

  // Light and dark: the visitor's choice, else the system's.
  const KEY = "soundstage-light";
  let asked = new URLSearchParams(location.search).get("__theme");
  const lit = (mode) => document.body.classList.toggle("dark", mode === "dark");
  const preferred = () =>
    asked || localStorage.getItem(KEY) || (matchMedia("(prefers-color-scheme: dark)").matches ? "dark" : "light");
  onceThere(() => {
    lit(preferred());
    // Gradio sets its own mode once it is mounted; the visitor's choice has the last word.
    const watcher = new MutationObserver(() => {
      const wanted = preferred() === "dark";
      if (document.body.classList.contains("dark") !== wanted) lit(preferred());
    });
    watcher.observe(document.body, { attributes: true, attributeFilter: ["class"] });
  });
  const switchLight = () => {
    const mode = document.body.classList.contains("dark") ? "light" : "dark";
    asked = null;
    localStorage.setItem(KEY, mode);
    lit(mode);
  };

  // Players: a native audio element does the work, the button and the range input are its face.
  const player = (element) => element.closest("[data-player]");
  const audioOf = (element) => player(element)?.querySelector("audio");
  const clock = (seconds) =>
    seconds < 60
      ? `${seconds.toFixed(1)} s`
      : `${Math.floor(seconds / 60)}:${String(Math.floor(seconds % 60)).padStart(2, "0")}`;

  function show(audio) {
    const root = player(audio);
    if (!root) return;
    const length = audio.duration || 0;
    const percent = length ? (100 * audio.currentTime) / length : 0;
    root.querySelectorAll("[data-plot]").forEach((plot) => plot.style.setProperty("--played", `${percent}%`));
    const seek = root.querySelector("[data-seek]");
    if (seek && document.activeElement !== seek) seek.value = audio.currentTime;
    const output = root.querySelector("[data-clock]");
    if (output) output.textContent = clock(audio.currentTime);
  }

  function follow(audio) {
    show(audio);
    face(audio, !audio.paused); // Gradio may have drawn the track anew meanwhile
    if (!audio.paused && audio.isConnected) requestAnimationFrame(() => follow(audio));
  }

  function face(audio, playing) {
    const root = player(audio);
    if (!root) return;
    root.toggleAttribute("data-playing", playing);
    const button = root.querySelector("[data-play]");
    const label = button.getAttribute("aria-label").replace(/^(Play|Pause)/, playing ? "Pause" : "Play");
    button.setAttribute("aria-label", label);
  }

  // Media events do not bubble, but they can be captured.
  const listen = (type, handler) =>
    document.addEventListener(type, (event) => event.target.tagName === "AUDIO" && player(event.target) && handler(event.target), true);
  listen("play", (audio) => {
    document.querySelectorAll("[data-player] audio").forEach((other) => other !== audio && other.pause());
    face(audio, true);
    follow(audio);
  });
  listen("pause", (audio) => face(audio, false));
  listen("ended", (audio) => face(audio, false));
  listen("timeupdate", show);
  listen("seeked", show);

  document.addEventListener("input", (event) => {
    if (!event.target.matches("[data-seek]")) return;
    const audio = audioOf(event.target);
    audio.currentTime = Number(event.target.value);
    event.target.setAttribute("aria-valuetext", clock(Number(event.target.value)));
  });

  document.addEventListener("click", (event) => {
    const play = event.target.closest("[data-play]");
    if (play) {
      const audio = audioOf(play);
      audio.paused ? audio.play() : audio.pause();
    }
    const live = event.target.closest("[data-live]");
    if (live) toggleLive(live);
    if (event.target.closest("[data-lamp]")) switchLight();
  });

  // Sound while it is being made: chunk files are queued one behind the other on the audio clock. It
  // starts at a press, so no autoplay rule is broken. The rest comes from the finished file.
  const streams = new Map();

  class Stream {
    constructor(job) {
      this.job = job;
      this.context = new AudioContext();
      this.seen = 0; // chunks handed to the clock
      this.played = 0; // seconds handed to the clock
      this.next = 0; // when the next piece starts, on the context's clock
      this.busy = Promise.resolve();
    }
    take(sources, whole) {
      this.busy = this.busy.then(async () => {
        for (const source of sources.slice(this.seen)) {
          // Chunk files go when the whole is kept, which the page hears of a moment later.
          if (this.gone || (this.gone = !(await this.schedule(source, 0)))) break;
          this.seen += 1;
        }
        if (whole && !this.ended) {
          this.ended = true;
          await this.schedule(whole, this.played);
        }
      });
      this.busy = this.busy.catch((error) => console.warn(`Cannot play ${this.job} while it is made:`, error));
    }
    async schedule(source, from) {
      const answer = await fetch(source);
      if (!answer.ok) return false;
      const buffer = await this.context.decodeAudioData(await answer.arrayBuffer());
      if (buffer.duration <= from) return true;
      const node = this.context.createBufferSource();
      node.buffer = buffer;
      node.connect(this.context.destination);
      this.next = Math.max(this.next, this.context.currentTime + 0.05);
      node.start(this.next, from);
      this.next += buffer.duration - from;
      this.played += buffer.duration - from;
      return true;
    }
    close() {
      this.context.close();
    }
  }

  function toggleLive(button) {
    const job = button.dataset.live;
    if (streams.has(job)) {
      streams.get(job).close();
      streams.delete(job);
    } else {
      document.querySelectorAll("[data-player] audio").forEach((audio) => audio.pause());
      streams.set(job, new Stream(job));
      feed();
    }
    button.setAttribute("aria-pressed", String(streams.has(job)));
  }

  function feed() {
    for (const [job, stream] of streams) {
      const list = document.querySelector(`[data-chunks="${CSS.escape(job)}"]`);
      const whole = document.querySelector(`[data-whole="${CSS.escape(job)}"]`);
      if (list) stream.take([...list.children].map((item) => item.dataset.src), null);
      else if (whole) stream.take([], whole.dataset.wholeSrc);
      const button = document.querySelector(`[data-live="${CSS.escape(job)}"]`);
      button?.setAttribute("aria-pressed", "true");
    }
  }

  // Folds that the visitor opened stay open when Gradio draws their track anew.
  const unfolded = new Set();
  document.addEventListener("click", (event) => {
    const fold = event.target.closest("summary")?.closest("[data-fold]");
    if (fold) fold.open ? unfolded.delete(fold.dataset.fold) : unfolded.add(fold.dataset.fold);
  });
  function unfold() {
    document.querySelectorAll("[data-fold]:not([open])").forEach((fold) => (fold.open = unfolded.has(fold.dataset.fold)));
  }

  onceThere(() => {
    const observer = new MutationObserver(() => {
      if (unfolded.size) unfold();
      if (streams.size) feed();
    });
    observer.observe(document.body, { childList: true, subtree: true });
  });

  // The count under the text, against the smallest limit of the chosen engines.
  function count(text, chosen, limits) {
    const characters = [...(text || "")].length;
    const limit = Math.min(...(chosen || []).map((engine) => limits[engine] ?? Infinity));
    const number = characters.toLocaleString("en");
    const words = `${number} ${characters === 1 ? "character" : "characters"}`;
    if (!Number.isFinite(limit)) return words;
    const all = `${words} of ${limit.toLocaleString("en")}`;
    return characters > limit ? `<span class="over">${all}</span>` : all;
  }
  // For changes that no event of the browser tells of: a text that was filled in.
  const changed = () => document.dispatchEvent(new Event("soundstage-changed"));
  window.soundstage = { changed, count, streams };

  document.addEventListener("keydown", (event) => {
    if (event.key === "Enter" && (event.ctrlKey || event.metaKey)) {
      event.preventDefault();
      document.querySelector("button.go:not([disabled])")?.click();
    }
  });
})();
