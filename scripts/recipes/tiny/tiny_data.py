# SPDX-License-Identifier: Apache-2.0
"""Problems for the tiny checkpoints: GSM-Symbolic from the `reasoning-gym` generator, in GSM8K's format.

    python -m scripts.recipes.tiny.tiny_data --train runs/data --stages 1 2     # training text (two minutes on one core)
    python -m scripts.recipes.tiny.tiny_data --tasks fastdllm/tasks/gsm_symbolic  # the files that ship with the tasks

Every problem is drawn by the generator from `seed + index`, so seeds and index ranges reproduce everything. Stage n
trains on the indices from n * 600,000 on. No question of the test, validation or few-shot split is trained on, except
that the few-shot examples come from stage 0.
"""

from __future__ import annotations

import json
import lzma
import random
import re
from multiprocessing import Pool
from pathlib import Path

from fastdllm import whole
from fastdllm.arguments import COUNT, SIZE, Parser
from fastdllm.shell import one_line

TRAIN_SEED, TEST_SEED = 20251, 977
STAGE_PROBLEMS = 600_000
TEST_CANDIDATES, SPLIT_SIZE, FEWSHOT_SIZE = 1500, 500, 8
INSTRUCTION = " Give the result as your final answer. Do not include units."

Problem = tuple[str, str]  # question, and reasoning that ends in "#### x"


def generate(seed: int, start: int, stop: int) -> list[Problem]:
    """Problems `start` to `stop` of the generator's sequence for `seed`."""
    import reasoning_gym

    dataset = reasoning_gym.create_dataset("gsm_symbolic", size=stop, seed=seed)
    items = (dataset[i] for i in range(start, stop))
    return [(x["question"].removesuffix(INSTRUCTION), x["metadata"]["answer_cot"].strip()) for x in items]


def unique(problems: list[Problem], excluded: set[str]) -> list[Problem]:
    """The first problem of every question that is not in `excluded`."""
    first: dict[str, Problem] = {}
    for problem in problems:
        first.setdefault(problem[0], problem)
    return [problem for question, problem in first.items() if question not in excluded]


def stage_problems(stage: int, workers: int) -> list[Problem]:
    start, step = stage * STAGE_PROBLEMS, 10_000
    jobs = [(TRAIN_SEED, i, i + step) for i in range(start, start + STAGE_PROBLEMS, step)]
    with Pool(workers) as pool:
        return [p for chunk in pool.starmap(generate, jobs) for p in chunk]


def splits(stage_0: list[Problem]) -> dict[str, list[Problem]]:
    """The held-out problems: none of their questions occurs in stage 0, and later stages leave them out."""
    held_out = unique(generate(TEST_SEED, 0, TEST_CANDIDATES), {question for question, _ in stage_0})
    fewshot = random.Random(0).sample(stage_0[:1000], FEWSHOT_SIZE)
    return {"test": held_out[:SPLIT_SIZE], "validation": held_out[SPLIT_SIZE : 2 * SPLIT_SIZE], "fewshot": fewshot}


def multiple_choice(problem: Problem, rng: random.Random) -> dict | None:
    """The last equation of the reasoning, to be finished by one of four results, or with one of four last digits.

    `context` ends in the equal sign, `choices` are results of the same sign and number of decimals; `stem` is the result
    without its last digit and `digits` are single tokens. None where the reasoning does not end in such an equation.
    """
    question, answer = problem
    reasoning, result = (part.strip() for part in answer.rsplit("#### ", 1))
    found = list(re.finditer(rf"= ([€$£]?){re.escape(result)}(?![\d.,]*\d)", reasoning))
    if not found or len(result) < 2 or float(result) <= 0:
        return None
    sign, decimals = found[-1].group(1), len(result.partition(".")[2])
    step = 10.0**-decimals
    options = [result]
    while len(options) < 4:
        near = float(result) + step * rng.choice([-10, -3, -2, -1, 1, 2, 3, 10])
        far = float(result) * rng.choice([0.5, 1.5, 2.0, 3.0]) + step
        wrong = near if rng.random() < 0.5 else far
        text = f"{wrong:.{decimals}f}"
        if wrong > 0 and text not in options:
            options.append(text)
    rng.shuffle(options)
    digits = [result[-1], *rng.sample([d for d in "0123456789" if d != result[-1]], 3)]
    rng.shuffle(digits)
    return {
        "question": question,
        "context": reasoning[: found[-1].start()] + "=",
        "choices": [sign + option for option in options],
        "gold": options.index(result),
        "stem": sign + result[:-1],
        "digits": digits,
        "digit_gold": digits.index(result[-1]),
    }


def write_jsonl(path: Path, records: list[dict]) -> None:
    whole.write_text(path, "".join(json.dumps(r, ensure_ascii=False) + "\n" for r in records))


