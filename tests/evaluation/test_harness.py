# SPDX-License-Identifier: Apache-2.0
"""The lm-eval adapter on the shipped tiny-llada: what it asks the model, what it answers, and what it keeps."""

from __future__ import annotations

import json
import logging
from pathlib import Path
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

import fastdllm
from fastdllm.evaluation import answers
from fastdllm.evaluation.options import read_batch_size
from fastdllm.tasks import TASKS_DIR
from fastdllm.text import cut, is_cut
from tests.examples import examples

lm_eval = pytest.importorskip("lm_eval")
from lm_eval.api.instance import Instance  # noqa: E402 - only after the import above did not skip
from lm_eval.tasks import TaskManager  # noqa: E402

from fastdllm.evaluation import ADAPTERS, register  # noqa: E402
from fastdllm.evaluation.harness import DiffusionLM  # noqa: E402

QUESTIONS = [
    json.loads(line)["question"] for line in (TASKS_DIR / "gsm_symbolic" / "test.jsonl").read_text().splitlines()[:5]
]


@pytest.fixture(scope="module", autouse=True)
def loaded_once() -> Any:
    """Every adapter of this file shares one tiny-llada."""
    model, load = fastdllm.load("tiny-llada", "cpu"), fastdllm.load
    patch = pytest.MonkeyPatch()
    patch.setattr(fastdllm, "load", lambda name, *rest, **how: model if name == "tiny-llada" else load(name, *rest, **how))
    yield
    patch.undo()


def adapter(batch_size: int | str = 2, device: str = "cpu", **options: Any) -> DiffusionLM:
    return DiffusionLM(pretrained="tiny-llada", batch_size=batch_size, device=device, **options)


def generations(*asked: tuple[str, dict[str, Any]]) -> list[Instance]:
    return [Instance("generate_until", {}, args, i, ("task", i, 1)) for i, args in enumerate(asked)]


def chat(model: DiffusionLM, question: str) -> str:
    return model.apply_chat_template([{"role": "user", "content": question}])


def test_answers_come_in_the_order_of_the_requests_and_alike_in_every_batch() -> None:
    model = adapter(1, gen_length=64, block_length=16)
    asked = [(chat(model, question), {"until": []}) for question in QUESTIONS]
    one = [model.generate_until(generations(ask), disable_tqdm=True)[0] for ask in asked]
    assert len(set(one)) == len(one)
    for size in (3, "auto"):
        batched = adapter(size, gen_length=64, block_length=16)
        assert batched.generate_until(generations(*asked[::-1]), disable_tqdm=True) == one[::-1]


def test_a_sampled_answer_depends_on_its_request_alone() -> None:
    asked = [(chat(adapter(), question), {"do_sample": True, "temperature": 5.0}) for question in QUESTIONS[:3]]
    run = adapter(gen_length=32)
    together = run.generate_until(generations(*asked, asked[0]), disable_tqdm=True)
    assert adapter(gen_length=32).generate_until(generations(asked[1]), disable_tqdm=True) == together[1:2]
    assert together[0] != together[3], "the same request again is another draw"
    assert adapter(gen_length=32, seed=1).generate_until(generations(*asked), disable_tqdm=True) != together[:3]


@pytest.mark.parametrize("until", ["####", ["####"], ["", "nowhere", "####"], ("####",)])
def test_stop_strings_cut_the_text(until: Any) -> None:
    model = adapter(gen_length=96)
    prompt = chat(model, QUESTIONS[0])
    whole, stopped = model.generate_until(
        generations((prompt, {}), (prompt, {"until": list(until) if isinstance(until, tuple) else until})), disable_tqdm=True
    )
    assert "####" in whole
    assert stopped == whole[: whole.index("####")]


@pytest.mark.parametrize("until", [[], "", None, [""]])
def test_without_a_stop_string_the_text_is_whole(until: Any) -> None:
    model = adapter(gen_length=32)
    prompt = chat(model, QUESTIONS[0])
    assert len(set(model.generate_until(generations((prompt, {}), (prompt, {"until": until})), disable_tqdm=True))) == 1


