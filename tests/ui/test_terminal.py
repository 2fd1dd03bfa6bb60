# SPDX-License-Identifier: Apache-2.0
"""The terminal chat on lines from a pipe: questions, commands, settings, wrong input. It always stays alive."""

from __future__ import annotations

import copy
import io
import json
import sys
from collections.abc import Callable
from pathlib import Path

import pytest
import torch

import fastdllm
from fastdllm import DecodeConfig, Model
from fastdllm.trace import Trace
from fastdllm.ui import options, terminal
from fastdllm.ui.screen import PlainScreen, answer_text, printable, spans
from fastdllm.ui.session import COMMANDS, Session

Chat = Callable[..., tuple[int, str]]


def test_a_piped_question_is_answered_with_its_figures(chat: Chat, question: str) -> None:
    code, out = chat(question)
    assert code == 0
    assert "39" in out.split(question)[-1], "the sample question of the tiny model"
    assert "tokens/forward" in out and "tokens/s" in out
    assert "tiny-llada is a small model" in out


def test_the_sudoku_model_is_introduced_and_fills_its_sample(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture
) -> None:
    monkeypatch.setattr(sys, "stdin", io.TextIOWrapper(io.BytesIO(options.SUDOKU.sample.encode())))
    assert terminal.main(["--model", "tiny-sudoku", "--device", "cpu"]) == 0
    out = capsys.readouterr().out
    assert f"tiny-sudoku is {options.SUDOKU.note}" in out and "word problems" not in out
    assert "1423 3241 2134 4312" in out


def test_an_empty_input_leaves_with_zero(chat: Chat) -> None:
    assert chat("")[0] == 0


@pytest.mark.parametrize(
    ("line", "expected"),
    [
        ("/foo", "unknown command /foo"),
        ("/preset fast", "unknown command /preset; did you mean /set preset VALUE? /help lists them"),
        ("/hel", "did you mean /help?"),
        ("/set threshold 7", "threshold=7.0 must lie in [0, 1]"),
        ("/set treshold 0.8", "did you mean 'threshold'?"),
        ("/set threshold", "usage: /set NAME VALUE"),
        ("/set cache block", "cache='block' does not fit the family 'llada'"),
        ("/set gen_length 600", "leaves no room for a question"),
        ("/set decoder nonsense", "decoder='nonsense' is unknown"),
        ("/set runner cuda_graph", "runner='cuda_graph' needs a model on a GPU"),
        ("/set block_length 100000", "block_length=100000 must be at most the model's context of 512"),
        ("/set max_length 64", "gen_length counts the new tokens only"),
        ("/set temperature inf", "temperature='inf' must be of type float, and finite"),
        ("/set depth 2", "depth='2' is an option of decoder draft_verify, but decoder is 'threshold'"),
        ("/model nowhere", "could not load 'nowhere'"),
        ("/reset now", "/reset takes nothing after it; got 'now'"),
        ("/retry and explain", "/retry takes nothing after it; got 'and explain'"),
        ("/stats 3", "/stats takes nothing after it"),
        ("/help /pace", "/pace SECONDS waits"),
        ("/help pase", "unknown command /pase; did you mean /pace?"),
        ("/", "unknown command /; /help lists them"),
        ("   ", ""),
        ("y" * 100_000, "the message is too long"),
        ("Emoji 😀 and \x1b[31m control \x07 characters \x00", "␛[31m"),
        ("half a pair \ud83d and <|mask|> <|eos|>", "tokens/forward"),
        ("//help is a message", "tokens/forward"),
    ],
)
def test_every_bad_line_is_answered_and_the_chat_goes_on(chat: Chat, line: str, expected: str) -> None:
    code, out = chat(line, "/set seed 5", "/exit", "/stats")
    assert code == 0
    assert expected in out
    assert "\x1b[31m" not in out and "\x07" not in out, "a message must not steer the terminal"
    after = out.split("> /set seed 5")[1]
    assert "cache dual" in after and "> /stats" not in after, "the settings line of /set, and nothing after /exit"


def test_commands_do_what_help_says(chat: Chat, question: str) -> None:
    code, out = chat(
        question,
        "/system Be brief.",
        question,
        "/reset",
        "/stats",
        "/set",
        "/set factor 1.5",
        "/set cache=none",
        "/set preset exact",
        "/help",
    )
    assert code == 0
    assert f"decoder {DecodeConfig(preset='exact').decoder}" in out.split("/set preset exact")[1]
    assert "no system role" in out and "new conversation" in out and "2 answers" in out
    assert "decoder factor" in out and "factor 1.5" in out and "cache none" in out
    assert all(f"/{name}" in out for name in COMMANDS)


