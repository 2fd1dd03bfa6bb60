# SPDX-License-Identifier: Apache-2.0
"""lm-eval adapter for every family: what `llada_dist`, `dream` and `fast_dllm_v2` share.

It touches of lm-eval only what 0.4.10 and later have in common: `TemplateLM`, `_device`, `_rank`, `_world_size`, and the
three collectives that `evaluate` calls. Documents are divided among processes by lm-eval; every request is decoded and
scored from its own prompt and seed, so the number of processes, the batch size and the order change no answer.
"""

from __future__ import annotations

import importlib.metadata
import logging
import sys
from collections import Counter
from collections.abc import Mapping
from pathlib import Path
from typing import Any, ClassVar

import torch
from lm_eval.api.instance import Instance
from lm_eval.api.model import TemplateLM
from lm_eval.models.utils import handle_stop_sequences
from lm_eval.utils import get_rolling_token_windows, make_disjoint_window
from torch import Tensor
from tqdm import tqdm

import fastdllm
from fastdllm.answers import AnswerStore, Ask, answer, answer_key, cut, fingerprint
from fastdllm.build import assemble
from fastdllm.config import DecodeConfig
from fastdllm.likelihood import Score, log_likelihoods
from fastdllm.processes import World, choose_device
from fastdllm.prompts import encode_text
from fastdllm.published import HarnessOptions, decode_options, read_batch_size, rename, split
from fastdllm.stats import Stats
from fastdllm.tasks import TASKS_DIR

log = logging.getLogger("lm_eval.fastdllm")  # below lm-eval's, which shows only its own

FROM_LM_EVAL = ("until", "do_sample")  # generation kwargs that are not options of decoding


