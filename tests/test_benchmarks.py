# SPDX-License-Identifier: Apache-2.0
"""The decode benchmark and the profile on the tiny models: every figure is there, and what can be counted is right."""

from __future__ import annotations

import json
import random
import subprocess
import sys
from pathlib import Path

import pytest
import torch

import fastdllm
from fastdllm import kernels, testing
from scripts.benchmarks import decode, profile_step, published

ROOT = Path(__file__).resolve().parents[1]

CACHES = {"llada": ("none", "prefix", "dual"), "dream": ("none", "prefix", "dual"), "v2": ("none", "block", "sub_block")}


@pytest.mark.parametrize("name", ["llada", "v2"])
def test_the_benchmark_reports_what_was_decoded(name: str, tmp_path: Path, capsys) -> None:
    given = ["--cpu", "--models", name, "--prompts", "40", "--gen", "32", "--repeats", "1"]
    kept = tmp_path / "decode.json"
    kept.write_text('{"fp8": 1}')
    decode.main([*given, "--batches", "1", "2", "--output", str(kept)])
    printed = capsys.readouterr().out
    report = json.loads(printed.splitlines()[-1])
    assert json.loads(kept.read_text()) == {"fp8": 1, "fp32": report}, "runs with other weights stay"
    assert {"device", "torch", "python", "commit"} < report.keys() and min(report["ceilings"].values()) > 0
    figures = report[name]
    cache, step = ("sub_block", 8 / 3) if name == "v2" else ("dual", 4)
    for batch in (1, 2):
        answers = figures[f"{cache}_prompt40_batch{batch}"]
        assert answers["nfe"] == pytest.approx(32 / step, abs=4 if name == "v2" else 0)  # v2 opens its blocks with a pass
        assert answers["tokens_per_forward"] == pytest.approx(32 * batch / answers["nfe"] / batch)
        assert answers["peak_gib"] is None
    model = fastdllm.load(decode.TINY[name], device="cpu")
    spec, keys = model.spec, 64 if name == "v2" else 40 + 32  # a block-causal model sees no further than its block of 32
    weights = sum(p.nbytes for key, p in model.network.named_parameters() if spec.tied_head or "embed" not in key)
    read = weights + 4 * keys * 2 * spec.layers * spec.kv_heads * spec.head_dim
    for width in ("block", "sub_block") if name == "v2" else ("block",):
        floor = figures["forward"][f"{width}_floor_ms"]
        assert floor * report["ceilings"]["copy_gb_s"] * 1e6 == pytest.approx(read)
        assert figures["forward"][f"{width}_ratio"] == pytest.approx(figures["forward"][f"{width}_forward_ms"] / floor)
    earlier = tmp_path / "earlier.txt"
    earlier.write_text(printed)
    decode.main([*given, "--batches", "1", "--compare", str(earlier)])
    assert f"x 1.000 of {earlier}" in capsys.readouterr().out  # the forwards of an answer do not vary


@pytest.mark.parametrize("name", ["llada", "dream", "v2"])
def test_a_prompt_and_an_answer_shorter_than_a_block_are_measured(name: str, capsys: pytest.CaptureFixture[str]) -> None:
    sizes = ["--prompts", "1", "--gen", "1", "--batches", "1", "--repeats", "1"]
    decode.main(["--cpu", "--models", name, "--brief", "--skip-checks", *sizes])
    assert "tokens_per_second" in capsys.readouterr().out


def test_a_floor_counts_the_experts_that_are_read() -> None:
    network = testing.random_model("llada2_moe").network
    total = sum(p.nbytes for name, p in network.named_parameters() if name != "embed.weight")
    one = 3 * network.spec.width * 12 * 4  # bytes of an expert, of which the second layer has 8
    assert decode.weight_bytes(network, 10**6) == total
    assert decode.weight_bytes(network, 1) == pytest.approx(total - 5 * one), "3 experts and what is shared"
    assert decode.weight_bytes(network, 2) == pytest.approx(total - 8 * one * (5 / 8) ** 2, abs=1)
    few, many = (decode.full_flops(network.spec, 7, 0), decode.full_flops(testing.random_model("v2").spec, 7, 0))
    assert many - few == 2 * 7 * 3 * 32 * (48 - 4 * 12), "an expert computes only for the tokens that chose it"


@pytest.mark.parametrize("name", decode.SHAPES)
def test_every_shape_is_a_model(name: str) -> None:
    family, config = decode.SHAPES[name]
    assert family.spec(config, {}).layers > 15


@pytest.mark.skipif(torch.cuda.is_available(), reason="there is a GPU")
@pytest.mark.parametrize(
    "module",
    ["decode", *(pytest.param(name, marks=pytest.mark.slow) for name in ("profile_step", "loading", "kernels", "tiles"))],
)
def test_a_benchmark_without_a_gpu_says_so_in_one_line(module: str) -> None:
    if module in ("kernels", "tiles"):
        pytest.importorskip("triton")
    command = [sys.executable, "-m", f"scripts.benchmarks.{module}", *(["--product", "out"] if module == "tiles" else [])]
    done = subprocess.run(command, capture_output=True, text=True, cwd=ROOT)
    assert done.returncode == 2 and done.stderr.startswith(f"{module}: a GPU is needed") and done.stderr.count("\n") == 1