def test_stop_strings_may_be_escaped() -> None:
    plain, escaped = adapter(gen_length=96), adapter(gen_length=96, escape_until=True)
    request = (chat(plain, QUESTIONS[0]), {"until": ["\\n"]})
    whole, line = (model.generate_until(generations(request), disable_tqdm=True)[0] for model in (plain, escaped))
    assert "\n" in whole and line == whole.split("\n")[0]


def test_cut_takes_the_first_of_all_stops() -> None:
    assert cut("one two three", ("three", "two", "")) == "one "
    assert cut("one", ()) == cut("one", ("two",)) == "one"


@settings(deadline=None)
@given(st.text("ab", max_size=8), st.text("ab", max_size=8), st.lists(st.text("ab", min_size=1, max_size=4), max_size=3))
def test_what_is_cut_for_sure_is_cut_the_same_whatever_follows(text: str, more: str, stops: list[str]) -> None:
    if is_cut(text, tuple(stops)):
        assert cut(text, tuple(stops)) == cut(text + more, tuple(stops)) != text
    for stop in stops[:1]:
        assert is_cut(text + stop, (stop,)), "a single stop string decides as soon as it is there"


def test_a_longer_stop_string_may_still_begin_earlier() -> None:
    assert not is_cut("so: b", ("b", ": baa")) and cut("so: baa", ("b", ": baa")) == "so"
    assert is_cut("so: bbbb", ("b", ": baa"))


def test_a_stop_string_ends_decoding_with_its_block_and_changes_no_text() -> None:
    asked = [(chat(adapter(), question), {"until": ["\n", "nowhere"]}) for question in QUESTIONS[:3]]
    options = {"gen_length": 48, "block_length": 8, "decoder": "quota", "cache": "dual", "stop_ids": ()}
    two, one, full = (adapter(size, **options) for size in (2, 1, 3))
    whole = full.generate_until(generations(*((prompt, {}) for prompt, _ in asked)), disable_tqdm=True)
    assert set(full.stats.row_tokens) == {48}
    for run in (one, two):
        assert run.generate_until(generations(*asked), disable_tqdm=True) == [text.split("\n")[0] for text in whole]
        # One token a step: what counts is what was decoded, whole blocks, and less than the whole length.
        assert sorted(run.stats.row_tokens) == sorted(run.stats.row_forwards)
        assert all(tokens % 8 == 0 for tokens in run.stats.row_tokens) and min(run.stats.row_tokens) < 48
        assert sorted(run.stats.row_tokens) == sorted(one.stats.row_tokens)


def test_requests_that_differ_in_their_stop_strings_are_answered_apart(tmp_path: Path) -> None:
    prompt = chat(adapter(), QUESTIONS[0])
    stopped = (prompt, {"until": ["\n"]})
    for _ in range(2):
        run = adapter(gen_length=96, block_length=8, save_dir=str(tmp_path))
        line, whole = run.generate_until(generations(stopped, (prompt, {})), disable_tqdm=True)
        assert line == whole.split("\n")[0] and len(line) < len(whole)
    assert run.reused == 2


def lengths(model: DiffusionLM, **kwargs: Any) -> int:
    return model._configure(kwargs).gen_length


def test_who_decides_the_length_of_an_answer() -> None:
    open_, fixed = adapter(), adapter(max_new_tokens=24)
    assert lengths(open_) == lengths(open_, until=["x"]) == 256
    assert lengths(open_, max_gen_toks=40) == 40
    assert lengths(open_, max_new_tokens=48.0) == 48
    assert lengths(fixed) == lengths(fixed, max_gen_toks=40) == 24
    assert lengths(open_, max_gen_toks=40, do_sample=False, temperature=0.5) == 40


def test_generation_kwargs_are_honoured_and_model_args_win() -> None:
    config = adapter(threshold=0.8)._configure({"temperature": 0.5, "top_p": 0.9, "do_sample": True, "threshold": 0.6})
    assert (config.temperature, config.top_p, config.threshold) == (0.5, 0.9, 0.8)
    assert adapter()._configure({"temperature": 0.5, "do_sample": False}).temperature == 0
    with pytest.raises(ValueError, match="unknown option temprature"):
        adapter()._configure({"temprature": 1})
    with pytest.warns(UserWarning, match="num_beams=4 is ignored"):
        assert adapter()._configure({"num_beams": 4}) == adapter()._configure({"num_beams": 1})


