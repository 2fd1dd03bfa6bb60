# SPDX-License-Identifier: Apache-2.0
"""How the tiny checkpoints are made: data without leaks, prompts as the shipped templates render them, masks as decoding
meets them, and a few steps of every family."""

from __future__ import annotations

import json
import lzma
import random
import sys
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from safetensors.torch import load_file
from tokenizers import Tokenizer

from fastdllm.models import TINY, find_folder
from fastdllm.models.spec import ModelSpec
from fastdllm.models.tokenizer import load_tokenizer
from fastdllm.tasks import TASKS_DIR
from fastdllm.training.masks import PADDING
from fastdllm.training.model import Fast_dLLM_QwenForCausalLM
from fastdllm.training.objective import IGNORE
from scripts.recipes.tiny import tiny_corpus, tiny_data, tiny_formats, train_tiny
from scripts.recipes.tiny.tiny_corpus import RESULT_FLAG, Corpus
from scripts.recipes.tiny.tiny_network import Network

CPU = torch.device("cpu")
SHIPPED = {"llada": "tiny-llada", "dream": "tiny-dream", "v2": "tiny-fast-dllm-v2"}
EMBEDDING = "model.embed_tokens.weight"
# Of a layer, LLaDA's name -> that of Qwen2, where both have the same tensor.
LLADA_FROM_QWEN2 = {
    "attn_norm": "input_layernorm",
    "q_proj": "self_attn.q_proj",
    "attn_out": "self_attn.o_proj",
    "ff_norm": "post_attention_layernorm",
    "ff_proj": "mlp.gate_proj",
    "up_proj": "mlp.up_proj",
    "ff_out": "mlp.down_proj",
}
PROBLEMS = [
    (f"Mia has {a} cups and buys {b} more. How many?", f"She has {a} + {b} = {a + b} cups.\n#### {a + b}")
    for a in range(3, 33)
    for b in (11, 29)
]


