# SPDX-License-Identifier: Apache-2.0
"""How the lm-eval adapters are built and found, and whose wish counts for an option."""

from __future__ import annotations

import json
import logging
from typing import Any

import pytest
from lm_eval.api.instance import Instance

import fastdllm
from fastdllm.evaluation import ADAPTERS, register
from fastdllm.evaluation.harness import DiffusionLM
from fastdllm.evaluation.options import read_batch_size
from tests.evaluation.asking import QUESTIONS, adapter, chat, generations, likelihoods

pytestmark = pytest.mark.usefixtures("loaded_once")


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


def test_every_adapter_is_known_by_name() -> None:
    from lm_eval.api.registry import get_model

    for name in ADAPTERS:
        assert issubclass(get_model(name), DiffusionLM)