def test_settings_are_measured_beside_each_other(capsys: pytest.CaptureFixture[str]) -> None:
    settings = ["cache=block", "cache=block,reuse_k=2,layer_subset=first"]
    sets = [part for setting in settings for part in ("--set", setting)]
    decode.main(["--cpu", "--models", "v2", "--gen", "32", "--prompts", "20", "--batches", "1", "2", *sets])
    found = json.loads(capsys.readouterr().out.splitlines()[-1])["v2"]
    assert list(found) == [f"{setting} prompt20_batch{batch}" for batch in (1, 2) for setting in settings]
    for batch in (1, 2):  # a fixed number of tokens a step: reuse saves layers, not forwards or positions
        none, reuse = (found[f"{setting} prompt20_batch{batch}"] for setting in settings)
        assert none["positions_per_token"] > 1
        assert all(none[name] == reuse[name] for name in ("nfe", "tokens_per_forward", "positions_per_token"))


PUBLISHED_CODE = {  # what the benchmark calls of a checkout of NVlabs/Fast-dLLM, over a network of a single layer
    "generate.py": """
import torch
def generate_with_dual_cache(model, prompt, steps, gen_length, block_length, mask_id):
    assert gen_length == 4 * steps and block_length == 32 and mask_id == 900
    print("asked for", prompt.shape[1])
    return torch.cat([prompt, prompt.new_zeros(1, gen_length)], 1), steps
""",
    "model/configuration_llada.py": """
class LLaDAConfig:
    def __init__(self, **fields):
        self.__dict__.update(fields)
""",
    "model/modeling_llada.py": """
import torch
from types import SimpleNamespace
class LLaDAModelLM(torch.nn.Module):
    def __init__(self, config):
        super().__init__()
        assert config.n_layers == 2 and config.mask_token_id == 900 and config.block_type == "llama"
        layers = {"ff_out": torch.nn.Linear(config.d_model, config.vocab_size, bias=False)}
        self.model = torch.nn.ModuleDict({"transformer": torch.nn.ModuleDict(layers)})
        self.model.transformer = self.model["transformer"]
        self.model.transformer.ff_out = layers["ff_out"]
    def forward(self, ids, use_cache, past_key_values=None, replace_position=None):
        assert use_cache and (past_key_values is None) == (replace_position is None)
        assert past_key_values is None or ids.shape[1] == replace_position.sum() == 32
        return SimpleNamespace(past_key_values=ids)
""",
}


def test_published_code_and_ours_are_measured_in_one_run(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys) -> None:
    for name, text in PUBLISHED_CODE.items():
        path = tmp_path / "checkout" / "llada" / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(text)
    monkeypatch.setattr(sys, "path", list(sys.path))
    for name in ("generate", "model", "model.configuration_llada", "model.modeling_llada"):
        monkeypatch.setitem(sys.modules, name, None)
        monkeypatch.delitem(sys.modules, name)
    family, sizes = decode.SHAPES["llada"]
    small = {"n_layers": 2, "d_model": 64, "n_heads": 2, "n_kv_heads": 2, "mlp_hidden_size": 64, "max_sequence_length": 256}
    small |= {"vocab_size": 1000, "embedding_size": 1000, "mask_token_id": 900, "eos_token_id": 901, "pad_token_id": 901}
    monkeypatch.setitem(decode.SHAPES, "llada", (family, sizes | small))
    saved = tmp_path / "speed.json"
    saved.write_text('{"kept": 1, "shape": "old"}')
    given = ["--checkout", str(tmp_path / "checkout"), "--output", str(saved), "--repeats", "1"]
    published.main([*given, "--prompts", "40", "24", "--gen", "32", "--batches", "1", "2"])
    report = json.loads(saved.read_text())
    assert report["kept"] == 1 and "32 new tokens" in report["shape"]
    assert {code: list(times) for code, times in report["forward_ms"].items()} == {
        code: ["block of 32", "72 positions"] for code in ("published", "bf16")
    }
    rows = [(row["code"], row["weights"], row["batch"]) for row in report["tokens_per_second"]]
    ours = [("fastdllm", weights, batch) for batch in (1, 2) for weights in ("bf16", "fp8")]
    assert rows == [("published", "bf16", 1), *ours]
    assert all(row["prompt_40"] > 0 < row["prompt_24"] for row in report["tokens_per_second"])
    assert capsys.readouterr().out.count("asked for 40") == 2, "the first answer warms up"
    with pytest.raises(ValueError, match=r"llada/generate\.py"):
        published.main(["--checkout", str(tmp_path)])