def test_a_long_prompt_loses_its_beginning(caplog: pytest.LogCaptureFixture) -> None:
    model, told = adapter(gen_length=16), []
    model.cache_hook.add_partial = lambda *args: told.append(args)
    logging.getLogger("lm_eval").propagate = True
    with caplog.at_level(logging.WARNING):
        text = "far away " * 400 + chat(model, QUESTIONS[0])
        model.generate_until(generations((text, {}), (chat(model, QUESTIONS[0]), {})), disable_tqdm=True)
    assert "is cut on the left to 496: gen_length=16 tokens follow" in caplog.text
    assert "1 of 2 prompts lost their beginning" in caplog.text and "--num_fewshot" in caplog.text
    assert [kind for kind, *_ in told] == ["generate_until"] * 2
    caplog.clear()
    model.generate_until(generations((chat(model, QUESTIONS[0]), {})), disable_tqdm=True)
    assert "lost their beginning" not in caplog.text
    with pytest.raises(ValueError, match="gen_length=512 leaves no room for a question in the model's context of 512"):
        adapter(gen_length=512).generate_until(generations(("hello", {})), disable_tqdm=True)


def test_the_template_is_the_models_and_applied_by_lm_eval_alone() -> None:
    model = adapter(gen_length=16)
    history = [{"role": "user", "content": "Hi"}, {"role": "assistant", "content": "The answer"}]
    text = model.apply_chat_template(history, add_generation_prompt=False)
    assert text.endswith("The answer"), "an opened answer stays open"
    assert model.tok_encode(model.prompt_of(generations((text, {}))[0])) == model.tok_encode(text)
    assert model.chat_template(True) == model.tokenizer.chat_template
    assert model.tokenizer_name == "tiny-llada"


def test_log_likelihoods_come_in_order_and_alike_in_every_batch() -> None:
    pairs = [("Question: 2 + 2?\nAnswer:", " 4"), ("One", " two three four"), ("", "alone"), ("a b", " c")] * 2
    asked = [Instance("loglikelihood", {}, pair, i, ("task", i, 1)) for i, pair in enumerate(pairs)]
    runs = [adapter(size, mc_num=5).loglikelihood(asked, disable_tqdm=True) for size in (1, 3, 64)]
    assert runs[0][:4] == runs[0][4:]
    for run in runs:
        assert [value for value, _ in run] == pytest.approx([value for value, _ in runs[0]], abs=1e-3)
        assert all(isinstance(greedy, bool) for _, greedy in run)


def test_rolling_scores_every_token_once(monkeypatch: pytest.MonkeyPatch) -> None:
    model, windows = adapter(mc_num=1), []
    monkeypatch.setattr(
        model, "_loglikelihood_tokens", lambda asked, *rest: [windows.append(w) or (float(len(w[2])), False) for w in asked]
    )
    texts = ["far away " * 400, "short", "one more"]
    asked = [Instance("loglikelihood_rolling", {}, (text,), i, ("task", i, 1)) for i, text in enumerate(texts)]
    ids = [model.tok_encode(text) for text in texts]
    assert model.loglikelihood_rolling(asked, disable_tqdm=True) == [float(len(one)) for one in ids]
    assert len(windows) > 3 and [t for _, _, target in windows for t in target] == [t for one in ids for t in one]
    assert all(context and len(context) + len(target) <= model.max_length for _, context, target in windows)


def test_rolling_is_the_sum_of_its_windows() -> None:
    model, text = adapter(mc_num=3), "Ann has 3 apples."
    asked = [Instance("loglikelihood_rolling", {}, (text,), 0, ("task", 0, 1))]
    value = model._loglikelihood_tokens([(None, [model.prefix_token_id], model.tok_encode(text))], True)[0][0]
    assert model.loglikelihood_rolling(asked, disable_tqdm=True) == [pytest.approx(value)]


