# SPDX-License-Identifier: Apache-2.0
"""Learning to decode in parallel: the trainable network, the states it is shown, the loss, and the recipe end to end."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from peft import LoraConfig, get_peft_model
from safetensors.torch import load_file, save_file
from torch import Tensor

import fastdllm
from fastdllm.models import TINY
from fastdllm.models.spec import ModelSpec
from fastdllm.prompts import encode_messages
from fastdllm.training import parallel
from fastdllm.training.network import load_network, save_network
from fastdllm.training.parallel import (
    UNKNOWN,
    Batch,
    Collator,
    Curriculum,
    Example,
    State,
    ask,
    draw_state,
    fill,
    parallel_loss,
)
from fastdllm.training.records import read_records, to_conversation
from scripts.recipes import parallel as recipe
from scripts.recipes import parallel_report
from tests.examples import examples

FAMILIES = ("tiny-llada", "tiny-dream", "tiny-fast-dllm-v2")
TALK = [{"role": "user", "content": "Tom has 3 apples and buys 4 more. How many apples does Tom have?"}]


def spec_like(block_causal: int = 0, shift: int = 0) -> ModelSpec:
    sizes = {"layers": 1, "width": 8, "heads": 1, "kv_heads": 1, "head_dim": 8, "ffn": 8, "vocab": 32, "max_length": 128}
    kinds = {"rms_eps": 1e-5, "rope_theta": 1e4, "qkv_bias": False, "tied_head": True}
    ids = {"mask_id": 31, "stop_ids": (1,), "pad_id": 1}
    return ModelSpec("test", **sizes, **kinds, shift=shift, block_causal=block_causal, **ids)


def whole_state(ids: Tensor, start: int, masked: Tensor, spec: ModelSpec) -> tuple[Batch, State]:
    """One row [T] with `masked` [T] asked for, all after it hidden."""
    width = torch.tensor([ids.shape[0]])
    batch = Batch(ids[None], torch.full((1, len(ids)), UNKNOWN), torch.tensor([start]), width - start, width)
    none = torch.zeros_like(masked)[None]
    return batch, State(masked[None], none, none, none[:, 0])


@pytest.mark.gpu
@pytest.mark.parametrize("width", [64, 128, 192, 200])
def test_gradients_under_a_mask_are_finite_at_every_width(width: int) -> None:
    """In bf16 as the recipe trains, close to those in fp32; cuDNN's attention gave NaN at 64 and 192."""
    network = load_network("tiny-llada")[0].cuda()
    torch.manual_seed(0)
    ids = torch.randint(300, (4, width), device="cuda")
    positions = torch.arange(width, device="cuda").expand(4, width)
    visible = (positions < torch.tensor([[width], [width - 1], [width // 2], [5]], device="cuda"))[:, None, None]
    found = []
    for half in (False, True):
        network.zero_grad()
        with torch.autocast("cuda", torch.bfloat16, enabled=half):
            logits = network(ids, positions, visible)
        torch.nn.functional.cross_entropy(logits.float().flatten(0, 1), ids.flatten()).backward()
        found.append(torch.cat([p.grad.flatten() for p in network.parameters()]))
    assert found[1].isfinite().all()
    assert torch.cosine_similarity(*found, dim=0) > 0.99


@pytest.mark.parametrize("name", FAMILIES)
def test_the_network_is_as_sure_as_the_engine(name: str) -> None:
    """The same probabilities as decoding without a cache has, in the states that decoding meets: shift, mask and blocks."""
    network, _, _ = load_network(name)
    model = fastdllm.load(name, device="cpu", dtype="float32")
    spec, prompt = model.spec, encode_messages(model, TALK)
    options = {} if spec.block_causal else {"cache": "none", "block_length": 16}
    length = 32 + (-len(prompt) % spec.block_causal if spec.block_causal else 0)  # whole blocks
    ids = torch.cat([prompt, torch.full((length,), spec.mask_id)])
    compared = 0
    for step in fastdllm.stream(model, [prompt], gen_length=length, threshold=0.9, **options):
        start = max(step.starts[0], len(prompt))  # a step shows its block from the answer's first token on
        count = min(step.stops[0], len(ids)) - start
        confidence, here = step.confidence[0][:count], slice(start, start + count)
        masked = torch.zeros_like(ids, dtype=torch.bool)
        masked[here] = ~confidence.isnan()
        masked &= ids == spec.mask_id
        if spec.block_causal:  # the first token of a block comes from the pass before
            masked &= torch.arange(len(ids)) % spec.block_causal != 0
        if masked.any():
            batch, state = whole_state(ids, len(prompt), masked, spec)
            asked = ask(batch, state, spec)
            probabilities = network.eval()(**asked.inputs).softmax(-1).masked_fill(model.banned, 0)
            expected = confidence[asked.place - start]
            torch.testing.assert_close(probabilities.amax(-1), expected, atol=2e-4, rtol=2e-3)
            compared += len(expected)
        ids[here] = torch.where(step.committed[0][:count], step.ids[0][:count], ids[here])
    assert compared > 20


@pytest.mark.parametrize("name", FAMILIES)
def test_what_is_saved_is_the_published_checkpoint(name: str, tmp_path: Path) -> None:
    network, _, folder = load_network(name)
    save_network(network.state_dict(), folder, tmp_path)
    before, after = load_file(folder / "model.safetensors"), load_file(tmp_path / "model.safetensors")
    assert before.keys() == after.keys()
    assert all(torch.equal(before[key], tensor) and before[key].dtype == tensor.dtype for key, tensor in after.items())
    first, second = (fastdllm.load(str(path), device="cpu") for path in (folder, tmp_path))
    assert first.spec == second.spec
    assert first.tokenizer.chat_template == second.tokenizer.chat_template


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda t: t.pop("model.transformer.ln_f.weight"), r"lacks tensors: model\.transformer\.ln_f\.weight"),
        (lambda t: t.update(odd=torch.ones(2)), "unknown tensors: odd"),
        (lambda t: t["model.transformer.ln_f.weight"].fill_(float("inf")), "infinite"),
    ],
    ids=["missing", "unknown", "infinite"],
)
def test_damaged_checkpoints_are_refused(tmp_path: Path, change: object, message: str) -> None:
    network, _, folder = load_network("tiny-llada")
    save_network(network.state_dict(), folder, tmp_path)
    tensors = load_file(tmp_path / "model.safetensors")
    change(tensors)
    save_file(tensors, tmp_path / "model.safetensors")
    with pytest.raises(ValueError, match=message):
        load_network(str(tmp_path))


def test_adapters_take_part_and_merge_into_published_names() -> None:
    """peft exchanges modules; a network that kept the old ones would run without the adapters."""
    network, _, _ = load_network("tiny-dream")
    names = set(network.state_dict())
    ids, positions = torch.randint(0, 300, (1, 12)), torch.arange(12)[None]
    inputs = {"ids": ids, "positions": positions, "visible": torch.ones(1, 1, 1, 12, dtype=torch.bool)}
    plain = network(**inputs)
    model = get_peft_model(network, LoraConfig(r=2, target_modules=network.projections, init_lora_weights=False))
    trained = {name for name, parameter in model.named_parameters() if parameter.requires_grad}
    assert len(trained) == 2 * len(network.projections)
    adapted = model(**inputs)
    assert (adapted - plain).abs().max() > 1e-3
    merged = model.merge_and_unload()
    assert set(merged.state_dict()) == names
    torch.testing.assert_close(merged(**inputs), adapted, atol=1e-4, rtol=1e-4)


def test_recomputing_activations_keeps_gradients() -> None:
    network, _, _ = load_network("tiny-llada")
    ids, positions = torch.randint(0, 300, (1, 12)), torch.arange(12)[None]

    def gradients(checkpointing: bool) -> list[Tensor]:
        network.zero_grad()
        network.train().checkpointing = checkpointing
        network(ids, positions, torch.ones(1, 1, 1, 12, dtype=torch.bool), torch.tensor([3, 7])).square().sum().backward()
        return [parameter.grad.clone() for parameter in network.parameters()]

    for plain, recomputed in zip(gradients(False), gradients(True), strict=True):
        torch.testing.assert_close(plain, recomputed)


EXAMPLE = st.builds(
    lambda prompt, order: Example([5] * prompt, [*range(2, 1 + len(order)), 1], order),
    st.integers(1, 20),
    st.lists(st.integers(1, 6), min_size=1, max_size=24),
)


@settings(max_examples=examples(150), deadline=None)
@given(
    examples=st.lists(EXAMPLE, min_size=1, max_size=5),
    blocks=st.lists(st.sampled_from([1, 4, 8, 24, 64]), min_size=1, max_size=3).map(sorted).map(tuple),
    shares=st.tuples(st.floats(0, 0.5), st.floats(0, 0.5), st.floats(0, 1)),
    progress=st.floats(0, 1),
    block_causal=st.sampled_from([0, 8]),
    seed=st.integers(0, 1000),
)
def test_states_are_those_of_decoding(
    examples: list[Example],
    blocks: tuple[int, ...],
    shares: tuple[float, float, float],
    progress: float,
    block_causal: int,
    seed: int,
) -> None:
    spec, generator = spec_like(block_causal), torch.Generator().manual_seed(seed)
    batch = Batch(**Collator(end_id=1, canvas=30, context=60, grid=block_causal)(examples))
    curriculum = Curriculum(blocks, share=shares[2], own=shares[0], recorded=shares[1])
    state = draw_state(batch, spec, curriculum, progress, generator)
    place = torch.arange(batch.ids.shape[1])
    for b in range(len(examples)):
        answer = (place >= batch.start[b]) & (place < batch.stop[b])
        masked, hidden, anchored = state.masked[b], state.hidden[b], state.anchored[b]
        assert not ((masked | hidden | anchored) & ~answer).any()
        assert masked.any() or (block_causal and not (answer & ~anchored).any())
        assert not (masked & (hidden | anchored)).any()
        if block_causal:
            assert not hidden.any()
            assert torch.equal(anchored, answer & (place % 8 == 0))
            continue
        first, last = place[masked].min(), place[masked].max()
        assert last - first < max(blocks)
        assert torch.equal(hidden, answer & (place >= place[hidden].min())) if hidden.any() else True
        assert not hidden.any() or last < place[hidden].min()
        if state.own[b]:
            assert masked.sum() == last - first + 1, "a full block"


def test_recorded_states_mask_what_was_committed_last() -> None:
    spec, curriculum = spec_like(), Curriculum((16,), share=1.0, own=0.0, recorded=1.0)
    order = [3, 1, 2, 2, 5, 1, 4, 6, 6, 2]
    batch = Batch(**Collator(end_id=1, canvas=10, context=60)([Example([5] * 4, list(range(10, 20)), order)] * 64))
    state = draw_state(batch, spec, curriculum, 1.0, torch.Generator().manual_seed(0))
    counts = set()
    for masked in state.masked[:, 4:14]:
        known = [when for when, open_ in zip(order, masked.tolist(), strict=True) if not open_]
        still = [when for when, open_ in zip(order, masked.tolist(), strict=True) if open_]
        assert max(known, default=0) <= min(still)
        counts.add(len(still))
    assert len(counts) > 4


class Oracle(torch.nn.Module):
    """Is right about every token but 7, as sure of each as its id says."""

    def forward(self, ids: Tensor, positions: Tensor, visible: Tensor, rows: Tensor) -> Tensor:
        target = self.truth.flatten()[rows]
        logits = torch.zeros(len(rows), 32)
        return logits.scatter(1, torch.where(target == 7, 8, target)[:, None], target[:, None] / 4.0)


def test_filling_takes_what_the_network_is_right_and_sure_about() -> None:
    spec = spec_like()
    oracle = Oracle()
    examples = [Example([5, 5], [30, 7, 12, 29, 1]), Example([5], [4, 3, 2, 1]), Example([5], [7, 7, 1])]
    batch = Batch(**Collator(end_id=1, canvas=5, context=60, full_share=1.0)(examples))
    oracle.truth = batch.ids
    masked = torch.zeros_like(batch.ids, dtype=torch.bool)
    masked[0, 2:7] = masked[1, 1:6] = masked[2, 1:3] = True
    none = torch.zeros_like(masked)
    state = State(masked, none, none, torch.tensor([True, True, True]))
    once = fill(oracle, batch, state, spec, threshold=0.9)
    assert once.masked[0, 2:7].tolist() == [False, True, True, False, True], "30 and 29 are sure, 7 is wrong"
    assert once.masked[1, 1:6].tolist() == [False, True, True, True, True], "none is sure: only the surest"
    assert torch.equal(once.masked[2], masked[2]), "nothing right is left as it is"
    assert torch.equal(fill(oracle, batch, state._replace(own=~state.own), spec, 0.9).masked, masked)
    for _ in range(10):
        once = fill(oracle, batch, once, spec, threshold=0.9)
    assert once.masked.any(1).all()


def test_loss_equals_a_loop_and_sharpens_only_what_is_right() -> None:
    torch.manual_seed(0)
    logits, target = torch.randn(40, 9, requires_grad=True), torch.randint(0, 9, (40,))
    weight = torch.rand(40)
    loss = parallel_loss(logits, target, weight, certainty=2.0, temperature=0.5)
    total = 0.0
    for one, t, w in zip(logits.double(), target, weight, strict=True):
        term = -one.log_softmax(-1)[t]
        p = (one / 0.5).softmax(-1)
        total = total + w * (term + 2.0 * (-(p * p.log()).sum() if one.argmax() == t else 0.0))
    torch.testing.assert_close(loss.loss.double(), total / weight.double().sum())
    (sharp,) = torch.autograd.grad(loss.loss, logits, retain_graph=True)
    (plain,) = torch.autograd.grad(loss.cross_entropy, logits)
    right = logits.argmax(-1) == target
    torch.testing.assert_close(sharp[~right], plain[~right])
    assert (sharp[right] - plain[right]).abs().amax(1).min() > 0


def test_the_curriculum_opens_with_progress() -> None:
    curriculum, generator = Curriculum((8, 32, 64), share=0.4, ramp=0.5), torch.Generator().manual_seed(0)
    seen = [set(curriculum.lengths(p, 400, generator).tolist()) for p in (0.0, 0.3, 0.5, 1.0)]
    assert seen == [{8}, {8, 32}, {8, 32, 64}, {8, 32, 64}]
    assert [curriculum.largest_share(p) for p in (0.0, 0.25, 0.5, 1.0)] == pytest.approx([0.4, 0.7, 1.0, 1.0])
    for wrong in ({"blocks": ()}, {"share": 2}, {"own": 0.8, "recorded": 0.3}):
        with pytest.raises(ValueError, match=next(iter(wrong))):
            Curriculum(**wrong)


def test_an_answer_agrees_by_its_result() -> None:
    assert recipe.agrees("3 + 4 = 7\n#### 7", "4 + 3 = 7\n#### 7")
    assert recipe.agrees("#### 1,200", "#### 1200")
    assert not recipe.agrees("7", "#### 7")
    assert not recipe.agrees("#### 17", "#### 7")
    assert recipe.agrees(" 1 2\n3 4 ", "1 2\n3 4")


def test_mcnemar_is_the_exact_binomial() -> None:
    first, second = [True] * 8 + [False] * 2 + [True] * 5, [False] * 8 + [True] * 2 + [True] * 5
    assert parallel_report.sign_test(first, second) == pytest.approx(2 * (1 + 10 + 45) / 1024)
    assert parallel_report.sign_test(first, first) == 1.0


def problems(path: Path) -> Path:
    lines = (TINY.parent / "tasks" / "gsm_symbolic" / "fewshot.jsonl").read_text().splitlines()
    path.write_text("\n".join(lines))
    return path


def options(name: str, data: Path, out: Path, *more: str) -> list[str]:
    given = f"--model {name} --data {data} --out {out} --problems 2 --trajectories 3 --teacher_threshold 0.9"
    given += " --max_steps 2 --batch 2 --log_every 1 --cpu --workers 0 --thresholds 0.9 --decode_blocks 32 --gen_length 128"
    return [*given.split(), "--data_share", "0.5", "--plain_share", "0.5", "--blocks", "32", "64", *more]


@pytest.mark.slow
@pytest.mark.parametrize("name", ["tiny-llada", "tiny-fast-dllm-v2"])
def test_the_recipe_trains_resumes_and_reports(name: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    data, out = problems(tmp_path / "problems.jsonl"), tmp_path / "out"
    recipe.main(options(name, data, out, "--session", "0"))
    assert [path.name for path in (out / "checkpoints").iterdir()] == ["checkpoint-1"]
    stamp = (out / "before.json").stat().st_mtime_ns, (out / "trajectories.jsonl").read_text()
    recipe.main(options(name, data, out))
    state = json.loads((out / "checkpoints" / "checkpoint-2" / "trainer_state.json").read_text())
    assert state["global_step"] == 2
    assert "resuming from" in capsys.readouterr().err
    assert stamp == ((out / "before.json").stat().st_mtime_ns, (out / "trajectories.jsonl").read_text())
    before, after = (load_file(folder / "model.safetensors") for folder in (TINY / name, out / "model"))
    assert before.keys() == after.keys()
    assert any(not torch.equal(tensor, before[key]) for key, tensor in after.items())
    table = (out / "report.md").read_text()
    assert table.count("| before |") == table.count("| after |") == 2
    assert (out / "report.png").stat().st_size > 1000


@pytest.mark.slow
def test_a_loss_that_is_no_number_ends_the_recipe(tmp_path: Path, monkeypatch: Any, capsys: Any) -> None:
    """What an earlier session made stays as it was."""
    data, out = problems(tmp_path / "problems.jsonl"), tmp_path / "out"
    recipe.main(options("tiny-llada", data, out, "--session", "0"))
    before = {path: path.read_bytes() for path in out.rglob("*") if path.is_file()}
    plain = parallel.parallel_loss
    monkeypatch.setattr(parallel, "parallel_loss", lambda *a: plain(*a)._replace(loss=plain(*a).loss * float("inf")))
    with pytest.raises(SystemExit) as stopped:
        recipe.main(options("tiny-llada", data, out))
    assert stopped.value.code == 2
    told = capsys.readouterr().err.splitlines()[-1]
    assert told.startswith("parallel: the loss or its gradient is no finite number at step 2 of 2; ")
    assert f"is {out / 'checkpoints' / 'checkpoint-1'}," in told
    assert {path: path.read_bytes() for path in out.rglob("*") if path.is_file()} == before


@pytest.mark.slow
def test_the_recipe_trains_adapters(tmp_path: Path) -> None:
    recipe.main(options("tiny-dream", problems(tmp_path / "problems.jsonl"), tmp_path / "out", "--lora"))
    before, after = (load_file(folder / "model.safetensors") for folder in (TINY / "tiny-dream", tmp_path / "out" / "model"))
    changed = {name for name, tensor in after.items() if not torch.equal(tensor, before[name])}
    assert changed
    assert all("_proj." in name for name in changed)


def test_a_torn_line_of_trajectories_is_made_again(tmp_path: Path) -> None:
    data, path = problems(tmp_path / "problems.jsonl"), tmp_path / "trajectories.jsonl"
    args = recipe.parse(options("tiny-llada", data, tmp_path / "out"))
    model = fastdllm.load("tiny-llada", device="cpu")
    conversations = recipe.read(data, None)
    recipe.collect(model, conversations, path, args)
    lines = path.read_text().splitlines()
    numbers = sorted(json.loads(line)["number"] for line in lines)
    path.write_text("\n".join(lines[:-1]) + "\n" + lines[-1][:30] + "\n")
    recipe.collect(model, conversations, path, args)
    again = [json.loads(line)["number"] for line in path.read_text().splitlines() if line.endswith("}")]
    assert sorted(again) == numbers
    for line in path.read_text().splitlines():
        if line.endswith("}"):
            value = json.loads(line)
            assert len(value["order"]) == len(value["answer"])
            assert min(value["order"]) >= 1
            assert value["answer"][-1] in model.spec.stop_ids


LINE = {"prompt": [5, 6], "answer": [7, 8], "order": [1, 2], "right": True, "number": 0}


@pytest.mark.parametrize(
    "change",
    [
        {"prompt": None},
        {"prompt": ["5"]},
        {"prompt": [10**9]},
        {"prompt": [-1]},
        {"answer": []},
        {"answer": [7]},
        {"answer": [7.0, 8.0]},
        {"order": [1]},
        {"order": [0, 1]},
        {"order": "12"},
        {"right": 1},
        {"number": "0"},
        {"number": None},
    ],
)
def test_a_line_that_is_no_trajectory_is_left_out(change: dict[str, object]) -> None:
    assert recipe.trajectory(json.dumps(LINE), 100) == LINE
    assert recipe.trajectory(json.dumps(LINE | change), 100) is None
    for name in change:
        assert recipe.trajectory(json.dumps({key: value for key, value in LINE.items() if key != name}), 100) is None


@pytest.mark.parametrize("text", ["", "null", "3", "[]", "{", "[" * 100_000, '"prompt"'])
def test_a_text_that_is_no_trajectory_is_left_out(text: str) -> None:
    assert recipe.trajectory(text, 100) is None


RESULT = {"setting": parallel_report.REFERENCE, "block": 32, "threshold": 1.0, "right": [True, False], "forwards": [3, 4]}


@pytest.mark.parametrize(
    ("value", "message"),
    [
        ({}, "of type dict where list is expected"),
        ([1], "holds no results"),
        ([{**RESULT, "forwards": None}], "holds no results"),
        ([RESULT, {}], "holds no results"),
        ([{**RESULT, "right": [True]}], "is about 1 problems, not 2; give another --out"),
        ([{**RESULT, "setting": "another"}], "has no line of"),
        ([], "has no line of"),
    ],
)
def test_results_of_another_run_are_refused(tmp_path: Path, value: object, message: str) -> None:
    path = tmp_path / "before.json"
    path.write_text(json.dumps([RESULT]))
    assert parallel_report.results_of(path, 2) == [RESULT]
    path.write_text(json.dumps(value))
    with pytest.raises(ValueError, match=message):
        parallel_report.results_of(path, 2)


def test_a_folder_of_another_run_is_refused(tmp_path: Path) -> None:
    """What is found there would be taken for this run's: answers of another model, trajectories of other problems."""
    data, out = problems(tmp_path / "problems.jsonl"), tmp_path / "out"
    out.mkdir()
    first, second = recipe.read(data, None)[:2], recipe.read(data, None)[2:4]
    args = recipe.parse(options("tiny-llada", data, out))
    for _ in range(2):
        recipe.check_same_run(args, first)
    recipe.check_same_run(recipe.parse(options("tiny-llada", data, out, "--batch", "4", "--session", "3")), first)
    with pytest.raises(ValueError, match="asked="):
        recipe.check_same_run(args, second)
    for more in (["--gen_length", "64"], ["--thresholds", "0.5"], ["--lora"], ["--limit", "9"], ["--model", "tiny-dream"]):
        with pytest.raises(ValueError, match=f"holds a run with {more[0][2:]}=.*give another --out"):
            recipe.check_same_run(recipe.parse(options("tiny-llada", data, out, *more)), first)
    (out / "run.json").write_text("[]")
    with pytest.raises(ValueError, match=r"run\.json"):
        recipe.check_same_run(args, first)


@pytest.mark.parametrize("text", ["", "x", "{}", "NaN", "-1.0", "Infinity", "null"])
def test_a_damaged_time_is_named(tmp_path: Path, text: str) -> None:
    (tmp_path / "spent.json").write_text("12.5\n")
    assert recipe.seconds_spent(tmp_path) == 12.5
    (tmp_path / "spent.json").write_text(text)
    with pytest.raises(ValueError, match=r"spent\.json"):
        recipe.seconds_spent(tmp_path)


@pytest.mark.parametrize(
    ("more", "message"),
    [
        (["--own", "0.8", "--recorded", "0.4"], "own=0.8 and recorded=0.4"),
        (["--problems", "500"], "leave no record"),
        (["--gen_length", "100000"], "can be put to the model"),
        (["--held_out", "nowhere.jsonl"], "nowhere.jsonl"),
    ],
)
def test_what_cannot_work_is_one_line_before_any_work(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], more: list[str], message: str
) -> None:
    with pytest.raises(SystemExit) as stopped:
        recipe.main(options("tiny-llada", problems(tmp_path / "problems.jsonl"), tmp_path / "out", *more))
    last = capsys.readouterr().err.strip().splitlines()[-1]
    assert stopped.value.code == 2 and last.startswith("parallel: ") and message in last
    assert not (tmp_path / "out" / "before.json").exists()


def test_a_record_that_the_model_cannot_be_asked_is_left_out(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    network, tokenizer, _ = load_network("tiny-llada")
    long = {"messages": [{"role": "user", "content": "1 " * 5000}, {"role": "assistant", "content": "4"}]}
    (tmp_path / "data.jsonl").write_text("\n".join([json.dumps(long), json.dumps({"prompt": "2+2?", "completion": "4"})]))
    found = [to_conversation(record) for record in read_records(tmp_path / "data.jsonl")]
    assert recipe.askable(found, 5, network, tokenizer, 64) == found[1:]
    assert "data.jsonl:1: a prompt of" in capsys.readouterr().err


def test_bad_input_is_one_line(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    (tmp_path / "empty.jsonl").write_text("{}\n")
    for name, data in (("nowhere", tmp_path / "empty.jsonl"), ("tiny-llada", tmp_path / "missing.jsonl")):
        with pytest.raises(SystemExit) as stopped:
            recipe.main(options(name, data, tmp_path / "out"))
        assert stopped.value.code == 2
        assert capsys.readouterr().err.strip().splitlines()[-1].startswith("parallel: ")
    with pytest.raises(SystemExit):
        recipe.parse(["--model", "m", "--data", "d", "--out", "o"])
