# SPDX-License-Identifier: Apache-2.0
"""The page's side of the server: its files and their policy, settings by name, answers as traces, several visitors."""

from __future__ import annotations

import dataclasses
import json
import re
import threading
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

pytest.importorskip("httpx", reason="fastapi's test client needs it")
from fastapi.testclient import TestClient

import fastdllm
from fastdllm import DecodeConfig, registry
from fastdllm.serving.app import STATIC, create_app
from fastdllm.serving.page import PRESETS, Page, PageBody, config_of, describe, plan
from fastdllm.serving.service import Service
from fastdllm.serving.turns import Turns
from fastdllm.serving.words import parse_constraints
from fastdllm.trace import Trace
from fastdllm.ui import options
from tests.random_models import FAMILIES, random_model
from tests.serving.conftest import QUESTION

MARKUP = ("innerHTML", "outerHTML", "insertAdjacentHTML", "document.write", "eval(", "onclick=", "<style", "style=")
MESSAGES = [{"role": "user", "content": QUESTION}]
CONFIG = DecodeConfig(gen_length=64)


@pytest.fixture(scope="module")
def client(model: fastdllm.Model) -> Iterator[TestClient]:
    service = Service(model, CONFIG, rows=4)
    sudoku = Service(fastdllm.load("tiny-sudoku"), DecodeConfig(), rows=4, beside=service)
    with TestClient(create_app(service, others=[sudoku], wait_until_warm=True), base_url="http://localhost") as started:
        yield started


def body(**given: Any) -> dict[str, Any]:
    stream = {"stream": True, "stream_options": {"include_usage": True, "include_denoising": True}}
    return {"model": "tiny-llada", "messages": MESSAGES, "max_tokens": 64, **stream, **given}


def events(client: TestClient, **given: Any) -> list[dict[str, Any]]:
    response = client.post("/page/chat", json=body(**given))
    assert response.status_code == 200, response.text
    *parts, done = [part.removeprefix("data: ") for part in response.text.split("\n\n") if part]
    assert done == "[DONE]"
    return [json.loads(part) for part in parts]


def text_of(told: list[dict[str, Any]]) -> str:
    return "".join(e["choices"][0]["delta"].get("content", "") for e in told if e.get("choices"))


def error_of(client: TestClient, **given: Any) -> str:
    response = client.post("/page/chat", json=body(**given))
    assert response.status_code in (400, 413), response.text
    return response.json()["error"]["message"]


# The files.


@pytest.mark.parametrize("path", ["/", *(f"/{file.name}" for file in sorted(STATIC.iterdir()))])
def test_every_file_comes_with_a_strict_policy(client: TestClient, path: str) -> None:
    response = client.get(path)
    assert response.status_code == 200
    policy = dict(part.strip().split(" ", 1) for part in response.headers["Content-Security-Policy"].split(";"))
    assert policy["default-src"] == "'none'" and policy["script-src"] == policy["style-src"] == "'self'"
    assert policy["frame-ancestors"] == policy["base-uri"] == policy["form-action"] == "'none'"
    assert response.headers["X-Content-Type-Options"] == "nosniff"
    kinds = {".js": "javascript", ".css": "text/css", ".svg": "image/svg", ".html": "text/html", "": "text/html"}
    assert kinds[Path(path).suffix] in response.headers["Content-Type"]


def test_the_files_name_no_other_server_and_write_no_markup() -> None:
    for file in STATIC.iterdir():
        text = file.read_text(encoding="utf-8")
        assert set(re.findall(r"https?://[\w.]+", text)) <= {"http://www.w3.org"}, file.name
        for word in MARKUP:
            assert word not in text, f"{word} in {file.name}"
        assert not re.search(r"^(<{7}|={7}|>{7})", text, re.MULTILINE), f"a merge was left open in {file.name}"


def test_an_unknown_file_is_an_error_in_the_format_of_the_server(client: TestClient) -> None:
    response = client.get("/nowhere.js")
    assert response.status_code == 404 and response.json()["error"]["message"]


# Who may ask.


def test_the_page_needs_the_key_for_its_answers_but_not_for_its_files(model: fastdllm.Model) -> None:
    app = create_app(Service(model, CONFIG), api_key="secret", hosts=["localhost"])
    with TestClient(app, base_url="http://localhost") as client:
        assert client.get("/").status_code == client.get("/app.js").status_code == 200
        for ask in (lambda: client.get("/page/info"), lambda: client.post("/page/chat", json=body())):
            response = ask()
            assert response.status_code == 401 and response.json()["error"]["code"] == "invalid_api_key"
        assert client.get("/page/info", headers={"Authorization": "Bearer secret"}).status_code == 200
        for path in ("/", "/page/info"):
            response = client.get(path, headers={"Host": "elsewhere.example"})
            assert response.status_code == 403 and response.json()["error"]["code"] == "unknown_host"


