// SPDX-License-Identifier: Apache-2.0
// The server: one request after another for facts, and answers as they are decoded.

import { tab } from "./state.js";

export class Refused extends Error {
  constructor(message, status, code, wait) {
    super(message);
    Object.assign(this, { status, code, wait });
  }
}

let askForKey = async () => null;

// ask: () -> Promise of the API key that a visitor types, null if none.
export function onMissingKey(ask) {
  askForKey = ask;
}

function headers() {
  const key = tab.get("key");
  return { "Content-Type": "application/json", ...(key ? { Authorization: `Bearer ${key}` } : {}) };
}

async function request(path, options = {}) {
  let response;
  try {
    response = await fetch(path, { ...options, headers: headers() });
  } catch (error) {
    if (error.name === "AbortError") throw error;
    throw new Refused("The server cannot be reached. Is it still running?", 0, "unreachable");
  }
  if (response.ok) return response;
  if (response.status === 401) {
    const key = await askForKey(Boolean(tab.get("key")));
    if (key) {
      tab.set("key", key);
      return request(path, options);
    }
  }
  const told = await response.json().catch((error) => {
    if (error.name === "AbortError") throw error;
    return null;
  });
  const error = told?.error ?? { message: `the server answered with status ${response.status}` };
  throw new Refused(sentence(error.message), response.status, error.code, Number(response.headers.get("Retry-After")));
}

// A message as a sentence; one that begins with the name of an option keeps it as it is written.
export function sentence(text) {
  const first = /^[a-z]+ /.test(text) ? text.charAt(0).toUpperCase() + text.slice(1) : text;
  return /[.!?]$/.test(first) ? first : `${first}.`;
}

export async function info() {
  return (await request("page/info")).json();
}

export async function words(model, text, length) {
  const body = JSON.stringify({ model, words: text, length });
  return (await (await request("page/words", { method: "POST", body })).json()).tokens;
}

// Ask, and hand each event of the answer to `take`. Resolves at its end; throws `Refused`, or an AbortError after `signal`.
export async function chat(body, take, signal) {
  const options = { stream: true, stream_options: { include_usage: true, include_denoising: true } };
  let response;
  for (;;) {
    try {
      response = await request("page/chat", { method: "POST", body: JSON.stringify({ ...body, ...options }), signal });
      break;
    } catch (error) {
      if (error.code !== "settings_busy") throw error;
      take({ waiting: { reason: error.message } });
      await new Promise((resolve) => setTimeout(resolve, 1000 * (error.wait || 2)));
      signal?.throwIfAborted();
    }
  }
  for await (const event of events(response.body)) {
    if (event.error) throw new Refused(sentence(event.error.message), 200, event.error.code);
    take(event);
  }
}

async function* events(body) {
  const reader = body.pipeThrough(new TextDecoderStream()).getReader();
  let rest = "";
  for (;;) {
    const { value, done } = await reader.read().catch((error) => {
      if (error.name === "AbortError") throw error;
      return { done: true };
    });
    if (done) throw new Refused("The connection broke before the answer was complete. Is the server still running?", 0, "broken");
    rest += value;
    let at;
    while ((at = rest.indexOf("\n\n")) >= 0) {
      const data = rest.slice(0, at).replace(/^data: /, "");
      rest = rest.slice(at + 2);
      if (data === "[DONE]") return;
      yield JSON.parse(data);
    }
  }
}
