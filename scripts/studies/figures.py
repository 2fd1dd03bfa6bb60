# SPDX-License-Identifier: Apache-2.0
"""Draw the pictures of the documentation from the data next to them. `scripts.studies.tables` writes the tables.

    python -m scripts.studies.figures                        # everything
    python -m scripts.studies.figures speed reuse            # some of speed, frontier, sudoku, reuse, pays

Every picture has one message. It is drawn for 800 pixels of width on a white ground, so that it can be read in a README, in
light and in dark mode.
"""

from __future__ import annotations

import argparse
import json
import re
import sys
from collections.abc import Callable, Iterable
from pathlib import Path
from typing import TYPE_CHECKING, Any

from fastdllm import whole
from fastdllm.arguments import Parser
from fastdllm.shell import one_line

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

DOCS = Path(__file__).resolve().parents[2] / "docs"
BLUE, GREY, DARK, ORANGE = "#1d4ed8", "#9aa5b1", "#1f2933", "#c2410c"
NEAR = "suffix_window:suffix=32:keep_last=false:refresh_blocks=4"
Row = dict[str, Any]


def data(name: str) -> Any:
    return json.loads((DOCS / f"{name}.json").read_text(encoding="utf-8"))


def new(width: float, height: float, columns: int = 1) -> tuple[Figure, list[Axes]]:
    """An empty figure in the common style; sizes in inches at 100 dots, drawn at twice that."""
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot

    style = {"font.size": 11, "axes.spines.top": False, "axes.spines.right": False, "axes.edgecolor": GREY}
    style |= {"text.color": DARK, "axes.labelcolor": DARK, "xtick.color": DARK, "ytick.color": DARK}
    pyplot.rcParams.update(style)
    figure, axes = pyplot.subplots(1, columns, figsize=(width, height), layout="constrained", squeeze=False)
    return figure, list(axes[0])


def save(figure: Figure, name: str) -> None:
    from matplotlib import pyplot

    with whole.replacing(DOCS / f"{name}.png") as place:
        figure.savefig(place, dpi=200, facecolor="white", metadata={"Software": None})
    pyplot.close(figure)


def speed() -> None:
    """Tokens per second of one shape: published code against this."""
    rows = data("speed")["tokens_per_second"]
    labels = [f"{'published code' if r['code'] == 'published' else 'fastdllm'}, {r['weights']}" for r in rows]
    labels = [f"{label}, batch of {r['batch']}" if r["batch"] > 1 else label for label, r in zip(labels, rows, strict=True)]
    values = [r["prompt_1000"] for r in rows]
    figure, (axis,) = new(8, 2.9)
    bars = axis.barh(labels, values, color=[GREY if r["code"] == "published" else BLUE for r in rows], height=0.7)
    factors = ["", *(f"  {value / values[0]:.1f} x" for value in values[1:])]
    axis.bar_label(bars, [f"{value:,.0f}{factor}" for value, factor in zip(values, factors, strict=True)], padding=5)
    (card,) = re.findall(r"NVIDIA (\w+)", data("speed")["measured"])
    title = f"Tokens per second: LLaDA-8B's shape, prompt of 1,000 tokens, {card}"
    figure.suptitle(title, x=0.01, ha="left", fontsize=12)
    axis.invert_yaxis()
    axis.margins(x=0.3)
    axis.spines[["left", "bottom"]].set_visible(False)
    axis.tick_params(left=False, bottom=False, labelbottom=False)
    save(figure, "speed")


def forwards_axis(axis: Axes, ticks: Iterable[float]) -> None:
    from matplotlib import ticker

    axis.set(xscale="log", xlabel="forwards per answer (fewer is faster)")
    axis.xaxis.set_major_locator(ticker.FixedLocator(list(ticks)))
    axis.xaxis.set_major_formatter("{x:g}")
    axis.xaxis.set_minor_formatter("")
    axis.grid(alpha=0.25)


def whole_percents(axis: Axes) -> None:
    from matplotlib import ticker

    axis.yaxis.set_major_locator(ticker.MultipleLocator(5))


def mark(axis: Axes, row: Row, text: str, place: tuple[float, float], colour: str = BLUE) -> None:
    """A named point with the interval of its difference, and its label at an offset in points."""
    x, y = row["forwards"], 100 * row["accuracy"]
    spread = [[100 * max(0.0, row["difference"] - row["low"])], [100 * max(0.0, row["high"] - row["difference"])]]
    axis.errorbar([x], [y], spread, fmt="o", ms=8, color=colour, elinewidth=1, capsize=2, zorder=3)
    side = "left" if place[0] >= 0 else "right"
    label(axis, text, (x, y), place, side, colour)


def label(axis: Axes, text: str, at: tuple[float, float], place: tuple[float, float], side: str, colour: str) -> None:
    """Words at an offset in points from a mark; side: that of the words which is nearest to it."""
    axis.annotate(text, at, place, textcoords="offset points", color=colour, ha=side, va="center", fontweight="bold")


