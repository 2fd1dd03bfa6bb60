// SPDX-License-Identifier: Apache-2.0
// The one place for settings: of every answer, of the chat and of both sides of a comparison, and of how it is shown.

import { words } from "./api.js";
import { element } from "./canvas.js";
import { iconButton } from "./icons.js";
import { PACES } from "./player.js";
import { BOUNDS, length, model, remember, seed, state, temperature, within } from "./state.js";

export class Drawer {
  // changed(what): called after every change, with the name of what was changed.
  constructor(changed) {
    this.box = document.querySelector("#settings");
    this.changed = changed;
    document.addEventListener("keydown", (event) => event.key === "Escape" && this.close());
  }

  toggle(at = "") {
    if (this.box.hidden || at) this.open(at);
    else this.close();
  }

  open(at = "") {
    this.build();
    this.box.hidden = false;
    document.body.classList.add("with-settings");
    if (at) this.box.querySelector(`#set-${at}`)?.scrollIntoView({ block: "start" });
    this.box.querySelector("button")?.focus({ preventScroll: true });
  }

  close() {
    this.box.hidden = true;
    document.body.classList.remove("with-settings");
  }

  build() {
    const top = this.box.scrollTop;
    const head = element("div", "drawer-head");
    head.append(element("h2", "", "Settings"), iconButton("close", "Close the settings", () => this.close()));
    this.box.replaceChildren(head, this._model(), this._answer(), ...this._settings(), this._display(), glossary());
    this.box.scrollTop = top;
  }

  _change(name, value) {
    state[name] = value;
    this.changed(name);
  }

  _model() {
    const part = section("Model", "model");
    const select = element("select");
    for (const known of state.info.models) select.append(new Option(known.name, known.name));
    select.value = model().name;
    select.addEventListener("change", () => {
      this._change("model", select.value);
      this.build();
    });
    part.append(field("Model", select, model().line));
    return part;
  }

  _answer() {
    const part = section("Answer", "answer");
    const most = model().max_length - 1;
    const number = (name, shown, max = BOUNDS[name].max) => {
      const input = element("input");
      Object.assign(input, { type: "number", value: shown(), ...BOUNDS[name], max });
      input.addEventListener("change", () => {
        const given = Number(input.value);
        if (input.value !== "" && Number.isFinite(given)) this._change(name, within(name, given));
        input.value = shown();
      });
      return input;
    };
    const row = element("div", "fields");
    row.append(
      field("New tokens", number("tokens", length, most), `1 to ${most}, less the question`),
      field("Temperature", number("temperature", temperature), "0 takes the likeliest token"),
      field("Seed", number("seed", seed), "of the draws"),
    );
    part.append(row, this._words());
    const system = element("textarea");
    Object.assign(system, { rows: 2, value: state.system, placeholder: "none" });
    system.addEventListener("input", () => this._change("system", system.value));
    part.append(field("Instructions (system)", system));
    return part;
  }

  _words() {
    const input = element("input");
    Object.assign(input, { type: "text", value: state.words, placeholder: model().words, id: "words" });
    const preview = element("div", "canvas preview");
    const told = element("p", "quiet");
    let asked = 0;
    const show = async () => {
      const mine = ++asked;
      told.className = "quiet";
      told.textContent = "position:word, position:word. They stand from the start, and the model writes around them.";
      preview.replaceChildren();
      if (!state.words.trim()) return;
      try {
        const tokens = await words(model().name, state.words, length());
        if (mine === asked) showWords(preview, tokens);
      } catch (error) {
        if (mine !== asked) return;
        told.className = "problem";
        told.textContent = error.message;
      }
    };
    let later = 0;
    input.addEventListener("input", () => {
      this._change("words", input.value);
      clearTimeout(later);
      later = setTimeout(show, 250);
    });
    show();
    const made = field("Words at token positions", input);
    made.append(preview, told);
    return made;
  }

  _settings() {
    return [["a", "Compare: setting A"], ["b", "Compare: setting B"], ["chat", "Chat"]].map(([side, title]) => {
      const part = section(title, side);
      const select = element("select");
      fillPresets(select, state[side]);
      select.addEventListener("change", () => {
        this.choose(side, select.value);
        this.build();
      });
      part.append(field("Setting", select, presetLine(state[side])));
      if (state[side].name === "custom") part.append(...this._custom(side));
      return part;
    });
  }

  // A preset by name, or a setting of one's own, which begins with the family's defaults.
  choose(side, name) {
    state[side] = name === "custom" ? { name, decoder: "threshold", cache: "" } : { name };
    this.changed(side);
  }

