# SPDX-License-Identifier: Apache-2.0
"""Write the tables of the documentation from the data in docs/, so that no figure of a page is kept by hand.

    python -m scripts.studies.tables             # every table
    python -m scripts.studies.tables --check     # exit code 1 if a page is out of date

In a page a table stands between `<!-- table NAME: ... -->` and `<!-- end -->`. All of docs/frontier_tables.md is written.

What writes the data:

* frontier.json, sudoku.json, validation.json: `python -m scripts.studies.pareto report --summary`; validation.json joins
  two, since LLaDA and Dream are compared with threshold 0.9 under `dual`, and v2 under `block`
* speed.json: `python -m scripts.benchmarks.published --output`; decode.json: `python -m scripts.benchmarks.decode --output`
* training.json: `python -m scripts.benchmarks.training --output`
* shared_prompts.json: `python -m scripts.benchmarks.shared_prompts --output`
* reuse_gpu.json: `python -m scripts.benchmarks.decode --set`, the line that it prints last
* when_diffusion_pays.json: `python -m scripts.studies.diffusion_pays --output`
* quickstart.json: `bash scripts/quickstart.sh`, as results/quickstart.json
* lossless.json: `python -m scripts.studies.lossless`, its lines
* measured.json, reuse.json: what other commands printed; each part names its command
"""

from __future__ import annotations

import argparse
import re
import sys
from collections.abc import Callable, Iterable

from fastdllm import whole
from fastdllm.arguments import Parser
from fastdllm.cli import one_line
from scripts.quickstart import table as quickstart_table
from scripts.studies.diffusion_pays import AR, OPTIONS, SUB, crossing
from scripts.studies.figures import DOCS, NEAR, Row, data

ROOT = DOCS.parent
PAGES = (
    "docs/choosing.md", "docs/finetuning.md", "docs/frontier.md", "docs/log.md", "docs/lossless.md", "docs/performance.md",
    "docs/quickstart.md", "docs/serving.md",
    "docs/when_diffusion_pays.md", "dream/README.md", "llada/README.md", "v2/README.md",
)  # fmt: skip
BLOCK = re.compile(r"(?P<head><!-- table (?P<name>\w+): [^\n]* -->\n)(?P<body>.*?)(?P<end><!-- end -->)", re.DOTALL)
MODELS = "tiny-llada", "tiny-dream", "tiny-fast-dllm-v2"


def grid(head: Iterable[str], rows: Iterable[Iterable[str]]) -> str:
    """A Markdown table."""
    lines = [list(head), *map(list, rows)]
    lines.insert(1, ["---"] * len(lines[0]))
    assert len({len(line) for line in lines}) == 1, f"rows of different lengths under {lines[0]}"
    return "\n".join(re.sub(" +", " ", f"| {' | '.join(cells)} |") for cells in lines)


def percent(share: float) -> str:
    return f"{100 * share:.1f} %"


def points(value: float) -> str:
    """A difference in points, with its sign; 0 has none."""
    text = f"{value:+.1f}"
    return "0.0" if float(text) == 0 else text


def difference(row: Row) -> str:
    """`-4.8 (-6.8, -3.0)`; nothing where the row differs in no problem."""
    low, middle, high = (points(100 * row[name]) for name in ("low", "difference", "high"))
    return middle if low == middle == high else f"{middle} ({low}, {high})"


def study(name: str, model: str, template: str = "chat", split: str = "test") -> dict[str, Row]:
    """Setting, with NEAR for its long name -> row."""
    for found in data(name)["studies"]:
        if (found["model"], found["template"], found["split"]) == (model, template, split):
            return {row["setting"].replace(NEAR, "NEAR"): row for row in found["settings"]}
    raise ValueError(f"docs/{name}.json has no study of {model}, {template} prompt, {split} problems")


def reference(model: str) -> str:
    return "quota+block" if "v2" in model else "quota+dual"


# docs/frontier.md


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


# docs/log.md

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


# docs/choosing.md


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


# docs/performance.md


def published() -> str:
    """Against the published code, from docs/speed.json."""
    found = data("speed")
    milliseconds = found["forward_ms"]
    rows = []
    for key, name in (("block of 32", "forward over a block of 32"), ("1256 positions", "forward over 1,256 positions")):
        rows.append((name, *(f"{milliseconds[code][key]:.3g} ms" for code in ("published", "bf16")), ""))
    speeds = {(r["code"], r["weights"], r["batch"]): r for r in found["tokens_per_second"]}
    columns = ("published", "bf16"), ("fastdllm", "bf16"), ("fastdllm", "fp8")
    for prompt, batch in ((1000, 1), (1000, 32), (128, 1), (128, 32)):
        values = [speeds.get((*column, batch), {}).get(f"prompt_{prompt}") for column in columns]
        cells = [f"{value:,}" if value else "" for value in values]
        rows.append((f"tokens/s, prompt {prompt:,}, batch {batch}", *cells))
    return grid(("", "published", "here", "here, fp8"), rows)


