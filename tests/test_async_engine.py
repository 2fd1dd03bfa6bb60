# SPDX-License-Identifier: Apache-2.0
"""`AsyncEngine`: each of many asyncio callers gets what `generate` gives, or an exception; who goes leaves nothing."""

from __future__ import annotations

import asyncio
import time
from collections.abc import Callable
from contextlib import aclosing
from typing import Any

import pytest
import torch

import fastdllm
from fastdllm.serving.errors import Closed, NotANumber, Overloaded
from tests.processes import python
from tests.random_models import prompts, random_model

QUESTION = [
    {
        "role": "user",
        "content": "A student has 23 pencils. His sister has 7 fewer pencils than he has. "
        "How many pencils do they have together?",
    }
]
SLOW = {"gen_length": 400, "decoder": "quota", "stop_ids": ()}  # an answer that takes a while


@pytest.fixture(scope="module")
def model() -> fastdllm.Model:
    return fastdllm.load("tiny-llada")


def same(one: fastdllm.Output, other: fastdllm.Output) -> None:
    """Equal token for token, and in what else does not depend on the clock."""
    assert one.texts == other.texts and one.finish_reasons == other.finish_reasons
    for name in ("sequences", "committed_at"):
        pairs = zip(getattr(one, name), getattr(other, name), strict=True)
        assert all(torch.equal(a, b) for a, b in pairs), name
    for a, b in zip(one.logprobs, other.logprobs, strict=True):
        torch.testing.assert_close(a, b, rtol=1e-4, atol=1e-4, equal_nan=True)
    for name in ("row_forwards", "row_positions", "row_layer_tokens", "row_tokens"):
        assert getattr(one.stats, name) == getattr(other.stats, name), name


def idle(engine: fastdllm.AsyncEngine) -> bool:
    return engine._scheduler.running == engine._scheduler.waiting == 0


async def until(condition: Callable[[], bool]) -> None:
    end = time.monotonic() + 600
    while not condition():
        assert time.monotonic() < end, "it never came true"
        await asyncio.sleep(0.01)


ENGINES = [
    ("llada", {"cache": "dual", "decoder": "threshold", "block_length": 8}),
    ("llada", {"cache": "none", "decoder": "quota", "block_length": 16}),
    ("dream", {"cache": "prefix", "decoder": "threshold", "block_length": 8}),
    ("v2", {"cache": "sub_block", "small_block_size": 4, "block_length": 8, "prompt_cache": 0}),
    ("nemotron", {"decoder": "self_speculate", "block_length": 8}),
]


@pytest.mark.parametrize(("family", "options"), ENGINES, ids=lambda value: str(value)[:40])
def test_callers_at_once_get_what_generate_gives(family: str, options: dict[str, Any]) -> None:
    model = random_model(family)
    asked: list[tuple[Any, dict[str, Any]]] = [
        (prompts(5), {}),
        (prompts(3, 9, 14), {"gen_length": 21}),
        (prompts(1), {"gen_length": 8, "seed": 3}),
        (prompts(7), {"gen_length": 40, "constraints": {0: 5, 30: 7}}),
    ]
    if options.get("decoder", "threshold") == "threshold":
        asked += [(prompts(6), {"threshold": 0.2}), (prompts(4, 2), {"threshold": 0.99, "gen_length": 30})]
    if options.get("decoder") != "self_speculate":
        asked += [(prompts(6), {"temperature": 0.8, "seed": 5, "num_return_sequences": 3, "top_p": 0.9, "top_k": 7})]

    async def together() -> list[fastdllm.Output]:
        async with fastdllm.AsyncEngine(model, gen_length=24, **options) as engine:
            return await asyncio.gather(*(engine.generate(given, **own) for given, own in asked))

    for (given, own), out in zip(asked, asyncio.run(together()), strict=True):
        same(out, fastdllm.generate(model, given, **{"gen_length": 24, **options, **own}))


