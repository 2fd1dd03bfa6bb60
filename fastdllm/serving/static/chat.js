// SPDX-License-Identifier: Apache-2.0
// A conversation. Each answer is shown as tiles while it is being filled, and as text or as tiles afterwards.

import { count, figures, follow, remark } from "./answer.js";
import { draw, element, grid, legend, sudoku } from "./canvas.js";
import { copyText, download } from "./files.js";
import { confirm, iconButton } from "./icons.js";
import { markdown } from "./markdown.js";
import { Player } from "./player.js";
import { body, model, remember, state } from "./state.js";

export class Chat {
  // page: {busy(on), pace(value)}.
  constructor(page) {
    this.page = page;
    this.turns = [];
    this.running = null;
    this.box = document.querySelector("#messages");
    this.refresh();
  }

  refresh() {
    if (this.turns.length || !state.info) return;
    const welcome = element("div", "welcome");
    welcome.append(element("h1", "", "Watch it think"));
    welcome.append(element("p", "", "A diffusion model writes by filling masks, many at once and in any order. Ask something, or take an example below."));
    if (model().note) welcome.append(element("p", "quiet", `${model().note}.`));
    this.box.replaceChildren(welcome);
  }

  reset() {
    this.stop();
    this.running = null;
    for (const turn of this.turns) turn.player.clear();
    this.turns = [];
    this.box.replaceChildren();
    this.refresh();
  }

  stop() {
    this.running?.abort();
  }

  get last() {
    return this.turns.at(-1);
  }

  async ask(question, retries = 0) {
    if (!this.turns.length) this.box.replaceChildren();
    this.last?.player.skip();
    const turn = this._turn(question, retries);
    const before = this.turns.filter((known) => known.kept);
    const messages = before.flatMap((known) => [
      { role: "user", content: known.question },
      { role: "assistant", content: known.trace.text },
    ]);
    this.turns.push(turn);
    this.box.append(turn.asked, turn.answer);
    this._bottom();
    const run = new AbortController();
    this.running = run;
    this.page.busy(true);
    try {
      const trace = await follow(
        body(state.chat, [...messages, { role: "user", content: question }], 0, retries),
        {
          waiting: (text) => (turn.note.textContent = text),
          begin: (begun, notices) => {
            turn.trace = begun;
            turn.notices.textContent = notices.map((text) => `${text.charAt(0).toUpperCase()}${text.slice(1)}.`).join(" ");
            turn.about.textContent = begun.about.about;
            turn.player.begin([begun], () => this._over(turn));
          },
        },
        run.signal,
      );
      turn.kept = Boolean(trace?.finished);
    } catch (error) {
      turn.error = error.message;
      turn.note.textContent = error.message;
      turn.note.className = "note problem";
    }
    if (this.running === run || !this.running) this.page.busy(false);
    if (this.running !== run) return; // the conversation is another one by now
    this.running = null;
    if (turn.trace) turn.player.complete();
    if (!turn.trace && !turn.error) turn.note.textContent = "Stopped; this turn is not remembered.";
    turn.tools.hidden = false;
    this._bottom();
  }