NAMES = {"llada": "LLaDA", "dream": "Dream", "v2": "v2"}
WEIGHTS = {"bf16": "", "fp8": ", fp8", "int8": ", int8", "int4": ", int4"}


def decode_runs(*weights: str) -> Iterable[tuple[str, Row]]:
    """`LLaDA, fp8` and that model's part of docs/decode.json, for these kinds of weights."""
    found = data("decode")
    for key, name in NAMES.items():
        for kind in weights:
            if key in found.get(kind, {}):
                yield name + WEIGHTS[kind], found[kind][key]


def batches(*weights: str) -> str:
    sizes = 1, 4, 16, 32, 64
    rows = []
    for name, run in decode_runs(*weights):
        for prompt in (1000, 128):
            answers = {int(key.rpartition("batch")[2]): run[key] for key in run if f"_prompt{prompt}_batch" in key}
            cells = [f"{answers[n]['tokens_per_second']:,.0f}" if n in answers else "" for n in sizes]
            if answers:
                rows.append((f"{name}, prompt {prompt:,}", *cells))
    return grid(("tokens/s by batch", *map(str, sizes)), rows)


def by_batch() -> str:
    return batches("bf16")


def by_batch_few_bits() -> str:
    return batches("fp8", "int8", "int4")


def narrow_forwards(*weights: str) -> str:
    """Forwards over a block of batch 1 against the time that reading their bytes takes."""
    rows = []
    for name, run in decode_runs(*weights):
        for key, what in (("block", "block of 32"), ("sub_block", "sub-block of 8")):
            times = [run["forward"].get(f"{key}_{part}") for part in ("forward_ms", "floor_ms", "ratio")]
            if all(times):
                rows.append((f"{name}, {what}", *(f"{ms:.2f} ms" for ms in times[:2]), f"{times[2]:.2f} x"))
    return grid(("forward, batch 1", "time", "limit", "time over limit"), rows)


def against_limit() -> str:
    return narrow_forwards("bf16")


def against_limit_few_bits() -> str:
    return narrow_forwards("fp8", "int8", "int4")


def full_forwards() -> str:
    rows = []
    for name, run in decode_runs(*WEIGHTS):
        ms, share = (run["forward"].get(key) for key in ("full_forward_ms", "full_share_of_matmul_rate"))
        if ms:
            rows.append((name, f"{ms:.1f} ms", f"{100 * share:.0f} %" if share else ""))
    return grid(("forward over all positions", "time", "share of the matrix rate"), rows)


def step_in_loop() -> str:
    runs = [(name, run[key]) for name, run in decode_runs(*WEIGHTS) for key in ("step_dual", "step_block") if key in run]
    lines = ("a step on the device", "step_device_ms"), ("its graph, replayed back to back", "step_replay_ms")
    rows = [(what, *(f"{times[key]:.2f} ms" for _, times in runs)) for what, key in lines]
    return grid(("prompt 1,000, batch 1", *(name for name, _ in runs)), rows)


REUSE = {  # the settings of docs/reuse_gpu.json as its table names them; the first is what the others are compared with
    "cache=block": "no reuse",
    "cache=block,reuse_k=2,layer_subset=first": "`k=2 first`",
    "cache=block,reuse_k=3,layer_subset=middle": "`k=3 middle`",
    f"cache=block,reuse_k=32,layer_subset={'+'.join(map(str, range(1, 28)))},trim_ratio=0.25": (
        "TRIM 0.25 over all layers but the first, k=32"
    ),
}


def reuse_on_gpu() -> str:
    found = data("reuse_gpu")["v2"]
    rows = []
    for setting, label in REUSE.items():
        cells = []
        for batch in (1, 32, 64):
            speed, none = (found[f"{s} prompt128_batch{batch}"]["tokens_per_second"] for s in (setting, "cache=block"))
            cells.append(f"{speed:,.0f}" + (f", {speed / none:.2f} x" if setting != "cache=block" else ""))
        rows.append((label, *cells))
    return grid(("tokens/s, and speed against no reuse", "batch 1", "batch 32", "batch 64"), rows)


# docs/finetuning.md

TRAINING = (
    "shape", "objective", "GPUs", "rows x tokens on each", "ms a step", "tokens/s", "of the matrix rate", "peak GiB",
)  # fmt: skip


def training_cells(case: Row) -> tuple[str, ...]:
    """A line of the table: a case of the training benchmark, or why it has no figures."""
    head = case["shape"], case["objective"], str(case["devices"]), f"{case['rows']} x {case['tokens']:,}"
    if "why" in case:
        return *head, case["why"], "", "", ""
    speed = f"{case['step_ms']:,.0f}", f"{case['tokens_per_second']:,}"
    return *head, *speed, percent(case["share_of_matrix_rate"]), str(case.get("peak_gib", ""))


def training() -> str:
    found = data("training")
    return f"{found['measured']}:\n\n{grid(TRAINING, map(training_cells, found['cases']))}"


# docs/performance.md