def frontier() -> None:
    """What a user gains by which preset: accuracy over forwards, the presets named, every other setting grey."""
    studies = [s for s in data("frontier")["studies"] if s["template"] == "chat"]
    figure, axes = new(11.6, 4, len(studies))
    places = {"exact": (0, 14), "paper": (9, -27), "balanced": (-9, 7), "fast": (-9, -8)}
    level = {"exact": (0, 14), "paper": (-2, -16), "balanced": (-9, 10), "fast": (-9, -10)}  # where a preset loses nothing
    for axis, study in zip(axes, studies, strict=True):
        rows = study["settings"]
        rest = [r for r in rows if not r["preset"] and r["setting"] != study["reference"]]
        axis.scatter(
            [r["forwards"] for r in rest], [100 * r["accuracy"] for r in rest], color=GREY, s=16, alpha=0.8, zorder=2
        )
        one = next(r for r in rows if r["setting"] == study["reference"])
        axis.axhline(100 * one["accuracy"], color=DARK, lw=0.8, ls=":", zorder=1)
        mark(axis, one, "one token\nper step", (-6, -20), DARK)
        for row in rows:
            if row["preset"]:
                mark(axis, row, row["preset"], (level if row["difference"] >= 0 else places)[row["preset"]])
        forwards_axis(axis, (2, 5, 10, 20, 50, 100))
        axis.set(xlim=(1, 150), ylim=(80, 97))
        whole_percents(axis)
        axis.set_title(study["model"], loc="left", fontsize=12)
    axes[0].set_ylabel("right answers of 500, %")
    save(figure, "frontier")


def sudoku() -> None:
    """The order decides: at 20 forwards each, and how fast a threshold may go."""
    (study,) = data("sudoku")["studies"]
    rows = {r["setting"]: r for r in study["settings"]}
    figure, (axis,) = new(8, 4.2)
    named = {
        "quota+none": ("most confident first", (-2, 16)),
        "quota:block_length=5+none": ("row by row", (-10, 0)),
        "quota:block_length=1+none": ("left to right", (-10, 0)),
        "quota:confidence=random+none": ("random order", (-10, 0)),
        "draft_verify=4+none": ("exact", (0, -16)),
        "threshold=0.99+none": ("threshold 0.99", (10, 10)),
        "threshold=0.9+none": ("0.9", (11, 0)),
        "threshold=0.7+none": ("0.7", (-10, 0)),
        "threshold=0.5+none": ("0.5", (11, 0)),
    }
    rest = [r for name, r in rows.items() if name not in named]
    axis.scatter([r["forwards"] for r in rest], [100 * r["accuracy"] for r in rest], color=GREY, s=16, zorder=2)
    for name, (text, place) in named.items():
        mark(axis, rows[name], text, place, ORANGE if name.startswith("quota") else BLUE)
    forwards_axis(axis, (1, 2, 5, 10, 20))
    axis.set(ylabel="solved of 500, %", ylim=(0, 114), xlim=(1, 26))
    axis.set_title("4x4 sudokus: orange, one token per step in four orders; blue, several", loc="left", fontsize=12)
    save(figure, "sudoku")


def reuse() -> None:
    """Layer reuse saves little before TRIM chooses what runs."""
    rows = data("reuse")["settings"]
    figure, (axis,) = new(8, 4)
    places = {"k=1": (9, -10), "k=32 1 to 7 trim=0.25": (0, -28), "k=3 middle": (9, -8), "k=2 middle output": (9, 4)}
    names = {"k=1": "no reuse", "k=32 1 to 7 trim=0.25": "recommended: all layers\nbut the first, TRIM 0.25"}
    names |= {"k=3 middle": "k=3, middle layers", "k=2 middle output": "outputs reused"}
    for row in rows:
        x, y = row["share"], row["accuracy"]
        if row["setting"] not in places:
            axis.scatter([x], [y], color=GREY, s=20, zorder=2)
            continue
        colour = BLUE if "trim" in row["setting"] else DARK if row["setting"] == "k=1" else ORANGE
        spread = [[row["difference"] - row["low"]], [row["high"] - row["difference"]]]
        axis.errorbar([x], [y], spread, fmt="o", ms=8, color=colour, elinewidth=1, capsize=2, zorder=3)
        side = "left" if places[row["setting"]][0] >= 0 else "right"
        label(axis, names[row["setting"]], (x, y), places[row["setting"]], side, colour)
    axis.axhline(next(r["accuracy"] for r in rows if r["setting"] == "k=1"), color=DARK, lw=0.8, ls=":")
    axis.grid(alpha=0.25)
    axis.set(
        xlabel="layer-token products, % of no reuse (fewer is less work)", ylabel="right answers of 150, %", xlim=(70, 110)
    )
    save(figure, "reuse")


