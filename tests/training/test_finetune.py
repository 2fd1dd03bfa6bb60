# SPDX-License-Identifier: Apache-2.0
"""The fine-tuning script end to end on a tiny Qwen2: losses, LoRA, the Alpaca script, bad records."""

from __future__ import annotations

import json
import os
import sys
from pathlib import Path

import numpy as np
import pytest
import torch
from peft import PeftModel
from safetensors.torch import load_file

import fastdllm
from fastdllm.forward import Window
from fastdllm.training.checkpoint import load_for_training
from tests.training.conftest import tiny_qwen2
from tests.training.running import SCRIPTS, alpaca_command, launch, losses, options
from v2.train_scripts import finetune

ANSWERS = {"red": "roses are", "blue": "the sea is", "green": "grass, of course", "grey": "an elephant"}


@pytest.fixture
def one_batch_losses(qwen2: Path, data: Path, tmp_path: Path) -> list[float]:
    """Three steps of four rows in one process, without accumulation."""
    finetune.main(options(qwen2, data, tmp_path / "one", max_steps=3, per_device_train_batch_size=4))
    return losses(tmp_path / "one")


def test_accumulation_does_not_change_the_loss(
    qwen2: Path, data: Path, tmp_path: Path, one_batch_losses: list[float]
) -> None:
    extra = {"max_steps": 3, "per_device_train_batch_size": 1, "gradient_accumulation_steps": 4}
    finetune.main(options(qwen2, data, tmp_path / "out", **extra))
    assert losses(tmp_path / "out") == pytest.approx(one_batch_losses, rel=1e-4)


@pytest.mark.slow
def test_two_processes_do_not_change_the_loss(
    qwen2: Path, data: Path, tmp_path: Path, one_batch_losses: list[float]
) -> None:
    torchrun = [sys.executable, "-m", "torch.distributed.run", "--nproc_per_node", 2, "--standalone"]
    argv = options(qwen2, data, tmp_path / "out", max_steps=3, per_device_train_batch_size=2)
    launch([*torchrun, SCRIPTS / "finetune.py", *argv], ACCELERATE_USE_CPU="true")
    assert losses(tmp_path / "out") == pytest.approx(one_batch_losses, rel=1e-4)


@pytest.mark.parametrize("checkpointing", [False, True], ids=["plain", "checkpointing"])
def test_lora_trains_adapters_only_and_merges(qwen2: Path, data: Path, tmp_path: Path, checkpointing: bool) -> None:
    output = tmp_path / "lora"
    extra = {"lora": True, "lora_rank": 4, "merge_lora": True, "gradient_checkpointing": checkpointing}
    finetune.main(options(qwen2, data, output, max_steps=4, per_device_train_batch_size=12, **extra))
    assert losses(output)[-1] < losses(output)[0]
    adapters = load_file(output / "adapter_model.safetensors")
    assert json.loads((output / "adapter_config.json").read_text())["base_model_name_or_path"] == str(qwen2)
    assert json.loads((output / "config.json").read_text())["bd_size"] == 8
    with pytest.raises(ValueError, match=f"a LoRA adapter of {qwen2}"):
        load_for_training(str(output))
    assert adapters
    assert all("lora_" in name for name in adapters)

    base, merged = load_file(qwen2 / "model.safetensors"), load_file(output / "merged" / "model.safetensors")
    assert base.keys() == merged.keys()
    changed = {name for name in base if not torch.equal(base[name], merged[name])}
    assert changed == {name for name in base if name.endswith("_proj.weight")}

    with_adapters = PeftModel.from_pretrained(load_for_training(str(qwen2))[0], output).eval()
    ids = torch.randint(3, 259, (2, 9))
    loaded, _ = load_for_training(str(output / "merged"))
    torch.testing.assert_close(loaded.eval()(ids).logits, with_adapters(ids).logits, atol=1e-4, rtol=1e-4)
    assert fastdllm.load(str(output / "merged"), device="cpu").spec.mask_id == 259


@pytest.mark.parametrize("diffuses", [True, False], ids=["Fast-dLLM v2", "plain Qwen2"])
def test_the_alpaca_scripts_adapter_loads_beside_its_model(qwen2: Path, data: Path, tmp_path: Path, diffuses: bool) -> None:
    """A plain Qwen2 is no diffusion model: what it was made into is written next to the adapter."""
    base, output = qwen2, tmp_path / "out"
    if diffuses:
        base = tmp_path / "base"
        model, tokenizer = load_for_training(str(qwen2), block=8)
        for part in (model, tokenizer):
            part.save_pretrained(base)
    extra = ["--max_steps", 3, "--bd_size", 8, "--learning_rate", "5e-3", "--lora", "--lora_rank", 4, "--merge_lora"]
    extra += ["--report_to", "none"]
    command = alpaca_command(tmp_path, SCRIPTS / "finetune_alpaca.sh", *extra, MODEL=base, DATA=data, OUTPUT=output)
    finetune.main(command[1:])
    ours = fastdllm.load(str(base), device="cpu", adapter=output)
    theirs = fastdllm.load(str(output / "merged"), device="cpu")
    assert ours.spec == theirs.spec and ours.tokenizer.get_vocab() == theirs.tokenizer.get_vocab()
    ids = torch.randint(3, 259, (1, 16))
    at = torch.arange(16)[None]
    window = Window(torch.zeros(1, dtype=torch.long), at, torch.full_like(at, 16), 16, True)
    logits = [m.network.head(m.network(ids, window, m.network.new_store(1, 16))) for m in (ours, theirs)]
    torch.testing.assert_close(*logits, atol=1e-5, rtol=1e-5)
    if diffuses:
        untrained = fastdllm.load(str(base), device="cpu")
        assert untrained.fingerprint() != ours.fingerprint()
    with pytest.raises(FileNotFoundError, match=rf"holds a LoRA adapter, not a model; load its base model \({base}\)"):
        fastdllm.load(str(output), device="cpu")


