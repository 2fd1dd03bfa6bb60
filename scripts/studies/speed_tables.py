# SPDX-License-Identifier: Apache-2.0
"""Tables of time, from what the benchmarks recorded in docs/."""

from __future__ import annotations

from collections.abc import Iterable

from scripts.quickstart import table as quickstart_table
from scripts.studies.cells import grid, percent
from scripts.studies.diffusion_pays import AR, OPTIONS, SUB, crossing
from scripts.studies.figures import Row, data


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
    runs = list(decode_runs(*weights))
    sizes = sorted({int(key.rpartition("batch")[2]) for _, run in runs for key in run if "_batch" in key})
    rows = []
    for name, run in runs:
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


def quickstart() -> str:
    found = data("quickstart")
    return f"\n{found['where']}:\n\n{quickstart_table(found['settings'])}\n"


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