def test_texts_stops_and_streams_are_those_of_generate(model: fastdllm.Model) -> None:
    async def stream(engine: fastdllm.AsyncEngine, **own: Any) -> list[str]:
        return [piece async for piece in engine.stream_text(QUESTION, **own)]

    async def together() -> Any:
        async with fastdllm.AsyncEngine(model, gen_length=64) as engine:
            whole = [engine.generate(QUESTION, stop="\n"), engine.generate([QUESTION, "Tom has"], n=1, max_new_tokens=32)]
            ids = fastdllm.encode(model, QUESTION)[0][None]
            named = [p async for p in engine.stream_text(input_ids=ids, attention_mask=torch.ones_like(ids).float())]
            assert "".join(named) == "".join(await stream(engine))
            return await asyncio.gather(*whole, stream(engine), stream(engine, stop=["Together"], gen_length=48))

    stopped, several, pieces, stopped_pieces = asyncio.run(together())
    same(stopped, fastdllm.generate(model, QUESTION, gen_length=64, stop="\n"))
    same(several, fastdllm.generate(model, [QUESTION, "Tom has"], gen_length=32))
    assert len(pieces) > 1 and all(pieces)
    assert pieces == list(fastdllm.stream_text(model, QUESTION, gen_length=64))
    assert "".join(stopped_pieces) == fastdllm.generate(model, QUESTION, gen_length=48, stop="Together").texts[0]


def test_cancelling_frees_the_rows_and_the_others_go_on(model: fastdllm.Model) -> None:
    async def main() -> fastdllm.Output:
        async with fastdllm.AsyncEngine(model, batch_size=2, **SLOW) as engine:
            slow = [asyncio.create_task(engine.generate("Hello")) for _ in range(4)]  # two at work, two that wait
            await until(lambda: engine._scheduler.running == 2)
            for task in slow:
                task.cancel()
            ends = await asyncio.gather(*slow, return_exceptions=True)
            assert all(isinstance(end, asyncio.CancelledError) for end in ends)
            await until(lambda: idle(engine))
            assert engine._scheduler.finished == 0 and engine._scheduler.aborted == 4
            async with aclosing(engine.stream_text(QUESTION)) as pieces:
                await anext(pieces)
            await until(lambda: idle(engine))
            late = engine.generate("Hello")
            with pytest.raises(asyncio.TimeoutError):
                await asyncio.wait_for(late, 0.2)
            await until(lambda: idle(engine))
            return await engine.generate("Hello", gen_length=8)

    same(asyncio.run(main()), fastdllm.generate(model, "Hello", **{**SLOW, "gen_length": 8}))


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"treshold": 0.5}, "unknown option treshold=0.5; did you mean 'threshold'"),
        ({"threshold": 7}, "threshold=7.0 must lie in"),
        ({"cache": "none"}, "cache='none' holds for all requests of an engine"),
        ({"factor": 1.0}, "factor=1.0 holds for all requests of an engine"),
        ({"gen_length": 10**6}, "gen_length=1000000"),
        ({"gen_length": 511}, "at most 1 fit the model's context"),
        ({"stop": 5}, "stop=5 must be a text"),
        ({"num_return_sequences": 2}, "num_return_sequences=2 would give the same answer"),
        ({"constraints": {999: 1}}, "constraints.* 999|999"),
    ],
)
def test_bad_input_is_its_callers_exception(model: fastdllm.Model, options: dict[str, Any], message: str) -> None:
    async def main() -> None:
        async with fastdllm.AsyncEngine(model, gen_length=16) as engine:
            good = asyncio.create_task(engine.generate("Hello there"))
            with pytest.raises(ValueError, match=message):
                await engine.generate("Hello there", **options)
            assert (await good).texts

    asyncio.run(main())


def test_an_option_of_the_engine_may_be_repeated(model: fastdllm.Model) -> None:
    async def main() -> None:
        async with fastdllm.AsyncEngine(model, gen_length=16, cache="prefix") as engine:
            await engine.generate("Hello", cache="prefix", decoder="threshold", block_length=32, threshold=None)

    asyncio.run(main())


