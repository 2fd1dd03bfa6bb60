# SPDX-License-Identifier: Apache-2.0
"""The lm-eval adapter on the shipped tiny-llada: what it asks the model, and what it answers."""

from __future__ import annotations

import json
import logging
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from fastdllm.evaluation.harness import DiffusionLM
from fastdllm.text import cut, is_cut
from tests.evaluation.asking import QUESTIONS, adapter, chat, evaluate, generations

pytestmark = pytest.mark.usefixtures("loaded_once")


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
