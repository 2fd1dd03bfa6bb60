// SPDX-License-Identifier: Apache-2.0
// A conversation. Each answer is shown as tiles while it is being filled, and as text or as tiles afterwards.

import { count, figures, follow, remark } from "./answer.js";
import { draw, element, grid, legend, sudoku } from "./canvas.js";
import { copyText, download } from "./files.js";
import { confirm, iconButton } from "./icons.js";
import { markdown } from "./markdown.js";
import { Player } from "./player.js";
import { body, model, remember, state, tab, temperature } from "./state.js";
import { Trace } from "./trace.js";

const KEPT = 30; // turns that come back after a reload
const FOLDED = { characters: 1200, lines: 14 }; // what is shown of a long question
const NEAR = 40; // pixels from the bottom within which new text is followed

export class Chat {
  // page: {busy(on), pace(value)}.
  constructor(page) {
    this.page = page;
    this.turns = [];
    this.running = null;
    this.box = document.querySelector("#messages");
    this.main = document.querySelector("main");
    this.followed = true; // whether the visitor stands at the bottom
    this.top = 0;
    this.main.addEventListener("scroll", () => this._scrolled());
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
    tab.remove("chat");
    this.box.replaceChildren();
    this.refresh();
  }

  // The conversation that this tab had before it was loaded anew.
  restore() {
    const kept = tab.get("chat");
    if (!kept?.turns?.length || kept.model !== model().name) return;
    this.box.replaceChildren();
    for (const { question, retries, trace, remembered, error, note, notices, about } of kept.turns) {
      const turn = this._turn(question, retries);
      Object.assign(turn, { kept: remembered, error, trace: trace && Trace.restored(trace) });
      this.turns.push(turn);
      this.box.append(turn.asked, turn.answer);
      turn.notices.textContent = notices;
      turn.about.textContent = about;
      turn.tools.hidden = false;
      if (turn.trace) {
        turn.answer.classList.remove("bare");
        turn.player.stand([turn.trace]);
        this._over(turn);
      } else turn.note.textContent = note || "The page was left before the answer was complete. This turn is not remembered.";
      if (error) turn.note.className = "note problem";
    }
  }

  _keep() {
    const turns = this.turns.slice(-KEPT).map(({ question, retries, trace, kept, error, note, notices, about, running }) => ({
      question,
      retries,
      trace: running ? null : (trace?.kept() ?? null),
      remembered: kept,
      error,
      note: note.textContent,
      notices: notices.textContent,
      about: about.textContent,
    }));
    tab.set("chat", { model: model().name, turns });
  }

  stop() {
    this.running?.abort();
  }

  get last() {
    return this.turns.at(-1);
  }

  // before: the text of the answer that this one takes the place of.
  async ask(question, retries = 0, before = null) {
    if (!this.turns.length) this.box.replaceChildren();
    this.last?.player.skip();
    const turn = Object.assign(this._turn(question, retries), { before, running: true });
    const messages = this.turns.filter((known) => known.kept).flatMap((known) => [
      { role: "user", content: known.question },
      { role: "assistant", content: known.trace.text },
    ]);
    this.turns.push(turn);
    this.box.append(turn.asked, turn.answer);
    this._keep();
    this.bottom();
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
            turn.answer.classList.remove("bare");
            const sentences = notices.map((text) => `${text.charAt(0).toUpperCase()}${text.slice(1)}.`);
            const told = this.turns.map(({ notices: earlier }) => earlier.textContent).join(" ");
            turn.notices.textContent = sentences.filter((text) => !told.includes(text)).join(" "); // once in a conversation
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
    turn.running = false;
    if (turn.trace) turn.player.complete();
    if (!turn.trace && !turn.error) turn.note.textContent = "Stopped; this turn is not remembered.";
    turn.tools.hidden = false;
    this._keep();
    this._follow();
  }

  _turn(question, retries) {
    const turn = { question, retries, trace: null, kept: false, error: "", mode: null };
    turn.asked = element("div", "asked");
    const rows = sudoku(question);
    const bubble = element("div", "bubble", rows ? "" : folded(question));
    bubble.dir = "auto";
    if (rows) bubble.append(grid(rows));
    const tools = element("div", "tools");
    tools.append(
      iconButton("edit", "Edit and ask again", () => this._edit(turn)),
      iconButton("copy", "Copy", async (button) => (await copyText(question)) && confirm(button, "copy")),
    );
    turn.asked.append(bubble, ...(rows || folded(question) === question ? [] : [unfold(bubble, question)]), tools);

    turn.answer = element("article", "answer bare");
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
    turn.figures = element("span", "sums");
    const retry = iconButton("retry", "Ask again, with other draws", () => this._again(turn, turn.question, turn.retries + 1, turn.kept ? turn.trace.text : null));
    retry.classList.add("retry");
    turn.tools.append(
      turn.modes,
      iconButton("copy", "Copy the answer", async (button) => turn.trace && (await copyText(turn.trace.text)) && confirm(button, "copy")),
      retry,
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
    turn.figures.textContent = `${tokens}${count(step, "forward")}${now.tokens ? `, ${now.each} per forward` : ""}, ${now.seconds}\u00a0s`;
    turn.figures.dataset.tip = "A forward is one call of the model, which predicts every open position at once. The seconds are those of the forwards only.";
    if (turn === this.last) this._follow();
  }

  _over(turn) {
    const same = turn.kept && turn.before === turn.trace.text && temperature() === 0;
    const said = remark(turn.trace) ?? (same ? "The same answer: at temperature 0 nothing is drawn. The settings have a temperature." : null);
    turn.note.textContent = turn.error || (said ? (turn.kept ? said : `${said} This turn is not remembered.`) : "");
    const rows = sudoku(turn.trace.text);
    turn.text.replaceChildren(rows ? grid(rows, sudoku(turn.question)) : markdown(turn.trace.text));
    this._mode(turn, turn.kept && turn.trace.text.trim() ? state.mode : "tokens");
    this._follow();
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
    Object.assign(field, { value: turn.question, dir: "auto" });
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
      if (event.key === "Escape") event.stopPropagation(), cancel.click();
    });
    field.focus();
  }

  // Ask from here on anew: what came later belonged to the other answer.
  _again(turn, question, retries, before = null) {
    if (this.running) return;
    for (const gone of this.turns.splice(this.turns.indexOf(turn))) {
      gone.player.clear();
      gone.asked.remove();
      gone.answer.remove();
    }
    this.ask(question, retries, before);
  }

  // Show the end of the conversation, and follow it.
  bottom() {
    this.followed = true;
    this._follow();
  }

  // Whoever has scrolled up to read is left there.
  _follow() {
    if (!this.followed || state.view !== "chat") return;
    this.main.scrollTop = this.main.scrollHeight;
    this.top = this.main.scrollTop;
  }

  _scrolled() {
    if (state.view !== "chat") return;
    const { scrollHeight, scrollTop, clientHeight } = this.main;
    if (scrollHeight - scrollTop - clientHeight < NEAR) this.followed = true;
    else if (scrollTop < this.top - 2) this.followed = false;
    this.top = scrollTop;
  }
}

function folded(text) {
  const lines = text.split("\n");
  const short = lines.slice(0, FOLDED.lines).join("\n").slice(0, FOLDED.characters);
  return text.length - short.length > 100 ? `${short} …` : text;
}

// A button that shows all of a long question.
function unfold(bubble, text) {
  const button = element("button", "unfold", `Show all ${text.length.toLocaleString("en")} characters`);
  button.type = "button";
  button.addEventListener("click", () => {
    bubble.textContent = text;
    button.remove();
  });
  return button;
}