@pytest.mark.parametrize(
    ("given", "message"),
    [
        ({"cahce": "none"}, "unknown option cahce"),
        ({"cache": "block"}, "cache='block' does not fit the family 'llada'"),
        ({"max_queue": -1}, "max_queue=-1 must be None or an integer of at least 0"),
        ({"max_queue": "many"}, "max_queue='many' must be"),
        ({"config": 5}, "config=5 must be a DecodeConfig"),
    ],
)
def test_a_bad_engine_is_an_error_at_once(model: fastdllm.Model, given: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        fastdllm.AsyncEngine(model, **given)
    with pytest.raises(ValueError, match="is a name; pass the model itself"):
        fastdllm.AsyncEngine("tiny-llada")


def test_a_full_queue_is_an_exception(model: fastdllm.Model) -> None:
    async def main() -> None:
        async with fastdllm.AsyncEngine(model, batch_size=1, max_queue=1, **SLOW) as engine:
            tasks = [asyncio.create_task(engine.generate("Hello")) for _ in range(2)]
            await until(lambda: engine._scheduler.running + engine._scheduler.waiting == 2)
            with pytest.raises(Overloaded):
                await engine.generate("Hello")
            for task in tasks:
                task.cancel()

    asyncio.run(main())


def test_the_context_ends_with_the_answers_that_were_taken(model: fastdllm.Model) -> None:
    async def main() -> None:
        async with fastdllm.AsyncEngine(model, **SLOW) as engine:
            tasks = [asyncio.create_task(engine.generate("Hello", gen_length=64, seed=i)) for i in range(3)]
            await until(lambda: not idle(engine))
        assert [len(out.sequences) for out in await asyncio.gather(*tasks)] == [1, 1, 1]
        for late in (engine.generate("Hello"), engine.call(lambda: 1), anext(engine.stream_text("Hello"))):
            with pytest.raises(Closed, match="this engine is closed"):
                await late

    asyncio.run(main())


def test_an_error_in_the_context_ends_the_others(model: fastdllm.Model) -> None:
    async def main() -> None:
        tasks = []

        async def body() -> None:
            async with fastdllm.AsyncEngine(model, **SLOW) as engine:
                tasks.append(asyncio.create_task(engine.generate("Hello")))
                await until(lambda: engine._scheduler.running == 1)
                raise KeyError("the caller's own")

        with pytest.raises(KeyError):
            await body()
        with pytest.raises(Closed):
            await tasks[0]

    asyncio.run(main())


FORGOTTEN = """
import asyncio, fastdllm
model = fastdllm.load("tiny-llada", device="cpu")
async def main():
    engine = fastdllm.AsyncEngine(model, gen_length=400, decoder="quota", stop_ids=())
    task = asyncio.create_task(engine.generate("Tom has 3 apples."))
    while {waits} and not task.done() and not engine._scheduler.positions_in_flight:
        await asyncio.sleep(0)
    {end}
asyncio.run(main())
"""


@pytest.mark.each_choice
@pytest.mark.parametrize(("end", "code"), [("return", 0), ("raise ValueError('mine')", 1), ("raise SystemExit(7)", 7)])
@pytest.mark.parametrize("waits", [False, True], ids=["starting", "decoding"])
def test_an_engine_that_nobody_closes_does_not_abort_the_process(waits: bool, end: str, code: int) -> None:
    """The interpreter ends while the engine's thread is within torch."""
    program = FORGOTTEN.format(waits=waits, end=end)
    run = python(program)
    assert run.returncode == code and "terminate" not in run.stderr, run.stderr


def test_what_the_model_or_the_loop_raises_reaches_the_caller() -> None:
    model = random_model("llada")

    def fail(*_: Any) -> Any:
        raise MemoryError("no more")

    async def main() -> None:
        async with fastdllm.AsyncEngine(model, gen_length=8, threshold=0.9) as engine:
            whole, forward = await engine.generate(prompts(4)), model.network.forward
            model.network.forward = fail
            with pytest.raises(MemoryError, match="no more"):
                await engine.generate(prompts(4))
            model.network.forward = lambda *given: forward(*given) * torch.nan
            with pytest.raises(NotANumber):
                await engine.generate(prompts(4))
            model.network.forward = forward
            same(await engine.generate([whole.sequences[0][:4]]), whole)

    try:
        asyncio.run(main())
    finally:
        vars(model.network).pop("forward", None)


def test_other_work_runs_between_two_forwards(model: fastdllm.Model) -> None:
    pairs = [(torch.tensor([5, 6]), torch.tensor([7]))]

    async def main() -> Any:
        async with fastdllm.AsyncEngine(model, gen_length=64) as engine:
            answering = asyncio.create_task(engine.generate(QUESTION))
            scores = await engine.call(lambda: fastdllm.log_likelihoods(model, pairs))
            with pytest.raises(ZeroDivisionError):
                await engine.call(lambda: 1 // 0)
            return scores, await answering

    scores, out = asyncio.run(main())
    assert scores == fastdllm.log_likelihoods(model, pairs)
    same(out, fastdllm.generate(model, QUESTION, gen_length=64))
