// SPDX-License-Identifier: Apache-2.0
// Shows traces on a clock of their own: each forward at the moment it was over, counting the time of forwards only. So two
// answers race fairly, whatever the server did in between, and may be watched slower than they were.

import { element } from "./canvas.js";
import { icon } from "./icons.js";

const NICE = [1, 2, 5, 10, 20, 50, 100];
const VISIBLE = 0.12; // seconds that a forward shall be seen, where the pace is chosen here
const LONGEST = 12; // and seconds that all may take

export const PACES = [["auto", "Auto pace"], ["1", "Real time"], ...NICE.slice(1).map((n) => [String(n), `1/${n} speed`])];

export class Player {
  // show: called with the forwards of each trace that are to be seen. pace: () -> "auto" or a factor.
  constructor(show, pace, setPace) {
    this.traces = [];
    this._show = show;
    this._pace = pace;
    this.bar = this._makeBar(setPace);
    this.clear();
  }

  clear() {
    cancelAnimationFrame(this._frame);
    Object.assign(this, { traces: [], live: false, playing: false, time: 0, _auto: 0, _before: 0, onEnd: null });
    this._update();
  }

  // Begin with traces that grow; they are played while they do.
  begin(traces, onEnd) {
    this.clear();
    Object.assign(this, { traces, live: true, onEnd });
    this.play();
  }

  // Stand at the end of traces that are over.
  stand(traces) {
    this.clear();
    this.traces = traces;
    this.time = this.end;
    this._update();
  }

  // Nothing more will come.
  complete() {
    this.live = false;
    this._update();
    if (!this.playing) this._finish();
  }

  // The moment up to which all that happened is known.
  get frontier() {
    const open = this.traces.filter((trace) => !trace.finished && this.live);
    return open.length ? Math.min(...open.map((trace) => trace.seconds())) : this.end;
  }

  get end() {
    return Math.max(0, ...this.traces.map((trace) => trace.seconds()));
  }

  get steps() {
    return this.traces.map((trace) => trace.stepAt(this.time));
  }

  get factor() {
    if (this._pace() !== "auto") return Number(this._pace());
    return this._auto || 1;
  }

  _chooseAuto() {
    const known = this.traces.flatMap((trace) => trace.steps.map((step) => step.seconds));
    if (this._auto || known.length < Math.min(3, 3 * this.traces.length) && this.live) return;
    if (!known.length) return;
    const typical = known.sort((a, b) => a - b)[Math.floor(known.length / 2)];
    const bound = this.live ? Infinity : LONGEST / (this.end || 1);
    this._auto = NICE.filter((n) => n <= Math.max(1, Math.min(VISIBLE / typical, bound))).pop() ?? 1;
  }

  play() {
    if (!this.live && this.time >= this.end) this.time = 0;
    this.playing = true;
    this._before = 0;
    cancelAnimationFrame(this._frame);
    this._frame = requestAnimationFrame((now) => this._tick(now));
    this._update();
  }

  pause() {
    this.playing = false;
    cancelAnimationFrame(this._frame);
    this._update();
  }

  // To the last moment at once.
  skip() {
    this.pause();
    this.time = this.end;
    this._update();
    if (!this.live) this._finish();
  }

  _tick(now) {
    if (!this.playing) return;
    this._chooseAuto();
    const passed = this._before ? (now - this._before) / 1000 : 0;
    this._before = now;
    this.time = Math.min(this.frontier, this.time + passed / this.factor);
    this._update();
    if (!this.live && this.time >= this.end) {
      this.playing = false;
      this._update();
      this._finish();
      return;
    }
    this._frame = requestAnimationFrame((next) => this._tick(next));
  }

  _finish() {
    const told = this.onEnd;
    this.onEnd = null;
    told?.();
  }

  // The moments that the slider stops at: the end of each forward of either.
  get moments() {
    const all = this.traces.flatMap((trace) => trace.clock);
    return [...new Set(all)].sort((a, b) => a - b);
  }

  _makeBar(setPace) {
    const bar = element("div", "bar");
    this._button = element("button", "icon play");
    this._button.type = "button";
    this._button.append(icon("play"));
    this._button.addEventListener("click", () => (this.playing ? this.pause() : this.play()));
    this._range = element("input", "scrub");
    Object.assign(this._range, { type: "range", min: 0, max: 1, value: 0 });
    this._range.setAttribute("aria-label", "Forward");
    this._range.addEventListener("input", () => {
      const at = Number(this._range.value); // before the bar is brought up to date
      this.pause();
      this.time = this.moments[at] ?? 0;
      this._update();
    });
    this._label = element("output", "moment");
    this._label.dataset.tip =
      "A forward is one call of the model: it looks at the positions it recomputes and predicts every open one at once. The clock counts the time of forwards only.";
    this._label.tabIndex = 0;
    this._select = element("select", "pace");
    this._select.setAttribute("aria-label", "Pace");
    this._select.dataset.tip = "How fast forwards are shown. Auto slows down what could not be seen.";
    for (const [value, label] of PACES) this._select.append(new Option(label, value));
    this._select.value = this._pace();
    this._select.addEventListener("change", () => setPace(this._select.value));
    bar.append(this._button, this._range, this._label, this._select);
    return bar;
  }

  _update() {
    const steps = this.steps;
    const key = `${steps.join()} ${this.traces.map((t) => t.forwards).join()} ${this.live} ${this.traces.map((t) => t.finished).join()}`;
    const moments = this.moments;
    const at = moments.filter((moment) => moment <= this.time + 1e-9).length - 1;
    this._range.max = Math.max(1, moments.length - 1);
    this._range.value = Math.max(0, at);
    this._range.disabled = moments.length < 2;
    this._button.disabled = moments.length < 2;
    if (this._state !== this.playing) {
      this._button.replaceChildren(icon(this.playing ? "pause" : "play"));
      this._button.setAttribute("aria-label", this.playing ? "Pause" : "Play the answer again");
      this._state = this.playing;
    }
    this._label.textContent = this.traces.length ? this._moment(steps) : "";
    this._select.value = this._pace();
    this._select.options[0].text = this._pace() === "auto" && this._auto > 1 ? `Auto, 1/${this._auto}` : PACES[0][1];
    if (key !== this._key || !this.traces.length) {
      this._key = key;
      this._show(steps);
    }
    this._clock?.(this.time, this.end);
  }

  // Called with the time and the end at every change.
  onClock(tell) {
    this._clock = tell;
  }

  _moment(steps) {
    if (this.traces.length === 1) {
      const [trace] = this.traces;
      return `Forward ${steps[0]}${trace.finished || !this.live ? ` of ${trace.forwards}` : ""}`; // how many is known at the end
    }
    return `${this.time.toFixed(this.time < 1 ? 3 : 2)} s`;
  }
}
