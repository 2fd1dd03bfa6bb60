// SPDX-License-Identifier: Apache-2.0
// The history of one answer, built from the server's events: the twin of fastdllm.trace.Trace, whose files it writes.

export class Trace {
  // about: the event `begin`.
  constructor(about) {
    this.about = about;
    this.length = about.length;
    this.mask = about.mask_id;
    this.stops = new Set(about.stop_ids);
    this.fixed = new Map(Object.entries(about.fixed).map(([at, token]) => [Number(at), token]));
    this.texts = new Map(Object.entries(about.texts).map(([token, text]) => [Number(token), text]));
    this.steps = [];
    this.clock = [0]; // seconds after 0, 1, 2, ... forwards
    this.filled = [Object.keys(about.fixed).length]; // positions that hold a token then
    this.opened = new Map(); // the forward that opened the block at a position
    this.positions = 0;
    this.text = ""; // final text, as the server tells it
    this.reason = null; // "stop" or "length"
    this.finished = false;
    this.shared = false; // a forward served somebody else too
    this._now = this._start();
    this._past = null;
  }

  _start() {
    const state = {
      step: 0,
      ids: new Array(this.length).fill(this.mask),
      written: new Array(this.length).fill(null),
      confidence: new Array(this.length).fill(null),
    };
    for (const [at, token] of this.fixed) {
      state.ids[at] = token;
      state.written[at] = 0;
    }
    return state;
  }

  _play(state, until) {
    for (let number = state.step + 1; number <= until; number++) {
      for (const [at, token, confidence] of this.steps[number - 1].changes) {
        const open = token === this.mask;
        state.ids[at] = token;
        state.written[at] = open ? null : number;
        state.confidence[at] = open ? null : confidence;
      }
    }
    state.step = until;
    return state;
  }

  // Take in an event `denoising`.
  add(event) {
    const changes = [];
    for (let i = 0; i < event.ids.length; i++) {
      const at = event.start + i;
      const token = event.ids[i] === null ? this.mask : event.ids[i];
      if (at < this.length && token !== this._now.ids[at]) changes.push([at, token, event.confidence[i]]);
      if (event.ids[i] !== null) this.texts.set(token, event.tokens[i]);
    }
    this.shared = this.shared || event.rows > 1;
    this._take({ start: event.start, stop: event.stop, seconds: event.seconds, changes });
  }

  _take(step) {
    this.steps.push(step);
    this.clock.push(this.clock[this.clock.length - 1] + step.seconds);
    if (!this.opened.has(step.start)) this.opened.set(step.start, this.steps.length);
    this._play(this._now, this.steps.length);
    this.filled.push(this._now.written.filter((written) => written !== null).length);
  }

  // What `restored` makes the trace of again.
  kept() {
    const { about, steps, positions, text, reason, finished, shared } = this;
    return { about, steps, positions, text, reason, finished, shared, texts: [...this.texts] };
  }

  static restored({ about, steps, texts, ...rest }) {
    const made = Object.assign(new Trace(about), rest, { texts: new Map(texts) });
    for (const step of steps) made._take(step);
    return made;
  }

  get forwards() {
    return this.steps.length;
  }

  seconds(step = this.forwards) {
    return this.clock[Math.min(step, this.forwards)];
  }

  // Forwards that are over at a time of its own clock.
  stepAt(seconds) {
    let step = 0;
    while (step < this.forwards && this.clock[step + 1] <= seconds + 1e-9) step++;
    return step;
  }

  // The answer after `step` forwards: ids, the forward that wrote each, and its confidence.
  at(step = this.forwards) {
    if (step >= this.forwards) return this._now;
    if (!this._past || this._past.step > step) this._past = this._start();
    return this._play(this._past, step);
  }

  // Where the answer ends after `step` forwards: its first stop token after the last constraint; its length if there is none.
  end(step = this.forwards) {
    const { ids } = this.at(step);
    const asked = Math.max(-1, ...this.fixed.keys());
    const found = ids.findIndex((token, at) => at > asked && this.stops.has(token));
    return found < 0 ? this.length : found;
  }

  tokens(step = this.forwards) {
    const { ids } = this.at(step);
    return ids.slice(0, this.end(step)).filter((token) => token !== this.mask && !this.stops.has(token)).length;
  }

  // Positions up to which blocks were opened.
  reached(step = this.forwards) {
    return this.steps.slice(0, step).reduce((most, done) => Math.max(most, done.stop), Math.max(0, ...[...this.fixed.keys()].map((at) => at + 1)));
  }

  // Which forward of its block wrote what stands at a position.
  turn(written) {
    return written - this.opened.get(this.steps[written - 1].start) + 1;
  }

  // As `fastdllm.trace.Trace.load` reads it.
  file() {
    const { model, config, prompt_length, length, mask_id, stop_ids, fixed } = this.about;
    return JSON.stringify({
      format: "fastdllm-trace", version: 1, model, config, prompt_length, length, mask_id, stop_ids, fixed,
      steps: this.steps.map(({ start, stop, seconds, changes }) => ({ start, stop, seconds, changes })),
      texts: Object.fromEntries(this.texts), finished: this.finished, positions: this.positions,
    });
  }
}
