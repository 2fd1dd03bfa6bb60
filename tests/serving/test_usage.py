# SPDX-License-Identifier: Apache-2.0
"""`usage` says how much of a prompt an earlier request had computed, under OpenAI's name."""

from __future__ import annotations

import json
from typing import Any

import fastdllm
from fastdllm import DecodeConfig
from fastdllm.serving.service import Service
from tests.serving.test_hostile_bodies import Client

PROMPT = "A student has 23 pencils. His sister has 7 fewer pencils than he has. How many pencils do they have together? " * 4


def test_usage_counts_cached_tokens() -> None:
    model = fastdllm.load("tiny-fast-dllm-v2")
    service = Service(model, DecodeConfig(gen_length=8)).start()
    client = Client(service)
    try:

        def ask(prompt: str, **more: Any) -> tuple[int, int, str]:
            body = json.dumps({"prompt": prompt, "max_tokens": 8, **more}).encode()
            answer = client.post("/v1/completions", body).json()
            usage = answer["usage"]
            return usage["prompt_tokens"], usage["prompt_tokens_details"]["cached_tokens"], answer["choices"][0]["text"]

        tokens, cached, text = ask(PROMPT)
        whole = tokens // 32 * 32
        assert cached == 0 and whole > 64
        assert ask(PROMPT) == (tokens, whole - 32, text)
        assert ask(PROMPT, n=2, temperature=0.5)[1] == whole - 32  # the prompt counts once
        assert ask("Another one. " + PROMPT)[1] == 0
    finally:
        service.close()