# What there is to choose from.


def test_what_may_be_chosen_is_told(client: TestClient) -> None:
    info = client.get("/page/info").json()
    assert [known["name"] for known in info["models"]] == ["tiny-llada", "tiny-sudoku"]
    assert [preset["name"] for preset in info["presets"]] == [preset.name for preset in PRESETS]
    assert info["models"][0]["examples"] == [question for question, _ in options.WORD_PROBLEMS.examples]
    assert "sub_block" not in info["models"][0]["caches"]
    threshold = next(known for known in info["decoders"] if known["name"] == "threshold")
    assert {"threshold", "strict", "steps_per_block"} == {option["name"] for option in threshold["options"]}
    assert not threshold["steps"]
    assert next(known for known in info["decoders"] if known["name"] == "quota")["steps"]


@pytest.mark.parametrize("family", FAMILIES)
def test_the_caches_to_choose_from_are_those_that_the_model_runs(model: fastdllm.Model, family: str) -> None:
    of = random_model(family).spec
    reads = {name: getattr(of, name) for name in ("family", "block_causal", "causal_context", "shift", "defaults")}
    spec = dataclasses.replace(model.spec, **reads)
    own = Service(dataclasses.replace(model, spec=spec), DecodeConfig())
    offered = describe(own)["caches"]
    for cache in registry.names("caches"):
        if cache in offered:
            plan(own, {"name": "custom", "cache": cache}, 16, 0)
        else:
            with pytest.raises(ValueError, match="does not fit the family"):
                plan(own, {"name": "custom", "cache": cache}, 16, 0)


def test_only_the_models_given_at_the_start_answer(client: TestClient) -> None:
    response = client.post("/page/chat", json=body(model="tiny-dream"))
    assert response.status_code == 404 and "tiny-dream" in response.json()["error"]["message"]
    assert text_of(events(client, model="tiny-sudoku", messages=[{"role": "user", "content": "___3 __4_ 21__ 4___"}],
                          max_tokens=20)) == "1423 3241 2134 4312"  # fmt: skip


# Answers.


@pytest.mark.parametrize("name", [preset.name for preset in PRESETS])
def test_a_setting_by_name_answers_as_python_does(client: TestClient, model: fastdllm.Model, name: str) -> None:
    told = events(client, setting={"name": name})
    given = dict(next(preset.options for preset in PRESETS if preset.name == name))
    out = fastdllm.generate(model, [MESSAGES], **{"gen_length": 64, **given})
    assert text_of(told) == out.texts[0]
    assert sum("denoising" in event for event in told) == out.stats.row_forwards[0]
    assert told[0]["begin"]["about"] and told[-1]["end"]["positions"] == out.stats.row_positions[0]


@pytest.mark.parametrize(
    ("setting", "options"),
    [
        ({"name": "custom", "decoder": "factor", "factor": 0.8, "cache": "prefix"}, {"factor": 0.8, "cache": "prefix"}),
        ({"name": "custom", "decoder": "quota", "steps": "16"}, {"decoder": "quota", "steps": 16}),
        ({"name": "custom", "decoder": "threshold", "threshold": "0.6", "block_length": 16, "cache": ""},
         {"threshold": 0.6, "block_length": 16}),
        ({"threshold": 0.5}, {"threshold": 0.5}),
    ],
)  # fmt: skip
def test_a_setting_of_ones_own_answers_as_python_does(
    client: TestClient, model: fastdllm.Model, setting: dict[str, Any], options: dict[str, Any]
) -> None:
    told = events(client, setting=setting)
    out = fastdllm.generate(model, [MESSAGES], gen_length=64, **options)
    assert text_of(told) == out.texts[0] and sum("denoising" in e for e in told) == out.stats.row_forwards[0]


@pytest.mark.parametrize(
    ("given", "expected"),
    [
        ({"setting": {"name": "custom", "decoder": "nothing"}}, "decoder='nothing' is unknown"),
        ({"setting": {"name": "custom", "cache": "block"}}, "does not fit the family"),
        ({"setting": {"name": "custom", "treshold": 1}}, "did you mean"),
        ({"setting": {"name": "custom", "threshold": 2}}, "threshold"),
        ({"setting": {"name": "quickest"}}, "allowed are server, one"),
        ({"setting": {"runner": "cuda_graph"}}, "runner is the server's choice"),
        ({"setting": {"steps": 1, "decoder": "quota"}}, "steps"),
        ({"messages": [{"role": "user", "content": "  "}]}, "message is empty"),
        ({"messages": [{"role": "user", "content": "many words " * 400}]}, "message is too long"),
        ({"messages": [{"role": "system", "content": "a"}]}, "last message must be the user's"),
        ({"words": "apples"}, "not of the form"),
        ({"words": "99:apples"}, "does not fit an answer of 64"),
        ({"words": "3:a, 3:b"}, "overlaps"),
        ({"max_tokens": 5_000}, "an answer of 5000 tokens is too long"),
        ({"messages": [{"role": "user", "content": "x" * 1_000_000}]}, "1,000,000 characters in messages"),
        ({"temperature": 1.0, "setting": {"name": "exact"}}, "temperature"),
    ],
)
def test_what_cannot_be_done_is_a_sentence(client: TestClient, given: dict[str, Any], expected: str) -> None:
    assert expected in error_of(client, **given)


