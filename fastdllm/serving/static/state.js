// SPDX-License-Identifier: Apache-2.0
// What a visitor has chosen, and the address that brings it back. What is the same for everybody is left out of it.

export const state = {
  info: null,
  view: "compare",
  model: "",
  tokens: null, // null: the model's own length
  temperature: null, // null: what the server was started with
  seed: null,
  words: "",
  system: "",
  prompt: "",
  chat: { name: "server" },
  a: { name: "one" },
  b: { name: "balanced" },
  colour: recall("colour", "turn"),
  mode: recall("mode", "text"),
  pace: "auto",
};

const START = structuredClone(state);
const SHORT = { view: "v", model: "m", tokens: "n", temperature: "t", seed: "s", words: "w", system: "y", prompt: "q", chat: "c", a: "a", b: "b" };

export function recall(name, otherwise) {
  try {
    return localStorage.getItem(`fastdllm-${name}`) ?? otherwise;
  } catch {
    return otherwise;
  }
}

export function remember(name, value) {
  try {
    localStorage.setItem(`fastdllm-${name}`, value);
  } catch {
    // A browser that keeps nothing: the choice holds until the page is closed.
  }
}

// What a tab keeps over a reload; null where nothing is kept.
export const tab = {
  get(name) {
    try {
      return JSON.parse(sessionStorage.getItem(`fastdllm-${name}`));
    } catch {
      return null;
    }
  },
  set(name, value) {
    try {
      sessionStorage.setItem(`fastdllm-${name}`, JSON.stringify(value));
    } catch {
      // No store, or a full one: what was kept before goes, so that nothing old comes back.
      this.remove(name);
    }
  },
  remove(name) {
    try {
      sessionStorage.removeItem(`fastdllm-${name}`);
    } catch {
      // Then there is nothing either.
    }
  },
};

export const model = () => state.info.models.find((known) => known.name === state.model) ?? state.info.models[0];

export const temperature = () => state.temperature ?? model().temperature;

export const seed = () => state.seed ?? model().seed;

export const length = () => Math.min(state.tokens ?? model().gen_length, model().max_length - 1);

// Characters of a prompt that an address carries; browsers and messengers cut longer ones.
export const LONGEST_LINKED = 8000;

// The address of the page as it is now, with a prompt.
export function address(prompt = state.view === "compare" && state.prompt !== model().examples[0] ? state.prompt : "") {
  const parts = new URLSearchParams();
  const chosen = { ...state, prompt: prompt.length > LONGEST_LINKED ? "" : prompt };
  if (chosen.model === state.info.models[0].name) chosen.model = START.model;
  for (const [name, key] of Object.entries(SHORT)) {
    const [now, start] = [chosen[name], START[name]].map((value) => (typeof value === "object" && value ? JSON.stringify(value) : value));
    if (now !== start && now !== null) parts.set(key, now);
  }
  const fragment = parts.toString();
  return `${location.origin}${location.pathname}${location.search}${fragment ? `#${fragment}` : ""}`;
}

let written = 0;

// Let the address say what the page shows, so that it survives a reload. Browsers refuse many changes at once.
export function follow() {
  clearTimeout(written);
  written = setTimeout(() => history.replaceState(null, "", address()), 200);
}

// Take over what an address says; what makes no sense is passed over.
export function open(fragment) {
  const parts = new URLSearchParams(fragment.replace(/^#/, ""));
  for (const [name, key] of Object.entries(SHORT)) {
    const value = parts.get(key);
    if (value === null) continue;
    const start = START[name];
    if (start && typeof start === "object") {
      try {
        const read = JSON.parse(value);
        if (known(read)) state[name] = read;
      } catch {
        continue;
      }
    } else if (typeof start === "number" || start === null) {
      if (value.trim() && Number.isFinite(Number(value))) state[name] = within(name, Number(value));
    } else state[name] = value;
  }
  if (!["compare", "chat"].includes(state.view)) state.view = START.view;
}

// Whether a setting names what there is.
function known(setting) {
  if (!setting || typeof setting !== "object" || !Object.values(setting).every((value) => typeof value !== "object")) return false;
  if (setting.name !== "custom") return state.info.presets.some(({ name }) => name === setting.name);
  const { decoders, caches } = state.info;
  return [[setting.decoder, decoders], [setting.cache, caches]].every(([name, all]) => !name || all.some((one) => one.name === name));
}

// Bounds of the numbers that can be chosen.
export const BOUNDS = {
  tokens: { min: 1, max: Infinity, step: 1 }, // `length` keeps it within the model's context
  temperature: { min: 0, max: 10, step: 0.1 },
  seed: { min: 0, max: 2 ** 31 - 1, step: 1 },
};

export function within(name, value) {
  const { min, max, step } = BOUNDS[name];
  return Math.min(Math.max(step === 1 ? Math.round(value) : value, min), max);
}

// A setting as the server takes it: only what was filled in.
export function sent(setting) {
  const { more = "", ...rest } = setting;
  const out = Object.fromEntries(Object.entries(rest).filter(([, value]) => value !== "" && value !== null));
  for (const item of more.split(/,(?=\s*[A-Za-z_]\w*\s*=)/).filter((part) => part.trim())) {
    const [name, ...value] = item.split("=");
    if (!value.length) throw new Error(`Other options: "${item.trim()}" must be name=value.`);
    out[name.trim()] = value.join("=").trim().replace(/,$/, "");
  }
  return out;
}

// A request's body under a setting.
export function body(setting, messages, side = 0, retry = 0) {
  const system = state.system.trim() ? [{ role: "system", content: state.system }] : [];
  return {
    model: model().name,
    messages: [...system, ...messages],
    max_tokens: length(),
    temperature: temperature(),
    seed: seed() + retry,
    words: state.words,
    setting: sent(setting),
    side,
  };
}