class DiffusionLM(TemplateLM):
    """A fastdllm model for lm-eval. Leaves set `defaults` (decoding options as `DecodeConfig` takes them).

    An option of `--model_args` is fixed for the run; what it leaves open comes from the task's generation kwargs (which
    `--gen_kwargs` overrides), then from `defaults`, then from `DecodeConfig`. So gen_length in model_args beats a task's
    max_gen_toks, which beats 256 (or half of a shorter context). Unknown names and values of a wrong type are errors. A
    request ends with the block in which one of its stop strings appeared, and its text is cut there.
    """

    defaults: ClassVar[Mapping[str, Any]] = {}
    options_type: ClassVar[type[HarnessOptions]] = HarnessOptions
    max_length = sys.maxsize  # of the context, until the model is read

    def __init__(
        self,
        *,
        batch_size: int | str | None = 1,
        max_batch_size: int | None = None,
        device: str | None = None,
        **given: Any,
    ) -> None:
        super().__init__()
        own, self._fixed = split(rename(given), self.options_type)
        if "pretrained" not in own:
            raise ValueError("pretrained (or model_path) is missing: a shipped name, a local folder or a hub id")
        self.options = self.options_type(**own)
        self.batch_size = read_batch_size(batch_size, max_batch_size)
        self._configure({})  # before the weights are read: a bad option is an error at once
        self.world = World(choose_device(device))
        self._device, self._rank, self._world_size = self.world.device, self.world.rank, self.world.size
        self.model = fastdllm.load(
            self.options.pretrained,
            self._device,
            self.options.dtype,
            self.options.revision,
            self.options.quantize,
            self.options.trust_remote_code,
        )
        if self.model.tokenizer is None:
            raise ValueError(f"model {self.options.pretrained!r} has no tokenizer; lm-eval asks in text")
        self.tokenizer = self.model.tokenizer
        self.max_length = self.model.spec.max_length
        assemble(self.model, self._configure({}))  # likewise a combination that this model cannot run
        self._score([])
        self.stats, self.reused, self._costs = Stats(), 0, []
        self._fingerprint = fingerprint(self.model)
        self._answers = AnswerStore(self.options.save_dir, self.rank) if self.options.save_dir else None
        if self._answers and self._answers.torn:
            log.warning("save_dir: %d torn lines are ignored", self._answers.torn)

    def _configure(self, task: Mapping[str, Any]) -> DecodeConfig:
        """The settings of one request; `task` holds its generation kwargs."""
        asked = rename({k: v for k, v in task.items() if k not in FROM_LM_EVAL})
        if task.get("do_sample") is False:
            asked["temperature"] = 0.0
        if asked.get("num_beams") == 1:
            del asked["num_beams"]
        _, asked = split({**asked, **self._fixed}, self.options_type)
        length = min(self.defaults.get("gen_length", DecodeConfig().gen_length), self.max_length // 2)
        return DecodeConfig(**self.complete(decode_options(asked, {**self.defaults, "gen_length": length})))

    def complete(self, options: dict[str, Any]) -> dict[str, Any]:
        """A family's last word: fill in what depends on other options."""
        return options

    def prompt_of(self, request: Instance) -> str:
        """The text to continue; leaves may rephrase it."""
        return request.args[0]

    @property
    def eot_token_id(self) -> int:
        return self.model.spec.stop_ids[0]

    @property
    def prefix_token_id(self) -> int:
        return self.tokenizer.bos_token_id if self.tokenizer.bos_token_id is not None else self.eot_token_id

    @property
    def tokenizer_name(self) -> str:
        return self.options.pretrained.replace("/", "__")

    def tok_encode(self, string: str, add_special_tokens: bool | None = None, **kwargs: Any) -> list[int]:
        """Token ids; templates write their own special tokens, so none is added but, if asked for, a missing BOS."""
        bos = self.tokenizer.bos_token
        if self.options.add_bos_token and add_special_tokens is not False and bos and not string.startswith(bos):
            string = bos + string
        return encode_text(self.model, string)

    def apply_chat_template(self, chat_history: list[dict[str, str]], add_generation_prompt: bool = True) -> str:
        """The conversation as a prompt; without `add_generation_prompt` the last message is left open to be continued."""
        if not self.tokenizer.chat_template:
            raise ValueError(f"model {self.options.pretrained!r} has no chat template; leave out --apply_chat_template")
        return self.tokenizer.apply_chat_template(
            chat_history,
            tokenize=False,
            add_generation_prompt=add_generation_prompt,
            continue_final_message=not add_generation_prompt,
        )

    def _fit(self, ids: list[int], room: int, what: str) -> list[int]:
        """The last `room` ids, with a warning when that cuts something off."""
        if room < 1:
            raise ValueError(f"{what} leave no room for a prompt in the model's context of {self.max_length}")
        if len(ids) > room:
            log.warning("a prompt of %d tokens is cut on the left to %d: %s follow", len(ids), room, what)
        return ids[-room:]

    def generate_until(self, requests: list[Instance], disable_tqdm: bool = False) -> list[str]:
        seen: Counter[str] = Counter()
        asks = [self._ask(request, seen) for request in requests]
        equal: dict[str, list[int]] = {}  # greedy repeats, such as those that pad a process's share, cost nothing
        for i, ask in enumerate(asks):
            equal.setdefault(ask.key, []).append(i)
        answers: dict[int, str] = {}
        bar = tqdm(total=len(asks), desc="answers", disable=disable_tqdm or self.rank > 0)

        def finish(key: str, ids: Tensor) -> None:
            for i in equal[key]:
                answers[i] = cut(self.tokenizer.decode(ids, skip_special_tokens=True), asks[i].until)
                self.cache_hook.add_partial("generate_until", requests[i].args, answers[i])
                bar.update()

        waiting: dict[str, list[Ask]] = {}
        for key, (first, *_) in equal.items():
            known = self._answers.get(key) if self._answers else None
            if known is not None:
                self.reused += len(equal[key])
                finish(key, known)
            else:
                waiting.setdefault(answer_key(asks[first].config.given()), []).append(asks[first])
        if self.reused:
            log.info("%d finished answers are taken from %s", self.reused, self.options.save_dir)
        for group in waiting.values():
            # Longest prompts first: trouble with memory shows at once, and neighbours are alike.
            group.sort(key=lambda ask: -len(ask.prompt))
            for at, ids in answer(self.model, group, self.batch_size, self.stats):
                if self._answers:
                    self._answers.add(group[at].key, ids, self.tokenizer.decode(ids, skip_special_tokens=True))
                finish(group[at].key, ids)
        bar.close()
        if self.options.show_speed and self.stats.samples:
            log.info("speed: %s", self.stats.line())
        return [answers[i] for i in range(len(requests))]

    def _ask(self, request: Instance, seen: Counter[str]) -> Ask:
        kwargs = dict(request.args[1])
        until = handle_stop_sequences(kwargs.get("until"), None)
        if self.options.escape_until:
            until = [stop.replace("\\n", "\n").replace("\\t", "\t") for stop in until]
        config = self._configure(kwargs)
        room = self.max_length - config.gen_length
        prompt = self._fit(self.tok_encode(self.prompt_of(request)), room, f"gen_length={config.gen_length} tokens")
        settings = {k: v for k, v in config.given().items() if k not in ("batch_size", "runner")}
        key = answer_key(prompt, settings, until, self._fingerprint, fastdllm.__version__)
        if config.temperature or config.alg_temp or config.confidence == "random":
            seen[key] += 1  # the same request again is another draw
            key = answer_key(key, seen[key])
        return Ask(prompt, tuple(until), config, key)

    def _loglikelihood_tokens(
        self,
        requests: list[tuple[tuple[str, str] | None, list[int], list[int]]],
        disable_tqdm: bool = False,
        check_greedy: bool | None = None,
    ) -> list[tuple[float, bool]]:
        check_greedy = self.options.is_check_greedy if check_greedy is None else check_greedy
        pairs = []
        for _, context, target in requests:
            context = self._fit(context, self.max_length - len(target), f"{len(target)} tokens to score")
            pairs.append((torch.tensor(context), torch.tensor(target, dtype=torch.long)))
        results: list[tuple[float, bool]] = [(0.0, True)] * len(requests)
        order = sorted(range(len(pairs)), key=lambda i: -len(pairs[i][0]) - len(pairs[i][1]))
        bar = tqdm(total=len(pairs), desc="log-likelihoods", disable=disable_tqdm or self.rank > 0)
        for at in range(0, len(order), 4 * self.batch_size):
            chunk = order[at : at + 4 * self.batch_size]
            scores = self._score([pairs[i] for i in chunk], check_greedy)
            for i, score in zip(chunk, scores, strict=True):
                results[i] = (score.log_likelihood, score.greedy)
                if requests[i][0] is not None:
                    self.cache_hook.add_partial("loglikelihood", requests[i][0], results[i])
            bar.update(len(chunk))
        bar.close()
        return results

    def _score(self, pairs: list[tuple[Tensor, Tensor]], check_greedy: bool = False) -> list[Score]:
        config = self._configure({})
        return log_likelihoods(
            self.model,
            pairs,
            method=self.options.likelihood,
            mc_num=self.options.mc_num,
            seed=config.seed,
            batch_size=self.batch_size,
            check_greedy=check_greedy,
            cfg_scale=config.cfg_scale,
        )

    def loglikelihood_rolling(self, requests: list[Instance], disable_tqdm: bool = False) -> list[float]:
        """Each text in windows of the model's context, every token scored once with as much context as fits."""
        windows: list[tuple[None, list[int], list[int]]] = []
        owners = []
        for i, request in enumerate(requests):
            rolling = get_rolling_token_windows(
                self.tok_encode(request.args[0]), self.prefix_token_id, self.max_length - 1, context_len=1
            )
            for context, target in map(make_disjoint_window, rolling):
                windows.append((None, context, target))
                owners.append(i)
        totals = [0.0] * len(requests)
        for i, (value, _) in zip(owners, self._loglikelihood_tokens(windows, disable_tqdm, False), strict=True):
            totals[i] += value
        for request, total in zip(requests, totals, strict=True):
            self.cache_hook.add_partial("loglikelihood_rolling", request.args, total)
        return totals

    def all_gather(self, tensor: Tensor) -> Tensor:
        return self.world.all_gather(tensor)

    def gather_object(self, obj: Any, dst: int = 0) -> list[Any] | None:
        return self.world.gather_object(obj, dst)

    def barrier(self) -> None:
        """Wait for the others. `evaluate` calls it after each kind of request, on every process: the moment to collect
        what the run cost, since results are written by the first process alone."""
        self._costs = self.gather_object((self.stats, self.reused)) or []

    def get_model_info(self) -> dict[str, Any]:
        """What the results file says of the model, its settings and its speed."""
        total, reused = Stats(), 0
        for stats, again in self._costs or [(self.stats, self.reused)]:
            total.add(stats)
            reused += again
        libraries = ("torch", "transformers", "lm_eval")
        device = torch.cuda.get_device_name(self.device) if self.device.type == "cuda" else "cpu"
        return {
            "model_name": self.options.pretrained,
            "model_family": self.model.spec.family,
            "model_num_parameters": sum(p.numel() for p in self.model.network.parameters()),
            "model_dtype": str(self.model.dtype),
            "model_fingerprint": self._fingerprint[:16],
            "model_device": device,
            "model_max_length": self.max_length,
            "processes": self.world_size,
            "settings": {k: v for k, v in self._configure({}).given().items() if v is not None},
            "speed": {**total.summary(), "reused_answers": reused},
            "versions": {"fastdllm": fastdllm.__version__, **{n: importlib.metadata.version(n) for n in libraries}},
        }


def register(name: str, adapter: type[DiffusionLM]) -> None:
    """Make `adapter` known as `--model name`.

    lm-eval's own models first: it adds them only while its registry is empty. The first to come keeps the name, so that a
    file may be run as a script and imported as well.
    """
    import lm_eval.models  # noqa: F401 - registers lm-eval's own
    from lm_eval.api.registry import model_registry

    if name not in model_registry:
        model_registry.register(name, target=adapter)


def main() -> None:
    """lm-eval's command line, with the tasks that ship with fastdllm beside those of `--include_path`."""
    from lm_eval.__main__ import HarnessCLI, setup_logging

    setup_logging()
    parser = HarnessCLI()
    args = parser.parse_args()
    if getattr(args, "command", None) == "run" and not args.config:
        given = [args.include_path] if args.include_path and Path(args.include_path).resolve() != TASKS_DIR.resolve() else []
        args.include_path = [str(TASKS_DIR), *given]
        if args.model_args:
            # lm-eval names the results folder after `pretrained`, and otherwise at random.
            args.model_args = rename(args.model_args)
    parser.execute(args)
