// SPDX-License-Identifier: Apache-2.0
// One answer: from the request to a finished trace, and what its figures say.

import { chat, Refused } from "./api.js";
import { model } from "./state.js";
import { Trace } from "./trace.js";

const SLOW = 800; // milliseconds without a word from the server after which it has to warm up a run

// Ask and follow. on: {waiting(text), begin(trace, notices), step(trace)}. Resolves with the trace, finished or, after
// `signal`, stopped; throws `Refused`.
export async function follow(body, on, signal) {
  let trace = null;
  const slow = setTimeout(() => on.waiting?.("Making this setting ready"), SLOW);
  try {
    await chat(
      body,
      (event) => {
        clearTimeout(slow);
        if (event.waiting) on.waiting?.(place(event.waiting));
        else if (event.begin) {
          trace = new Trace(event.begin);
          on.waiting?.("");
          on.begin(trace, event.begin.notices);
        } else if (event.denoising) {
          trace.add(event.denoising);
          on.waiting?.("");
          on.step?.(trace);
        } else if (event.end) {
          trace.positions = event.end.positions;
          trace.finished = true;
        } else if (event.choices?.length) {
          trace.text += event.choices[0].delta.content ?? "";
          trace.reason = event.choices[0].finish_reason ?? trace.reason;
        }
      },
      signal,
    );
  } catch (error) {
    if (error.name !== "AbortError") throw error;
  } finally {
    clearTimeout(slow);
  }
  if (!trace && !signal?.aborted) throw new Refused("The server sent no answer.", 0, "empty");
  on.step?.(trace);
  return trace;
}

function place(waiting) {
  if (waiting.reason) return waiting.reason;
  if (!waiting.place) return "";
  return waiting.place === 1 ? "Waiting: you are next" : `Waiting: ${waiting.place - 1} before you`;
}

export const count = (number, what) => `${number} ${what}${number === 1 ? "" : "s"}`;

// What must be said about an answer that is over, null for nothing.
export function remark(trace) {
  if (!trace.finished) return `Stopped after ${count(trace.forwards, "forward")}.`;
  if (!trace.text.trim()) return `An empty answer: the model ended it at once.${model().note ? " It knows questions like the examples only." : ""}`;
  if (trace.reason === "length") return `Cut at ${count(trace.length, "token")}: the answer had not ended. Settings allow more.`;
  return null;
}

export const FIGURES = [
  ["seconds", "seconds", "Time of the forwards only, without what lay between them"],
  ["forwards", "forwards", "A forward is one call of the model: it looks at the positions it recomputes and predicts every open one at once"],
  ["tokens", "tokens", "Tokens written before the end"],
  ["each", "per forward", "Tokens per forward; 1 is one token at a time"],
];

// Seconds of a clock, finer below one.
export const clock = (seconds) => seconds.toFixed(seconds < 1 ? 3 : 2);

export function figures(trace, step) {
  const seconds = trace.seconds(step);
  const tokens = trace.tokens(step);
  return { seconds: clock(seconds), forwards: step, tokens, each: step ? (tokens / step).toFixed(1) : "0" };
}

const CLOSE = 1.05; // ratios below it are "about"

// "7.6 times", of a ratio of at least that.
const times = (ratio) => `${ratio >= 9.95 ? Math.round(ratio) : ratio.toFixed(1).replace(/\.0$/, "")} times`;

// What a race shows, from the counts of both.
export function verdict(a, b) {
  const [one, other] = [a.text.trim(), b.text.trim()];
  if (!one && !other) return { name: "", text: "Both answers are empty", shared: false };
  const [fast, slow, name] = b.seconds() <= a.seconds() ? [b, a, "B"] : [a, b, "A"];
  const ratio = slow.seconds() / (fast.seconds() || 1e-9);
  const parts = [ratio < CLOSE ? "about as fast" : `${times(ratio)} faster`];
  const share = slow.forwards / (fast.forwards || 1);
  if (share === 1) parts.push("as many forwards");
  else if (Math.max(share, 1 / share) < CLOSE) parts.push("about as many forwards");
  else parts.push(share > 1 ? `${times(share)} fewer forwards` : `${times(1 / share)} more forwards`);
  parts.push(one === other ? "same answer" : "another answer");
  return { name, text: `${name}: ${parts.join(", ")}`, shared: a.shared || b.shared };
}