def test_settings_say_what_runs(chat: Chat) -> None:
    """Not what was asked for: guidance needs cache none, and an adaptive decoder does not heed steps."""
    lines = ("cfg_scale 1", "cfg_scale 0", "stop_ids ()", "steps 8", "threshold 0.8", "max-new-tokens 40", "decoder default")
    code, out = chat(*(f"/set {line}" for line in lines), "/set", arguments=("--threshold", "0.7", "--steps", "10"))
    shown = dict(zip(("start", *lines, "all"), out.split("> /set"), strict=True))
    assert code == 0
    assert "decoder threshold (threshold 0.7)" in shown["start"] and "steps have no effect" in shown["start"]
    assert "cache none" in shown["cfg_scale 1"] and "guidance 1.0" in shown["cfg_scale 1"]
    assert "cache dual" in shown["cfg_scale 0"] and "guidance" not in shown["cfg_scale 0"]
    assert "decoder quota (8 steps)" in shown["steps 8"]
    assert "threshold 0.8" in shown["threshold 0.8"] and "40 new tokens" in shown["max-new-tokens 40"]
    assert "stop_ids=()" in shown["all"] and "gen_length=40" in shown["all"] and "threshold=0.8" in shown["all"]


def named(model: Model, name: str) -> Model:
    """The same network under a name of which nothing is known."""
    other = copy.copy(model)
    other.name = name
    return other


def test_a_model_of_single_questions_never_sees_the_one_before(chat: Chat, question: str) -> None:
    code, out = chat(question, "And if she had 9 fewer?", question, "/set gen_length 8", question)
    answers = [part.split("\n", 1)[1] for part in out.split(f"> {question}")[1:]]
    assert code == 0 and answers[0].split("tokens/forward")[0].split("·")[0] == answers[1].split("·")[0]
    assert out.count("each one starts a new conversation)") == 1, "told once"


def test_an_answer_that_its_length_cut_says_so(chat: Chat, question: str) -> None:
    out = chat(question, "/set gen_length 8", question)[1]
    whole, short = out.split("> /set gen_length 8")
    assert "cut at" not in whole and "(cut at 8 tokens; /set gen_length N allows more)" in short
    endless = chat("/set stop_ids ()", "/set gen_length 8", question)[1]
    assert "(cut at 8 tokens;" in endless, "as the page and the server say of an answer that no token ends"


def test_settings_outlive_a_model_whose_context_is_smaller(model: Model, question: str) -> None:
    small = fastdllm.load("tiny-sudoku", device="cpu")
    out = io.StringIO()
    models = {"tiny-llada": model, "tiny-sudoku": small}
    session = Session(models.__getitem__, DecodeConfig(gen_length=128, threshold=0.8), PlainScreen(out).say)
    for name, asked in (("tiny-llada", question), ("tiny-sudoku", options.SUDOKU.sample), ("tiny-llada", question)):
        terminal.run_command(session, f"/model {name}")
        terminal.answer(session, PlainScreen(out), asked)
    assert session.config == DecodeConfig(gen_length=128, threshold=0.8)
    described = [line for line in out.getvalue().splitlines() if "new tokens in blocks" in line]
    assert ["128 new" in line for line in described] == [True, False, True] and "threshold 0.8" in described[2]
    assert out.getvalue().count("loading tiny-") == 3 and "cut at" not in out.getvalue()


def test_retry_asks_again_with_other_draws_and_remembers_one_turn(model: Model, question: str) -> None:
    model = named(model, "a-chat-model")
    out = io.StringIO()
    session = Session(lambda _: model, DecodeConfig(gen_length=64, temperature=5.0), PlainScreen(out).say, model)
    terminal.run_command(session, "/retry")
    assert "nothing has been asked yet" in out.getvalue()
    terminal.answer(session, PlainScreen(out), question)
    found = [session.trace.answer()]
    for _ in range(2):
        terminal.run_command(session, "/retry")
        terminal.answer(session, PlainScreen(out), session.again)
        found.append(session.trace.answer())
        assert [m["role"] for m in session.conversation.messages] == ["user", "assistant"]
    assert len({tuple(ids) for ids in found}) == 3


