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
import warnings
import weakref
from collections import Counter
from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import contextmanager
from functools import cached_property
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
from fastdllm.build import assemble
from fastdllm.config import DecodeConfig
from fastdllm.conversations import encode_text, render
from fastdllm.evaluation.answers import AnswerStore, Query, answer, answer_key
from fastdllm.evaluation.distributed import Distributed, choose_device
from fastdllm.evaluation.options import (
    HarnessOptions,
    check_names,
    decode_options,
    latest,
    merge,
    parse_arguments,
    read_batch_size,
    rename,
    split,
)
from fastdllm.fields import coerce
from fastdllm.likelihood import Score, log_likelihoods
from fastdllm.models import Model
from fastdllm.prompts import check_model, prefix_id, split_join
from fastdllm.stats import Stats
from fastdllm.text import cut

log = logging.getLogger("lm_eval.fastdllm")  # below lm-eval's, which shows only its own

FROM_LM_EVAL = ("until", "stop", "do_sample", "num_beams")  # generation kwargs that are not options of decoding
LOADING = (
    "dtype",
    "revision",
    "quantize",
    "adapter",
    "trust_remote_code",
)  # options without a meaning for a model in memory


class DiffusionLM(TemplateLM):
    """A fastdllm model for lm-eval. Leaves set `defaults` (decoding options as `DecodeConfig` takes them).

    pretrained: a name, a folder, a hub id or a loaded `Model`. An option of `--model_args` is fixed for the run; what it
    leaves open comes from the task's generation kwargs (which `--gen_kwargs` overrides, in whatever spelling), then from
    `defaults`, then from `DecodeConfig`. So gen_length in model_args beats a task's max_gen_toks, which beats 256 (or half
    of a shorter context). Unknown names and values of a wrong type are errors; the options of all requests are checked
    before anything is generated. `steps` of the run are at most one a token where a task's answers are shorter. A request
    ends with the block in which one of its stop strings appeared, and its text is cut there.
    """

    defaults: ClassVar[Mapping[str, Any]] = {}
    options_type: ClassVar[type[HarnessOptions]] = HarnessOptions
    latest: ClassVar[Callable[[], DiffusionLM | None]] = staticmethod(
        lambda: None
    )  # for the command line, which checks tasks
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
        check_names(given, self.options_type)
        given = rename(given)
        loaded = self._loaded(given)
        own, self._fixed = split(given, self.options_type)
        if "pretrained" not in own:
            raise ValueError("pretrained (or model_path) is missing: a shipped name, a local folder or a hub id")
        self.options = self.options_type(**own)
        self.batch_size = read_batch_size(batch_size, max_batch_size)
        self._configure({})  # before the weights are read: a bad option is an error at once
        self.world = Distributed(loaded.device if loaded else choose_device(device))
        self._device, self._rank, self._world_size = self.world.device, self.world.rank, self.world.size
        self.model = loaded or fastdllm.load(
            self.options.pretrained, self._device, **{name: getattr(self.options, name) for name in LOADING}
        )
        if self.model.tokenizer is None:
            raise ValueError(f"model {self.options.pretrained!r} has no tokenizer; lm-eval asks in text")
        self.tokenizer = self.model.tokenizer
        self.max_length = self.model.spec.max_length
        assemble(self.model, self._configure({}))  # likewise a combination that this model cannot run
        self._score([])
        self.stats, self.reused, self.unfinished, self._costs = Stats(), 0, 0, []
        self._shortened = 0  # prompts that lost their beginning
        folder = self.options.save_dir
        self._answers = AnswerStore(folder, self.rank, self.model.spec.vocab) if folder else None
        if self._answers and self._answers.torn:
            log.warning("save_dir: %d torn lines are ignored", self._answers.torn)
        DiffusionLM.latest = weakref.ref(self)

    @classmethod
    def create_from_arg_string(cls, arg_string: str, additional_config: dict[str, Any] | None = None) -> DiffusionLM:
        """From "name=value,...", where lm-eval's own reading would lose cache=none."""
        more = {k: v for k, v in (additional_config or {}).items() if v is not None}
        return cls(**parse_arguments(arg_string), **more)

    @staticmethod
    def _loaded(given: dict[str, Any]) -> Model | None:
        """The model object among the arguments, which there gives way to its name; None for a model that must be read."""
        model = given.get("pretrained")
        if model is None or isinstance(model, str | int | float | Path):
            return None
        check_model(model)
        for name in LOADING:
            if name in given:
                raise ValueError(f"{name}={given[name]!r} has no meaning for a model that is loaded already")
        given["pretrained"] = model.name or "model"
        return model

    def _configure(self, task: Mapping[str, Any]) -> DecodeConfig:
        """The settings of one request; `task` holds its generation kwargs."""
        if coerce("num_beams", task.get("num_beams") or 1, int) > 1:
            warnings.warn(f"num_beams={task['num_beams']} is ignored: a diffusion model has no beam search", stacklevel=2)
        asked = latest({k: v for k, v in task.items() if k not in FROM_LM_EVAL})
        if task.get("do_sample") is not None:
            # transformers samples at temperature 1 unless told otherwise
            sampled = coerce("do_sample", task["do_sample"], bool)
            asked["temperature"] = asked.get("temperature", 1.0) if sampled else 0.0
        _, asked = split(merge(asked, self._fixed), self.options_type)
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
        return prefix_id(self.model)

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
        return render(self.model, chat_history, continue_final=not add_generation_prompt)

    def _encode_pair(self, context: str, continuation: str) -> tuple[list[int], list[int]]:
        """Ids of the context [P], P > 0, and of the continuation [L], as `prompts.split_join` cuts them."""
        return split_join(self.tok_encode, context, continuation, self.prefix_token_id)

    def loglikelihood(self, requests: list[Instance], disable_tqdm: bool = False) -> list[tuple[float, bool]]:
        pairs = []
        for request in requests:
            with _naming(request):
                pairs.append((request.args, *self._encode_pair(*request.args)))
        return self._loglikelihood_tokens(pairs, disable_tqdm)

    def _fit(self, ids: list[int], room: int, what: str) -> list[int]:
        """The last `room` ids, with a warning when that cuts something off."""
        if room < 1:
            raise ValueError(f"{what} leave no room for a prompt in the model's context of {self.max_length}")
        if len(ids) > room:
            log.warning("a prompt of %d tokens is cut on the left to %d: %s follow", len(ids), room, what)
            self._shortened += 1
        return ids[-room:]

    def generate_until(self, requests: list[Instance], disable_tqdm: bool = False) -> list[str]:
        if faults := self.faults((request.task_name or "(no name)", request.args[1]) for request in requests):
            named = "; ".join(f"task {name}: {fault}" for name, fault in faults.items())
            raise ValueError(f"{named}; leave these tasks out, or fix the option in --model_args")
        seen: Counter[str] = Counter()
        queries = []
        for request in requests:
            with _naming(request):
                queries.append(self._query(request, seen))
        equal: dict[str, list[int]] = {}  # greedy repeats, such as those that pad a process's share, cost nothing
        for i, query in enumerate(queries):
            equal.setdefault(query.key, []).append(i)
        answers: dict[int, str] = {}
        bar = tqdm(total=len(queries), desc="answers", disable=disable_tqdm or self.rank > 0)

        def finish(key: str, ids: Tensor) -> None:
            for i in equal[key]:
                text = self.tokenizer.decode(ids, skip_special_tokens=True)
                answers[i] = cut(text, queries[i].until)
                self.unfinished += len(ids) == queries[i].config.gen_length and answers[i] == text
                self.cache_hook.add_partial("generate_until", requests[i].args, answers[i])
                bar.update()

        waiting: dict[str, list[Query]] = {}
        for key, (first, *_) in equal.items():
            known = self._answers.get(key) if self._answers else None
            if known is not None:
                self.reused += len(equal[key])
                finish(key, known)
            else:
                waiting.setdefault(answer_key(queries[first].config.given()), []).append(queries[first])
        if self.reused:
            log.info("%d finished answers are taken from %s", self.reused, self.options.save_dir)
        for group in waiting.values():
            # Longest prompts first: trouble with memory shows at once, and neighbours are alike.
            group.sort(key=lambda query: -len(query.prompt))
            for at, ids in answer(self.model, group, self.batch_size, self.stats):
                if self._answers:
                    self._answers.add(group[at].key, ids, self.tokenizer.decode(ids, skip_special_tokens=True))
                finish(group[at].key, ids)
        bar.close()
        if self._shortened:
            log.warning(
                "%d of %d prompts lost their beginning, so the score is not that of the whole task: fewer examples "
                "(--num_fewshot) or a smaller gen_length may keep them whole",
                self._shortened,
                len(requests),
            )
            self._shortened = 0
        if self.unfinished:
            log.info("%d answers are as long as gen_length allows: they may have been cut off", self.unfinished)
        if self.options.show_speed and self.stats.samples:
            log.info("speed: %s", self.stats.line())
        return [answers[i] for i in range(len(requests))]

    @cached_property
    def _fingerprint(self) -> str:
        return self.model.fingerprint()

    def faults(self, asked: Iterable[tuple[str, Mapping[str, Any]]]) -> dict[str, str]:
        """What is wrong with the generation kwargs of tasks, of (name, kwargs) pairs, by the task's name."""
        found: dict[str, str] = {}
        checked: set[str] = set()
        for name, kwargs in asked:
            key = answer_key(name, kwargs)
            if key in checked or name in found:
                continue
            checked.add(key)
            try:
                config = self._configure(kwargs)
                assemble(self.model, config)
                self._fit([0], self.max_length - config.gen_length, f"gen_length={config.gen_length} tokens")
                _stops(kwargs)
            except ValueError as error:
                found[name] = str(error)
        return found

    def _query(self, request: Instance, seen: Counter[str]) -> Query:
        kwargs = dict(request.args[1])
        until = _stops(kwargs)
        if self.options.escape_until:
            until = [stop.replace("\\n", "\n").replace("\\t", "\t") for stop in until]
        config = self._configure(kwargs)
        room = self.max_length - config.gen_length
        ids = self.tok_encode(self.prompt_of(request)) or [self.prefix_token_id]  # some models need a token before the first
        prompt = self._fit(ids, room, f"gen_length={config.gen_length} tokens")
        settings = {k: v for k, v in config.given().items() if k not in ("batch_size", "prompt_cache", "runner")}
        key = answer_key(prompt, settings, until, self._fingerprint, fastdllm.__version__)
        if config.temperature or config.alg_temp or config.confidence == "random":
            seen[key] += 1  # the same request again is another draw
            key = answer_key(key, seen[key])
        return Query(prompt, tuple(until), config, key)

    def _loglikelihood_tokens(
        self,
        requests: list[tuple[tuple[str, str] | None, list[int], list[int]]],
        disable_tqdm: bool = False,
        check_greedy: bool | None = None,
    ) -> list[tuple[float, bool]]:
        check_greedy = self.options.is_check_greedy if check_greedy is None else check_greedy
        pairs = []
        for _, context, target in requests:
            if len(target) >= self.max_length:
                log.warning("a target of %d tokens is cut on the left to %d", len(target), self.max_length - 1)
                cut_off = len(target) - self.max_length + 1
                context, target = target[cut_off - 1 : cut_off], target[cut_off:]
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
        what the run cost, since results are written by the first process only."""
        self._costs = self.gather_object((self.stats, self.reused, self.unfinished)) or []

    def get_model_info(self) -> dict[str, Any]:
        """What the results file says of the model, its settings and its speed."""
        total, reused, unfinished = Stats(), 0, 0
        for stats, again, cut_off in self._costs or [(self.stats, self.reused, self.unfinished)]:
            total.add(stats)
            reused += again
            unfinished += cut_off
        libraries = ("torch", "transformers", "lm_eval")
        device = torch.cuda.get_device_name(self.device) if self.device.type == "cuda" else "cpu"
        return {
            "model_name": self.options.pretrained,
            **({"model_adapter": self.options.adapter} if self.options.adapter else {}),
            "model_family": self.model.spec.family,
            "model_num_parameters": sum(p.numel() for p in self.model.network.parameters()),
            "model_dtype": str(self.model.dtype),
            "model_fingerprint": self._fingerprint[:16],
            "model_device": device,
            "model_max_length": self.max_length,
            "processes": self.world_size,
            "settings": {k: v for k, v in self._configure({}).given().items() if v is not None},
            "speed": {**total.summary(), "reused_answers": reused, "answers_cut_at_gen_length": unfinished},
            "versions": {"fastdllm": fastdllm.__version__, **{n: importlib.metadata.version(n) for n in libraries}},
        }


def _stops(kwargs: Mapping[str, Any]) -> list[str]:
    """The stop strings among generation kwargs (`stop` is OpenAI's name). ValueError for what is none."""
    until = handle_stop_sequences(kwargs.get("stop") or kwargs.get("until"), None)
    if not all(isinstance(stop, str) for stop in until):
        raise ValueError(f"until={until!r} must be a text or a list of texts")
    return until


@contextmanager
def _naming(request: Instance) -> Iterator[None]:
    """A ValueError from within says which document it is about."""
    try:
        yield
    except ValueError as error:
        raise ValueError(f"task {request.task_name or '(no name)'}, document {request.doc_id}: {error}") from error
