# SPDX-License-Identifier: Apache-2.0
"""Ask a server whole and streamed, with nothing but Python's own library:

    fastdllm serve tiny-llada                        # in one terminal
    python examples/serve_client.py [ADDRESS]        # in another; default http://127.0.0.1:8000

OpenAI's client works as well; `docs/serving.md` has an example.
"""

import json
import sys
import urllib.request
from collections.abc import Iterator
from typing import Any

ADDRESS = sys.argv[1] if len(sys.argv) > 1 else "http://127.0.0.1:8000"
QUESTION = "A student has 23 pencils. His sister has 7 fewer pencils than he has. How many pencils do they have together?"


def post(**body: Any) -> Any:
    """The open response to a chat request."""
    body = {"messages": [{"role": "user", "content": QUESTION}], "max_tokens": 128, **body}
    head = {"Content-Type": "application/json"}
    return urllib.request.urlopen(urllib.request.Request(f"{ADDRESS}/v1/chat/completions", json.dumps(body).encode(), head))


def events(response: Any) -> Iterator[Any]:
    """The events of a stream, decoded."""
    for line in response:
        if line.startswith(b"data: ") and line.strip() != b"data: [DONE]":
            yield json.loads(line.removeprefix(b"data: "))


with post() as response:
    answer = json.load(response)
print(answer["choices"][0]["message"]["content"])
print(f"{answer['usage']['completion_tokens']} tokens in {answer['usage']['forwards']} forwards\n")

# With `include_denoising`, every forward is an event: what stands where, null where a mask still stands.
with post(stream=True, stream_options={"include_denoising": True}) as response:
    for event in events(response):
        if forward := event.get("denoising"):
            text = "".join("░" if token is None else token for token in forward["tokens"])
            print(f"forward {forward['forward']}, positions {forward['start']} to {forward['stop']}: {text!r}")
