# SPDX-License-Identifier: Apache-2.0
"""Train tiny-sudoku: 4x4 sudoku, where a cell may be unclear until others are filled. Minutes on a CPU core.

    python -m scripts.recipes.tiny.train_sudoku --tasks fastdllm/tasks/mini_sudoku     # the held-out problems
    python -m scripts.recipes.tiny.train_sudoku --out fastdllm/tiny/tiny-sudoku

Puzzles are those of `reasoning-gym` (`mini_sudoku`, 10 to 12 of 16 cells empty, one solution), in one line. The objective
is LLaDA's: every token of the answer is masked with ratio t ~ U(0, 1). Optimisers and loop are train_tiny's.
"""

from __future__ import annotations

import argparse
import json
import shutil
from functools import partial
from multiprocessing import Pool
from pathlib import Path

import numpy as np
import torch
from tokenizers import Regex, Tokenizer, decoders, models, pre_tokenizers
from torch import Tensor

from fastdllm.arguments import AMOUNT, COUNT, SEED, Parser, output_folder
from fastdllm.shell import one_line
from scripts.recipes.tiny.tiny_corpus import Sampler, chat_prompt
from scripts.recipes.tiny.tiny_data import Problem, unique, write_jsonl
from scripts.recipes.tiny.tiny_formats import END_OF_TURN, read, write_json
from scripts.recipes.tiny.tiny_network import Batch, Network, initialise
from scripts.recipes.tiny.train_tiny import LEAST_RATIO, Recipe, Trainer, train_and_save

TRAIN_SEED, TEST_SEED = 20251, 977
TRAIN_PUZZLES, TEST_CANDIDATES, SPLIT_SIZE = 300_000, 1100, 500
EMPTY = {"min_empty": 10, "max_empty": 12}
# Two layers look a few deductions ahead. Four of width 96 fill nearly every grid in one or two forwards, in any order.
SHAPE = {"d_model": 64, "n_layers": 2, "n_heads": 2, "n_kv_heads": 2, "mlp_hidden_size": 128, "mlp_ratio": 2.0}
TOKENS = ["<|pad|>", "<|mask|>", "<|eos|>", "<|user|>", "<|assistant|>", " ", "_", "1", "2", "3", "4"]
RECIPE = Recipe(muon=5e-3, adam=3e-3, drills=0.0, drills_late=0.0)


def generate(seed: int, start: int, stop: int) -> list[Problem]:
    """Puzzles `start` to `stop` of the generator's sequence for `seed`, each with its solution."""
    import reasoning_gym

    dataset = reasoning_gym.create_dataset("mini_sudoku", size=stop, seed=seed, **EMPTY)
    items = (dataset[i]["metadata"] for i in range(start, stop))
    return [(write(x["puzzle"]), write(x["solution"])) for x in items]


def write(grid: list[list[int]]) -> str:
    """Rows without separators, joined by a space, so that a puzzle can be typed in one line."""
    return " ".join("".join(str(cell or "_") for cell in row) for row in grid)


def held_out() -> dict[str, list[Problem]]:
    problems = unique(generate(TEST_SEED, 0, TEST_CANDIDATES), set())
    return {"test": problems[:SPLIT_SIZE], "validation": problems[SPLIT_SIZE : 2 * SPLIT_SIZE]}


def training_problems(count: int, workers: int) -> list[Problem]:
    """Different puzzles, none of them held out. Their solutions are among the 288 grids that there are."""
    step = 5000
    with Pool(workers) as pool:
        jobs = [(TRAIN_SEED, i, min(i + step, count)) for i in range(0, count, step)]
        drawn = [p for chunk in pool.starmap(generate, jobs) for p in chunk]
    return unique(drawn, {question for split in held_out().values() for question, _ in split})


def create(folder: Path, tiny_llada: Path) -> None:
    """A checkpoint folder without weights: tiny-llada's config and template around a smaller shape, a token a character."""
    folder.mkdir(parents=True, exist_ok=True)
    shutil.copyfile(tiny_llada / "chat_template.jinja", folder / "chat_template.jinja")
    shutil.copyfile(tiny_llada / "tokenizer_config.json", folder / "tokenizer_config.json")
    config = json.loads((tiny_llada / "config.json").read_text(encoding="utf-8"))
    sizes = {"vocab_size": len(TOKENS), "embedding_size": len(TOKENS), "max_sequence_length": 64, "rms_norm_eps": 1e-5}
    write_json(folder / "config.json", {**config, **SHAPE, **sizes})
    tokenizer = Tokenizer(models.WordLevel({token: i for i, token in enumerate(TOKENS)}, unk_token=TOKENS[0]))
    tokenizer.pre_tokenizer = pre_tokenizers.Split(Regex(r"[\s\S]"), "isolated")
    tokenizer.decoder = decoders.Fuse()
    tokenizer.add_special_tokens(TOKENS[:5])
    tokenizer.save(str(folder / "tokenizer.json"))