@pytest.fixture
def decoded(monkeypatch: pytest.MonkeyPatch) -> list[int]:
    """How many answers each call of `decode` was asked for."""
    calls: list[int] = []

    def counted(model: Any, requests: list, *chosen: Any, **limits: Any) -> Any:
        calls.append(len(requests))
        return decode(model, requests, *chosen, **limits)

    decode = answers.decode
    monkeypatch.setattr(answers, "decode", counted)
    return calls


def test_an_interrupted_run_goes_on_where_it_stopped(tmp_path: Path, decoded: list[int], monkeypatch: Any) -> None:
    options = {"gen_length": 32, "save_dir": str(tmp_path), "batch_size": 1}
    asked = [(chat(adapter(), question), {"until": ["####"]}) for question in QUESTIONS[:4]]
    expected = adapter(1, gen_length=32).generate_until(generations(*asked), disable_tqdm=True)
    add = answers.AnswerStore.add
    with monkeypatch.context() as patch:

        def interrupted(self: answers.AnswerStore, *entry: Any) -> None:
            if len(self._known) == 2:
                raise KeyboardInterrupt
            add(self, *entry)

        patch.setattr(answers.AnswerStore, "add", interrupted)
        with pytest.raises(KeyboardInterrupt):
            adapter(**options).generate_until(generations(*asked), disable_tqdm=True)
    (file,) = tmp_path.glob("*.jsonl")
    with file.open("a") as lines:
        lines.write('{"key": "abc", "ids": [1, 2')  # the process died while it wrote
    decoded.clear()
    again = adapter(**options)
    assert again.generate_until(generations(*asked), disable_tqdm=True) == expected
    assert decoded == [2] and again.reused == 2
    # The torn line is ignored and did not spoil the one after it.
    last = adapter(**options)
    assert last._answers.torn == 1
    assert last.generate_until(generations(*asked), disable_tqdm=True) == expected
    assert decoded == [2] and last.get_model_info()["speed"]["reused_answers"] == 4


@pytest.mark.parametrize(
    ("change", "fresh"),
    [
        ({}, 0),
        ({"batch_size": 2}, 0),
        ({"threshold": 0.5}, 1),
        ({"gen_length": 24}, 1),
        ({"cache": "none"}, 1),
        ({"seed": 7}, 1),
    ],
)
def test_an_answer_is_used_again_only_for_equal_settings(
    change: dict, fresh: int, tmp_path: Path, decoded: list[int]
) -> None:
    options = {"gen_length": 16, "save_dir": str(tmp_path)}
    request = (chat(adapter(), QUESTIONS[0]), {})
    adapter(**options).generate_until(generations(request), disable_tqdm=True)
    decoded.clear()
    adapter(**{**options, **change}).generate_until(generations(request), disable_tqdm=True)
    assert len(decoded) == fresh
    changed = (chat(adapter(), QUESTIONS[1]), {})
    adapter(**options).generate_until(generations(changed), disable_tqdm=True)
    assert len(decoded) == fresh + 1, "another prompt is another answer"


def test_other_weights_are_another_model(tmp_path: Path) -> None:
    model = fastdllm.load("tiny-llada")
    before = model.fingerprint()
    assert model.fingerprint() == before
    model.network.norm.data[0] += 1
    assert model.fingerprint() != before
    model.network.norm.data[0] -= 1