def test_a_talk_and_a_trace_are_written_to_files(chat: Chat, question: str, tmp_path: Path) -> None:
    talk, markdown, trace = (tmp_path / name for name in ("talk.json", "talk.md", "trace.json"))
    nowhere = tmp_path / "none" / "x"
    lines = (
        "/trace early.json",
        question,
        f"/save {talk}",
        f"/save {markdown}",
        f"/trace {trace}",
        f"/save {nowhere}",
        "/save",
    )
    out = chat("/system Be brief.", *lines)[1]
    assert [m["role"] for m in json.loads(talk.read_text())] == ["system", "user", "assistant"]
    assert question in markdown.read_text() and "**assistant**" in markdown.read_text()
    assert Trace.load(trace).finished
    assert "nothing has been answered yet" in out and "No such file" in out and "usage: /save FILE" in out


def test_all_that_was_said_is_saved_though_only_the_last_question_is_sent(chat: Chat, question: str, tmp_path: Path) -> None:
    talk = tmp_path / "talk.json"
    other = question.replace("23", "33")
    out = chat(question, other, "/retry", f"/save {talk}", "/reset", f"/save {tmp_path / 'none.json'}")[1]
    said = [m["content"] for m in json.loads(talk.read_text()) if m["role"] == "user"]
    assert said == [question, other] and "4 messages" in out and "nothing has been answered yet" in out
    assert not (tmp_path / "none.json").exists()
    assert out.count("at temperature 0 nothing is drawn") == 1


def test_a_file_that_cannot_be_written_is_a_sentence(chat: Chat, question: str, tmp_path: Path) -> None:
    out = chat(question, f"/save {tmp_path / 'none' / 'x'}", f"/trace {tmp_path}")[1]
    assert f"{tmp_path / 'none' / 'x'}: No such file" in out and f"{tmp_path}: Is a directory" in out
    assert "Errno" not in out


def test_an_empty_answer_leaves_no_empty_line(chat: Chat) -> None:
    assert "> hi\n(an empty answer: the model ended it at once; it knows questions like its example only)\n" in chat("hi")[1]


@pytest.mark.parametrize("word", ["/quit", "/exit", "exit", "quit", " Quit "])
def test_words_that_leave(chat: Chat, word: str) -> None:
    code, out = chat(word, "/stats")
    assert code == 0 and "answers" not in out


def test_three_quotes_hold_a_message_of_several_lines(chat: Chat, monkeypatch: pytest.MonkeyPatch) -> None:
    asked = []
    monkeypatch.setattr(terminal, "answer", lambda session, screen, text: asked.append(text))
    chat('"""one line"""', '"""', "first", "", "  second", '"""', "plain", '"""never', "closed")
    assert asked == ["one line", "first\n\n  second", "plain", "never\nclosed"]


@pytest.mark.parametrize("value", ["-1", "61", "nan", "x"])
def test_a_pace_is_checked_when_it_is_set(chat: Chat, value: str) -> None:
    assert "must lie in [0, 60]" in chat(f"/pace {value}")[1]
    with pytest.raises(SystemExit) as stopped:
        chat("", arguments=("--pace", value))
    assert stopped.value.code == 2


def test_a_pace_slows_every_forward(model: Model, monkeypatch: pytest.MonkeyPatch, question: str) -> None:
    slept = []
    monkeypatch.setattr(terminal.time, "sleep", slept.append)
    session = Session(lambda _: model, DecodeConfig(gen_length=32), PlainScreen(io.StringIO()).say, model, pace=0.2)
    terminal.answer(session, PlainScreen(io.StringIO()), question)
    assert slept == [0.2] * (len(session.trace.steps) + 1)


def test_a_rule_of_ones_own_is_an_option_of_the_chat(
    chat: Chat, question: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "my_chat_rules.py").write_text(RULES)
    monkeypatch.chdir(tmp_path)
    monkeypatch.syspath_prepend(str(tmp_path))
    try:
        code, out = chat(question, arguments=("--import", "my_chat_rules", "--decoder", "surest", "--least", "0.7"))
    finally:
        fastdllm.registry.unregister("decoders", "surest")
    assert code == 0 and "decoder surest (least 0.7)" in out and "39" in out
    with pytest.raises(SystemExit) as stopped:
        chat("", arguments=("--import", "no_such_rules"))
    assert stopped.value.code == 2


