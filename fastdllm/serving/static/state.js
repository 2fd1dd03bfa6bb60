// SPDX-License-Identifier: Apache-2.0
// What a visitor has chosen, and the address that brings it back. What is the same for everybody is left out of it.

export const state = {
  info: null,
  view: "compare",
  model: "",
  tokens: null, // null: the model's own length
  temperature: 0,
  seed: 0,
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

export const model = () => state.info.models.find((known) => known.name === state.model) ?? state.info.models[0];

export const length = () => Math.min(state.tokens ?? model().gen_length, model().max_length - 1);

// The address of the page as it is now.
export function address() {
  const parts = new URLSearchParams();
  for (const [name, key] of Object.entries(SHORT)) {
    const [now, start] = [state[name], START[name]].map((value) => (typeof value === "object" && value ? JSON.stringify(value) : value));
    if (now !== start && now !== null) parts.set(key, now);
  }
  return `${location.origin}${location.pathname}#${parts}`;
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
        if (read && typeof read === "object" && typeof read.name === "string") state[name] = read;
      } catch {
        continue;
      }
    } else if (typeof start === "number" || start === null) {
      if (value.trim() && Number.isFinite(Number(value))) state[name] = Number(value);
    } else state[name] = value;
  }
  if (!["compare", "chat"].includes(state.view)) state.view = START.view;
}

// A setting as the server takes it: only what was filled in.
export function sent(setting) {
  const { more = "", ...rest } = setting;
  const out = Object.fromEntries(Object.entries(rest).filter(([, value]) => value !== "" && value !== null));
  for (const item of more.split(",").filter((part) => part.trim())) {
    const [name, ...value] = item.split("=");
    if (!value.length) throw new Error(`Other options: "${item.trim()}" must be name=value.`);
    out[name.trim()] = value.join("=").trim();
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
    temperature: state.temperature,
    seed: state.seed + retry,
    words: state.words,
    setting: sent(setting),
    side,
  };
}