def test_the_profile_knows_what_each_operation_moves() -> None:
    model = fastdllm.load("tiny-llada", device="cpu")
    spec, rows, width, keys = model.spec, 2, 8, 50
    step = decode.Forward(model, rows, width, keys, keys - width, width)
    before = {name: getattr(kernels, name) for name in profile_step.OPERATIONS}
    with profile_step.recorded() as nbytes:
        step.run()
        assert kernels.attention is not before["attention"]
    assert {name: getattr(kernels, name) for name in profile_step.OPERATIONS} == before
    n, c, f, v = rows * width, spec.width, spec.ffn, spec.vocab
    q, kv = spec.heads * spec.head_dim, spec.kv_heads * spec.head_dim
    integers = 8 * (rows + n)  # rows, and positions or limits
    assert nbytes == {
        f"rmsnorm {rows}x{width}x{c}": 4 * (2 * n * c + c),
        f"linear_rope_store {q + 2 * kv}x{c}": 4 * ((q + 2 * kv) * c + n * (c + q + 2 * kv)) + integers,
        f"attention {rows}x{width}x{spec.heads}x{spec.head_dim}": 4 * (2 * n * q + 2 * rows * keys * kv) + integers,
        f"linear_rmsnorm {c}x{q}": 4 * (c * q + c + n * (q + 3 * c)),
        f"linear_silu_mul {2 * f}x{c}": 4 * (2 * f * c + n * (c + f)),
        f"linear_rmsnorm {c}x{f}": 4 * (c * f + c + n * (f + 3 * c)),
        f"head_confidence {v}x{c}": 4 * (v * c + n * c) + v + n * (8 + 4 + 4),  # top, probability, log-sum-exp
    }


def test_a_kernel_belongs_to_the_operation_that_launched_it() -> None:
    """Launches are matched by their time on the host, kernels by their launch, whenever they ran."""

    def event(cat: str, name: str, ts: float, dur: float, correlation: int | None = None) -> dict[str, object]:
        return {"cat": cat, "name": name, "ts": ts, "dur": dur, "args": {"correlation": correlation}}

    events = [
        event("user_annotation", "attention 1x8", 10, 5),
        event("user_annotation", "rmsnorm 4x4", 20, 5),
        event("user_annotation", "somebody else's", 30, 5),
        event("cuda_driver", "cuLaunchKernelEx", 11, 1, 1),
        event("cuda_driver", "cuLaunchKernelEx", 13, 1, 2),
        event("cuda_runtime", "cudaLaunchKernel", 21, 1, 3),
        event("cuda_runtime", "cudaLaunchKernel", 31, 1, 4),
        event("kernel", "split", 21, 4.0, 1),
        event("kernel", "join", 26, 2.0, 2),
        event("kernel", "gemm", 40, 8.0, 3),
        event("kernel", "gather", 50, 1.0, 4),
        event("kernel", "launched before the trace", 51, 1.0, 5),
    ]
    assert profile_step.attribute(events, cuda=True) == {
        "attention 1x8": {"split": (1, 4.0), "join": (1, 2.0)},
        "rmsnorm 4x4": {"gemm": (1, 8.0)},
        "other": {"gather": (1, 1.0), "launched before the trace": (1, 1.0)},
    }
    assert profile_step.attribute(events, cuda=False) == {
        "attention 1x8": {"on the host": (1, 5)},
        "rmsnorm 4x4": {"on the host": (1, 5)},
    }


def test_the_profile_prints_every_operation(tmp_path: Path, capsys) -> None:
    profile_step.main(["--cpu", "--keys", "64", "--out", str(tmp_path)])
    printed = capsys.readouterr().out
    names = {name.removesuffix("_fp8") for name in profile_step.OPERATIONS} - {"experts_rmsnorm"}
    assert all(f"\n{name} " in printed for name in names)
    assert json.loads((tmp_path / "trace.json").read_text())["traceEvents"]


@pytest.mark.gpu
def test_models_settings_and_batch_sizes_share_a_process_in_any_order(monkeypatch: pytest.MonkeyPatch) -> None:
    """Forwards of the benchmark and whole answers, captured, drawn in random order: each gives what it gives eagerly."""
    monkeypatch.setattr(kernels, "_CHOICE", "triton")  # one attention for both, so that tokens can be compared
    models = {name: fastdllm.load(tiny, "cuda", "float32") for name, tiny in decode.TINY.items()}
    work = [(name, rows, width) for name in models for rows in (1, 2, 8) for width in (8, 32)] * 2
    order = random.Random(0)
    order.shuffle(work)
    for name, rows, width in work:
        model = models[name]
        step = decode.Forward(model, rows, width, keys=96, start=96 - width, head_rows=8)
        step()
        captured = step.out.top.clone(), step.out.prob.clone()
        eager = step.run()
        assert torch.equal(captured[0], eager.top) and torch.allclose(captured[1], eager.prob, atol=1e-4)
        cache, prompts = order.choice(CACHES[name]), [torch.randint(0, 512, (order.randint(1, 90),)) for _ in range(rows)]
        options = {"gen_length": 40, "cache": cache, "threshold": order.choice((0.5, 0.9)), "stop_ids": ()}
        eager, graph = (fastdllm.generate(model, prompts, runner=r, **options) for r in ("eager", "cuda_graph"))
        assert [s.tolist() for s in graph.sequences] == [s.tolist() for s in eager.sequences]
