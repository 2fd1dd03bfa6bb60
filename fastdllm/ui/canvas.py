# SPDX-License-Identifier: Apache-2.0
"""A trace as HTML: the answer's tokens coloured by forward and by confidence, its figures, its acceptance curve.

Both colourings are in the markup (classes s0..s9 and c0..c4, and a number in each token, so that colour is never the only
sign); the page's style sheet shows one of them, and switching costs no round trip.
"""

from __future__ import annotations

from collections.abc import Sequence
from html import escape

from fastdllm.trace import Snapshot, Trace
from fastdllm.ui.screen import printable

STEP_COLOURS = 10
CONFIDENCE_BOUNDS = (0.5, 0.7, 0.9, 0.99)  # below the first, ..., from the last on
CONFIDENCE_LABELS = ("below 50%", "50–70%", "70–90%", "90–99%", "99% and more")


def step_colour(step: int, steps: int) -> int:
    """Bucket 0..9 of a forward 1..steps: the first is always 0, the last 9."""
    return 0 if steps <= 1 else round((step - 1) / (steps - 1) * (STEP_COLOURS - 1))


def confidence_colour(confidence: float) -> int:
    return sum(confidence >= bound for bound in CONFIDENCE_BOUNDS)


def token_text(trace: Trace, token: int) -> str:
    """A token as a reader sees it: special tokens as names, blanks and line breaks as signs, part of a character as ◌.

    A space before a word is left out; `_token` shows it as distance.
    """
    if token in trace.stop_ids:
        return "end"
    text = trace.texts.get(token, str(token)).replace("\ufffd", "◌").replace("\n", "↵").replace("\t", "⇥")
    return printable(text.removeprefix(" ") or "␣")


def _token(trace: Trace, now: Snapshot, at: int, step: int, ended: bool) -> str:
    written, confidence, token = now.written[at], now.confidence[at], now.ids[at]
    if written is None:
        return f'<span class="tok open" title="position {at}: open"><b>░</b></span>'
    kinds = ["tok"]
    if written == 0:
        kinds.append("fixed")
        where, small, certain = "given as a constraint", "⚿", "⚿"
    else:
        kinds.append(f"s{step_colour(written, len(trace.steps))}")
        where, small, certain = f"forward {written}", str(written), "–"
        if confidence is not None:
            kinds.append(f"c{confidence_colour(confidence)}")
            # Margins and probabilities are shares; a negative entropy is none.
            certain = f"{confidence:.0%}" if 0 <= confidence <= 1 else f"{confidence:.1f}"
            where += f", confidence {confidence:.3f}"
    text = trace.texts.get(token, "")
    states = (
        ("now", written == step and step > 0),
        ("after", ended or token in trace.stop_ids),
        ("word", text.startswith(" ") and not ended),
    )
    kinds += [name for name, holds in states if holds]
    shown = "·" if ended else escape(token_text(trace, token))
    title = escape(f"position {at}: {where}", quote=True)
    chip = f'<span class="{" ".join(kinds)}" title="{title}"><b>{shown}</b><i class="step">{small}</i>'
    return chip + f'<i class="conf">{certain}</i></span>' + ("<br>" if "\n" in text and not ended else "")


def tokens_html(trace: Trace, step: int | None = None) -> str:
    """The canvas after `step` forwards (default: now). Blocks that a finished answer never opened are only counted."""
    step = len(trace.steps) if step is None else step
    now, end, out = trace.at(step), len(trace.answer(step)), []
    current = trace.steps[step - 1] if step and not (trace.finished and step == len(trace.steps)) else None
    starts = {done.start for done in trace.steps[:step]}
    shown = max([done.stop for done in trace.steps] + [at + 1 for at in trace.fixed]) if trace.finished else trace.length
    for at in range(shown):
        if at and at in starts:
            out.append('<span class="edge" title="a block begins"></span>')
        chip = _token(trace, now, at, step, at > end)
        inside = current is not None and current.start <= at < current.stop
        out.append(chip.replace('class="tok', 'class="tok current', 1) if inside else chip)
    rest = trace.length - shown
    more = f'<p class="rest">{rest} more positions were never decoded: the answer had ended.</p>' if rest else ""
    return f'<div class="tokens" role="img" aria-label="{_label(trace, step)}">{"".join(out)}</div>{more}'