RULES = '''"""A rule for the test."""
from dataclasses import dataclass
import fastdllm
from fastdllm.decoders.base import DecoderRule

@dataclass(frozen=True)
class Surest(DecoderRule):
    least: float = 0.9

    def step(self, view):
        return view.commit(view.scores() >= self.least)

fastdllm.register("decoders", Surest)
'''


def test_history_goes_into_the_next_turn_until_reset(model: Model, monkeypatch: pytest.MonkeyPatch, question: str) -> None:
    screen = PlainScreen(io.StringIO())
    model = named(model, "a-chat-model")
    session = Session(lambda _: model, DecodeConfig(gen_length=64), screen.say, model)
    sent, watch = [], terminal.watch
    monkeypatch.setattr(terminal, "watch", lambda m, ids, c: sent.append(m.tokenizer.decode(ids)) or watch(m, ids, c))
    terminal.answer(session, screen, question)
    terminal.answer(session, screen, "And then?")
    answer = session.conversation.messages[1]["content"]
    assert sent[1] == f"<|user|>{question}<|assistant|>{answer}<|eos|><|user|>And then?<|assistant|>"
    COMMANDS["reset"](session, "")
    terminal.answer(session, screen, "Anew?")
    assert sent[2] == "<|user|>Anew?<|assistant|>"


@pytest.mark.parametrize(
    ("arguments", "expected"),
    [
        (("--gen_length", "64", "--steps", "64", "--block_size", "32"), "cache dual · decoder quota (64 steps) · 64"),
        (("--use_cache",), "cache prefix · decoder threshold (threshold 0.9)"),
        (("--use_cache", "--if_cache_position", "--threshold", "0.8"), "cache dual · decoder threshold (threshold 0.8)"),
        (("--factor", "1.5", "--cache", "none"), "cache none · decoder factor (factor 1.5"),
        (("--set", "confidence=margin", "--steps", "8"), "decoder quota (8 steps)"),
        (("--preset", "exact"), "cache dual · decoder draft_verify · "),
        (("--cache", "lazy", "--refresh-blocks", "2", "--max_tokens", "64"), "cache lazy · decoder threshold"),
    ],
)
def test_published_and_clear_flags_mean_what_they_say(chat: Chat, arguments: tuple[str, ...], expected: str) -> None:
    code, out = chat("", arguments=arguments)
    assert code == 0 and expected in out


@pytest.mark.parametrize(
    "arguments",
    [("--use_cache", "--cache", "dual"), ("--if_cache_position",), ("--threshold", "2"), ("--set", "x"), ("--nonsense",)],
)
def test_contradicting_flags_are_refused(chat: Chat, arguments: tuple[str, ...]) -> None:
    with pytest.raises(SystemExit) as stopped:
        chat("", arguments=arguments)
    assert stopped.value.code == 2


def test_spans_show_old_new_and_masked_tokens(model: Model) -> None:
    from fastdllm.trace import watch

    seen = set()
    for trace in watch(model, "3 + 4 =", gen_length=32, block_length=16, decoder="quota", steps=32, stop_ids=()):
        shown = spans(model, trace)
        seen |= {style for style, _ in shown}
        masks = sum(len(text) for style, text in shown if style == "mask")
        reached = trace.steps[-1].stop if trace.steps else 0
        assert masks == trace.at().ids[:reached].count(trace.mask_id)
    assert seen == {"old", "new", "mask"}
    assert answer_text(model, trace) == "".join(text for _, text in shown)


def test_printable_shows_control_characters_and_keeps_the_rest() -> None:
    assert printable("a\x1b[2J\x07\n\té😀\u202e\x9b") == "a␛[2J␇\n\té😀\ufffd\ufffd"


def test_turns_share_their_prompts_where_a_models_blocks_never_change(model: Model) -> None:
    session = Session(fastdllm.load, DecodeConfig(gen_length=32), print)
    block_causal = fastdllm.load("tiny-fast-dllm-v2")
    assert session.settings(block_causal).prompt_cache is session.prompts
    assert session.settings(model).prompt_cache is None
    ids = torch.arange(100)
    costs = [fastdllm.generate(block_causal, ids, session.settings(block_causal)).stats.row_cached for _ in range(2)]
    assert costs == [[0], [64]]
    session.config = session.config.replace(prompt_cache=0)
    assert session.settings(block_causal).prompt_cache == 0
