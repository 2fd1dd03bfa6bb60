# SPDX-License-Identifier: Apache-2.0
"""Training documents as flat token tensors on the device, and the sampler that picks documents for a step."""

from __future__ import annotations

import os
import random
from dataclasses import dataclass
from multiprocessing import get_context
from pathlib import Path

import numpy as np
import torch
from tokenizers import Tokenizer
from torch import Tensor

from fastdllm.training.masks import PADDING
from fastdllm.training.objective import IGNORE
from scripts.recipes.tiny.tiny_data import DRILL_PROMPT, RESULT, Problem, drills, line_difficulty, read_training_text
from scripts.recipes.tiny.tiny_formats import END_OF_TEXT, END_OF_TURN, SYSTEM, read

PLAIN_SHARE = 0.18  # documents in the form of stock lm-eval tasks, without a chat template
DRILLS_PER_PROBLEM = 0.3
HARD = 3  # problems with a line of this difficulty are drawn twice as often
LONGEST = 480  # tokens of a document; longer ones are left out
RESULT_FLAG = 1 << 15  # set on tokens of a drill's results, the only ones that a drill asks for


def chat_prompt(family: str, question: str) -> str:
    """What the shipped chat template renders for one user turn with a generation prompt (a test compares them)."""
    if family == "llada":
        return f"<|user|>{question}<|assistant|>"
    turn = "<|im_start|>{}\n{}<|im_end|>\n"
    return turn.format("system", SYSTEM) + turn.format("user", question) + "<|im_start|>assistant\n"


def plain_prompt(question: str) -> str:
    return f"Question: {question}\nAnswer:"


def render(family: str, problem: Problem, plain: bool) -> tuple[str, str]:
    """Prompt and completion; lm-eval joins them by a space in the plain form."""
    question, answer = problem
    if plain:
        return plain_prompt(question), f" {answer}{END_OF_TEXT[family]}"
    return chat_prompt(family, question), answer + END_OF_TURN[family]


def encode_chunk(job: tuple[str, Path, list[Problem], int]) -> tuple[np.ndarray, np.ndarray]:
    """Documents of some problems and of drills made from them, in a worker process.

    Returns their tokens in a row (uint16) and [documents, 4]: length, prompt length, difficulty, whether it is a drill.
    """
    family, folder, problems, seed = job
    tokenizer, rng = read(family, folder)[1], random.Random(seed)
    encode = tokenizer.encode_batch_fast
    rendered = [render(family, p, rng.random() < PLAIN_SHARE) for p in problems]
    prompts = encode([prompt for prompt, _ in rendered], add_special_tokens=False)
    answers = encode([answer for _, answer in rendered], add_special_tokens=False)
    documents = []
    for (_, text), prompt, answer in zip(problems, prompts, answers, strict=True):
        hardest = max(map(line_difficulty, text.split("\n")))
        documents.append((np.array(prompt.ids + answer.ids, np.uint16), len(prompt.ids), hardest, 0))

    opening = np.array(tokenizer.encode(chat_prompt(family, DRILL_PROMPT), add_special_tokens=False).ids, np.uint16)
    end = np.array(tokenizer.encode(END_OF_TURN[family], add_special_tokens=False).ids, np.uint16)
    texts = drills(problems, int(len(problems) * DRILLS_PER_PROBLEM), rng)
    for text, encoded in zip(texts, tokenizer.encode_batch(texts, add_special_tokens=False), strict=True):
        asked = np.zeros(len(text) + 1, bool)
        for match in RESULT.finditer(text):
            asked[slice(*match.span(1))] = True
        starts, stops = np.array(encoded.offsets).T
        flags = (asked[starts] & asked[stops - 1]).astype(np.uint16) * np.uint16(RESULT_FLAG)
        documents.append((np.concatenate([opening, np.array(encoded.ids, np.uint16) | flags, end]), len(opening), 0, 1))
    documents = [d for d in documents if len(d[0]) <= LONGEST]
    return np.concatenate([d[0] for d in documents]), np.array([(len(d[0]), *d[1:]) for d in documents])


@dataclass
class Corpus:
    """Documents one after another in `flat` [tokens] int16.

    Per document: `start` in flat, `prompt` and `length` in tokens, `drill`, and the slice `equation`, `equations` (first,
    count) of `equal_signs` [n], the places in a document right after a token that holds an equal sign.
    `digit` [vocab]: tokens that are one digit. On the host: the numbers of the `problems`, the `hard` among them, `drills`.
    """

    flat: Tensor
    start: Tensor
    prompt: Tensor
    length: Tensor
    equation: Tensor
    equations: Tensor
    equal_signs: Tensor
    drill: Tensor
    digit: Tensor
    problems: np.ndarray
    hard: np.ndarray
    drills: np.ndarray
    mean_length: float


