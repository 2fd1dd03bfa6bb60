# SPDX-License-Identifier: Apache-2.0
"""studies/quantize_study.py: errors that are known, the forward against the likelihood's, and a short run."""

from __future__ import annotations

import json
import sys

import pytest
import torch

import fastdllm
from fastdllm.likelihood import read
from scripts.studies import quantize_study
from scripts.studies.pareto import problems
from scripts.studies.quantize_study import errors, half_masked, logit_errors, logits_of

MODELS = ["tiny-llada", "tiny-dream", "tiny-fast-dllm-v2"]
ASKED = problems("validation", 2, "gsm_symbolic")


def test_errors_worked_out_by_hand() -> None:
    """The third id is banned. Log-odds of 0 and log 3: KL((1/2, 1/2) || (1/4, 3/4)) = log(4 / 3) / 2."""
    banned, log3 = torch.tensor([False, False, True]), float(torch.tensor(3.0).log())
    reference = torch.tensor([[1.0, 1.0, 9.0], [3.0, -1.0, -9.0]])
    other = torch.tensor([[1.0, 1.0 + log3, -9.0], [3.0, -1.0, 9.0]])
    found = errors([(other[:1], reference[:1]), (other[1:], reference[1:])], banned)
    assert found["positions"] == 2 and found["same_top"] == 0.5
    assert found["error"] == pytest.approx(log3 / 8**0.5) and found["kl"] == pytest.approx(0.143841 / 2, rel=1e-5)


@pytest.mark.parametrize("name", MODELS)
def test_half_of_the_answer_is_masked_and_the_forward_is_that_of_the_likelihood(name: str) -> None:
    model = fastdllm.load(name, device="cpu")
    for probe in half_masked(model, ASKED):
        answer = len(probe.ids) - probe.prompt
        assert int((probe.ids == model.spec.mask_id).sum()) == len(probe.at) == (answer + 1) // 2
        assert probe.at.min() >= probe.prompt
        ((_, reading),) = read(model, [(0, 1.0, probe)], batch_size=1)
        mine = logits_of(model, probe).log_softmax(-1).gather(1, probe.tokens[:, None])[:, 0]
        torch.testing.assert_close(mine, reading.log_prob, atol=1e-4, rtol=1e-4)


@pytest.mark.parametrize("name", MODELS)
def test_a_model_against_itself_has_no_error_and_fewer_bits_have_more(name: str) -> None:
    """fp8 keeps 3 bits of a mantissa, of weights and of activations; int8 has 255 levels of weights, int4 has 16 a group."""
    kinds = {"fp32": None, "bf16": None, "fp8": "fp8", "int8": "int8", "int4": "int4"}
    found = logit_errors({w: fastdllm.load(name, "cpu", "bfloat16", quantize=kind) for w, kind in kinds.items()}, ASKED)
    nothing = {"positions": found["fp8"]["positions"], "error": 0, "same_top": 1, "kl": 0}
    assert found["bf16"] == nothing
    assert 0 < found["int8"]["error"] < found["fp8"]["error"] / 2 < 0.1
    assert found["fp8"]["error"] < found["int4"]["error"] < 0.3
    assert all(
        found[w]["kl"] > 0 and found[w]["same_top"] > least for w, least in (("fp8", 0.9), ("int8", 0.9), ("int4", 0.8))
    )


def test_a_run_prints_a_table_and_every_figure(monkeypatch: pytest.MonkeyPatch, capsys) -> None:
    small = ("--limit", "2", "--logit_limit", "1", "--gen_length", "32", "--batch_size", "1", "--split", "validation")
    options = ("--models", "tiny-fast-dllm-v2", "--settings", "threshold=0.5", "--device", "cpu")
    monkeypatch.setattr(sys, "argv", ["quantize_study", *small, *options])
    quantize_study.main()
    *table, line = capsys.readouterr().out.strip().splitlines()
    rows = json.loads(line)["rows"]
    compared = [("bf16", "fp32"), ("fp8", "bf16"), ("int8", "bf16"), ("int4", "bf16")]
    assert [(r["weights"], r["against"]) for r in rows] == compared
    assert len([x for x in table if x.startswith("| tiny-fast-dllm-v2 | ")]) == 4
    for row in rows:
        decoded = row["decoding"]["threshold=0.5"]
        assert 0 < row["logits"]["error"] < 0.3 and decoded["forwards"] >= 2
        assert decoded["low"] <= decoded["difference"] <= decoded["high"]
