// SPDX-License-Identifier: Apache-2.0
// Two settings race on one prompt.

import { clock, count, figures, FIGURES, follow, remark, verdict } from "./answer.js";
import { curve, draw, element, grid, legend, sudoku } from "./canvas.js";
import { confirm, iconButton } from "./icons.js";
import { Player } from "./player.js";
import { presetLine } from "./drawer.js";
import { body, follow as followAddress, length, state } from "./state.js";
import { copyText, download } from "./files.js";

const SIDES = ["a", "b"];
const READY = "Getting ready"; // until a forward is over: the lanes say what is waited for

export class Compare {
  // page: {presets(select, setting), preset(side, name), openSettings(side), edit(prompt), busy(on), pace(value)}.
  constructor(page) {
    this.page = page;
    this.running = null;
    this.lanes = SIDES.map((side) => this._lane(side));
    document.querySelector("#lanes").append(...this.lanes.map((lane) => lane.box));
    this.player = new Player((steps) => this._show(steps), () => state.pace, page.pace);
    this.player.onClock((time) => this._clock(time));
    const under = document.querySelector("#race-bar");
    const scale = element("div", "legend");
    legend(scale);
    under.append(this.player.bar, scale);
    document.querySelector("#question-tools").append(iconButton("edit", "Edit this prompt", () => page.edit(state.prompt)));
  }

  _lane(side) {
    const box = element("article", `lane lane-${side}`);
    const head = element("div", "lane-head");
    const badge = element("span", "badge", side.toUpperCase());
    const select = element("select", "preset");
    select.id = `preset-${side}`;
    select.setAttribute("aria-label", `Setting ${side.toUpperCase()}`);
    select.addEventListener("change", () => this.page.preset(side, select.value));
    const lane = { side, box, select, trace: null, error: "" };
    const copy = iconButton("copy", "Copy this answer", async (button) => {
      if (lane.trace && (await copyText(lane.trace.text))) confirm(button, "copy");
    });
    const save = iconButton("download", "Download its history (fastdllm.trace reads it)", () => {
      if (lane.trace) download(`trace-${side}.json`, lane.trace.file());
    });
    const tune = iconButton("settings", `Settings of ${side.toUpperCase()}`, () => this.page.openSettings(side));
    head.append(badge, select, tune, copy, save);
    lane.tools = [copy, save];
    lane.figures = element("dl", "figures");
    lane.values = {};
    for (const [name, text, tip] of FIGURES) {
      const cell = element("div", `figure ${name}`);
      cell.dataset.tip = tip;
      cell.tabIndex = 0;
      const value = element("dd", "", "0");
      value.dataset.figure = name;
      cell.append(value, element("dt", "", text));
      lane.values[name] = value;
      lane.figures.append(cell);
    }
    lane.track = element("div", "track");
    lane.done = element("i");
    lane.track.append(lane.done);
    lane.canvas = element("div", "canvas");
    lane.canvas.id = `canvas-${side}`;
    lane.canvas.setAttribute("role", "img");
    lane.note = element("p", "note");
    lane.curve = element("div", "curve");
    box.append(head, lane.figures, lane.track, lane.canvas, lane.note, lane.curve);
    return lane;
  }

  refresh() {
    for (const lane of this.lanes) this.page.presets(lane.select, state[lane.side]);
    this._question();
    if (!this.running && !this.lanes.some((lane) => lane.trace)) this._idle();
  }

  _question() {
    const box = document.querySelector("#question");
    const rows = sudoku(state.prompt);
    box.replaceChildren(rows ? element("span", "quiet", "Fill in the sudoku ") : state.prompt, rows ? element("code", "", state.prompt) : "");
    box.dataset.tip = state.prompt.length > 120 ? state.prompt.slice(0, 400) : "";
  }

  _idle() {
    for (const lane of this.lanes) {
      this._clear(lane);
      this._note(lane, presetLine(state[lane.side]));
    }
    this._say("Two settings, one prompt. Press Race.", "idle");
  }

  // A lane in which nothing has run.
  _clear(lane) {
    Object.assign(lane, { trace: null, error: "" });
    lane.canvas.replaceChildren(this._blank());
    this._note(lane, "");
    for (const tool of lane.tools) tool.disabled = true;
    for (const value of Object.values(lane.values)) value.textContent = "0";
    lane.curve.replaceChildren();
    lane.done.style.width = "0";
  }

  // An answer before its first forward: a sudoku as far as it is given, else masks.
  _blank() {
    const rows = sudoku(state.prompt);
    if (rows) return grid(rows);
    const out = document.createDocumentFragment();
    for (let i = 0; i < Math.min(length(), 128); i++) out.append(element("span", "tok open"));
    return out;
  }

  // The line above the race. A winner's frame and the note on the figures belong to a verdict, and go with it.
  _say(text, kind, won = "", tip = "") {
    const box = document.querySelector("#verdict");
    box.className = kind;
    box.textContent = text;
    if (tip) box.dataset.tip = tip;
    else delete box.dataset.tip;
    for (const lane of this.lanes) lane.box.classList.toggle("won", lane.side.toUpperCase() === won);
  }