def encode(tokenizer: Tokenizer, problems: list[Problem]) -> tuple[Tensor, int]:
    """Documents [N, T] int64, which are all of one length, and the length of their prompt."""
    prompts = [chat_prompt("llada", question) for question, _ in problems]
    texts = [p + answer + END_OF_TURN["llada"] for p, (_, answer) in zip(prompts, problems, strict=True)]
    ids = [e.ids for e in tokenizer.encode_batch_fast(texts, add_special_tokens=False)]
    return torch.tensor(ids), len(tokenizer.encode(prompts[0], add_special_tokens=False).ids)


def masked_batch(documents: Tensor, prompt: int, mask_token: int, chosen: Tensor) -> Batch:
    """LLaDA's objective: answers masked with ratio t, spread evenly over the batch, weighted by 1/t."""
    ids = documents[chosen]
    rows, width = ids.shape
    ratio = LEAST_RATIO + (1 - LEAST_RATIO) * ((torch.rand(1) + torch.arange(rows) / rows) % 1)[:, None]
    masked = (torch.rand(rows, width) < ratio) & (torch.arange(width) >= prompt)
    return Batch(
        ids=torch.where(masked, mask_token, ids).flatten(),
        positions=torch.arange(width).repeat(rows),
        targets=ids.flatten(),
        weights=(masked / ratio / (rows * (width - prompt))).flatten(),
        mask=torch.zeros(rows, 1, 1, 1),
    )


def main() -> None:
    parser = Parser(description=__doc__.split("\n")[0])
    parser.add_argument("--tasks", type=Path, help="write the test and validation files here")
    parser.add_argument("--out", type=output_folder, help="train, and write the checkpoint to this folder")
    parser.add_argument("--tiny-llada", type=Path, default=Path("fastdllm/tiny/tiny-llada"), help="whose config is followed")
    parser.add_argument("--puzzles", type=COUNT, default=TRAIN_PUZZLES)
    parser.add_argument("--documents", type=COUNT, default=128, help="of one step")
    parser.add_argument("--seconds", type=AMOUNT, default=300.0, help="training time, set-up excluded")
    parser.add_argument("--steps", type=COUNT, help="stop after this many steps, if --seconds are not over before")
    parser.add_argument("--seed", type=SEED, default=0)
    parser.add_argument("--workers", type=COUNT, default=2, help="processes that make puzzles")
    args = parser.parse_args()
    if args.tasks:
        args.tasks.mkdir(parents=True, exist_ok=True)
        for name, problems in held_out().items():
            write_jsonl(args.tasks / f"{name}.jsonl", [{"question": q, "answer": a} for q, a in problems])
    if args.out:
        fit(args)


def fit(args: argparse.Namespace) -> None:
    torch.manual_seed(args.seed)
    files = args.out.with_name(args.out.name + ".files")
    create(files, args.tiny_llada)
    spec, tokenizer = read("llada", files)
    documents, prompt = encode(tokenizer, training_problems(args.puzzles, args.workers))
    args.tokens = args.documents * documents.shape[1]  # of a step, for the report
    parameters = {name: tensor.requires_grad_() for name, tensor in initialise("llada", spec, args.seed).items()}
    network = Network("llada", spec, parameters, compiled=False, dtype=torch.float32)
    digit = torch.tensor([token.isdigit() for token in TOKENS])
    batch = partial(masked_batch, documents, prompt, spec.mask_id)
    trainer = Trainer(network, list(parameters.values()), RECIPE, batch, digit, args.documents)
    sampler = Sampler([np.arange(len(documents))], args.documents, args.seed)
    print(f"{sum(p.numel() for p in parameters.values())} parameters, {len(documents)} puzzles", flush=True)
    train_and_save(trainer, sampler, args, files, parameters)


if __name__ == "__main__":
    with one_line("train_sudoku"):
        main()
