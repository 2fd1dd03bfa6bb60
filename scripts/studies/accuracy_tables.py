# SPDX-License-Identifier: Apache-2.0
"""Tables of accuracy against forwards, from what `scripts.studies.pareto` and its like recorded in docs/."""

from __future__ import annotations

from scripts.studies.cells import difference, grid, percent, points
from scripts.studies.figures import NEAR, Row, data

MODELS = "tiny-llada", "tiny-dream", "tiny-fast-dllm-v2"


def study(name: str, model: str, template: str = "chat", split: str = "test") -> dict[str, Row]:
    """Setting, with NEAR for its long name -> row."""
    for found in data(name)["studies"]:
        if (found["model"], found["template"], found["split"]) == (model, template, split):
            return {row["setting"].replace(NEAR, "NEAR"): row for row in found["settings"]}
    raise ValueError(f"docs/{name}.json has no study of {model}, {template} prompt, {split} problems")


def reference(model: str) -> str:
    return "quota+block" if "v2" in model else "quota+dual"


def presets() -> str:
    rows = []
    for model in MODELS:
        found = study("frontier", model)
        named = {row["preset"]: row for row in found.values() if row["preset"]}
        lines = {"one token per step": found[reference(model)], "`exact`": named["exact"], "`paper`": named["paper"]}
        if "dual" in reference(model):  # v2's `paper` is threshold 0.9 with its default cache already
            lines |= {"threshold 0.9, `dual`": found["threshold=0.9+dual"]}
        lines |= {"`balanced`": named["balanced"], "`fast`": named["fast"]}
        for name, row in lines.items():
            against = "" if name.startswith("one") else difference(row) + (", the same tokens" if row["same"] == 1 else "")
            cells = percent(row["accuracy"]), against, f"{row['forwards']:.1f}", f"{row['positions']:,.0f}"
            speed = f"{row['tokens_per_second']:,.0f}" if row["tokens_per_second"] else ""
            rows.append([model if name.startswith("one") else "", name, *cells, speed])
    return grid(("model", "preset", "right", "difference (95 %)", "forwards", "positions", "tokens/s"), rows)


def v2_presets() -> str:
    """v2's own presets on validation problems, against threshold 0.9."""
    found = study("validation", MODELS[2], split="validation")
    names = {"quota+block": "one token per step", "threshold=0.9+block": "threshold 0.9"}
    names |= {"threshold=0.99:small_block_size=32+fused": "`balanced`", "threshold=0.95:small_block_size=32+fused": "`fast`"}
    names["self_verify:small_block_size=32+block"] = "`self_verify`"
    rows: list[tuple[str, ...]] = []
    for setting, name in names.items():
        row = found[setting]
        against = "" if setting == "threshold=0.9+block" else difference(row)
        rows.append((name, percent(row["accuracy"]), against, f"{row['forwards']:.1f}", f"{row['positions']:,.0f}"))
    return grid(("tiny-fast-dllm-v2", "right", "against threshold 0.9 (95 %)", "forwards", "positions"), rows)


def thresholds() -> str:
    rows = []
    for model in MODELS:
        found = study("frontier", model)
        one, cache = found[reference(model)], reference(model).partition("+")[2]
        for level in ("0.99", "0.9"):
            row = found[f"threshold={level}+{cache}"]
            share = f"{100 * row['forwards'] / one['forwards']:.0f} %"
            rows.append((f"{model}, threshold {level}", share, f"{row['tokens_per_forward']:.1f}", difference(row)))
    return grid(("against one token per step", "forwards", "tokens per forward", "difference (95 %)"), rows)


def remasking() -> str:
    found = study("frontier", "tiny-llada")
    names = "wino=0.6", "threshold=0.7", "threshold=0.9"
    rows = [(name, found[f"{name}+dual"]) for name in names]
    cells = [(f"`{name}`", percent(row["accuracy"]), f"{row['forwards']:.1f}") for name, row in rows]
    return grid(("decoder", "right", "forwards"), cells)


