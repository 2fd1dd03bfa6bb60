// SPDX-License-Identifier: Apache-2.0
// A trace as tiles. Colours say by which forward of its block a token was written, on a scale that never moves, or how sure
// the model was.

const TURNS = [1, 2, 3, 4, 6, 9, 13, 19, 27]; // upper ends of the colours s0 to s8; later ones are s9
const SURE = [0.5, 0.7, 0.9, 0.99]; // lower ends of c1 to c4
const SHOWN_AHEAD = 160; // open positions beyond the blocks at work that are drawn; more are counted

export const turnColour = (turn) => TURNS.filter((bound) => turn > bound).length;
export const sureColour = (confidence) => SURE.filter((bound) => confidence >= bound).length;

export function element(name, className = "", text = "") {
  const made = document.createElement(name);
  if (className) made.className = className;
  if (text) made.textContent = text;
  return made;
}

// A sudoku as rows of characters, null for any other text.
export function sudoku(text) {
  const rows = text.trim().split(/\s+/);
  const size = rows.length;
  return [4, 9].includes(size) && rows.every((row) => row.length === size && /^[\d_.]+$/.test(row)) ? rows : null;
}

export function grid(rows, given = null) {
  const board = element("div", `grid grid-${rows.length}`);
  board.setAttribute("role", "img");
  board.setAttribute("aria-label", `sudoku ${rows.join(", ")}`);
  rows.forEach((row, r) =>
    [...row].forEach((digit, c) => {
      const cell = element("span", "cell", /\d/.test(digit) ? digit : "");
      if (given ? /\d/.test(given[r][c]) : cell.textContent) cell.classList.add("given");
      board.append(cell);
    }),
  );
  return board;
}

function shown(text) {
  return text.replace(/^ /, "").replace(/\s+$/, "").replace(/[\u0000-\u001f\u007f-\u009f\u202a-\u202e\u2066-\u2069\ufffd]/g, "·");
}

const percent = (share) => (share >= 0.9995 ? "over 99.9%" : `${(100 * share).toFixed(share > 0.985 ? 1 : 0)}%`);

function tile(trace, now, at, step) {
  const written = now.written[at];
  if (written === null) {
    const open = element("span", "tok open");
    open.dataset.tip = `Position ${at}: open`;
    return open;
  }
  const text = trace.stops.has(now.ids[at]) ? "end" : (trace.texts.get(now.ids[at]) ?? String(now.ids[at]));
  const made = element("span", "tok", shown(text));
  if (text.startsWith(" ")) made.classList.add("word");
  if (!made.textContent) made.classList.add(text.includes("\n") ? "line" : "space");
  let tip = `Position ${at}: given as a constraint`;
  if (written === 0) made.classList.add("fixed");
  else {
    const confidence = now.confidence[at];
    const turn = trace.turn(written);
    made.classList.add(`s${turnColour(turn)}`);
    tip = `Position ${at}: forward ${written}` + (turn !== written ? `, number ${turn} of its block` : "");
    if (confidence !== null) {
      const share = confidence >= 0 && confidence <= 1;
      made.classList.add(`c${sureColour(confidence)}`);
      tip += share ? `, confidence ${percent(confidence)}` : `, score ${confidence.toFixed(2)}`;
    }
    if (written === step) made.classList.add("now");
  }
  if (/\ufffd/.test(text)) tip += ", part of a character";
  made.dataset.tip = tip;
  return made;
}

// The tiles of an answer after `step` forwards. prompt: the question, whose sudoku makes the answer a grid.
export function draw(box, trace, step, prompt = "") {
  const now = trace.at(step);
  const over = trace.finished && step >= trace.forwards;
  const board = asGrid(trace, now, step, prompt);
  box.replaceChildren(board ?? tiles(trace, now, step, over));
  box.setAttribute("aria-label", `answer after ${step} forwards: ${trace.tokens(step)} tokens are written`);
}

function tiles(trace, now, step, over) {
  const out = document.createDocumentFragment();
  const end = trace.end(step);
  const reached = trace.reached(step);
  const last = over ? reached : Math.min(trace.length, reached + SHOWN_AHEAD);
  const edges = new Set(trace.steps.slice(0, step).map((done) => done.start));
  for (let at = 0; at < last; at++) {
    if (at >= end && (over || now.written[at] !== null)) {
      at = fold(out, trace, now, at, last, step) - 1;
      continue;
    }
    if (at && edges.has(at)) out.append(element("span", "edge"));
    const made = tile(trace, now, at, step);
    out.append(made);
    if (made.classList.contains("line")) out.append(element("br"));
  }
  const left = trace.length - last;
  if (!over && left > 0) out.append(element("span", "tok more", `${left} more open positions`));
  return out;
}