def test_the_events_are_a_trace_that_python_reads(client: TestClient, model: fastdllm.Model, tmp_path: Path) -> None:
    """As trace.js writes it, compared with what `fastdllm.watch` records."""
    told = events(client, setting={"name": "one"}, words="12:pencils")
    begin, end = told[0]["begin"], told[-1]["end"]
    now = [begin["mask_id"]] * begin["length"]
    for at, token in begin["fixed"].items():
        now[int(at)] = token
    steps, texts = [], dict(begin["texts"])
    for event in (event["denoising"] for event in told if "denoising" in event):
        changes = []
        for at, token, text, sure in zip(
            range(event["start"], event["stop"]), event["ids"], event["tokens"], event["confidence"], strict=True
        ):
            new = begin["mask_id"] if token is None else token
            if new != now[at]:
                changes.append([at, new, sure])
                now[at] = new
            if token is not None:
                texts[str(token)] = text
        steps.append({"start": event["start"], "stop": event["stop"], "seconds": event["seconds"], "changes": changes})
        assert event["rows"] == 1
    names = ("model", "config", "prompt_length", "length", "mask_id", "stop_ids", "fixed")
    file = {"format": "fastdllm-trace", "version": 1, **{name: begin[name] for name in names},
            "steps": steps, "texts": texts, "finished": True, **end}  # fmt: skip
    (tmp_path / "trace.json").write_text(json.dumps(file))
    read = Trace.load(tmp_path / "trace.json")
    *_, seen = fastdllm.watch(model, [MESSAGES], gen_length=64, decoder="quota", cache="none", constraints=read.fixed)
    assert read.at().ids == seen.at().ids and read.at().written == seen.at().written
    assert read.filled() == seen.filled() and read.prompt_length == seen.prompt_length
    assert read.positions == seen.positions and read.tokens() == seen.tokens() and read.seconds() > 0


def test_words_are_shown_where_they_will_stand(client: TestClient, model: fastdllm.Model) -> None:
    given = {"model": "tiny-llada", "words": '0:Well, 20:pencils, 40:" <|mask|>"', "length": 64}
    told = client.post("/page/words", json=given).json()["tokens"]
    assert [told[0], told[1]] == [{"position": 0, "text": "Well"}, {"position": 20, "text": " pencils"}] or told
    places = {token["position"]: token["text"] for token in told}
    assert places[20] == " pencils" and "".join(text for at, text in places.items() if at >= 40) == " <|mask|>"
    answer = text_of(events(client, words=given["words"]))
    assert answer.startswith("Well") and " pencils" in answer
    for words, expected in (("x", "not of the form"), ("70:a", "does not fit")):
        response = client.post("/page/words", json={**given, "words": words})
        assert response.status_code == 400 and expected in response.json()["error"]["message"]


def test_a_model_of_single_questions_forgets_and_says_so(client: TestClient) -> None:
    talk = [*MESSAGES, {"role": "assistant", "content": "39"}, *MESSAGES]
    told = events(client, messages=talk)
    assert told[0]["begin"]["dropped"] == 2 and "single questions" in told[0]["begin"]["notices"][0]
    assert text_of(told) == text_of(events(client))


@pytest.mark.slow
@pytest.mark.parametrize("name", fastdllm.models.tiny_names())
def test_every_example_is_answered_rightly_under_every_setting(name: str) -> None:
    model = fastdllm.load(name, device="cpu")
    about = options.about(name)
    for known in PRESETS:
        given = config_of(DecodeConfig(), model.spec, {"name": known.name}).given()
        given["gen_length"] = about.gen_length
        out = fastdllm.generate(model, [[{"role": "user", "content": q}] for q, _ in about.examples], **given)
        for (question, answer), text in zip(about.examples, out.texts, strict=True):
            assert text.split("#### ")[-1].strip() == answer, (known.name, question)


@pytest.mark.parametrize("name", fastdllm.models.tiny_names())
def test_the_words_that_the_form_suggests_leave_the_answer_right(name: str) -> None:
    model = fastdllm.load(name, device="cpu")
    about = options.about(name)
    question, answer = about.examples[0]
    fixed = parse_constraints(model, about.words, about.gen_length)
    messages = [{"role": "user", "content": question}]
    text = fastdllm.generate(model, messages, gen_length=about.gen_length, constraints=fixed).texts[0]
    assert text.split("#### ")[-1].strip() == answer and about.words.split(":")[1] in text