def over(setting: str) -> str:
    """Forwards of a decoder with so many branches, and how many times fewer than by itself."""
    lines = {(x["model"], x["branches"]): x for x in data("lossless")["lines"] if x["setting"] == setting}
    assert all(line["identical"] == line["answers"] for line in lines.values()), "the page says that all tokens are the same"
    rows = []
    for branches in sorted({branches for _, branches in lines}):
        found = [(lines[model, branches]["forwards"], lines[model, 1]["forwards"]) for model in MODELS]
        cells = (f"{now:.1f}" + (f", {one / now:.2f} x fewer" if branches > 1 else "") for now, one in found)
        rows.append((f"{branches}", *cells))
    return grid(("branches", *MODELS), rows)


def lossless() -> str:
    return over("quota")


def lossless_threshold() -> str:
    return over("threshold=0.95")


def self_verify() -> str:
    found = study("frontier", MODELS[2])
    lines = {
        "one token per step": "quota+block",
        "`self_verify`, sub-blocks of 8": "self_verify+block",
        "`self_verify`, sub-blocks of 32": "self_verify:small_block_size=32+block",
        "threshold 0.9": "threshold=0.9+block",
        "`balanced`": "threshold=0.99:small_block_size=32+fused",
    }
    rows: list[tuple[str, ...]] = []
    for name, setting in lines.items():
        row = found[setting]
        cells = percent(row["accuracy"]), difference(row) if rows else "", f"{row['forwards']:.1f}"
        rows.append((name, *cells, f"{row['positions']:,.0f}"))
    return grid(("setting", "right", "difference (95 %)", "forwards", "positions"), rows)


def sudoku() -> str:
    found = study("sudoku", "tiny-sudoku")
    names = {
        "quota+none": "one token per step, most confident first",
        "quota:block_length=5+none": "row by row (`block_length=5`)",
        "quota:block_length=1+none": "left to right (`block_length=1`)",
        "quota:confidence=random+none": "in any order (`confidence=random`)",
        "draft_verify=4+none": "`draft_verify=4`, the rule of `exact`",
        "threshold=0.99+none": "threshold 0.99",
        "threshold=0.9+none": "threshold 0.9",
    }
    rows: list[tuple[str, ...]] = []
    for setting, name in names.items():
        row = found[setting]
        rows.append((name, percent(row["accuracy"]), difference(row) if rows else "", f"{row['forwards']:.1f}"))
    return grid(("setting", "solved", "difference (95 %)", "forwards"), rows)


NOT_PAYING = (
    "frechet=0.25", "frechet=0.75", "local_leap=0.9", "hierarchical=0.8", "lopa=0.9", "threshold=0.8", "credit=0.9",
    "progress_threshold=0.9", "factor=1.0", "adablock=0.9", "entropy_bound=0.1", "wino=0.6",
)  # fmt: skip


def not_paying() -> str:
    """Forwards and right answers of rules against threshold 0.9, on each model that they ran on."""
    rows = []
    for setting in NOT_PAYING:
        cells = []
        for model in MODELS:
            found, cache = study("frontier", model), reference(model).partition("+")[2]
            row, usual = found.get(f"{setting}+{cache}"), found[f"threshold=0.9+{cache}"]
            change = round(100 * (row["forwards"] / usual["forwards"] - 1)) if row else 0
            cells.append(f"{change:+d} %, {points(100 * (row['accuracy'] - usual['accuracy']))}" if row else "")
        rows.append((f"`{setting}`", *cells))
    return grid(("forwards, points", *MODELS), rows)


def discount() -> str:
    """`attention_discount` next to plain thresholds, each model with its family's default cache."""
    names = {"threshold=0.9": "threshold 0.9", "threshold=0.95": "threshold 0.95"}
    names |= {f"threshold={t}:attention_discount=40": f"threshold {t}, `attention_discount=40`" for t in ("0.7", "0.9")}
    rows = []
    for model in [found["model"] for found in data("validation")["studies"]]:
        found, cache = study("validation", model, split="validation"), reference(model).partition("+")[2]
        measured = [(name, found[f"{setting}+{cache}"]) for setting, name in names.items() if f"{setting}+{cache}" in found]
        for name, row in sorted(measured, key=lambda item: item[1]["forwards"]):
            against = "" if name == "threshold 0.9" else difference(row)
            rows.append((model, name, percent(row["accuracy"]), f"{row['forwards']:.1f}", against))
    return grid(("model", "setting", "solved", "forwards", "difference (95 %)"), rows)