@pytest.mark.parametrize(
    ("value", "largest", "size"), [("8", None, 8), (4, None, 4), (None, None, 1), ("auto", None, 8), ("auto:4", 64, 64)]
)
def test_batch_sizes(value: Any, largest: int | None, size: int) -> None:
    assert read_batch_size(value, largest) == size


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"batch_size": "many"}, "batch_size='many' must be a number of at least 1, auto or auto:N"),
        ({"batch_size": 0}, "batch_size=0 must be a number of at least 1"),
        ({"batch_size": "automatic"}, "batch_size='automatic' must be"),
        ({"device": "quantum"}, "device='quantum' cannot be used here .* allowed are auto, cpu"),
        ({"pretrained": None}, r"pretrained \(or model_path\) is missing"),
        ({"pretrained": None, "model_path": "nowhere"}, "'nowhere' is neither a folder nor a shipped name"),
        ({"gen_lenght": 8}, "did you mean 'gen_length'"),
        ({"block_length": 10**6}, "block_length=1000000 must be at most the model's context of 512"),
        ({"cache": "sub_block"}, "cache='sub_block' does not fit the family 'llada'; allowed are"),
        ({"reuse_k": 2, "layer_subset": "middle"}, "reuse_k=2 needs cache='block'"),
        ({"likelihood": "first_token"}, "likelihood='first_token' does not fit the family 'llada'"),
        ({"mc_num": 0}, "mc_num=0 must be at least 1"),
        ({"dtype": "float8"}, "dtype='float8' is unknown"),
    ],
)
def test_bad_construction_says_what_is_wrong(options: dict, message: str, monkeypatch: pytest.MonkeyPatch) -> None:
    from fastdllm.models import load

    monkeypatch.setattr(fastdllm, "load", load)
    with pytest.raises((ValueError, FileNotFoundError), match=message):
        DiffusionLM(**{"pretrained": "tiny-llada", "device": "cpu", **options})


def test_without_a_gpu_the_default_device_is_the_cpu(caplog: pytest.LogCaptureFixture, monkeypatch: Any) -> None:
    monkeypatch.setattr("torch.cuda.is_available", lambda: False)
    logging.getLogger("lm_eval").propagate = True
    with caplog.at_level(logging.WARNING):
        assert adapter(device="cuda:0").device.type == "cpu"
    assert "no CUDA device: running on the CPU" in caplog.text
    with pytest.raises(ValueError, match="device='cuda:3' cannot be used here"):
        adapter(device="cuda:3")


def test_registering_keeps_lm_evals_models_and_the_first_class() -> None:
    from lm_eval.api.registry import get_model

    register("fastdllm_test", DiffusionLM)
    register("fastdllm_test", type("Other", (DiffusionLM,), {}))
    assert get_model("fastdllm_test") is DiffusionLM
    assert get_model("dummy")


def evaluate(model: DiffusionLM, task: str, **options: Any) -> dict[str, Any]:
    tasks = TaskManager(include_path=str(TASKS_DIR), include_defaults=False)
    options = {"bootstrap_iters": 0, "log_samples": True, **options}
    return lm_eval.simple_evaluate(model, tasks=[task], task_manager=tasks, **options)


def test_generation_task_from_end_to_end(capfd: pytest.CaptureFixture) -> None:
    model = adapter(4, gen_length=96, show_speed=True)
    results = evaluate(model, "gsm_symbolic", limit=6, num_fewshot=0, apply_chat_template=True)
    scores = results["results"]["gsm_symbolic"]
    samples = [s for s in results["samples"]["gsm_symbolic"] if s["filter"] == "strict-match"]
    assert scores["exact_match,strict-match"] == sum(s["exact_match"] for s in samples) / 6 > 0
    for sample in samples:
        prompt = sample["arguments"][0][0]
        assert prompt.count("<|user|>") == prompt.count("<|assistant|>") == 1
    info = results["config"]
    json.dumps(info["speed"])
    assert info["speed"]["samples"] == 6 and 0 < info["speed"]["nfe"] < 96
    assert info["speed"]["tokens_per_forward"] == pytest.approx(info["speed"]["tokens"] / (6 * info["speed"]["nfe"]))
    assert info["settings"]["gen_length"] == 96 and info["model_device"] == "cpu"
    assert set(info["versions"]) >= {"fastdllm", "torch", "lm_eval"}
    assert samples[0]["resps"][0][0] not in capfd.readouterr().out, "answers are not printed"


def test_multiple_choice_task_from_end_to_end() -> None:
    results = evaluate(adapter(8, mc_num=2, is_check_greedy=False), "gsm_symbolic_mc", limit=3, num_fewshot=0)
    assert 0 <= results["results"]["gsm_symbolic_mc"]["acc,none"] <= 1
    assert len(results["samples"]["gsm_symbolic_mc"]) == 3