  _custom(side) {
    const now = state[side];
    const set = (name, value) => {
      if (value === "") delete now[name];
      else now[name] = value;
      this.changed(side);
    };
    const choice = (name, values, clear) => {
      const select = element("select");
      for (const [value, label] of values) select.append(new Option(label, value));
      select.value = now[name] ?? "";
      select.addEventListener("change", () => {
        for (const option of clear) delete now[option.name];
        set(name, select.value);
        this.build();
      });
      return select;
    };
    const { decoders, caches } = state.info;
    const decoder = decoders.find((known) => known.name === (now.decoder ?? "threshold")) ?? decoders[0];
    const cache = caches.find((known) => known.name === now.cache);
    const out = [
      field("Decoder", choice("decoder", decoders.map(({ name }) => [name, name]), decoder.options), decoder.line),
      field("Cache", choice("cache", [["", "default"], ...model().caches.map((name) => [name, name])], cache?.options ?? []), cache?.line ?? "The family's own."),
    ];
    const row = element("div", "fields");
    const own = [
      { name: "block_length", type: "int", default: model().block_length, line: "Positions decoded together" },
      ...(decoder.steps ? [{ name: "steps", type: "int", default: "", line: "Forwards for the whole answer; default one a token" }] : []),
      ...decoder.options,
      ...(cache?.options ?? []),
    ];
    for (const option of own) row.append(field(option.name.replaceAll("_", " "), this._option(option, now, set), option.line));
    const more = element("input");
    Object.assign(more, { type: "text", value: now.more ?? "", placeholder: "name=value, name=value" });
    more.addEventListener("change", () => set("more", more.value));
    out.push(row, field("Other options", more, "Any other of fastdllm.DecodeConfig"));
    return out;
  }

  _option(option, now, set) {
    const names = option.type === "bool" ? ["True", "False"] : option.choices;
    if (names?.length) {
      const select = element("select");
      const usual = String(option.default ?? "default");
      const others = names.filter((name) => name.toLowerCase() !== usual.toLowerCase());
      select.append(new Option(names.find((name) => !others.includes(name)) ?? usual, ""), ...others.map((name) => new Option(name, name)));
      select.value = now[option.name] ?? "";
      select.addEventListener("change", () => set(option.name, select.value));
      return select;
    }
    const input = element("input");
    Object.assign(input, { type: "text", inputMode: "decimal", value: now[option.name] ?? "", placeholder: String(option.default ?? "") });
    input.addEventListener("change", () => set(option.name, input.value.trim()));
    return input;
  }

  _display() {
    const part = section("Display", "display");
    const colour = element("select");
    for (const [value, text] of [["turn", "The forward of its block"], ["sure", "The model's confidence"]]) colour.append(new Option(text, value));
    colour.value = state.colour;
    colour.id = "colour";
    colour.addEventListener("change", () => {
      remember("colour", colour.value);
      this._change("colour", colour.value);
    });
    const pace = element("select");
    for (const [value, text] of PACES) pace.append(new Option(text, value));
    pace.value = state.pace;
    pace.addEventListener("change", () => this._change("pace", pace.value));
    const row = element("div", "fields two");
    const tone = element("select");
    for (const [value, text] of [["", "As the system"], ["light", "Light"], ["dark", "Dark"]]) tone.append(new Option(text, value));
    tone.value = document.documentElement.dataset.theme ?? "";
    tone.addEventListener("change", () => {
      remember("theme", tone.value);
      if (tone.value) document.documentElement.dataset.theme = tone.value;
      else delete document.documentElement.dataset.theme;
    });
    row.append(field("Pace", pace), field("Light or dark", tone));
    part.append(field("Tokens are coloured by", colour), row);
    return part;
  }
}

export function fillPresets(select, setting) {
  const presets = state.info.presets.map(({ name, label }) => new Option(label, name));
  select.replaceChildren(...presets, new Option("Custom", "custom"));
  select.value = setting.name;
}

export function presetLine(setting) {
  if (setting.name === "server") return `As the server was started: ${model().setting}.`;
  return state.info.presets.find((preset) => preset.name === setting.name)?.line ?? `Decoder ${setting.decoder ?? "threshold"}, ${setting.cache ? `cache ${setting.cache}` : "the family's own cache"}.`;
}

function section(title, name) {
  const made = element("section");
  made.id = `set-${name}`;
  made.append(element("h3", "", title));
  return made;
}

let fields = 0;

function field(name, control, line = "") {
  const made = element("div", "field");
  const label = element("label", "name", name);
  control.id ||= `field-${++fields}`;
  label.htmlFor = control.id;
  made.append(label, control);
  if (line) made.append(element("small", "", line));
  return made;
}

// Tiles up to a little after the last word.
function showWords(box, tokens) {
  const texts = new Map(tokens.map(({ position, text }) => [position, text]));
  const last = Math.max(...texts.keys());
  for (let at = 0; at <= Math.min(last + 3, length() - 1); at++) {
    const tile = element("span", texts.has(at) ? "tok fixed" : "tok open", texts.get(at)?.trim() ?? "");
    tile.dataset.tip = texts.has(at) ? `Position ${at}: ${texts.get(at)}` : `Position ${at}: open`;
    box.append(tile);
  }
}

function glossary() {
  const part = section("Words", "words-used");
  const list = element("dl", "glossary");
  for (const [word, meaning] of [
    ["Token", "A word or a piece of one. The answer is a row of positions, each a mask at first."],
    ["Forward", "One call of the model: it looks at the positions it recomputes and predicts every open one at once."],
    ["Decoder", "The rule that says which predictions are written after a forward."],
    ["Cache", "What is kept from earlier forwards instead of being computed again."],
    ["Block", "Positions that are finished before the next ones are begun."],
    ["Confidence", "The probability that the model gave to the token when it was written."],
  ]) list.append(element("dt", "", word), element("dd", "", meaning));
  part.append(list);
  return part;
}
