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
from collections.abc import Callable

from fastdllm import whole
from fastdllm.arguments import Parser
from fastdllm.shell import one_line
from scripts.studies import accuracy_tables as accuracy
from scripts.studies import speed_tables as speed
from scripts.studies.cells import grid
from scripts.studies.figures import DOCS, data

ROOT = DOCS.parent
PAGES = (
    "docs/choosing.md", "docs/finetuning.md", "docs/frontier.md", "docs/log.md", "docs/lossless.md", "docs/performance.md",
    "docs/quickstart.md", "docs/serving.md",
    "docs/when_diffusion_pays.md", "dream/README.md", "llada/README.md", "v2/README.md",
)  # fmt: skip
BLOCK = re.compile(r"(?P<head><!-- table (?P<name>\w+): [^\n]* -->\n)(?P<body>.*?)(?P<end><!-- end -->)", re.DOTALL)


def printed(name: str) -> Callable[[], str]:
    """A section of docs/measured.json as it stands."""

    def table() -> str:
        section = data("measured")["sections"][name]
        return grid(section["columns"], section["rows"])

    return table


# A table's name is that of the function that writes it, or of a section of docs/measured.json.
TABLES: dict[str, Callable[[], str]] = {
    f.__name__: f
    for f in (
        accuracy.presets, accuracy.v2_presets, accuracy.thresholds, accuracy.remasking, accuracy.not_paying,
        accuracy.discount, accuracy.speculative, accuracy.lossless, accuracy.lossless_threshold, accuracy.self_verify,
        accuracy.sudoku, accuracy.which_threshold, accuracy.which_cache, accuracy.measured_llada, accuracy.measured_dream,
        accuracy.layer_reuse, accuracy.paces_reached,
        speed.published, speed.by_batch, speed.by_batch_few_bits, speed.against_limit, speed.against_limit_few_bits,
        speed.full_forwards, speed.step_in_loop, speed.reuse_on_gpu, speed.quickstart, speed.training,
        speed.shared_prompts, speed.pays_speed, speed.pays_crossings,
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
    return {page: filled(page) for page in PAGES} | {"docs/frontier_tables.md": accuracy.all_settings()}


def main(arguments: list[str] | None = None) -> int:
    parser = Parser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--check", action="store_true", help="write nothing; exit code 1 if a page is out of date")
    args = parser.parse_args(arguments)
    old = [page for page, text in pages().items() if (ROOT / page).read_text(encoding="utf-8") != text]
    for page in old:
        if not args.check:
            whole.write_text(ROOT / page, filled(page) if page in PAGES else accuracy.all_settings())
        print(f"{page} is out of date" if args.check else f"wrote {page}")
    return int(args.check and bool(old))


if __name__ == "__main__":
    with one_line("tables"):
        sys.exit(main())