def test_v2_scores_choices_and_rephrases_only_when_asked() -> None:
    from fastdllm.evaluation.adapters import FastDLLMv2EvalHarness

    options = {"pretrained": "tiny-fast-dllm-v2", "device": "cpu"}
    whole = FastDLLMv2EvalHarness(**options)
    first = FastDLLMv2EvalHarness(**options, likelihood="first_token", cot_prompt=True)
    scores = [evaluate(model, "gsm_symbolic_mc_digit", limit=2)["results"] for model in (whole, first)]
    assert all(0 <= of["gsm_symbolic_mc_digit"]["acc,none"] <= 1 for of in scores)
    args = ("Question: 1 + 1?\nAnswer:", {})
    gsm8k, other = (Instance("generate_until", {}, args, 0, (task, 0, 1)) for task in ("gsm8k_cot", "gsm_symbolic"))
    assert whole.prompt_of(gsm8k) == whole.prompt_of(other) == first.prompt_of(other) == args[0]
    assert first.prompt_of(gsm8k).startswith("Question: 1 + 1?\nPlease reason step by step")


@pytest.fixture(scope="module")
def model() -> DiffusionLM:
    return adapter()


def likelihoods(model: DiffusionLM, *pairs: tuple[str, str]) -> list[tuple[float, bool]]:
    return model.loglikelihood(
        [Instance("loglikelihood", {}, pair, i, ("choices", i, 1)) for i, pair in enumerate(pairs)], disable_tqdm=True
    )


def test_a_choice_that_merges_with_its_context_is_scored() -> None:
    model = adapter(8, mc_num=1)
    pairs = [("The answe", "r"), ("The answe", "d"), ("He is a stude", "nt"), ("He is a stude", "s")]
    for (value, _), (context, choice) in zip(likelihoods(model, *pairs), pairs, strict=True):
        assert value < -0.01, (context, choice)
    assert likelihoods(model, ("The answer", "")) == [(0.0, True)]
    assert likelihoods(model, ("", "")) == [(0.0, True)]


@settings(deadline=None, max_examples=examples(300))
@given(st.text("aber answ\n .é\u0301", max_size=12), st.text("aber answ\n .é\u0301", min_size=1, max_size=8))
def test_nothing_of_a_continuation_is_lost(model: DiffusionLM, context: str, continuation: str) -> None:
    whole = model.tok_encode(context + continuation)
    before, target = model._encode_pair(context, continuation)
    assert before and target
    joined = before + target if before != [model.prefix_token_id] or whole[:1] == before else target
    assert joined == whole
    if joined is not target:  # what comes before the cut belongs to the context
        seen, text = (model.tokenizer.decode(ids) for ids in (before, whole))
        assert text.startswith(seen) and len(seen) <= len(model.tokenizer.decode(model.tok_encode(context)))


def test_a_pair_without_a_join_is_cut_as_lm_eval_cuts_it() -> None:
    model = adapter()
    for context, continuation in [
        ("Question: 2?\nAnswer:", " 4"),
        ("One ", "two"),
        ("far away", " and so on"),
        ("a\n", "b"),
    ]:
        pair = super(DiffusionLM, model)._encode_pair(context, continuation)
        assert model._encode_pair(context, continuation) == pair


def test_a_target_longer_than_the_context_loses_its_beginning() -> None:
    model = adapter(mc_num=1, is_check_greedy=False)
    ((value, _),) = likelihoods(model, ("Here: ", "far away " * 600))
    assert value < 0


@pytest.mark.parametrize("family", ["llada", "dream", "fast-dllm-v2"])
def test_an_empty_prompt_is_answered(family: str) -> None:
    model = DiffusionLM(pretrained=f"tiny-{family}", device="cpu", gen_length=16)
    (text,) = model.generate_until(generations(("", {"until": []})), disable_tqdm=True)
    assert isinstance(text, str)


def test_cache_none_as_text_decodes_without_a_cache() -> None:
    def cache(arguments: str) -> str:
        return DiffusionLM.create_from_arg_string(arguments, {"device": "cpu"})._configure({}).cache

    assert (
        cache("pretrained=tiny-llada,cache=none,threshold=0.9") == cache("pretrained=tiny-llada,use_cache=False") == "none"
    )
    assert cache("pretrained=tiny-llada,cache=none,use_cache=False") == "none"
    assert cache("pretrained=tiny-llada,cache=prefix") == "prefix"
    with pytest.raises(ValueError, match="cache='none' and use_cache"):
        cache("pretrained=tiny-llada,use_cache=True,cache=none")


