# SPDX-License-Identifier: Apache-2.0
"""Teach a LLaDA, Dream or Fast-dLLM v2 checkpoint to decode in fewer forwards, and measure what that did to its answers.

    python -m scripts.recipes.parallel --model tiny-llada --data problems.jsonl --out runs/parallel --seconds 900

Four stages, each left out when its result is in OUT already: answers of the model as it is (before.json), its trajectories
on training prompts (trajectories.jsonl), training (checkpoints/, model/), answers of what it became (after.json). Then
report.md and report.png: accuracy against forwards an answer. `--session 400` stops training after that many seconds;
the same command again goes on, until `--seconds` are spent. `--data` is any file that fine-tuning reads
(v2/train_scripts/README.md); its answers are what is compared. How it works: fastdllm/training/parallel.py.
"""

from __future__ import annotations

import argparse
import hashlib
import json
import math
import os
import random
import sys
from collections.abc import Callable, Iterator
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from torch.utils.data import Dataset
from tqdm.auto import tqdm
from transformers import PreTrainedTokenizerFast, TrainerCallback, TrainingArguments, set_seed
from transformers.trainer_callback import PrinterCallback

import fastdllm
from fastdllm import whole
from fastdllm.arguments import AMOUNT, COUNT, SEED, SHARE, SIZE, Parser, number, output_folder
from fastdllm.models import Model
from fastdllm.shell import one_line, shell
from fastdllm.training.checkpoint import checkpoint_to_resume
from fastdllm.training.finite import train_or_exit
from fastdllm.training.network import Network, load_network, save_network
from fastdllm.training.objective import IGNORE
from fastdllm.training.parallel import Clock, Collator, Curriculum, Example, ParallelTrainer
from fastdllm.training.records import BadRecord, Conversation, is_target, keep_good, read_records, to_conversation
from fastdllm.training.samples import encode
from scripts.recipes.parallel_report import REFERENCE, report, results_of
from scripts.results import read_json

DRAWS = 50  # tries to find an example that fits


@dataclass(frozen=True)
class Setting:
    """How answers are decoded: block length and threshold, a threshold of 1 for one token a step."""

    block: int
    threshold: float

    @property
    def name(self) -> str:
        return REFERENCE if self.threshold >= 1 else f"blocks of {self.block}, threshold {self.threshold:g}"

    def options(self, model: Model, length: int) -> dict[str, Any]:
        # Many rows of changing numbers: a graph for each would take longer to capture than it saves.
        rule: dict[str, Any] = {"decoder": "quota"}  # one token a step; a threshold of 1 would take all that round to 1
        if self.threshold < 1:
            rule = {"decoder": "threshold", "threshold": self.threshold}
        given = rule | {"gen_length": length, "runner": "eager"}
        return given if model.spec.block_causal else given | {"block_length": min(self.block, length)}


def plain(conversation: Conversation) -> tuple[str, str]:
    """A question and its answer as lm-eval writes them for models without a chat template."""
    asked = [m["content"] for m in conversation.messages if m["role"] == "user"]
    return f"Question: {asked[-1]}\nAnswer:", f" {conversation.messages[-1]['content']}"


def to_example(conversation: Conversation, tokenizer: PreTrainedTokenizerFast, stops: tuple[int, ...]) -> Example:
    """The last answer of a conversation after all that stands before it, up to its first stop token."""
    sample = encode(conversation, tokenizer)
    targets = (sample.labels != IGNORE).nonzero()[0]
    start = int(targets[-1])
    while start and sample.labels[start - 1] != IGNORE:
        start -= 1
    answer = sample.ids[start : targets[-1] + 1].tolist()
    end = next((i for i, token in enumerate(answer) if token in stops), None)
    answer = [*answer, stops[0]] if end is None else answer[: end + 1]
    return Example(sample.ids[:start].tolist(), answer)


def to_plain_example(conversation: Conversation, tokenizer: PreTrainedTokenizerFast, end: int) -> Example:
    prompt, answer = (tokenizer(text, add_special_tokens=False)["input_ids"] for text in plain(conversation))
    return Example(prompt, [*answer, end])