def test_four_samples_are_learnt_by_heart_and_decoded(tmp_path: Path) -> None:
    """Training, saving, loading and decoding agree on masks, shift, blocks and the end of an answer."""
    data, output = tmp_path / "four.jsonl", tmp_path / "out"
    questions = [[{"role": "user", "content": question}] for question in ANSWERS]
    talks = [[*q, {"role": "assistant", "content": a}] for q, a in zip(questions, ANSWERS.values(), strict=True)]
    data.write_text("\n".join(json.dumps({"messages": talk}) for talk in talks))
    extra = {"max_steps": 200, "learning_rate": 1e-2, "lr_scheduler_type": "cosine", "logging_steps": 50}
    start = tiny_qwen2(tmp_path / "model")
    finetune.main(options(start, data, output, per_device_train_batch_size=4, **extra))
    assert losses(output)[-1] < 0.02

    model = fastdllm.load(str(output), device="cpu")
    prompts = [
        model.tokenizer.apply_chat_template(q, add_generation_prompt=True, return_dict=True)["input_ids"] for q in questions
    ]
    answers = fastdllm.generate(model, [torch.tensor(p) for p in prompts], gen_length=40).sequences
    decoded = [model.tokenizer.decode(row[len(p) :]) for row, p in zip(answers, prompts, strict=True)]
    assert decoded == [f"{answer}<|im_end|>" for answer in ANSWERS.values()]


def test_evaluation_noise_does_not_move(qwen2: Path, data: Path, tmp_path: Path) -> None:
    extra = {"eval_dataset_path": data, "eval_strategy": "steps", "eval_steps": 1, "learning_rate": 0}
    finetune.main(options(qwen2, data, tmp_path / "out", max_steps=2, **extra))
    history = json.loads((tmp_path / "out" / "trainer_state.json").read_text())["log_history"]
    first, second = (entry["eval_loss"] for entry in history if "eval_loss" in entry)
    assert first == second


def test_alpaca_script_runs_offline(qwen2: Path, data: Path, tmp_path: Path) -> None:
    command = ["bash", SCRIPTS / "finetune_alpaca.sh", "--max_steps", 3, "--bd_size", 8, "--learning_rate", "5e-3"]
    path = f"{Path(sys.executable).parent}{os.pathsep}{os.environ['PATH']}"
    output = tmp_path / "out"
    launch([*command, "--disable_tqdm", "true"], MODEL=qwen2, DATA=data, OUTPUT=output, GPUS=0, PATH=path)
    assert losses(output)[2] < losses(output)[0]
    assert list(output.glob("runs/**/events.out.tfevents*")), "nothing was logged to TensorBoard"
    assert json.loads((output / "config.json").read_text())["model_type"] == "Fast_dLLM_Qwen"


def test_bad_records_are_skipped_or_fatal(
    qwen2: Path, data: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    records = json.loads(data.read_text())
    data.write_text(json.dumps([records[0], {"text": "no conversation"}, *records[1:]]))
    finetune.main(options(qwen2, data, tmp_path / "out", max_steps=1))
    errors = capsys.readouterr().err
    assert "alpaca.json[1]" in errors
    assert "12 samples in 12 rows" in errors
    with pytest.raises(SystemExit) as stopped:
        finetune.main(options(qwen2, data, tmp_path / "another", max_steps=1, on_bad_record="error"))
    assert stopped.value.code == 2
    assert "alpaca.json[1]" in capsys.readouterr().err.strip().splitlines()[-1]


@pytest.mark.parametrize(("pad_with", "fill", "label"), [("mask", 259, -100), ("end", 2, 2), ("none", None, None)])
def test_last_block_is_filled_as_asked(qwen2: Path, data: Path, pad_with: str, fill: int | None, label: int | None) -> None:
    _, tokenizer = load_for_training(str(qwen2))
    chosen = finetune.DataArguments(str(data), context_length=512, pad_with=pad_with)
    filled = [row[0] for row in finetune.load_samples(str(data), tokenizer, chosen, 32, quiet=True)]
    chosen.pad_with = "none"
    plain = [row[0] for row in finetune.load_samples(str(data), tokenizer, chosen, 32, quiet=True)]
    assert any(len(sample.ids) % 32 for sample in plain)
    for one, other in zip(filled, plain, strict=True):
        size = len(other.ids)
        assert np.array_equal(one.ids[:size], other.ids)
        assert len(one.ids) == (size if fill is None else -(-size // 32) * 32)
        assert (one.ids[size:] == fill).all()
        assert (one.labels[size:] == label).all()