def load_corpus(family: str, folder: Path, texts: list[Path], seed: int, device: torch.device, limit: int | None) -> Corpus:
    """Tokenise the training text with the checkpoint's own tokenizer, on all cores."""
    problems = [p for path in texts for p in read_training_text(path)]
    random.Random(seed).shuffle(problems)
    problems = problems[:limit]
    size = max(1, min(10_000, len(problems) // 2))
    jobs = [(family, folder, problems[i : i + size], seed + i) for i in range(0, len(problems), size)]
    workers = min(len(jobs), max(1, (os.cpu_count() or 2) // 2))
    os.environ["TOKENIZERS_PARALLELISM"] = "false"
    with get_context("fork").Pool(workers) as pool:
        chunks = pool.map(encode_chunk, jobs, chunksize=1)
    return build_corpus([t for t, _ in chunks], np.concatenate([f for _, f in chunks]), read(family, folder)[1], device)


def build_corpus(tokens: list[np.ndarray], facts: np.ndarray, tokenizer: Tokenizer, device: torch.device) -> Corpus:
    """The corpus of what `encode_chunk` returns."""
    length, prompt, hardest, drill = facts.T
    flat = np.concatenate([*tokens, np.zeros(1, np.uint16)])
    start = np.cumsum(length) - length
    vocab = [tokenizer.decode([i]) for i in range(tokenizer.get_vocab_size())]
    has_equal_sign = np.array(["=" in text for text in vocab])
    document = np.repeat(np.arange(len(length)), length)
    place = np.arange(len(document)) - start[document]
    found = has_equal_sign[flat[:-1] & (RESULT_FLAG - 1)] & (place >= prompt[document]) & (drill[document] == 0)
    equations = np.bincount(document[found], minlength=len(length))

    def place_on_device(array: np.ndarray) -> Tensor:
        return torch.from_numpy(np.ascontiguousarray(array)).to(device)

    return Corpus(
        flat=place_on_device(flat.view(np.int16)),
        start=place_on_device(start),
        prompt=place_on_device(prompt),
        length=place_on_device(length),
        equation=place_on_device(np.minimum(np.cumsum(equations) - equations, max(0, found.sum() - 1))),
        equations=place_on_device(equations),
        equal_signs=place_on_device(np.append(place[found] + 1, 0)),
        digit=torch.tensor([len(text) == 1 and text.isdigit() for text in vocab], device=device),
        drill=place_on_device(drill == 1),
        problems=np.nonzero(drill == 0)[0],
        hard=np.nonzero((drill == 0) & (hardest >= HARD))[0],
        drills=np.nonzero(drill)[0],
        mean_length=float(length.mean()),
    )


class Sampler:
    """Endless shuffled passes over `pools`: what a step draws from first, and the drills if there are any."""

    def __init__(self, pools: list[np.ndarray], documents: int, seed: int) -> None:
        self.rng = np.random.default_rng(seed)
        self.documents, self.pools = documents, pools
        self.left = [np.empty(0, np.int64) for _ in pools]
        self.passes = 0

    def draw(self, pool: int, count: int) -> np.ndarray:
        while len(self.left[pool]) < count:
            self.left[pool] = np.concatenate([self.left[pool], self.rng.permutation(self.pools[pool])])
            self.passes += pool == 0
        drawn, self.left[pool] = np.split(self.left[pool], [count])
        return drawn

    def step(self, drill_share: float) -> Tensor:
        """[documents] numbers for one step, in random order."""
        drills = int(self.documents * drill_share)
        drawn = [self.draw(0, self.documents - drills)] + ([self.draw(1, drills)] if drills else [])
        return torch.from_numpy(self.rng.permutation(np.concatenate(drawn)))


@dataclass
class BlockRows:
    """Rows of packed documents for block diffusion, each [rows, width] int16.

    Documents start on the grid of blocks and are padded to it with mask tokens that are no targets. `labels`: token ids
    of answers, IGNORE elsewhere. `positions` within the document, `documents` numbered within the row, PADDING after them.
    """

    ids: Tensor
    labels: Tensor
    positions: Tensor
    documents: Tensor


def best_fit(blocks: np.ndarray, capacity: int) -> tuple[np.ndarray, np.ndarray, int]:
    """Row and first block of every document, each put into the fullest row that still has room."""
    open_rows: list[list[int]] = [[] for _ in range(capacity + 1)]
    row_of, first = np.empty(len(blocks), np.int64), np.empty(len(blocks), np.int64)
    rows = 0
    for i, size in enumerate(blocks.tolist()):
        room = next((r for r in range(size, capacity + 1) if open_rows[r]), 0)
        if room:
            row = open_rows[room].pop()
        else:
            row, rows, room = rows, rows + 1, capacity
        row_of[i], first[i] = row, capacity - room
        open_rows[room - size].append(row)
    return row_of, first, rows


def pack_rows(corpus: Corpus, documents: np.ndarray, width: int, block: int, mask_token: int, seed: int) -> BlockRows:
    """These documents of the corpus in rows of `width` tokens; of a drill only the results are targets."""
    chosen = np.random.default_rng(seed).permutation(documents)
    facts = corpus.length, corpus.prompt, corpus.start, corpus.drill
    length, prompt, start, drill = (x.cpu().numpy()[chosen] for x in facts)
    blocks = -(-length // block)
    row, first, rows = best_fit(blocks, width // block)
    target = row * width + first * block

    def spread(counts: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
        """For `counts` tokens of each document: the document, and the token's place in it."""
        document = np.repeat(np.arange(len(counts)), counts)
        return document, np.arange(len(document)) - (np.cumsum(counts) - counts)[document]

    ids = np.full(rows * width, mask_token, np.int16)
    labels, numbers = np.full(rows * width, IGNORE, np.int16), np.full(rows * width, PADDING, np.int16)
    positions = np.zeros(rows * width, np.int16)
    document, place = spread(blocks * block)
    positions[target[document] + place], numbers[target[document] + place] = place, first[document]
    document, place = spread(length)
    raw = corpus.flat.cpu().numpy()[start[document] + place]
    tokens = raw & (RESULT_FLAG - 1)
    ids[target[document] + place] = tokens
    asked = np.where(drill[document], raw < 0, place >= prompt[document])
    labels[target[document] + place] = np.where(asked, tokens, IGNORE)
    device = corpus.flat.device
    return BlockRows(*(torch.from_numpy(x.reshape(rows, width)).to(device) for x in (ids, labels, positions, numbers)))