# Several visitors.


def test_the_servers_own_setting_needs_no_second_run_and_numbers_share_one(model: fastdllm.Model) -> None:
    own = Service(model, CONFIG)
    keys = {}
    for name, setting in {
        "own": {"name": "server"}, "default": {"name": "custom"}, "number": {"threshold": 0.5}, "a": {"name": "paper"},
        "b": {"name": "paper", "threshold": 0.5}, "one": {"name": "one"}, "steps": {"name": "one", "steps": 8},
    }.items():  # fmt: skip
        keys[name] = plan(own, setting, 64, 0)[2]
    assert keys["own"] is keys["default"] is keys["number"] is None
    assert keys["a"] == keys["b"] is not None and keys["one"] not in (None, keys["a"], keys["steps"])
    assert plan(own, {"name": "server"}, 64, 1)[2] is not None, "the two sides of a race share no forward"
    assert plan(own, {"threshold": 0.5}, 64, 0)[1]["threshold"] == 0.5


def test_settings_that_share_a_run_keep_their_own_numbers(client: TestClient, model: fastdllm.Model) -> None:
    """The run is opened for a setting with another threshold, and asked under the default one afterwards."""
    lax: dict[str, Any] = {"name": "custom", "threshold": 0.3}
    for setting in (lax, {"name": "custom"}, {"name": "server"}, lax):
        told = events(client, setting=setting, side=1)
        threshold = setting.get("threshold", DecodeConfig().threshold)
        out = fastdllm.generate(model, [MESSAGES], gen_length=64, threshold=threshold)
        assert f"threshold {threshold}" in told[0]["begin"]["about"]
        assert sum("denoising" in e for e in told) == out.stats.row_forwards[0] and text_of(told) == out.texts[0]


def test_a_temperature_among_the_options_of_a_setting_is_taken(client: TestClient) -> None:
    told = events(client, temperature=0.0, setting={"name": "custom", "temperature": "0.9", "top_k": 4})
    assert told[0]["begin"]["config"]["temperature"] == 0.9 and told[0]["begin"]["config"]["top_k"] == 4
    told = events(client, temperature=0.5, setting={"name": "custom"})
    assert told[0]["begin"]["config"]["temperature"] == 0.5


def test_the_page_begins_with_what_the_server_was_started_with(model: fastdllm.Model) -> None:
    own = Service(model, DecodeConfig(gen_length=48, temperature=0.7, seed=3))
    shown = Page([own]).info()["models"][0]
    assert (shown["gen_length"], shown["temperature"], shown["seed"]) == (48, 0.7, 3)
    shown = Page([Service(model, DecodeConfig())]).info()["models"][0]
    assert (shown["gen_length"], shown["temperature"], shown["seed"]) == (options.about(model.name).gen_length, 0.0, 0)


def test_runs_of_different_settings_go_on_together(client: TestClient) -> None:
    """Neither waits for the other's end: their forwards alternate."""
    order: list[str] = []

    def visit(name: str) -> None:
        with client.stream(
            "POST", "/page/chat", json=body(setting={"name": name, "decoder": "quota", "stop_ids": "()"})
        ) as stream:
            for line in stream.iter_lines():
                if '"denoising"' in line:
                    order.append(name)

    visitors = [threading.Thread(target=visit, args=(name,)) for name in ("server", "paper")]
    for visitor in visitors:
        visitor.start()
    for visitor in visitors:
        visitor.join()
    assert set(order) == {"server", "paper"} and len(order) == 128


def test_turns_go_round() -> None:
    turns, order = Turns(), []
    ready = threading.Barrier(3)

    def work(name: int) -> None:
        ready.wait()
        for _ in range(20):
            with turns:
                order.append(name)

    threads = [threading.Thread(target=work, args=(name,)) for name in range(3)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert sorted(order) == [0] * 20 + [1] * 20 + [2] * 20
    with turns, turns.rest(), turns:
        pass  # whoever rests lets others in, and gets the turn back


@pytest.mark.parametrize("field", ["setting", "words", "side"])
@pytest.mark.parametrize("value", [[], {"a": [1]}, -1, 2, "x" * 5_000, 1e400, True])
def test_wild_fields_are_refused(client: TestClient, field: str, value: Any) -> None:
    given = json.dumps(body(**{field: value}))
    response = client.post("/page/chat", content=given, headers={"Content-Type": "application/json"})
    assert response.status_code == 400 and response.json()["error"]["message"]


def test_page_bodies_know_the_fields_of_chats() -> None:
    assert PageBody(messages=MESSAGES, max_completion_tokens=5).length == 5