def shared_prompts() -> str:
    found = data("shared_prompts")
    without, with_ = found["without"], found["with"]
    rows = [
        ("positions computed for the prompts", *(f"{part['positions']:,}" for part in (without, with_))),
        ("seconds, one forward an answer", *(f"{part['prompt']:.2f}" for part in (without, with_))),
        (f"seconds, {found['gen']} tokens an answer", *(f"{part['answer']:.2f}" for part in (without, with_))),
    ]
    rows = [(*row, percent(1 - float(row[2].replace(",", "")) / float(row[1].replace(",", "")))) for row in rows]
    title = f"{found['requests']} prompts with {found['shots']} worked examples, batch {found['batch']}"
    return grid((title, "each by itself", "shared", "saved"), rows)


def printed(name: str) -> Callable[[], str]:
    """A section of docs/measured.json as it stands."""

    def table() -> str:
        section = data("measured")["sections"][name]
        return grid(section["columns"], section["rows"])

    return table


# the readmes of the packages


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


def quickstart() -> str:
    found = data("quickstart")
    return f"\n{found['where']}:\n\n{quickstart_table(found['settings'])}\n"


# docs/when_diffusion_pays.md

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


def pays_speed() -> str:
    """Tokens per second at each pace, and in brackets the positions computed per token."""
    report = data("when_diffusion_pays")
    cells = {(row["weights"], row["way"], row["per_step"], row["batch"]): row for row in report["rows"]}
    batches = sorted({row["batch"] for row in report["rows"]})
    paces = sorted({key[:3] for key in cells}, key=lambda key: (key[0], key[1] != AR, key[1] != SUB, key[2]))
    rows = []
    for weights, way, per_step in paces:
        found = [cells.get((weights, way, per_step, batch)) for batch in batches]
        forward = [row["tokens_per_forward"] for row in found if row]
        line = [weights, way, f"{sum(forward) / len(forward):.1f}"]
        for row, batch in zip(found, batches, strict=True):
            aim = cells.get((weights, AR, 1.0, batch))
            text = f"{row['tokens_per_second']:,.0f}" if row else ""
            if row and aim and row["tokens_per_second"] > aim["tokens_per_second"]:
                text = f"**{text}**"
            line.append(f"{text} ({row['positions_per_token']:.1f})" if row else "")
        rows.append(line)
    return grid(("weights", "way", "tokens per forward", *(f"batch {batch}" for batch in batches)), rows)


def pays_crossings() -> str:
    """The least tokens per forward at which diffusion is as fast as autoregression."""
    rows = data("when_diffusion_pays")["rows"]
    batches, kinds = sorted({row["batch"] for row in rows}), sorted({row["weights"] for row in rows})

    def cell(weights: str, way: str, batch: int) -> str:
        found = crossing(rows, weights, way, batch)
        return {"=": "", "<": "below ", ">": "above "}[found[1]] + f"{found[0]:.1f}" if found else ""

    lines = [(weights, way, *(cell(weights, way, batch) for batch in batches)) for weights in kinds for way in OPTIONS]
    return grid(("weights", "way", *(f"batch {batch}" for batch in batches)), lines)


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


# docs/frontier_tables.md


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


TABLES: dict[str, Callable[[], str]] = {
    f.__name__: f
    for f in (
        presets, v2_presets, thresholds, remasking, not_paying, discount, speculative, lossless, lossless_threshold,
        self_verify, sudoku,
        which_threshold, which_cache, published, by_batch, by_batch_few_bits, against_limit, against_limit_few_bits,
        full_forwards, step_in_loop, measured_llada, measured_dream, layer_reuse, reuse_on_gpu, quickstart,
        training, shared_prompts, pays_speed, pays_crossings, paces_reached,
    )
} | {name: printed(name) for name in data("measured")["sections"]}  # fmt: skip


def filled(page: str) -> str:
    """A page with its tables as they follow from the data.

    page: path from the root of the checkout.
    """

    def fill(found: re.Match[str]) -> str:
        if found["name"] not in TABLES:
            raise ValueError(f"{page}: unknown table {found['name']!r}; allowed are {', '.join(TABLES)}")
        return f"{found['head']}\n{TABLES[found['name']]()}\n\n{found['end']}"

    return BLOCK.sub(fill, (ROOT / page).read_text(encoding="utf-8"))


def pages() -> dict[str, str]:
    """Path from the root -> what should stand there."""
    return {page: filled(page) for page in PAGES} | {"docs/frontier_tables.md": all_settings()}


def main(arguments: list[str] | None = None) -> int:
    parser = Parser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--check", action="store_true", help="write nothing; exit code 1 if a page is out of date")
    args = parser.parse_args(arguments)
    old = [page for page, text in pages().items() if (ROOT / page).read_text(encoding="utf-8") != text]
    for page in old:
        if not args.check:
            whole.write_text(ROOT / page, filled(page) if page in PAGES else all_settings())
        print(f"{page} is out of date" if args.check else f"wrote {page}")
    return int(args.check and bool(old))


if __name__ == "__main__":
    with one_line("tables"):
        sys.exit(main())
