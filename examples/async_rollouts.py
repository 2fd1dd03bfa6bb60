# SPDX-License-Identifier: Apache-2.0
"""Many asyncio tasks ask one model: rollouts of several questions, a reader of a stream, and one who changes his mind.

    python examples/async_rollouts.py

Their requests share one batch, and each gets the answer that `fastdllm.generate` gives. A server of your own can do the same
in its request handlers.
"""

import asyncio
from contextlib import aclosing

import fastdllm

QUESTIONS = {
    "A student has 23 pencils. His sister has 7 fewer pencils than he has. "
    "How many pencils do they have together?": "#### 39",
    "Elizabeth scored 300 points in one game of archery. Karen scored 28 more than 50% as many as Elizabeth. "
    "How many points did Elizabeth and Karen have in total?": "#### 478",
}


async def rollouts(engine: fastdllm.AsyncEngine, question: str, right: str) -> None:
    """Four drawn answers to a question; numbers of decoding may differ from request to request."""
    conversation = [{"role": "user", "content": question}]
    out = await engine.generate(conversation, num_return_sequences=4, temperature=2.0, seed=1)
    rewards = [float(text.endswith(right)) for text in out.texts]
    print(f"{question[:24]}...: rewards {rewards}, log-probabilities {[round(float(p.sum()), 2) for p in out.logprobs]}")


async def read(engine: fastdllm.AsyncEngine, question: str) -> None:
    """The text of an answer as it becomes final."""
    async with aclosing(engine.stream_text([{"role": "user", "content": question}])) as pieces:
        async for piece in pieces:
            print(f"piece {piece!r}")


async def main() -> None:
    model = fastdllm.load("tiny-llada")
    async with fastdllm.AsyncEngine(model, gen_length=128, threshold=0.9) as engine:
        await asyncio.gather(
            *(rollouts(engine, question, right) for question, right in QUESTIONS.items()),
            read(engine, next(iter(QUESTIONS))),
        )
        unwanted = asyncio.create_task(engine.generate("Once upon a time"))
        await asyncio.sleep(0)
        unwanted.cancel()  # its row is free for others within one forward
        try:
            await engine.generate("Once upon a time", cache="none")
        except ValueError as error:
            print(f"error: {error}")


asyncio.run(main())