@pytest.mark.parametrize("task", ["max_gen_toks", "max_new_tokens", "gen_length", "max_tokens"])
@pytest.mark.parametrize("user", ["max_gen_toks", "max_new_tokens", "gen_length", "max_tokens"])
def test_what_the_command_line_gives_replaces_the_tasks_value(task: str, user: str) -> None:
    kwargs: dict[str, Any] = {task: 64, "until": ["x"]}
    kwargs.update({user: 16})  # as lm-eval does with --gen_kwargs
    assert adapter()._configure(kwargs).gen_length == 16
    assert adapter(max_new_tokens=24)._configure(kwargs).gen_length == 24


def test_who_says_anything_of_the_cache_says_it_all() -> None:
    assert adapter(cache="dual")._configure({"use_cache": False}).cache == "dual"
    assert adapter(use_cache=True)._configure({"cache": "none"}).cache == "prefix"
    assert adapter()._configure({"use_cache": False}).cache == "none"


def named(task: str, *asked: tuple[str, dict[str, Any]]) -> list[Instance]:
    return [Instance("generate_until", {}, args, i, (task, i, 1)) for i, args in enumerate(asked)]


def test_the_options_of_all_requests_are_checked_before_any_is_answered(decoded: list[int]) -> None:
    model = adapter(gen_length=None)
    asked = named("good", ("hello", {"max_gen_toks": 16}))
    asked += named("long", ("hello", {"max_gen_toks": 32768})) + named("odd", ("hello", {"beams": 2}), ("hi", {"beams": 2}))
    with pytest.raises(ValueError, match=r"task long: gen_length=32768 leaves no room.*; task odd: unknown option beams"):
        model.generate_until(asked, disable_tqdm=True)
    assert decoded == []
    with pytest.raises(ValueError, match=r"task x: until=5|task x: Expected"):
        model.generate_until(named("x", ("hello", {"until": 5})), disable_tqdm=True)


def test_the_steps_of_a_run_are_at_most_one_a_token() -> None:
    model = adapter(steps=128, decoder="quota", stop_ids=())
    model.generate_until(named("t", ("x", {"max_gen_toks": 8})), disable_tqdm=True)
    assert model.stats.row_forwards == [8]


def test_the_idioms_of_other_libraries() -> None:
    model = adapter()
    assert model._configure({"do_sample": True}).temperature == 1
    assert model._configure({"do_sample": "true", "temperature": 0.5}).temperature == 0.5
    assert model._configure({"do_sample": False, "temperature": 0.5}).temperature == 0
    assert adapter(temperature=0.2)._configure({"do_sample": True}).temperature == 0.2
    with pytest.raises(ValueError, match=r"max_length=512.*gen_length"):
        model._configure({"max_length": 512})
    asked = generations((chat(model, QUESTIONS[0]), {"until": ["nowhere"], "stop": "####"}))
    assert "####" not in adapter(gen_length=96).generate_until(asked, disable_tqdm=True)[0]


def test_a_fault_of_one_document_names_it() -> None:
    model = adapter(gen_length=16)
    with pytest.raises(ValueError, match=r"task t, document 1: .*lone surrogate"):
        model.generate_until(named("t", ("fine", {}), ("a\ud800", {})), disable_tqdm=True)
    with pytest.raises(ValueError, match=r"task choices, document 0: .*lone surrogate"):
        likelihoods(model, ("a\ud800", "b"))


def test_a_loaded_model_stands_in_for_its_name() -> None:
    model = fastdllm.load("tiny-llada", "cpu")
    run = DiffusionLM(pretrained=model, device="cuda:0", gen_length=16)
    assert run.model is model and run.tokenizer_name == "tiny-llada" and run.device == model.device
    json.dumps(run.get_model_info())
    with pytest.raises(ValueError, match="dtype='float32' has no meaning for a model that is loaded"):
        DiffusionLM(pretrained=model, dtype="float32")
    with pytest.raises(ValueError, match=r"model is of type dict; pass what fastdllm.load"):
        DiffusionLM(pretrained={})