class Examples(Dataset[Example | None]):
    """Trajectories and, for `data_share` of the rows, the file's own answers; `plain_share` of those in the plain form."""

    def __init__(
        self,
        trajectories: list[Example],
        conversations: list[Conversation],
        tokenizer: PreTrainedTokenizerFast,
        stops: tuple[int, ...],
        data_share: float,
        plain_share: float,
        fits: Callable[[Example], bool],
    ) -> None:
        self.fits = fits
        self.trajectories, self.conversations, self.tokenizer, self.stops = trajectories, conversations, tokenizer, stops
        self.data_share, self.plain_share = data_share if trajectories else 1.0, plain_share

    def __len__(self) -> int:
        return len(self.conversations) + len(self.trajectories)

    def __getitem__(self, index: int) -> Example | None:
        draw = random.Random(index)
        for _ in range(DRAWS):
            example = self.draw(draw)
            if example is not None and self.fits(example):
                return example
        return None  # the collator leaves it out

    def draw(self, draw: random.Random) -> Example | None:
        if draw.random() >= self.data_share:
            return draw.choice(self.trajectories)
        conversation = draw.choice(self.conversations)
        try:
            if draw.random() < self.plain_share:
                return to_plain_example(conversation, self.tokenizer, self.tokenizer.eos_token_id)
            return to_example(conversation, self.tokenizer, self.stops)
        except BadRecord:
            return None


def prompt_of(conversation: Conversation, model: Model) -> Tensor:
    return torch.tensor(to_example(conversation, model.tokenizer, model.spec.stop_ids).prompt)


def askable(found: list[Conversation], count: int, network: Network, tokenizer: Any, length: int) -> list[Conversation]:
    """The first `count` conversations that can be put to the model: its template takes them, and an answer of `length`
    tokens has room."""
    out: list[Conversation] = []
    for conversation in found:
        if len(out) == count:
            break
        try:
            prompt = to_example(conversation, tokenizer, network.spec.stop_ids).prompt
        except BadRecord as error:
            print(f"left out: {error}", file=sys.stderr)
            continue
        if len(prompt) + length > network.spec.max_length:
            print(f"left out: {conversation.where}: a prompt of {len(prompt)} tokens leaves no room", file=sys.stderr)
        else:
            out.append(conversation)
    return out


def reference_of(conversation: Conversation) -> str:
    return next(m["content"] for m in reversed(conversation.messages) if is_target(m))


def agrees(answer: str, reference: str) -> bool:
    """Whether two answers say the same: what follows the last `####` where there is one, else the whole text."""
    ends = [" ".join(text.rpartition("####")[2].replace(",", "").split()) for text in (answer, reference)]
    return ends[0] == ends[1] and ("####" in answer or "####" not in reference)


def measure(model: Model, held_out: list[Conversation], settings: list[Setting], args: argparse.Namespace) -> list[dict]:
    """Per setting: which answers are right, and the forwards of each."""
    prompts = [prompt_of(c, model) for c in held_out]
    results = []
    for setting in tqdm(settings, desc="answering", unit=" settings", file=sys.stderr):
        options = setting.options(model, args.gen_length) | {"batch_size": args.decode_batch}
        out = fastdllm.generate(model, prompts, **options)
        right = [agrees(text, reference_of(c)) for text, c in zip(out.texts or [], held_out, strict=True)]
        results.append({"setting": setting.name, **asdict(setting), "right": right, "forwards": out.stats.row_forwards})
    return results


def trajectories(model: Model, conversations: list[Conversation], args: argparse.Namespace) -> Iterator[dict[str, Any]]:
    """The model's own answers, and which forward committed each token. One that does not end is left out."""
    prompts = [prompt_of(c, model) for c in conversations]
    setting = Setting(min(args.blocks), args.teacher_threshold)
    options = setting.options(model, args.gen_length) | {"batch_size": args.decode_batch}
    out = fastdllm.generate(model, prompts, **options)
    texts = out.texts or []
    for row, (prompt, ids) in enumerate(zip(prompts, out.sequences, strict=True)):
        answer = ids[len(prompt) :].tolist()
        if answer and answer[-1] in model.spec.stop_ids:
            line = {"row": row, "prompt": prompt.tolist(), "answer": answer, "order": out.committed_at[row].tolist()}
            yield line | {"right": agrees(texts[row], reference_of(conversations[row]))}


def trajectory(text: str, vocab: int) -> dict[str, Any] | None:
    """A line of trajectories; None for what is none, such as the part of a line that an interrupted run wrote."""
    try:
        line = json.loads(text)
        prompt, answer, order = (line[name] for name in ("prompt", "answer", "order"))
        ids = all(type(token) is int and 0 <= token < vocab for token in (*prompt, *answer))
        places = len(order) == len(answer) > 0 and all(type(at) is int and at >= 1 for at in order)
        return line if ids and places and type(line["number"]) is int and type(line["right"]) is bool else None
    except (ValueError, TypeError, KeyError, RecursionError):
        return None