// One tile for what is written from `from` on, at the end of the answer or after it; returns the position after it. Once the
// answer is over, all that stands after its end is one tile, whatever was left open in between.
function fold(out, trace, now, from, last, step) {
  const over = trace.finished && step >= trace.forwards;
  let to = from + 1;
  while (to < last && (over || now.written[to] !== null)) to++;
  const run = now.written.slice(from, to);
  const ends = from === trace.end(step);
  const more = run.filter((written) => written !== null).length - (ends ? 1 : 0);
  const made = element("span", "tok end", ends ? (more ? `end, +${more}` : "end") : `+${more}`);
  const undecoded = over ? run.length - more - 1 + trace.length - last : 0;
  made.dataset.tip =
    (ends ? `Position ${from}: the end of the answer, forward ${run[0]}` : `After the end of the answer, from position ${from}`) +
    (more ? `; ${more} ${ends ? "more " : ""}${more === 1 ? "position" : "positions"}${ends ? " after it" : ""}, which no longer count` : "") +
    (undecoded ? `; ${undecoded} were never decoded` : "");
  if (run.includes(step)) made.classList.add("now");
  out.append(made);
  return to;
}

// The answer as a sudoku's grid, where each of its digits is a token; else null.
function asGrid(trace, now, step, prompt) {
  const rows = sudoku(prompt);
  if (!rows) return null;
  const size = rows.length;
  if (trace.length < size * (size + 1) - 1) return null;
  const board = element("div", `grid grid-${size}`);
  for (let r = 0; r < size; r++) {
    for (let c = 0; c <= size; c++) {
      const at = r * (size + 1) + c;
      if (at >= size * (size + 1) - 1) break;
      const text = now.written[at] === null ? null : (trace.texts.get(now.ids[at]) ?? "");
      if (text !== null && !(c === size ? /^\s$/ : /^\d$/).test(text)) return null;
      if (c === size) continue;
      const cell = tile(trace, now, at, step);
      cell.classList.add("cell");
      if (/\d/.test(rows[r][c])) cell.classList.add("given");
      board.append(cell);
    }
  }
  return board;
}

// Positions filled over time, up to a forward, on a scale of `longest` seconds.
export function curve(box, trace, step, longest) {
  const width = 600;
  const height = 60;
  const x = (seconds) => (longest ? (seconds / longest) * width : 0);
  const most = trace.reached() || 1;
  const y = (filled) => (height - 2 - (filled / most) * (height - 6)).toFixed(1);
  let path = `M0 ${y(trace.filled[0])}`;
  for (let number = 1; number <= step; number++) path += `H${x(trace.clock[number]).toFixed(1)}V${y(trace.filled[number])}`;
  const ns = "http://www.w3.org/2000/svg";
  const drawing = box.querySelector("svg") ?? box.appendChild(document.createElementNS(ns, "svg"));
  drawing.setAttribute("viewBox", `0 0 ${width} ${height}`);
  drawing.setAttribute("preserveAspectRatio", "none");
  const line = drawing.querySelector("path") ?? drawing.appendChild(document.createElementNS(ns, "path"));
  line.setAttribute("d", path);
  box.dataset.tip = `Positions filled over time: ${trace.filled[step]} of ${most} after ${trace.seconds(step).toFixed(2)} s`;
}

export function legend(box) {
  const turns = element("span", "ramp by-turn");
  turns.append(element("span", "quiet", "forward of its block"));
  TURNS.concat(Infinity).forEach((bound, i) => {
    const from = i ? TURNS[i - 1] + 1 : 1;
    const swatch = element("i", `s${i}`, bound === Infinity ? `${from}+` : String(bound));
    swatch.dataset.tip = bound === Infinity ? `Forward ${from} of its block, or later` : from === bound ? `Forward ${bound} of its block` : `Forward ${from} to ${bound} of its block`;
    turns.append(swatch);
  });
  const sure = element("span", "ramp by-sure");
  sure.append(element("span", "quiet", "confidence"));
  ["<50%", "50", "70", "90", "99%"].forEach((label, i) => {
    const swatch = element("i", `c${i}`, label);
    swatch.dataset.tip = i ? `Written with a confidence of ${100 * SURE[i - 1]}% or more` : "Written with a confidence below 50%";
    sure.append(swatch);
  });
  box.replaceChildren(turns, sure);
}