def pays() -> None:
    """Diffusion wins in small batches and autoregression in large ones."""
    from scripts.studies.diffusion_pays import AR

    report = data("when_diffusion_pays")
    rows = [row for row in report["rows"] if row["weights"] == report["rows"][0]["weights"]]
    batches = sorted({row["batch"] for row in rows})
    baseline = {row["batch"]: row["tokens_per_second"] for row in rows if row["way"] == AR}
    fastest: dict[float, dict[int, Row]] = {}  # tokens a step -> batch -> the faster way's row
    for row in sorted(rows, key=lambda row: (row["per_step"], row["tokens_per_second"])):
        if row["way"] != AR:
            fastest.setdefault(row["per_step"], {})[row["batch"]] = row
    figure, (rates, ratios) = new(8.6, 4.1, 2)
    rates_of(rates, batches, baseline, list(fastest.values()))
    ratios_of(ratios, batches, baseline, list(fastest.values()))
    save(figure, "when_diffusion_pays")


def pace_of(found: dict[int, Row]) -> str:
    return f"{sum(row['tokens_per_forward'] for row in found.values()) / len(found):.1f}"


def rates_of(axis: Axes, batches: list[int], baseline: dict[int, float], fastest: list[dict[int, Row]]) -> None:
    """Tokens per second against the batch. A line breaks and ends where a batch was not measured."""
    from matplotlib import ticker

    nothing, ends = float("nan"), []
    for found in fastest:
        ys = [found[batch]["tokens_per_second"] if batch in found else nothing for batch in batches]
        axis.plot(batches, ys, "o-", color=BLUE, lw=1.2, ms=4)
        ends.append((found[max(found)]["tokens_per_second"], pace_of(found), BLUE, max(found)))
    axis.plot(batches, [baseline.get(b, nothing) for b in batches], "o-", color=ORANGE, lw=2.5, ms=5, zorder=3)
    ends.append((baseline[max(baseline)], "1", ORANGE, max(baseline)))
    axis.set(xscale="log", xlabel="batch", xlim=(batches[0] * 0.8, batches[-1] * 2.2), yscale="log")
    axis.xaxis.set_major_locator(ticker.FixedLocator(batches))
    axis.xaxis.set_major_formatter("{x:g}")
    axis.xaxis.set_minor_locator(ticker.NullLocator())
    axis.yaxis.set_major_formatter("{x:,.0f}")
    axis.grid(alpha=0.25)
    axis.set_title("tokens per second", loc="left", fontsize=12)
    axis.text(0.97, 0.10, "diffusion,\nby tokens per forward", transform=axis.transAxes, color=BLUE, ha="right")
    axis.text(0.97, 0.03, "autoregression", transform=axis.transAxes, color=ORANGE, ha="right")
    apart(axis, ends)


def apart(axis: Axes, ends: list[tuple[float, str, str, int]]) -> None:
    """Name lines (y, words, colour, x) at their ends, each at least a line of text above the one below it at the same x."""
    axis.figure.canvas.draw()
    above: dict[int, float] = {}
    for y, words, colour, x in sorted(ends):
        at = 72 * axis.transData.transform((x, y))[1] / axis.figure.dpi  # points from the figure's lower edge
        above[x] = max(at, above.get(x, at - 12) + 12)
        label(axis, words, (x, y), (7, above[x] - at), "left", colour)


def ratios_of(axis: Axes, batches: list[int], baseline: dict[int, float], fastest: list[dict[int, Row]]) -> None:
    """A field for each batch and pace: how many times as fast as autoregression; grey where it was not measured."""
    from matplotlib.patches import Rectangle

    for y, found in enumerate(fastest):
        for x, batch in enumerate(batches):
            known = batch in found and batch in baseline
            ratio = found[batch]["tokens_per_second"] / baseline[batch] if known else 1.0
            colour = GREY if not known else BLUE if ratio > 1 else ORANGE
            axis.add_patch(Rectangle((x - 0.47, y - 0.45), 0.94, 0.9, color=colour, alpha=0.15, lw=0))
            words = (f"{ratio:.1f} x" if ratio >= 2 else f"{ratio:.2f} x") if known else "not\nmeasured"
            weight, size = ("bold", 11) if known else ("normal", 8)
            text = colour if known else DARK
            axis.text(x, y, words, ha="center", va="center", color=text, fontweight=weight, fontsize=size)
    axis.set(xlim=(-0.5, len(batches) - 0.5), ylim=(-0.5, len(fastest) - 0.5), xlabel="batch", ylabel="tokens per forward")
    axis.set_xticks(range(len(batches)), map(str, batches))
    axis.set_yticks(range(len(fastest)), map(pace_of, fastest))
    axis.spines[["left", "bottom"]].set_visible(False)
    axis.tick_params(left=False, bottom=False)
    axis.set_title("diffusion's speed over autoregression's", loc="left", fontsize=12)


PARTS: dict[str, Callable[[], None]] = {f.__name__: f for f in (speed, frontier, sudoku, reuse, pays)}


def main(arguments: list[str] | None = None) -> int:
    parser = Parser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("parts", nargs="*", help=f"some of {', '.join(PARTS)}; default: all")
    parts = parser.parse_args(arguments).parts or list(PARTS)
    if unknown := [name for name in parts if name not in PARTS]:
        parser.error(f"unknown part {unknown[0]!r}; allowed are {', '.join(PARTS)}")
    for name in parts:
        PARTS[name]()
    return 0


if __name__ == "__main__":
    with one_line("figures"):
        sys.exit(main())