def collect(model: Model, conversations: list[Conversation], path: Path, args: argparse.Namespace) -> list[Example]:
    """Trajectories of `path`, which is filled up to `args.trajectories`; those with another answer than the file's are left
    out, since a wrong answer given sooner is no gain."""
    lines: list[dict[str, Any]] = []
    for at, text in enumerate(
        path.read_text(encoding="utf-8", errors="replace").split("\n") if path.exists() else (), start=1
    ):
        if (line := trajectory(text, model.spec.vocab)) is not None:
            lines.append(line)
        elif text:
            print(f"{path}:{at}: a damaged line is left out", file=sys.stderr)
    known = {line["number"] for line in lines}
    wanted = [number for number in range(min(args.trajectories, len(conversations))) if number not in known]
    with path.open("a", encoding="utf-8") as file, tqdm(total=len(wanted), desc="trajectories", file=sys.stderr) as bar:
        for at in range(0, len(wanted), args.chunk):
            numbers = wanted[at : at + args.chunk]
            if path.stat().st_size:
                file.write("\n" * (path.read_bytes()[-1:] != b"\n"))  # after a line without its end
            for line in trajectories(model, [conversations[number] for number in numbers], args):
                line["number"] = numbers[line.pop("row")]
                lines.append(line)
                file.write(json.dumps(line) + "\n")
            file.flush()
            bar.update(len(numbers))
    good = [Example(line["prompt"], line["answer"], line["order"]) for line in lines if line["right"]]
    print(f"{len(good)} of {len(lines)} trajectories give the file's answer", file=sys.stderr)
    return good


class Lines(TrainerCallback):
    """One line of progress at a time, without a bar whose end nobody knows."""

    def on_log(self, args: Any, state: Any, control: Any, logs: dict[str, float] | None = None, **kwargs: Any) -> None:
        if state.is_world_process_zero and logs and "cross_entropy" in logs:
            names = ("progress", "loss", "cross_entropy", "entropy", "right", "grad_norm", "learning_rate")
            print(f"step {state.global_step}", *(f"{n} {float(logs[n]):.3g}" for n in names if n in logs), flush=True)


def seconds_spent(checkpoint: Path) -> float:
    """What training took up to a checkpoint."""
    spent = read_json(checkpoint / "spent.json", float)
    if not 0 <= spent < math.inf:
        raise ValueError(f"{checkpoint / 'spent.json'} holds {spent}, which is no time")
    return spent


def prepare(
    examples: Examples, collator: Collator, network: Network, args: argparse.Namespace
) -> tuple[ParallelTrainer, Clock, Path | None]:
    """The trainer, its clock, and the checkpoint to go on from. Raises ValueError for what the user should mend."""
    spec, out = network.spec, args.out / "checkpoints"
    network.checkpointing = args.gradient_checkpointing
    model: torch.nn.Module = network
    if args.lora:
        from peft import LoraConfig, get_peft_model

        model = get_peft_model(
            network, LoraConfig(r=args.lora_rank, lora_alpha=2 * args.lora_rank, target_modules=network.projections)
        )
    resume = None
    if list(out.glob("checkpoint-*")):
        resume, passed_over = checkpoint_to_resume("latest", out, model, needed=("spent.json",))
        print(*passed_over, f"resuming from {resume}", sep="\n", file=sys.stderr)
    clock = Clock(args.seconds, args.session, seconds_spent(resume) if resume else args.start_at * (args.seconds or 0.0))
    if args.compile:
        network.compile(dynamic=True)
    cuda = torch.cuda.is_available() and not args.cpu
    training = TrainingArguments(
        output_dir=str(out),
        max_steps=args.max_steps or 10**9,
        per_device_train_batch_size=args.batch,
        gradient_accumulation_steps=args.accumulate,
        learning_rate=args.learning_rate,
        weight_decay=args.weight_decay,
        adam_beta2=0.98,
        max_grad_norm=1.0,
        bf16=cuda,
        use_cpu=not cuda,
        logging_steps=args.log_every,
        save_steps=args.save_every,
        save_total_limit=2,
        dataloader_num_workers=args.workers,
        dataloader_persistent_workers=args.workers > 0,
        remove_unused_columns=False,
        report_to="none",
        disable_tqdm=True,
        seed=args.seed,
    )
    trainer = ParallelTrainer(
        model=model,
        args=training,
        train_dataset=examples,
        data_collator=collator,
        spec=spec,
        curriculum=curriculum_of(args),
        clock=clock,
        certainty=args.certainty,
        temperature=args.temperature,
        callbacks=[Lines()],
    )
    trainer.remove_callback(PrinterCallback)
    return trainer, clock, resume


