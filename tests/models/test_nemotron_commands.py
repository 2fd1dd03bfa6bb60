# SPDX-License-Identifier: Apache-2.0
"""A tiny random Nemotron checkpoint from a folder: against transformers, under lm-eval, in the chat and in the server."""

from __future__ import annotations

import asyncio
import io
import json
import sys
from pathlib import Path
from typing import Any

import pytest
import torch

import fastdllm
from fastdllm import DecodeConfig, decide
from fastdllm.likelihood import log_likelihoods
from fastdllm.prompts import encode
from tests.published_checkpoints import qwen2_config, write_checkpoint
from tests.reference import nemotron
from tests.reference.network import PlainNetwork

CONTEXT = {"max_position_embeddings": 2048, "rope_parameters": {"rope_type": "default", "rope_theta": 10000.0}}
DRAFTS = {"decoder": "self_speculate", "block_length": 8}


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    torch.manual_seed(5)
    out = tmp_path_factory.mktemp("nemotron")
    write_checkpoint(out, "nemotron", shards=2, **CONTEXT)
    return out


@pytest.fixture(scope="module")
def model(folder: Path) -> fastdllm.Model:
    return fastdllm.load(str(folder), device="cpu")


def test_self_speculation_is_greedy_decoding_of_transformers_ministral(tmp_path: Path) -> None:
    from tests.models.test_families import theirs

    tensors = write_checkpoint(tmp_path, "nemotron")
    loaded = fastdllm.load(str(tmp_path), device="cpu")
    network = theirs("nemotron", qwen2_config("nemotron"), tensors)
    never = loaded.banned.nonzero()[:, 0].tolist()
    for length in (1, 7, 20):
        ids = torch.randint(300, 500, (1, length))
        options = {"do_sample": False, "max_new_tokens": 24, "suppress_tokens": never, "eos_token_id": None}
        expected = network.generate(ids, attention_mask=torch.ones_like(ids), pad_token_id=0, **options)[0].tolist()
        for size in (1, 8, 32):
            shape = {"block_length": size, "gen_length": 24, "stop_ids": ()}
            out = fastdllm.generate(loaded, [ids[0]], decoder="self_speculate", **shape)
            assert out.sequences[0].tolist() == expected


def test_a_slot_is_read_like_an_open_block(model: fastdllm.Model) -> None:
    """Prompt and template from left to right, the masks after them in both directions; questions do not see each other."""
    questions: list[dict[str, Any]] = [
        {"name": "fruit", "type": "choice", "options": ["apple", "a pear tree"]},
        {"name": "even", "type": "yes_no"},
    ]
    out = decide(model, "Tom has 5 apples.", questions)
    lead = "fruit (apple/a pear tree):"
    start = torch.cat(
        [encode(model, "Tom has 5 apples.")[0], torch.tensor(model.tokenizer.encode(lead, add_special_tokens=False))]
    )
    sums = []
    for option in (" apple", " a pear tree"):
        tokens = model.tokenizer.encode(option, add_special_tokens=False)
        net = PlainNetwork(model)
        net.banned = torch.zeros_like(model.banned)
        reader = nemotron.Reader(net)
        reader.read(start)
        rows = reader.look(torch.full((len(tokens),), model.spec.mask_id)).log_softmax(-1)
        sums.append(float(rows.gather(1, torch.tensor(tokens)[:, None]).sum()))
    expected = torch.tensor(sums).softmax(0).tolist()
    assert list(out["fruit"].probabilities.values()) == pytest.approx(expected, abs=1e-4)
    alone = decide(model, "Tom has 5 apples.", questions[1:])["even"].probabilities
    assert list(alone.values()) == pytest.approx(list(out["even"].probabilities.values()), abs=1e-5)


@pytest.mark.parametrize("options", [{}, DRAFTS], ids=str)
def test_lm_eval_takes_the_folder(folder: Path, options: dict[str, Any]) -> None:
    pytest.importorskip("lm_eval")
    from fastdllm.evaluation.harness import DiffusionLM
    from tests.evaluation.asking import evaluate

    adapter = DiffusionLM(pretrained=str(folder), device="cpu", batch_size=2, gen_length=24, show_speed=True, **options)
    speed = evaluate(adapter, "gsm_symbolic", limit=3, num_fewshot=0, apply_chat_template=True)["config"]["speed"]
    assert speed["samples"] == 3 and speed["nfe"] > 0
    scored = evaluate(adapter, "gsm_symbolic_mc", limit=3, num_fewshot=0)["results"]["gsm_symbolic_mc"]
    assert 0 <= scored["acc,none"] <= 1


@pytest.mark.parametrize("options", [[], ["--decoder", "self_speculate"]], ids=str)
def test_the_chat_takes_the_folder(
    folder: Path, options: list[str], monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture
) -> None:
    from fastdllm.ui import terminal

    monkeypatch.setattr(sys, "stdin", io.TextIOWrapper(io.BytesIO(b"Tom has 5 apples.\nAnd now?")))
    code = terminal.main(
        ["--model", str(folder), "--max-new-tokens", "24", "--block-length", "8", "--stop-ids", "()", *options]
    )
    out = capsys.readouterr().out
    assert code == 0 and out.count("tokens/forward") == 2


@pytest.mark.parametrize("options", [{}, DRAFTS], ids=str)
def test_the_server_streams_what_it_answers(model: fastdllm.Model, options: dict[str, Any]) -> None:
    pytest.importorskip("fastapi")
    import httpx

    from fastdllm.serving.app import create_app
    from fastdllm.serving.service import Service

    service = Service(model, DecodeConfig(gen_length=24, **options)).start()

    async def ask() -> None:
        transport = httpx.ASGITransport(create_app(service))
        async with httpx.AsyncClient(transport=transport, base_url="http://localhost", timeout=600) as client:
            chat = {"messages": [{"role": "user", "content": "Tom has 5 apples."}], "max_tokens": 24}
            whole, other = await asyncio.gather(
                client.post("/v1/chat/completions", json=chat),
                client.post("/v1/completions", json={"prompt": "Tom", "max_tokens": 9, "logprobs": 1, "echo": True}),
            )
            assert whole.status_code == other.status_code == 200, (whole.text, other.text)
            text = whole.json()["choices"][0]["message"]["content"]
            streamed = await client.post("/v1/chat/completions", json={**chat, "stream": True})
            pieces = [line.removeprefix("data: ") for line in streamed.text.splitlines() if line.startswith("data: {")]
            deltas = [json.loads(piece)["choices"] for piece in pieces]
            assert "".join(c[0]["delta"].get("content") or "" for c in deltas if c) == text
            echoed = other.json()["choices"][0]["logprobs"]["token_logprobs"]
            assert echoed[0] is None and all(value <= 0 for value in echoed[1:])
            longer = {"prompt": "Tom has 5 apples.", "max_tokens": 9, "logprobs": 1, "echo": True}
            echoed = (await client.post("/v1/completions", json=longer)).json()["choices"][0]["logprobs"]["token_logprobs"]
            ids = torch.tensor(model.tokenizer.encode("Tom has 5 apples."))
            (score,) = log_likelihoods(model, [(ids[:1], ids[1:])])
            assert sum(echoed[1 : len(ids)]) == pytest.approx(score.log_likelihood, abs=1e-3)
            answer = await client.post("/v1/decide", json={"prompt": "Tom", "questions": [{"name": "ok", "type": "yes_no"}]})
            assert answer.status_code == 200, answer.text

    try:
        asyncio.run(ask())
    finally:
        service.close(timeout=30)