SPECULATIVE = ("psd=0.97+NEAR", "psd=0.97:branches=2+NEAR", "threshold=0.9+NEAR", "threshold=0.97+NEAR")  # in blocks of 64


def speculative() -> str:
    """`psd` next to plain thresholds under the same caches, on validation problems."""
    rows = []
    for model in MODELS:
        found, cache = study("validation", model, split="validation"), reference(model).partition("+")[2]
        usual = [f"{rule}+{cache}" for rule in ("psd=0.95", "threshold=0.9", "threshold=0.95")]
        first = ":first_token=rule" if "dream" in model else ""
        wide = [setting.replace("+", f"{first}:block_length=64+") for setting in SPECULATIVE]
        measured = [(setting, found[setting]) for setting in (*usual, *wide) if setting in found]
        for setting, row in sorted(measured, key=lambda item: item[1]["forwards"]):
            name = f"`{setting.replace(first, '')}`" + (f", `{row['preset']}`" if row["preset"] else "")
            cells = percent(row["accuracy"]), f"{row['forwards']:.1f}", f"{row['positions']:,.0f}"
            rows.append((model, name, *cells, "" if setting == f"threshold=0.9+{cache}" else difference(row)))
    return grid(("model", "setting", "solved", "forwards", "positions", "against threshold 0.9 (95 %)"), rows)


def which_threshold() -> str:
    found = study("frontier", "tiny-llada")
    rows = [(level, found[f"threshold={level}+dual"]) for level in ("0.99", "0.97", "0.9", "0.8")]
    cells = [(level, f"{-100 * row['difference']:.1f}", f"{row['forwards']:.1f}") for level, row in rows]
    return grid(("threshold, with `dual`", "points lost against one token per step", "forwards per answer"), cells)


def which_cache() -> str:
    found = study("frontier", "tiny-llada")
    does = {
        "dual": ("`dual`", "the block"),
        "prefix": ("`prefix`", "the block and what follows it"),
        "none": ("`none`", "everything"),
        "NEAR": ("`suffix_window`, as in `balanced`", "the block; masks far after it are never computed"),
    }
    rows = [(*text, f"{found[f'threshold=0.9+{name}']['positions']:,.0f}") for name, text in does.items()]
    return grid(("cache", "what a step recomputes", "positions per answer"), rows)


def measured(model: str) -> str:
    found = study("frontier", model)
    named = {row["preset"]: row for row in found.values() if row["preset"]}
    lines = [("one token per step", found[reference(model)]), ("threshold 0.99", found["threshold=0.99+dual"])]
    lines += [("threshold 0.9", found["threshold=0.9+dual"])]
    lines += [(f"preset `{name}`", named[name]) for name in ("balanced", "fast")]
    rows: list[tuple[str, ...]] = []
    for name, row in lines:
        rows.append((name, percent(row["accuracy"]), difference(row) if rows else "", f"{row['forwards']:.1f}"))
    return grid(("setting, `dual` cache but for the presets", "right", "difference (95 %)", "forwards per answer"), rows)


def measured_llada() -> str:
    return measured("tiny-llada")


def measured_dream() -> str:
    return measured("tiny-dream")


def layer_reuse() -> str:
    rows: list[tuple[str, ...]] = []
    for row in data("reuse")["settings"]:
        name = row["setting"] + (" (ablation)" if row["setting"].endswith("output") else "")
        middle, low, high = (points(row[key]) for key in ("difference", "low", "high"))
        against = f"{middle} ({low}, {high})" if rows else ""
        rows.append((name, f"{row['accuracy']} %", against, f"{row['share']} %", f"{row['forwards']}"))
    return grid(("setting", "accuracy", "difference (95 %)", "layer-token products", "forwards"), rows)