def curriculum_of(args: argparse.Namespace) -> Curriculum:
    return Curriculum(tuple(args.blocks), args.share, args.ramp, args.own, args.recorded, args.forwards, args.fill_threshold)


def train(trainer: ParallelTrainer, clock: Clock, resume: Path | None, folder: Path, args: argparse.Namespace) -> float:
    """Train until the session or the run is over; writes OUT/model. Returns the share of the run that is done."""
    training = trainer.args
    train_or_exit(trainer, resume, "parallel")
    trained = trainer.accelerator.get_state_dict(trainer.model)  # on every process: a sharded model is gathered
    trainer.accelerator.wait_for_everyone()
    trainer.accelerator.end_training()
    if not training.should_save:
        sys.exit(0)
    if args.lora:
        trained = trainer.accelerator.unwrap_model(trainer.model).merge_and_unload().state_dict()
    save_network(trained, folder, args.out / "model")
    return 1.0 if args.max_steps and trainer.state.global_step >= args.max_steps else clock.progress


# What the files of an earlier session depend on: with other values they would be another run's.
SAME = ["model", "data", "held_out", "problems", "limit", "gen_length", "blocks", "decode_blocks", "thresholds"]
SAME += ["teacher_threshold", "lora", "lora_rank"]


def check_same_run(args: argparse.Namespace, held_out: list[Conversation]) -> None:
    """Raise ValueError where OUT holds another run; else remember in OUT/run.json which one it is."""
    texts = json.dumps([conversation.messages for conversation in held_out])
    own = {name: getattr(args, name) for name in SAME} | {"asked": hashlib.sha256(texts.encode()).hexdigest()[:16]}
    own = {name: str(value.resolve()) if isinstance(value, Path) else value for name, value in own.items()}
    path = args.out / "run.json"
    if not path.exists():
        whole.write_text(path, json.dumps(own, indent=1) + "\n")
        return
    for name, before in read_json(path).items():
        if own.get(name) != before:
            raise ValueError(f"{args.out} holds a run with {name}={before!r}, not {own.get(name)!r}; give another --out")


def evaluated(path: Path, name: str, held_out: list[Conversation], args: argparse.Namespace) -> list[dict]:
    """The results in `path`, measured unless they are there."""
    if path.exists():
        return results_of(path, len(held_out))
    model = fastdllm.load(name, device="cpu" if args.cpu else None, dtype="float32")
    blocks = [model.spec.block_causal] if model.spec.block_causal else args.decode_blocks
    settings = [Setting(blocks[0], 1.0)]
    settings += [Setting(block, threshold) for block in blocks for threshold in args.thresholds]
    results = measure(model, held_out, settings, args)
    whole.write_text(path, json.dumps(results) + "\n")
    return results


def read(path: Path, limit: int | None) -> list[Conversation]:
    """The usable records of a file, shuffled the same way every time."""
    found = list(
        keep_good(read_records(path), to_conversation, "skip", lambda line: print(f"left out: {line}", file=sys.stderr))
    )
    if not found:
        raise ValueError(f"data={str(path)!r} has no usable record")
    random.Random(0).shuffle(found)
    return found[:limit]