  _turn(question, retries) {
    const turn = { question, retries, trace: null, kept: false, error: "", mode: null };
    turn.asked = element("div", "asked");
    const bubble = element("div", "bubble");
    const rows = sudoku(question);
    bubble.append(rows ? grid(rows) : question);
    const tools = element("div", "tools");
    tools.append(
      iconButton("edit", "Edit and ask again", () => this._edit(turn)),
      iconButton("copy", "Copy", async (button) => (await copyText(question)) && confirm(button, "copy")),
    );
    turn.asked.append(bubble, tools);

    turn.answer = element("article", "answer");
    turn.canvas = element("div", "canvas");
    turn.canvas.setAttribute("role", "img");
    turn.text = element("div", "text");
    turn.text.hidden = true;
    turn.note = element("p", "note");
    turn.notices = element("p", "note");
    turn.about = element("p", "about");
    turn.player = new Player((steps) => this._show(turn, steps[0]), () => state.pace, this.page.pace);
    turn.replay = element("div", "under");
    const scale = element("div", "legend");
    legend(scale);
    turn.replay.append(turn.player.bar, scale);
    turn.tools = element("div", "tools");
    turn.tools.hidden = true;
    turn.modes = element("span", "switch");
    for (const [mode, name] of [["text", "Text"], ["tokens", "Tokens"]]) {
      const button = element("button", "", name);
      button.type = "button";
      button.dataset.mode = mode;
      button.addEventListener("click", () => {
        state.mode = mode;
        remember("mode", mode);
        this._mode(turn, mode);
      });
      turn.modes.append(button);
    }
    turn.figures = element("span", "line");
    turn.tools.append(
      turn.modes,
      iconButton("copy", "Copy the answer", async (button) => turn.trace && (await copyText(turn.trace.text)) && confirm(button, "copy")),
      iconButton("retry", "Ask again, with other draws", () => this._again(turn, turn.question, turn.retries + 1)),
      iconButton("download", "Download its history (fastdllm.trace reads it)", () => turn.trace && download("trace.json", turn.trace.file())),
      turn.figures,
    );
    turn.answer.append(turn.notices, turn.text, turn.canvas, turn.replay, turn.note, turn.tools, turn.about);
    return turn;
  }

  _show(turn, step) {
    if (!turn.trace) return;
    draw(turn.canvas, turn.trace, step, turn.question);
    const now = figures(turn.trace, step);
    const tokens = now.tokens ? `${count(now.tokens, "token")} in ` : "";
    turn.figures.textContent = `${tokens}${count(step, "forward")}${now.tokens ? `, ${now.each} per forward` : ""}, ${now.seconds} s`;
    turn.figures.dataset.tip = "A forward is one call of the model, which predicts every open position at once. The seconds are those of the forwards only.";
    if (turn === this.last) this._bottom();
  }

  _over(turn) {
    const said = remark(turn.trace);
    turn.note.textContent = turn.error || (said ? (turn.kept ? said : `${said} This turn is not remembered.`) : "");
    const rows = sudoku(turn.trace.text);
    turn.text.replaceChildren(rows ? grid(rows, sudoku(turn.question)) : markdown(turn.trace.text));
    this._mode(turn, turn.kept && turn.trace.text.trim() ? state.mode : "tokens");
    this._bottom();
  }

  _mode(turn, mode) {
    turn.text.hidden = mode !== "text";
    turn.canvas.hidden = turn.replay.hidden = mode === "text";
    turn.about.hidden = mode === "text";
    for (const button of turn.modes.children) button.setAttribute("aria-pressed", String(button.dataset.mode === mode));
  }

  _edit(turn) {
    if (this.running) return;
    const field = element("textarea", "edit");
    field.value = turn.question;
    field.setAttribute("aria-label", "Edit the question");
    const row = element("div", "row");
    const cancel = element("button", "", "Cancel");
    const ask = element("button", "primary", "Ask again");
    for (const button of [cancel, ask]) button.type = "button";
    row.append(cancel, ask);
    const form = element("div", "editing");
    form.append(field, row);
    turn.asked.replaceWith(form);
    cancel.addEventListener("click", () => form.replaceWith(turn.asked));
    const send = () => {
      if (!field.value.trim() || this.running) return;
      form.replaceWith(turn.asked);
      this._again(turn, field.value.trim(), 0);
    };
    ask.addEventListener("click", send);
    field.addEventListener("keydown", (event) => {
      if (event.key === "Enter" && !event.shiftKey && !event.isComposing) event.preventDefault(), send();
    });
    field.focus();
  }

  // Ask from here on anew: what came later belonged to the other answer.
  _again(turn, question, retries) {
    if (this.running) return;
    for (const gone of this.turns.splice(this.turns.indexOf(turn))) {
      gone.player.clear();
      gone.asked.remove();
      gone.answer.remove();
    }
    this.ask(question, retries);
  }

  _bottom() {
    const main = document.querySelector("main");
    if (main.scrollHeight - main.scrollTop - main.clientHeight < 400) main.scrollTop = main.scrollHeight;
  }
}
