// SPDX-License-Identifier: Apache-2.0
// Puts the page together: header, views, the box to write in, and what they share.

import { info, onMissingKey } from "./api.js";
import { element, sudoku } from "./canvas.js";
import { Chat } from "./chat.js";
import { Compare } from "./compare.js";
import { Drawer, fillPresets } from "./drawer.js";
import { copyText } from "./files.js";
import { confirm, icon, iconButton } from "./icons.js";
import { address, follow, LONGEST_LINKED, model, open, recall, remember, state } from "./state.js";

const find = (selector) => document.querySelector(selector);
const box = find("#message");
const send = find("#send");
const RUNNING = "An answer is running; what you write here stays.";
let busy = false;
let compare, chat, drawer;

find("#key-cancel").addEventListener("click", () => find("#key").close("cancel"));
onMissingKey(async (wrong) => {
  const dialog = find("#key");
  if (wrong) find("#key-reason").textContent = "This key is wrong. The server asks for another one.";
  find("#key-value").value = "";
  dialog.showModal();
  return new Promise((resolve) =>
    dialog.addEventListener("close", () => resolve(dialog.returnValue === "ok" ? find("#key-value").value : null), { once: true }),
  );
});

function setBusy(on) {
  busy = on;
  document.body.classList.toggle("busy", on);
  if (!on && find("#notice").textContent === RUNNING) say("");
  refreshSend();
}

function refreshSend() {
  const racing = state.view === "compare";
  const word = busy ? "Stop" : racing ? "Race" : "Ask";
  send.replaceChildren(icon(busy ? "stop" : racing ? "play" : "send"), element("span", "", word));
  send.setAttribute("aria-label", word);
  send.classList.toggle("stop", busy);
  box.placeholder = racing ? "Another prompt for both" : "Ask something";
}

function say(text) {
  const notice = find("#notice");
  notice.hidden = !text;
  notice.textContent = text;
}

// What is in the box is the visitor's: it is emptied when it is sent, and touched by nothing else.
function submit() {
  if (busy) return;
  say("");
  const text = box.value.trim();
  try {
    if (state.view === "compare") {
      if (!text && !state.prompt) return;
      empty(text);
      compare.race(text || state.prompt).catch((error) => (setBusy(false), say(error.message)));
    } else if (text) {
      empty(text);
      chat.ask(text).catch((error) => (setBusy(false), say(error.message)));
    } else say("Write a question first.");
  } catch (error) {
    say(error.message);
  }
}

function empty(sent) {
  if (!sent) return;
  box.value = "";
  grow();
}

// Put a prompt into the box, unless a visitor has written something else there.
function edit(prompt) {
  if (box.value.trim() && box.value !== prompt) say("There is something else in the box already. Send it or remove it first.");
  else box.value = prompt;
  grow();
  box.focus();
}

function take(example) {
  if (busy) return;
  say("");
  const running = state.view === "compare" ? compare.race(example) : chat.ask(example);
  running.catch((error) => (setBusy(false), say(error.message)));
}

function grow() {
  box.style.height = "auto";
  box.style.height = `${Math.min(box.scrollHeight, 180)}px`;
}

function examples() {
  const list = find("#examples");
  list.replaceChildren(
    ...model().examples.map((text) => {
      const chip = element("button", "chip", sudoku(text) ? `Sudoku ${text}` : text);
      chip.type = "button";
      chip.dataset.tip = text;
      chip.addEventListener("click", () => take(text));
      return chip;
    }),
  );
}

// Words that every answer must hold are easily forgotten.
function wordsSet() {
  const line = find("#words-set");
  line.hidden = !state.words.trim();
  const clear = iconButton("close", "Leave these words out", () => {
    state.words = "";
    wordsSet();
    if (!drawer.box.hidden) drawer.build();
  });
  line.replaceChildren(element("span", "", `Words that stand from the start: ${state.words}`), clear);
}

function show(view) {
  state.view = view;
  for (const name of ["compare", "chat"]) {
    find(`#${name}`).hidden = name !== view;
    find(`#tab-${name}`).setAttribute("aria-selected", String(name === view));
  }
  document.body.dataset.view = view;
  say("");
  refreshSend();
  find("main").scrollTop = 0;
  chat.bottom();
}

function changed(what) {
  follow();
  if (what === "model") {
    find("#model").value = model().name;
    state.tokens = null;
    state.words = "";
    state.prompt = model().examples[0] ?? "";
    for (const side of ["a", "b", "chat"]) if (state[side].name === "custom") state[side] = { ...state[side], cache: "" };
    examples();
    compare.reset();
    chat.reset();
  }
  if (["a", "b"].includes(what)) compare.reset();
  if (["words", "model"].includes(what)) wordsSet();
  document.body.dataset.colour = state.colour;
  if (what === "pace") for (const player of [compare.player, ...chat.turns.map((turn) => turn.player)]) player._update();
}