def test_control_tokens_of_a_document_are_text_and_the_system_text_is_kept() -> None:
    model = adapter()
    eos = model.tokenizer.eos_token
    plain, told = (model.apply_chat_template([{"role": "user", "content": text}]) for text in ("x", f"What is {eos}?"))
    count = [model.tok_encode(text).count(model.tokenizer.eos_token_id) for text in (plain, told)]
    assert count[0] == count[1]
    with pytest.warns(UserWarning, match="no system role"):
        text = model.apply_chat_template([{"role": "system", "content": "Be brief."}, {"role": "user", "content": "Hi"}])
    assert "Be brief.\n\nHi" in text


def test_answers_as_long_as_allowed_are_counted() -> None:
    model = adapter(gen_length=4)
    model.generate_until(generations((chat(model, QUESTIONS[0]), {})), disable_tqdm=True)
    assert model.get_model_info()["speed"]["answers_cut_at_gen_length"] == 1
    model = adapter(gen_length=128)
    model.generate_until(generations((chat(model, QUESTIONS[0]), {})), disable_tqdm=True)
    assert model.get_model_info()["speed"]["answers_cut_at_gen_length"] == 0


def test_the_fingerprint_covers_every_weight() -> None:
    model = fastdllm.load("tiny-llada")
    before = model.fingerprint()
    rows = model.network.embed.weight.data
    kept = rows.clone()
    for change in (lambda: rows[1:].copy_(kept[1:].flip(0)), lambda: rows[77, 101].add_(1e-3), lambda: rows[-1, -1].neg_()):
        change()
        assert model.fingerprint() != before
        rows.copy_(kept)
    assert model.fingerprint() == before
    model.banned[7] = True  # as with a tokenizer that lacks the token
    assert model.fingerprint() != before


@pytest.mark.parametrize(
    "line",
    [
        '{"key": "a", "ids": [1e999]}',
        '{"key": "a", "ids": [1, [2]]}',
        '{"key": "a", "ids": "123"}',
        '{"key": "a", "ids": [-1]}',
        '{"key": "a", "ids": [100000]}',
        '{"key": "a", "ids": [1.0]}',
        '{"key": "a", "ids": [true]}',
        '{"key": 3, "ids": [1]}',
        '{"ids": [1]}',
        "null",
        "5",
        "[1]",
        "[" * 100_000 + "]" * 100_000,
    ],
)
def test_a_line_that_is_no_answer_is_named(line: str, tmp_path: Path) -> None:
    (tmp_path / "answers_3.jsonl").write_text('{"key": "b", "ids": [1]}\n' + line + "\n")
    with pytest.raises(ValueError, match=r"answers_3\.jsonl:2 is no answer; a line has a key and ids"):
        answers.AnswerStore(tmp_path, 0, 2048)


def test_what_is_no_file_or_folder_is_named(tmp_path: Path) -> None:
    import os

    file = tmp_path / "file"
    file.write_text("x")
    for folder in (file, file / "below"):
        with pytest.raises(ValueError, match="is no folder"):
            answers.AnswerStore(folder)
    for make in (os.mkfifo, os.mkdir):
        make(tmp_path / "answers_1.jsonl")
        with pytest.raises(ValueError, match=r"answers_1\.jsonl is no regular file"):
            answers.AnswerStore(tmp_path)
        (os.rmdir if make is os.mkdir else os.unlink)(tmp_path / "answers_1.jsonl")


@pytest.mark.skipif(not Path("/dev/full").exists(), reason="needs a device that is full")
def test_a_full_disk_is_told(tmp_path: Path) -> None:
    store = answers.AnswerStore(tmp_path)
    store._path = Path("/dev/full")
    with pytest.raises(OSError, match=r"an answer could not be written .*No space left on device.*kept"):
        store.add("a", torch.tensor([1]), "x")


def test_every_adapter_is_known_by_name() -> None:
    from lm_eval.api.registry import get_model

    for name in ADAPTERS:
        assert issubclass(get_model(name), DiffusionLM)