def _label(trace: Trace, step: int) -> str:
    filled = trace.filled()[step]
    return f"answer after {step} forwards: {filled} of {trace.length} positions filled"


def figures_html(trace: Trace, step: int | None = None) -> str:
    """Clock, forwards, tokens, tokens per forward and per second, after `step` forwards."""
    step = len(trace.steps) if step is None else step
    seconds, tokens = trace.seconds(step), trace.tokens(step)
    values = (
        ("seconds", f"{seconds:.2f}", "spent decoding, pauses left out"),
        ("forwards", str(step), "calls of the model"),
        ("tokens", str(tokens), "written before the end token"),
        ("per forward", f"{tokens / step:.2f}" if step else "–", "tokens per forward; 1 is one token at a time"),
        ("per second", f"{tokens / seconds:.0f}" if seconds else "–", "tokens per second"),
    )
    cells = (
        f'<div title="{hint}"><b data-figure="{name}">{value}</b><span>{name}</span></div>' for name, value, hint in values
    )
    return f'<div class="figures">{"".join(cells)}</div>'


def legend_html() -> str:
    """What the colours mean, in both views."""
    ramp = "".join(f'<i class="s{k}"></i>' for k in range(STEP_COLOURS))
    levels = "".join(f'<span><i class="c{k}"></i>{label}</span>' for k, label in enumerate(CONFIDENCE_LABELS))
    return (
        f'<div class="legend"><div class="step"><span>first forward</span><div class="ramp">{ramp}</div>'
        f"<span>last</span></div>"
        f'<div class="conf"><span>written with</span>{levels}</div></div>'
    )


def curve_svg(curves: Sequence[tuple[str, Trace]]) -> str:
    """Acceptance curves: positions filled after each forward, one line a run (class run0, run1)."""
    left, right, top, bottom, width, height = 44, 12, 12, 34, 640, 200
    most_x = max([len(trace.steps) for _, trace in curves] + [1])
    most_y = max([trace.length for _, trace in curves] + [1])

    def x(step: float) -> float:
        return left + step / most_x * (width - left - right)

    def y(filled: float) -> float:
        return height - bottom - filled / most_y * (height - top - bottom)

    parts = []
    for fraction in (0, 0.5, 1):
        level = round(most_y * fraction)
        parts.append(f'<line class="grid" x1="{left}" x2="{width - right}" y1="{y(level):.1f}" y2="{y(level):.1f}"/>')
        parts.append(f'<text x="{left - 8}" y="{y(level) + 4:.1f}" text-anchor="end">{level}</text>')
    for tick in sorted({0, most_x // 2, most_x}):
        parts.append(f'<text x="{x(tick):.1f}" y="{height - bottom + 18}" text-anchor="middle">{tick}</text>')
    parts.append(f'<text x="{(left + width - right) / 2}" y="{height - 2}" text-anchor="middle">forwards</text>')
    for number, (name, trace) in enumerate(curves):
        points = [(x(step), y(filled)) for step, filled in enumerate(trace.filled())]
        path = " ".join(f"{px:.1f},{py:.1f}" for px, py in points)
        parts.append(f'<polyline class="run{number}" points="{path}"><title>{escape(name)}</title></polyline>')
        parts.append(f'<circle class="run{number}" cx="{points[-1][0]:.1f}" cy="{points[-1][1]:.1f}" r="4"/>')
    keys = ""
    if len(curves) > 1:
        names = (f'<span><i class="run{n}"></i>{escape(name)}</span>' for n, (name, _) in enumerate(curves))
        keys = f'<div class="keys">{"".join(names)}</div>'
    return (
        f'<figure class="curve"><figcaption>Positions filled by forward</figcaption>{keys}'
        f'<svg viewBox="0 0 {width} {height}" role="img" aria-label="acceptance curve">{"".join(parts)}</svg></figure>'
    )


def answer_html(trace: Trace | None, step: int | None = None) -> str:
    """Figures and tokens of one answer; an invitation before there is one."""
    if trace is None:
        return '<div class="canvas empty">The answer appears here, token by token.</div>'
    return f'<div class="canvas">{figures_html(trace, step)}{tokens_html(trace, step)}</div>'