# Right answers and tokens per forward on GSM8K (chain of thought, no examples), as d3LLM's authors measured them:
# arXiv 2601.07568 and its leaderboard. Their tokens end with the answer, as ours do.
PUBLISHED_PACES = (
    ("Dream-7B, Fast-dLLM", "79.0 %", 1.44),
    ("Fast-dLLM-v2-7B", "81.5 %", 2.21),
    ("LLaDA-8B, Fast-dLLM", "74.7 %", 2.77),
    ("d3LLM-Dream-7B, trained for fewer forwards", "81.4 %", 4.94),
    ("dParallel-LLaDA-8B, trained for fewer forwards", "72.6 %", 5.14),
    ("d3LLM-LLaDA-8B, trained for fewer forwards", "73.1 %", 9.11),
)


def paces_reached() -> str:
    """Tokens per forward that trained models reach: the shipped ones, and published figures."""
    rows = []
    for model in MODELS:
        found, cache = study("frontier", model), reference(model).partition("+")[2]
        for level in ("0.99", "0.9"):
            row = found[f"threshold={level}+{cache}"]
            rows.append((f"{model}, threshold {level}", percent(row["accuracy"]), f"{row['tokens_per_forward']:.1f}"))
    rows += [(name, right, f"{pace:.1f}") for name, right, pace in PUBLISHED_PACES]
    return grid(("model", "right", "tokens per forward"), rows)


def setting_cell(row: Row) -> str:
    text = row["setting"].replace(NEAR, "NEAR")
    return f"`{text}`" + (f" (preset `{row['preset']}`)" if row["preset"] else "")


def whole_study(found: Row) -> str:
    """A study's settings, most forwards first, each against the reference on the same problems."""
    head = ["setting", "accuracy", "difference", "p", "same", "tokens differ", "forwards", "positions", "tokens per forward"]
    timed = any(row["tokens_per_second"] for row in found["settings"])
    rows = []
    for row in found["settings"]:
        cells = [setting_cell(row), f"{100 * row['accuracy']:.1f}"]
        if row["setting"] == found["reference"]:
            cells += [""] * 4
        else:
            cells += [f"{100 * row['difference']:+.1f} ({100 * row['low']:+.1f}, {100 * row['high']:+.1f})"]
            cells += [f"{row['p']:.3f}", f"{100 * row['same']:.0f}", f"{100 * row['tokens_differ']:.1f}"]
        cells += [f"{row['forwards']:.1f}", f"{row['positions']:.0f}", f"{row['tokens_per_forward']:.1f}"]
        if timed:
            cells.append(f"{row['tokens_per_second']:,.0f}" if row["tokens_per_second"] else "")
        rows.append(cells)
    return grid([*head, *(["tokens/s"] if timed else [])], rows)


def all_settings() -> str:
    """docs/frontier_tables.md."""
    whole = data("frontier")
    text = f"""<!-- Written by `python -m scripts.studies.tables` from docs/frontier.json and docs/sudoku.json. -->
# All settings

[Accuracy against forwards](frontier.md) says what these tables mean, and how they were measured. `NEAR` stands for
`{NEAR}`."""
    for found in [*whole["studies"], *data("sudoku")["studies"]]:
        rows, machines = found["settings"], " and ".join(found["machines"])
        text += f"\n\n## {found['model']}, {found['template']} prompt\n\n"
        text += f"{rows[0]['problems']} {found['split']} problems were answered in {found['dtype']} on: {machines}.\n\n"
        text += whole_study(found)
    text += """

## Does the prompt change the order?

Of all pairs of settings, how many change places between the chat and the plain prompt. McNemar's test confirms none of
them at 5 % under both prompts.

"""
    for found in whole["templates"]:
        assert not found["clear"], "the sentence above would be wrong"
    rows = [(t["model"], str(t["pairs"]), str(t["change"]), f"{t['tau']:.2f}") for t in whole["templates"]]
    return text + grid(("model", "pairs", "change places", "Kendall's tau"), rows) + "\n"