  stop() {
    this.running?.abort();
  }

  // What stands there belongs to other settings or another model: begin anew.
  reset() {
    this.stop();
    this.running = null;
    this.player.clear();
    for (const lane of this.lanes) Object.assign(lane, { trace: null, error: "" });
    this.refresh();
  }

  async race(prompt) {
    state.prompt = prompt;
    followAddress();
    this._question();
    this.player.clear();
    this.prompt = prompt;
    this.said = null;
    const run = new AbortController();
    const signal = run.signal;
    this.running = run;
    const traces = [];
    this.page.busy(true);
    this._say(READY, "racing");
    for (const lane of this.lanes) this._clear(lane);
    const begun = (lane, trace) => {
      if (this.running !== run) return;
      lane.trace = trace;
      traces[SIDES.indexOf(lane.side)] = trace;
      if (traces[0] && traces[1]) this.player.begin(traces, () => this._over());
    };
    await Promise.all(
      this.lanes.map(async (lane, side) => {
        try {
          await follow(
            body(state[lane.side], [{ role: "user", content: prompt }], side),
            {
              waiting: (text) => this.running === run && this._note(lane, text),
              begin: (trace) => begun(lane, trace),
            },
            signal,
          );
        } catch (error) {
          if (this.running !== run) return;
          lane.error = error.message;
          this._note(lane, error.message, "problem");
          run.abort();
        }
      }),
    );
    if (this.running === run || !this.running) this.page.busy(false);
    if (this.running !== run) return;
    this.running = null;
    if (this.lanes.some((lane) => lane.error) || !traces[0] || !traces[1]) {
      this._say(this.lanes.some((lane) => lane.error) ? "No race" : "Stopped.", "idle");
      for (const lane of this.lanes) if (!lane.trace && !lane.error) this._clear(lane);
    }
    if (traces[0] && traces[1]) this.player.complete();
  }

  _note(lane, text, kind = "") {
    lane.note.textContent = text;
    lane.note.className = `note ${kind}`;
  }

  _over() {
    const [a, b] = this.lanes.map((lane) => lane.trace);
    if (this.lanes.some((lane) => lane.error)) return;
    for (const lane of this.lanes) {
      this._note(lane, remark(lane.trace) ?? "");
      for (const tool of lane.tools) tool.disabled = false;
    }
    if (!a.finished || !b.finished) {
      this._say("Stopped.", "idle");
      return;
    }
    this.said = verdict(a, b);
    this._standing(this.player.time);
  }

  // How the race stands at a time: in words while it runs or is played again, the verdict at its end.
  _standing(time) {
    const traces = this.player.traces;
    if (traces.length < 2 || this.lanes.some((lane) => lane.error)) return;
    const over = traces.map((trace) => trace.finished && time >= trace.seconds());
    const end = over[0] && over[1];
    const said = end ? this.said : null;
    if (said) {
      const shared = "Other visitors shared some of these forwards, which makes them slower for both sides.";
      this._say(said.text, "said", said.name, said.shared ? shared : "Of the clocks and counts below.");
    } else if (over[0] !== over[1]) {
      const [done, other] = over[0] ? [0, 1] : [1, 0];
      const [first, second] = [SIDES[done], SIDES[other]].map((side) => side.toUpperCase());
      const step = this.player.steps[other];
      const where = step ? `is at its ${ordinal(step)}` : "is in its first";
      this._say(`${first} is done after ${count(traces[done].forwards, "forward")}; ${second} ${where}`, "racing");
    } else if (!end && traces.every((trace) => trace.finished || this.running)) this._say(traces.some((trace) => trace.forwards) ? "Racing" : READY, "racing");
  }

  _show(steps) {
    this.lanes.forEach((lane, side) => {
      const trace = this.player?.traces[side];
      if (!trace) return;
      const step = steps[side];
      draw(lane.canvas, trace, step, this.prompt);
      for (const [name, value] of Object.entries(figures(trace, step))) lane.values[name].textContent = value;
      curve(lane.curve, trace, step, this.player.end);
      const fresh = lane.canvas.querySelector(".now");
      if (fresh && this.player.playing) keepInSight(lane.canvas, fresh);
    });
  }

  _clock(time) {
    const longest = Math.max(...this.player.traces.map((trace) => Math.min(time, trace.seconds())), 1e-9);
    this.lanes.forEach((lane, side) => {
      const trace = this.player.traces[side];
      if (!trace) return;
      const own = Math.min(time, trace.seconds());
      lane.done.style.width = `${(100 * own) / longest}%`;
      lane.values.seconds.textContent = clock(own);
    });
    this._standing(time);
  }
}

function ordinal(number) {
  const end = number % 100 > 10 && number % 100 < 14 ? "th" : (["th", "st", "nd", "rd"][number % 10] ?? "th");
  return `${number}${end}`;
}

function keepInSight(box, tile) {
  const low = tile.offsetTop + tile.offsetHeight - box.offsetTop;
  if (low > box.scrollTop + box.clientHeight || low < box.scrollTop) box.scrollTop = Math.max(0, low - box.clientHeight / 2);
}