function theme(button) {
  const dark = getComputedStyle(document.documentElement).colorScheme === "dark" ||
    (!document.documentElement.dataset.theme && matchMedia("(prefers-color-scheme: dark)").matches);
  const next = dark ? "light" : "dark";
  document.documentElement.dataset.theme = next;
  remember("theme", next);
  button.replaceChildren(icon(next === "dark" ? "sun" : "moon"));
}

function actions() {
  const dark = (document.documentElement.dataset.theme || (matchMedia("(prefers-color-scheme: dark)").matches ? "dark" : "light")) === "dark";
  const fresh = iconButton("plus", "New chat", () => chat.reset());
  fresh.classList.add("only-chat");
  const tone = iconButton(dark ? "sun" : "moon", "Light or dark", theme);
  tone.classList.add("theme");
  const setting = iconButton("settings", "Settings", () => drawer.toggle());
  setting.id = "open-settings";
  find("#actions").append(
    fresh,
    iconButton("link", "Copy a link to this prompt and these settings", async (button) => {
      const prompt = state.view === "compare" ? state.prompt : (chat.last?.question ?? box.value.trim());
      const link = address(prompt);
      if (prompt.length > LONGEST_LINKED) say(`A link carries ${LONGEST_LINKED.toLocaleString("en")} characters of a prompt at most; this one has the settings only.`);
      if (await copyText(link)) confirm(button, "link");
    }),
    tone,
    setting,
  );
}

function tooltips() {
  const tip = find("#tip");
  const at = (target) => {
    const text = target?.dataset.tip;
    tip.hidden = !text;
    if (!text) return;
    tip.textContent = text;
    const place = target.getBoundingClientRect();
    const left = Math.min(Math.max(8, place.left + place.width / 2 - tip.offsetWidth / 2), innerWidth - tip.offsetWidth - 8);
    const above = place.top - tip.offsetHeight - 8;
    tip.style.left = `${left}px`;
    tip.style.top = `${above < 4 ? place.bottom + 8 : above}px`;
  };
  document.addEventListener("pointerover", (event) => at(event.target.closest?.("[data-tip]")));
  document.addEventListener("focusin", (event) => event.target.matches(":focus-visible") && at(event.target.closest("[data-tip]")));
  document.addEventListener("focusout", () => (tip.hidden = true));
  document.addEventListener("scroll", () => (tip.hidden = true), true);
}

function start(facts) {
  state.info = facts;
  const linked = location.hash.length > 1;
  if (linked) open(location.hash);
  state.model = model().name;
  const asked = state.prompt;
  if (!state.prompt) state.prompt = model().examples[0] ?? "";
  const models = find("#model");
  models.append(...facts.models.map(({ name }) => new Option(name, name)));
  models.value = state.model;
  models.addEventListener("change", () => {
    state.model = models.value;
    changed("model");
    if (!drawer.box.hidden) drawer.build();
  });
  const rebuild = (what) => {
    changed(what);
    if (!drawer.box.hidden && ["a", "b"].includes(what)) drawer.build();
  };
  const pace = (value) => ((state.pace = value), changed("pace"));
  drawer = new Drawer(changed);
  compare = new Compare({
    presets: fillPresets,
    preset: (side, name) => {
      drawer.choose(side, name);
      if (name === "custom") drawer.open(side);
      else rebuild(side);
    },
    openSettings: (side) => drawer.open(side),
    edit,
    busy: setBusy,
    pace,
  });
  chat = new Chat({ busy: setBusy, pace });
  actions();
  examples();
  wordsSet();
  compare.refresh();
  if (linked && asked && state.view === "chat") box.value = asked;
  chat.restore();
  show(state.view);
  document.body.dataset.colour = state.colour;
  document.body.dataset.ready = "true";
  find("#hint").textContent = "Enter sends, Shift+Enter breaks the line";
  grow();
  chat.bottom();
  box.focus();
}

const kept = recall("theme", "");
if (kept === "light" || kept === "dark") document.documentElement.dataset.theme = kept;
for (const tab of document.querySelectorAll("[role=tab]")) {
  tab.addEventListener("click", () => {
    if (busy && tab.dataset.view !== state.view) (state.view === "compare" ? compare : chat).stop();
    show(tab.dataset.view);
    follow();
  });
}
box.addEventListener("input", grow);
box.addEventListener("keydown", (event) => {
  if (event.key !== "Enter" || event.shiftKey || event.isComposing) return;
  event.preventDefault();
  if (busy) say(RUNNING);
  else submit();
});
find("#composer").addEventListener("submit", (event) => {
  event.preventDefault();
  if (busy) (state.view === "compare" ? compare : chat).stop();
  else submit();
});
addEventListener("hashchange", () => location.reload()); // another link was put into the address
tooltips();
info().then(start, (error) => say(error.message));