@pytest.fixture(scope="module")
def text(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("text") / "stage.xz"
    path.write_bytes(lzma.compress("\0".join(f"{q}\1{a}" for q, a in PROBLEMS).encode()))
    return path


def corpus(family: str) -> Corpus:
    folder = find_folder(SHIPPED[family])
    tokens, facts = tiny_corpus.encode_chunk((family, folder, PROBLEMS, 0))
    return tiny_corpus.build_corpus([tokens], facts, tiny_formats.read(family, folder)[1], CPU)


def test_training_text_keeps_problems_apart_and_held_out_questions_out(tmp_path: Path, monkeypatch) -> None:
    leaked = json.loads((TASKS_DIR / "gsm_symbolic" / "test.jsonl").read_text(encoding="utf-8").splitlines()[0])
    problems = [*PROBLEMS, PROBLEMS[0], (leaked["question"], leaked["answer"])]
    monkeypatch.setattr(tiny_data, "stage_problems", lambda stage, workers: problems)
    tiny_data.write_training_text(tmp_path, [3], workers=1)
    assert tiny_data.read_training_text(tmp_path / "stage3.xz") == sorted(PROBLEMS)


@pytest.mark.parametrize(
    "data",
    [b"", b"a text", lzma.compress(b"a\1b")[:-9], *map(lzma.compress, (b"", b"\xff", b"a", b"a\1b\0c", b"a\1", b"\1b"))],
    ids=repr,
)
def test_what_is_no_training_text_is_named(tmp_path: Path, data: bytes) -> None:
    """Some of it was a traceback; another text was one long question without an answer."""
    (tmp_path / "stage1.xz").write_bytes(data)
    with pytest.raises(ValueError, match=r"stage1\.xz"):
        tiny_data.read_training_text(tmp_path / "stage1.xz")


def test_the_generator_still_gives_the_shipped_problems() -> None:
    pytest.importorskip("reasoning_gym")
    shipped = [json.loads(line) for line in (TASKS_DIR / "gsm_symbolic" / "test.jsonl").open(encoding="utf-8")]
    drawn = dict(tiny_data.generate(tiny_data.TEST_SEED, 0, 40))
    found = [row for row in shipped if drawn.get(row["question"]) == row["answer"]]
    assert len(found) > 20


@pytest.mark.parametrize(
    "expression, expected",
    [("3 + 4", 1), ("3 + 4 - 2", 4), ("12 * 34", 3), ("120 - 34", 2), ("8 / 2", 2), ("1.5 * 3", 2), ("2*(3+4)", 1)],
)
def test_difficulty(expression: str, expected: int) -> None:
    assert tiny_data.difficulty(expression) == expected


@pytest.mark.parametrize("family", SHIPPED)
def test_training_prompt_is_what_the_shipped_template_renders(family: str) -> None:
    tokenizer = load_tokenizer(find_folder(SHIPPED[family]))
    turn = [{"role": "user", "content": "How many?"}]
    rendered = tokenizer.apply_chat_template(turn, add_generation_prompt=True, tokenize=False)
    assert tiny_corpus.chat_prompt(family, "How many?") == rendered
    answered = [*turn, {"role": "assistant", "content": "Two."}]
    prompt, completion = tiny_corpus.render(family, ("How many?", "Two."), plain=False)
    assert tokenizer.apply_chat_template(answered, tokenize=False) in (prompt + completion, prompt + completion + "\n")


@pytest.mark.parametrize("family", SHIPPED)
def test_shipped_files_are_what_the_script_writes(family: str, tmp_path: Path) -> None:
    folder = find_folder(SHIPPED[family])
    tiny_formats.create(family, tmp_path / "new", TINY / "tiny-llada")
    for path in (tmp_path / "new").iterdir():
        assert path.read_bytes() == (folder / path.name).read_bytes(), path.name
    spec, _ = tiny_formats.read(family, folder)
    weights = load_file(folder / "model.safetensors")
    assert {k: tuple(v.shape) for k, v in weights.items()} == tiny_formats.expected_shapes(family, spec)
    assert (folder / "model.safetensors").stat().st_size <= 16_000_000


def test_drills_ask_for_results_only() -> None:
    data = corpus("llada")
    tokenizer = tiny_formats.read("llada", TINY / "tiny-llada")[1]
    flat = data.flat.numpy().view(np.uint16)
    for number in data.drills[:5]:
        start = int(data.start[number])
        document = flat[start : start + int(data.length[number])]
        asked = tokenizer.decode([int(t) & (RESULT_FLAG - 1) for t in document if t >= RESULT_FLAG])
        assert asked.split() and all(part.isdigit() for part in asked.split())


def test_drills_are_packed_for_v2_and_only_their_results_are_labels() -> None:
    data = corpus("v2")
    spec, tokenizer = tiny_formats.read("v2", find_folder(SHIPPED["v2"]))
    rows = tiny_corpus.pack_rows(data, data.drills, 256, 32, spec.mask_id, seed=0)
    flat, lengths = data.flat.numpy().view(np.uint16), data.length.numpy()
    expected = []
    for number in data.drills:
        document = flat[int(data.start[number]) :][: lengths[number]]
        expected.append([(int(t) & (RESULT_FLAG - 1), bool(t & RESULT_FLAG)) for t in document])
    packed = []
    for ids, labels, numbers in zip(rows.ids, rows.labels, rows.documents, strict=True):
        for number in numbers[numbers != PADDING].unique():
            here = (numbers == number) & (ids != spec.mask_id)
            asked = labels[here] != IGNORE
            assert (labels[here][asked] == ids[here][asked]).all() and asked.any()
            assert all(part.isdigit() for part in tokenizer.decode(ids[here][asked].tolist()).split())
            packed.append(list(zip(ids[here].tolist(), asked.tolist(), strict=True)))
    assert sorted(packed) == sorted(expected)
    assert (rows.labels[rows.ids == spec.mask_id] == IGNORE).all()


def test_a_step_of_v2_draws_rows_of_drills_and_rows_of_problems() -> None:
    data, spec = corpus("v2"), tiny_formats.read("v2", find_folder(SHIPPED["v2"]))[0]
    args = SimpleNamespace(seed=0, tokens=8 * 2 * train_tiny.ROW)
    batch, (problems, drills), rows = train_tiny.objective("v2", data, spec, 0, args, torch.float32)
    assert rows == 8 and len(problems) and len(drills) and not set(problems) & set(drills)
    chosen = tiny_corpus.Sampler([problems, drills], rows, seed=0).step(0.25)
    assert np.isin(chosen.numpy(), drills).sum() == 2
    of_drills, of_problems = (batch(torch.from_numpy(pool)).weights > 0 for pool in (drills, problems))
    assert 0 < of_drills.float().mean() < of_problems.float().mean(), "of a drill only the results are targets"


@pytest.mark.parametrize("family", ["llada", "dream"])
def test_masks_leave_prompts_alone_and_weights_sit_on_masks(family: str) -> None:
    data, spec = corpus(family), tiny_formats.read(family, find_folder(SHIPPED[family]))[0]
    torch.manual_seed(0)
    chosen = torch.from_numpy(np.concatenate([data.problems[:24], data.drills[:8]]))
    widths = torch.tensor(train_tiny.WINDOWS)
    batch = train_tiny.masked_batch(data, chosen, 2048, end_token=2, mask_token=spec.mask_id, widths=widths)
    masked = batch.ids == spec.mask_id
    assert masked.any() and not masked.all()
    assert (batch.ids == batch.targets)[~masked].all()
    assert masked[batch.weights > 0].all() and (batch.weights >= 0).all()
    for slot, number in enumerate(chosen.tolist()):
        start, stop = int(batch.ends[slot]), int(batch.ends[slot + 1])
        assert not masked[start : min(stop, start + int(data.prompt[number]))].any()
    assert (batch.positions[batch.ends[:-1][batch.ends[:-1] < 2048].long()] == 0).all()


def test_every_answer_token_is_an_autoregressive_target() -> None:
    data = corpus("v2")
    chosen = torch.from_numpy(data.problems[:4])
    batch = train_tiny.autoregressive_batch(data, chosen, 2048, end_token=0)
    answers = int((data.length[chosen] - data.prompt[chosen]).sum())
    assert int((batch.weights > 0).sum()) == answers
    assert batch.weights.sum().item() == pytest.approx(1.0)


def test_best_fit_overlaps_nothing_and_wastes_little() -> None:
    sizes = np.random.default_rng(0).integers(1, 17, 500)
    row, first, rows = tiny_corpus.best_fit(sizes, 16)
    used = np.zeros((rows, 16), int)
    for r, f, n in zip(row, first, sizes, strict=True):
        used[r, f : f + n] += 1
    assert used.max() == 1
    assert rows <= 1.1 * sizes.sum() / 16


def test_block_diffusion_rows_and_loss_equal_the_training_package() -> None:
    """The captured step joins the package's functions by hand; its loss must be that of `fastdllm.training`."""
    folder = find_folder("tiny-fast-dllm-v2")
    spec, tokenizer = tiny_formats.read("v2", folder)
    data = corpus("v2")
    rows = tiny_corpus.pack_rows(data, data.problems, 256, 32, spec.mask_id, seed=0)
    assert ((rows.labels == IGNORE) | (rows.labels == rows.ids)).all()
    starts = rows.positions[:, ::32]
    assert (starts % 32 == 0).all()
    torch.manual_seed(1)
    chosen = torch.tensor([0, 2])
    batch = train_tiny.block_diffusion_batch(rows, chosen, spec.mask_id, torch.float32)
    network = Network("v2", spec, tiny_formats.load_published("v2", folder, spec, tokenizer), False, torch.float32)
    with torch.no_grad():
        loss = (network.losses(batch)[0] * batch.weights).sum()
    model = Fast_dLLM_QwenForCausalLM.from_pretrained(folder, dtype=torch.float32)
    model.config.mask_token_id = spec.mask_id
    fields = {
        "input_ids": rows.ids,
        "labels": rows.labels,
        "position_ids": rows.positions,
        "documents": rows.documents,
    }
    with torch.no_grad():
        expected = model(**{k: v[chosen].long() for k, v in fields.items()}, masked=batch.masked).loss
    assert loss.item() == pytest.approx(expected.item(), rel=1e-4)


def test_dream_starts_from_the_tensors_of_v2_and_its_own_tokens() -> None:
    """Both have Qwen2's names and shapes: only the rows of the embeddings go by what a token means."""
    start, spec, tokenizer = start_from_v2("dream")
    parent, parent_spec, parent_tokenizer = start_from_v2("v2")
    assert shapes(start) == tiny_formats.expected_shapes("dream", spec)
    new, old = start.pop(EMBEDDING), parent.pop(EMBEDDING)
    assert start.keys() == parent.keys()
    assert all(torch.equal(start[name], parent[name]) for name in start)
    check_embeddings(new, spec, tokenizer, old, parent_spec, parent_tokenizer)


def test_llada_starts_from_v2_with_its_keys_and_values_for_each_head() -> None:
    start, spec, tokenizer = start_from_v2("llada")
    parent, parent_spec, parent_tokenizer = start_from_v2("v2")
    assert shapes(start) == tiny_formats.expected_shapes("llada", spec)
    assert (spec.kv_heads, parent_spec.kv_heads) == (4, 2)
    for i in range(spec.layers):
        new, old = f"model.transformer.blocks.{i}.", f"model.layers.{i}."
        for name, parent_name in LLADA_FROM_QWEN2.items():
            assert torch.equal(start[f"{new}{name}.weight"], parent[f"{old}{parent_name}.weight"]), (i, name)
        for name in ("k_proj", "v_proj"):
            heads = start[f"{new}{name}.weight"].view(4, spec.head_dim, -1)
            groups = parent[f"{old}self_attn.{name}.weight"].view(2, spec.head_dim, -1)
            assert not torch.equal(groups[0], groups[1])
            for head in range(4):
                assert torch.equal(heads[head], groups[head // 2]), (i, name, head)
    assert torch.equal(start["model.transformer.ln_f.weight"], parent["model.norm.weight"])
    new, old = start["model.transformer.wte.weight"], parent[EMBEDDING]
    check_embeddings(new, spec, tokenizer, old, parent_spec, parent_tokenizer)


def test_a_start_without_biases_gets_zeros() -> None:
    spec, tokenizer = tiny_formats.read("v2", find_folder(SHIPPED["v2"]))
    start = tiny_formats.load_published("v2", TINY / "tiny-llada", replace(spec, kv_heads=4), tokenizer)
    biases = [tensor for name, tensor in start.items() if name.endswith("_proj.bias")]
    assert len(biases) == 3 * spec.layers and not any(bias.any() for bias in biases)


def start_from_v2(family: str) -> tuple[dict[str, torch.Tensor], ModelSpec, Tokenizer]:
    spec, tokenizer = tiny_formats.read(family, find_folder(SHIPPED[family]))
    return tiny_formats.load_published(family, find_folder(SHIPPED["v2"]), spec, tokenizer), spec, tokenizer


def shapes(tensors: dict[str, torch.Tensor]) -> dict[str, tuple[int, ...]]:
    return {name: tuple(tensor.shape) for name, tensor in tensors.items()}


def check_embeddings(
    new: torch.Tensor,
    spec: ModelSpec,
    tokenizer: Tokenizer,
    old: torch.Tensor,
    parent: ModelSpec,
    parent_tokenizer: Tokenizer,
) -> None:
    """Every token that both have keeps its row, and so does the mask; the tokens' numbers differ."""
    vocab, known = tokenizer.get_vocab(), parent_tokenizer.get_vocab()
    shared = vocab.keys() & known.keys()
    assert len(shared) > 2000 and torch.equal(new[[vocab[t] for t in shared]], old[[known[t] for t in shared]])
    assert spec.mask_id != parent.mask_id and torch.equal(new[spec.mask_id], old[parent.mask_id])


@pytest.mark.parametrize(
    ("family", "init", "message"),
    [
        ("dream", "tiny-llada", "is one of llada, but dream starts from a checkpoint of v2, a checkpoint of dream"),
        (
            "llada",
            "tiny-dream",
            "is one of dream, but llada starts from random weights, a checkpoint of llada, a checkpoint",
        ),
        ("dream", None, "--init is not given, but dream starts from a checkpoint of v2"),
    ],
)
def test_a_start_without_a_recipe_is_refused_before_anything_is_written(
    family: str, init: str | None, message: str, text: Path, tmp_path: Path, monkeypatch, capsys: pytest.CaptureFixture[str]
) -> None:
    arguments = ["train_tiny", "--family", family, "--text", str(text), "--out", str(tmp_path / "out")]
    monkeypatch.setattr(sys, "argv", [*arguments, *(["--init", str(TINY / init)] if init else [])])
    with pytest.raises(SystemExit) as stopped:
        train_tiny.main()
    assert stopped.value.code == 2 and message in capsys.readouterr().err
    assert not list(tmp_path.iterdir())


def test_learning_rate_warms_up_and_ends_low() -> None:
    rates = [train_tiny.learning_rate(done / 100, 0.02) for done in range(101)]
    assert max(rates) == rates[2] == pytest.approx(1.0) and rates[-1] == pytest.approx(2e-3)
    assert rates[2:] == sorted(rates[2:], reverse=True)


def test_muon_steps_are_orthogonal() -> None:
    singular = torch.linalg.svdvals(train_tiny.orthogonalise(torch.randn(3, 24, 16)).float())
    assert (singular > 0.5).all() and (singular < 1.5).all()


@pytest.mark.parametrize(
    "family", ["llada", "v2", *(pytest.param(name, marks=pytest.mark.slow) for name in ("dream", "qwen"))]
)
def test_a_few_steps_write_a_checkpoint(family: str, text: Path, tmp_path: Path, monkeypatch) -> None:
    out = tmp_path / family
    arguments = ["train_tiny", "--family", family, "--text", str(text), "--out", str(out), "--steps", "2"]
    arguments += ["--tokens", "1024", "--limit", "20", "--tiny-llada", str(TINY / "tiny-llada")]
    if family == "v2":
        parent = tmp_path / "qwen"
        tiny_formats.create("qwen", parent, TINY / "tiny-llada")
        spec, _ = tiny_formats.read("qwen", parent)
        tiny_formats.save(parent, parent, train_tiny.initialise("qwen", spec, seed=0))
        arguments += ["--init", str(parent)]
    elif family != "qwen":
        arguments += ["--init", str(find_folder(SHIPPED["v2"]))]
    monkeypatch.setattr(sys, "argv", arguments)
    train_tiny.main()
    report = json.loads((out / "training.json").read_text(encoding="utf-8"))
    assert report["steps"] == 2 and np.isfinite(report["curve"][-1]["loss"])
    spec, tokenizer = tiny_formats.read(family, out)
    weights = tiny_formats.load_published(family, out, spec, tokenizer)
    assert all(torch.isfinite(w).all() for w in weights.values())
    assert {p.name for p in tmp_path.iterdir()} <= {family, "qwen"}  # no half-written folder is left


@pytest.mark.each_choice
@pytest.mark.parametrize("kind", ["loss", "gradient", "weights"])
@pytest.mark.parametrize("at", [1, 2])
def test_a_step_that_is_no_number_ends_the_run(
    text: Path, tmp_path: Path, monkeypatch, capsys: pytest.CaptureFixture[str], kind: str, at: int
) -> None:
    """It went on, and saved weights that nothing can load over those of an earlier checkpoint."""
    step, done = train_tiny.Trainer.step, []

    def spoiled(self: train_tiny.Trainer) -> None:
        done.append(1)
        losses = self.network.losses

        def bad(batch: train_tiny.Batch) -> tuple[torch.Tensor, torch.Tensor]:
            out, hits = losses(batch)
            nothing = self.parameters[0].flatten()[:1].sum() * 0
            return (out * float("nan") if kind == "loss" else out + nothing.sqrt()), hits  # its slope at 0 is infinite

        if len(done) == at and kind != "weights":
            self.network.losses = bad
        step(self)
        self.network.losses = losses
        if len(done) == at and kind == "weights":
            self.parameters[-1].detach().view(-1)[-1] = float("inf")

    monkeypatch.setattr(train_tiny.Trainer, "step", spoiled)
    out = tmp_path / "out"
    arguments = ["train_tiny.py", "--family", "llada", "--text", str(text), "--out", str(out), "--steps", str(at)]
    arguments += ["--tokens", "1024", "--limit", "20", "--tiny-llada", str(TINY / "tiny-llada")]
    monkeypatch.setattr(sys, "argv", arguments)
    with pytest.raises(SystemExit) as stopped:
        train_tiny.main()
    assert stopped.value.code == 2
    (line,) = capsys.readouterr().err.strip().splitlines()
    what = "weights are no finite numbers after" if kind == "weights" else "the loss or its gradient is no finite number at"
    good = f"the last checkpoint before it is {out}, of step 1" if at == 2 else "no checkpoint was saved before it"
    assert line.startswith(f"train_tiny: {what} step {at}; {good}, and nothing was saved since")
    assert list(tmp_path.iterdir()) == ([out] if at == 2 else [])
    for path in out.glob("*.safetensors"):
        assert all(tensor.isfinite().all() for tensor in load_file(path).values())


def test_the_checkpoint_before_a_bad_step_stays(monkeypatch, tmp_path: Path) -> None:
    """Steps 2 and 4 would save; the third is bad."""
    network = torch.nn.Linear(1, 1)

    class Trainer(train_tiny.Trainer):
        def __init__(self) -> None:
            self.recipe, self.parameters = train_tiny.FROM_SCRATCH, list(network.parameters())
            self.watch, self.sums, self.done = train_tiny.StepWatch("cpu"), torch.ones(5), 0

        def run(self, chosen: torch.Tensor, rate: float) -> None:
            self.done += 1
            self.watch.note(torch.tensor(float("nan") if self.done == 3 else 1.0), torch.tensor(1.0))

    saved: list[int] = []
    trainer = Trainer()
    args = SimpleNamespace(steps=5, seconds=1e9, tokens=1, out=tmp_path)
    sampler = SimpleNamespace(step=lambda drills: torch.zeros(1), passes=0)
    with pytest.raises(train_tiny.Diverged, match=f"at step 3; the last checkpoint before it is {tmp_path}, of step 2"):
        train_tiny.train(trainer, sampler, args, lambda: saved.append(trainer.done))
    assert saved == [2]


def test_drills_prefer_hard_lines() -> None:
    easy = [("q", "He has 3 + 4 = 7 cups.\n#### 7")] * 50
    hard = [("q", "He has 12 - 3 - 4 = 5 cups.\n#### 5")] * 50
    texts = tiny_data.drills(easy + hard, 60, random.Random(0))
    share = sum(t.count("12 - 3 - 4") for t in texts) / sum(t.count("He has") for t in texts)
    assert 0.7 < share < 0.9