def parse(argv: list[str] | None = None) -> argparse.Namespace:
    parser = Parser(description=__doc__.split("\n")[0], allow_abbrev=False)
    add = parser.add_argument
    add("--model", required=True, help="a shipped name, a folder or a hub id")
    add("--data", type=Path, required=True, help="training prompts with answers")
    add("--out", type=output_folder, required=True)
    add("--held_out", type=Path, help="problems to measure on; default: the first --problems of --data, kept from training")
    add("--problems", type=COUNT, default=500)
    add("--limit", type=COUNT, help="use only this many records of --data")
    add("--trajectories", type=SIZE, default=2000, help="prompts that the model answers itself before training")
    add("--teacher_threshold", type=SHARE, default=1.0, help="how it decodes them; 1: one token a step")
    add("--data_share", type=SHARE, default=0.0, help="of the rows that show the file's own answers instead")
    add("--plain_share", type=SHARE, default=0.0, help="of those, the share without the chat template, as in lm-eval")
    add("--gen_length", type=COUNT, default=256)
    add("--context", type=COUNT, help="tokens of a row at most; default: the model's")
    add("--seconds", type=AMOUNT, help="training time of the whole run; or --max_steps")
    add("--session", type=AMOUNT, help="stop and save after so many seconds of it")
    add("--start_at", type=SHARE, default=0.0, help="share of the run that --model has had already")
    add("--max_steps", type=COUNT)
    add("--batch", type=COUNT, default=64)
    add("--accumulate", type=COUNT, default=1)
    add("--learning_rate", type=AMOUNT, default=5e-4)
    add("--weight_decay", type=AMOUNT, default=0.01)
    add("--certainty", type=AMOUNT, default=1.0, help="weight of the entropy where the model is right")
    add("--temperature", type=number(float, 1e-6, 1e3), default=0.5, help="of that entropy")
    defaults = Curriculum()
    add("--blocks", type=COUNT, nargs="+", default=list(defaults.blocks), help="block lengths to learn, short ones first")
    add("--share", type=SHARE, default=defaults.share, help="largest mask share at the start")
    add("--ramp", type=SHARE, default=defaults.ramp, help="share of the run over which block length and mask share grow")
    add("--own", type=SHARE, default=defaults.own, help="rows filled by the present weights")
    add("--recorded", type=SHARE, default=defaults.recorded, help="rows masked in a recorded order")
    add("--forwards", type=SIZE, default=defaults.forwards, help="forwards at most that fill a row of the first kind")
    add("--fill_threshold", type=SHARE, default=defaults.threshold)
    add("--lora", action="store_true", help="train low-rank adapters; OUT/model has them merged")
    add("--lora_rank", type=COUNT, default=16)
    add("--gradient_checkpointing", action="store_true")
    add("--compile", action="store_true", help="torch.compile the network")
    add("--decode_blocks", type=COUNT, nargs="+", default=[32, 64, 128, 256], help="block lengths to measure")
    add("--thresholds", type=SHARE, nargs="+", default=[0.5, 0.7, 0.8, 0.9, 0.95, 0.98], help="thresholds to measure")
    add("--decode_batch", type=COUNT, default=250)
    add("--chunk", type=COUNT, default=1000, help="trajectories between two writes")
    add("--workers", type=number(int, 0, 256), default=4, help="processes that tokenise")
    add("--log_every", type=COUNT, default=100)
    add("--save_every", type=COUNT, default=2000)
    add("--seed", type=SEED, default=0)
    add("--cpu", action="store_true")
    args = parser.parse_args(argv)
    if (args.seconds is None) == (args.max_steps is None):
        parser.error("one of --seconds and --max_steps is needed")
    if not 0 <= args.start_at < 1:
        parser.error(f"--start_at {args.start_at} must be within 0..1")
    return args


def main(argv: list[str] | None = None) -> None:
    args = parse(argv)
    set_seed(args.seed)
    os.environ["TOKENIZERS_PARALLELISM"] = "false"  # the processes that tokenise are forked
    with one_line("parallel"):
        curriculum_of(args)
        args.out.mkdir(parents=True, exist_ok=True)
        conversations = read(args.data, args.limit)
        network, tokenizer, folder = load_network(args.model)
        found = read(args.held_out, None) if args.held_out else conversations
        held_out = askable(found, args.problems, network, tokenizer, args.gen_length)
        if not held_out:
            raise ValueError(f"no record of {args.held_out or args.data} can be put to the model with room for an answer")
        check_same_run(args, held_out)
        questions = {json.dumps(c.messages[:-1]) for c in held_out}
        conversations = [c for c in conversations if json.dumps(c.messages[:-1]) not in questions]
        if not conversations:
            raise ValueError(f"--problems {args.problems} leave no record of {args.data} to train on")
        before = evaluated(args.out / "before.json", args.model, held_out, args)
        teacher = fastdllm.load(args.model, device="cpu" if args.cpu else None, dtype="float32")
        asked = askable(conversations, args.trajectories, network, tokenizer, args.gen_length)
        kept = collect(teacher, asked, args.out / "trajectories.jsonl", args)
        stops = teacher.spec.stop_ids
        del teacher
        spec = network.spec
        context = min(spec.max_length, args.context or spec.max_length)
        collator = Collator(tokenizer.eos_token_id, args.gen_length, context, spec.block_causal)
        examples = Examples(kept, conversations, tokenizer, stops, args.data_share, args.plain_share, collator.fits)
        if all(examples[i] is None for i in range(min(10, len(examples)))):
            raise ValueError(f"no example fits into rows of {context} tokens with {args.gen_length} for the answer")
        trainer, clock, resume = prepare(examples, collator, network, args)
    done = train(trainer, clock, resume, folder, args)
    print(f"{100 * done:.0f} % of the run is done", file=sys.stderr)
    (args.out / "after.json").unlink(missing_ok=True)
    after = evaluated(args.out / "after.json", str(args.out / "model"), held_out, args)
    print(report(before, after, args.out))


if __name__ == "__main__":
    with shell("parallel"):
        main()