def write_tasks(folder: Path, workers: int) -> None:
    """test, validation and fewshot in GSM8K's format, and multiple-choice questions of the test problems."""
    folder.mkdir(parents=True, exist_ok=True)
    parts = splits(unique(stage_problems(0, workers), set()))
    for name, problems in parts.items():
        write_jsonl(folder / f"{name}.jsonl", [{"question": q, "answer": a} for q, a in problems])
    rng = random.Random(TEST_SEED)
    questions = [multiple_choice(problem, rng) for problem in parts["test"]]
    write_jsonl(folder / "multiple_choice.jsonl", [q for q in questions if q])


def held_out_questions(tasks: Path) -> set[str]:
    names = ("test.jsonl", "validation.jsonl", "fewshot.jsonl")
    lines = [line for name in names for line in (tasks / name).read_text(encoding="utf-8").splitlines()]
    return {json.loads(line)["question"] for line in lines}


def write_training_text(folder: Path, stages: list[int], workers: int) -> None:
    """One xz file a stage. Sorted: neighbours of one template compress to a tenth; training shuffles anyway."""
    from fastdllm.tasks import TASKS_DIR

    folder.mkdir(parents=True, exist_ok=True)
    for stage in stages:
        problems = sorted(unique(stage_problems(stage, workers), held_out_questions(TASKS_DIR / "gsm_symbolic")))
        text = "\0".join(f"{q}\1{a}" for q, a in problems)
        with whole.replacing(folder / f"stage{stage}.xz") as place:
            place.write_bytes(lzma.compress(text.encode(), preset=6))


def read_training_text(path: Path) -> list[Problem]:
    """The problems that `write_training_text` wrote. Raises ValueError, which names the file, for anything else."""
    try:
        text = lzma.decompress(path.read_bytes()).decode()
    except (lzma.LZMAError, UnicodeDecodeError) as error:
        raise ValueError(f"{path} is no whole training text ({error}); tiny_data writes it") from error
    parts = [record.partition("\1") for record in text.split("\0")]
    if not all(question and answer for question, _, answer in parts):
        raise ValueError(f"{path} holds records that are no question with an answer; tiny_data writes it")
    return [(question, answer) for question, _, answer in parts]


# Drills: reasoning lines out of context, in which only the results are to be predicted. What a stage-1 model still got
# wrong was nearly all arithmetic, and bare equations did not transfer into answers; lines in their wording did.
RESULT = re.compile(r"=(\s*[€$£]?\d[\d,]*(?:\.\d+)?)")
LEFT_SIDE = re.compile(r"((?:[€$£]\s?)?\(?\d[\d\s+\-*/x×%().,€$£]*[\d)%])\s*$")
DRILL_PROMPT = "Compute."
DRILL_LINES, DRILL_LINE_LENGTH = (5, 11), 260


def difficulty(expression: str) -> int:
    """1 to 4 for the left side of an equation: how often a stage-1 model got its kind wrong."""
    text = re.sub(r"[€$£, ]", "", expression).replace("x", "*").replace("×", "*")
    operators = re.findall(r"[+\-*/(]", text)
    digits = [len(n.replace(".", "")) for n in re.findall(r"\d+(?:\.\d+)?", text)]
    if not operators:
        return 2
    if len(operators) > 1 and "(" not in operators:
        return 4
    if operators == ["*"] and len(digits) == 2 and min(digits) > 1:
        return 3
    return 2 if operators == ["/"] or "." in text or (operators == ["-"] and max(digits) > 2) else 1


def line_difficulty(line: str) -> int:
    """The hardest equation of a reasoning line, 0 when it has none; words inside an equation count as 2."""
    hardest = 0
    for match in RESULT.finditer(line):
        left = LEFT_SIDE.search(line[max(0, match.start() - 60) : match.start()])
        hardest = max(hardest, difficulty(left.group(1)) if left else 2)
    return hardest


def drills(problems: list[Problem], count: int, rng: random.Random) -> list[str]:
    """`count` documents of reasoning lines, harder lines more often."""
    lines = [line for _, answer in problems for line in answer.split("\n") if len(line) < DRILL_LINE_LENGTH]
    weighted = [(line, weight) for line in lines if (weight := line_difficulty(line))]
    pool, weights = zip(*weighted, strict=True)
    sizes = [rng.randint(*DRILL_LINES) for _ in range(count)]
    drawn = iter(rng.choices(pool, weights, k=sum(sizes)))
    return ["\n".join(next(drawn) for _ in range(size)) for size in sizes]


def main() -> None:
    parser = Parser(description=__doc__.split("\n")[0])
    parser.add_argument("--tasks", type=Path, help="write the test, validation and few-shot files here")
    parser.add_argument("--train", type=Path, help="write the training text here")
    parser.add_argument("--stages", type=SIZE, nargs="+", default=[0])
    parser.add_argument("--workers", type=COUNT, default=2)
    args = parser.parse_args()
    if args.tasks:
        write_tasks(args.tasks, args.workers)
    if args.train:
        write_training_text(args.train, args.stages, args.workers)


if __name__ == "__main__":
    with one_line("tiny_data"):
        main()
