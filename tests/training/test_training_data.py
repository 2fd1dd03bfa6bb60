# SPDX-License-Identifier: Apache-2.0
"""From files to batches: formats, bad records, response-only labels, padding, packing."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import pytest
import torch
from transformers import PreTrainedTokenizerFast

from fastdllm.training.collator import Collator, Row, Rows
from fastdllm.training.masks import PADDING
from fastdllm.training.objective import IGNORE
from fastdllm.training.records import BadRecord, Conversation, keep_good, read_records, to_conversation
from fastdllm.training.samples import Sample, encode, fit, pack, pad_to_block

TALK = [
    {"role": "user", "content": "2+2?"},
    {"role": "assistant", "content": "4"},
    {"role": "user", "content": "sure?"},
    {"role": "assistant", "content": "yes"},
]


def read(path: Path) -> list[Conversation]:
    return [to_conversation(record) for record in read_records(path)]


def sample(length: int, prompt: int = 1) -> Sample:
    ids = np.arange(length, dtype=np.int32)
    return Sample(ids, np.where(ids < prompt, IGNORE, ids).astype(np.int32))


def test_formats_give_the_same_conversation(tmp_path: Path) -> None:
    record = {"messages": TALK}
    (tmp_path / "array.json").write_text(json.dumps([record]))
    (tmp_path / "lines.jsonl").write_text("\n" + json.dumps(record) + "\n\n")
    (tmp_path / "lmflow.json").write_text(json.dumps({"type": "conversation", "instances": [record]}))
    for path in tmp_path.iterdir():
        assert [talk.messages for talk in read(path)] == [TALK]
    assert len(read(tmp_path)) == 3
    assert read(tmp_path / "lines.jsonl")[0].where.endswith("lines.jsonl:2")
    assert read(tmp_path / "array.json")[0].where.endswith("array.json[0]")


def test_system_and_tools_beside_the_messages(tmp_path: Path) -> None:
    path = tmp_path / "a.jsonl"
    path.write_text(json.dumps({"messages": TALK, "system": "Be brief.", "tools": []}))
    (talk,) = read(path)
    assert talk.messages == [{"role": "system", "content": "Be brief."}, *TALK]
    assert talk.tools is None


def test_alpaca(tmp_path: Path) -> None:
    path = tmp_path / "alpaca.json"
    records = [
        {"instruction": "Translate.", "input": "Hund", "output": "dog"},
        {"instruction": "Count.", "input": "", "output": "1 2 3"},
    ]
    path.write_text(json.dumps(records))
    assert [[m["content"] for m in talk.messages] for talk in read(path)] == [
        ["Translate.\n\nHund", "dog"],
        ["Count.", "1 2 3"],
    ]


BAD_LINES = [
    "{not json",
    "[1, 2]",
    json.dumps({"text": "hello"}),
    json.dumps({"messages": "hello"}),
    json.dumps({"messages": []}),
    json.dumps({"messages": [{"role": "user", "content": "hi"}]}),
    json.dumps({"messages": [{"role": "poet", "content": "hi"}, *TALK]}),
    json.dumps({"messages": [{"role": "user"}, *TALK]}),
    json.dumps({"messages": [{"role": "user", "content": "hi"}, {"role": "assistant", "content": ""}]}),
    json.dumps({"instruction": 3, "output": "three"}),
    json.dumps({"instruction": "Count.", "output": None}),
]


def test_bad_records_are_reported_by_line_and_left_out(tmp_path: Path) -> None:
    path = tmp_path / "mixed.jsonl"
    path.write_text("\n".join([*BAD_LINES, json.dumps({"messages": TALK})]))
    reports: list[str] = []
    kept = list(keep_good(read_records(path), to_conversation, "skip", reports.append))
    assert [talk.messages for talk in kept] == [TALK]
    assert len(reports) == len(BAD_LINES)
    for number, report in enumerate(reports, start=1):
        assert report.startswith(f"{path}:{number}:"), report


@pytest.mark.parametrize("line", BAD_LINES, ids=range(len(BAD_LINES)))
def test_bad_records_are_fatal_by_choice(line: str, tmp_path: Path) -> None:
    path = tmp_path / "bad.jsonl"
    path.write_text(json.dumps({"messages": TALK}) + "\n" + line)
    with pytest.raises(BadRecord, match=r"bad\.jsonl:2"):
        list(keep_good(read_records(path), to_conversation, "error", print))


def test_unreadable_files_are_always_fatal(tmp_path: Path) -> None:
    (tmp_path / "broken.json").write_text('[{"messages": ')
    with pytest.raises(ValueError, match=r"broken\.json.*JSON"):
        list(read_records(tmp_path / "broken.json"))
    (tmp_path / "text.json").write_text(json.dumps({"type": "text_only", "instances": []}))
    with pytest.raises(ValueError, match="text_only"):
        list(read_records(tmp_path / "text.json"))
    with pytest.raises(FileNotFoundError, match="nowhere"):
        list(read_records(tmp_path / "nowhere.json"))
    with pytest.raises(ValueError, match="on_bad_record='ignore'"):
        list(keep_good([], to_conversation, "ignore", print))


def test_only_the_assistants_words_are_targets(tokenizer: PreTrainedTokenizerFast) -> None:
    encoded = encode(Conversation("here", TALK), tokenizer)
    text = tokenizer.decode(encoded.ids)
    assert text == tokenizer.apply_chat_template(TALK, tokenize=False)
    assert "You are a helpful assistant." in text
    target = encoded.labels != IGNORE
    assert tokenizer.decode(encoded.ids[target]) == "4<|im_end|>\nyes<|im_end|>\n"
    assert np.array_equal(encoded.labels[target], encoded.ids[target])


def test_a_prompt_has_the_tokens_it_has_at_inference(tokenizer: PreTrainedTokenizerFast) -> None:
    encoded = encode(Conversation("here", TALK[:2]), tokenizer)
    prompt = tokenizer.apply_chat_template(TALK[:1], add_generation_prompt=True, return_dict=True)["input_ids"]
    assert encoded.ids[: len(prompt)].tolist() == prompt
    assert (encoded.labels[: len(prompt)] == IGNORE).all()
    assert (encoded.labels[len(prompt) :] != IGNORE).all()


def test_templates_that_rewrite_the_past_are_refused(
    tokenizer: PreTrainedTokenizerFast, monkeypatch: pytest.MonkeyPatch
) -> None:
    template = "{{ messages | length }}{% for m in messages %}{{ m['content'] }}{% endfor %}"
    monkeypatch.setattr(tokenizer, "chat_template", template)
    with pytest.raises(BadRecord, match="message 1"):
        encode(Conversation("here", TALK), tokenizer)


def test_templates_that_refuse_a_conversation(tokenizer: PreTrainedTokenizerFast, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(tokenizer, "chat_template", "{{ raise_exception('no system prompts') }}")
    with pytest.raises(BadRecord, match=r"here: .*no system prompts"):
        encode(Conversation("here", TALK), tokenizer)


def test_tools_need_a_template_that_shows_them(tokenizer: PreTrainedTokenizerFast) -> None:
    with pytest.raises(BadRecord, match="tools"):
        encode(Conversation("here", TALK, [{"name": "add"}]), tokenizer)


@pytest.mark.parametrize(("length", "padded"), [(1, 8), (7, 8), (8, 8), (9, 16), (16, 16)])
def test_padding_fills_the_last_block_and_no_more(length: int, padded: int) -> None:
    filled = pad_to_block(sample(length), 8, fill=77)
    assert len(filled.ids) == len(filled.labels) == padded
    assert (filled.ids[length:] == 77).all()
    assert (filled.labels[length:] == IGNORE).all()
    assert np.array_equal(filled.ids[:length], sample(length).ids)
    assert filled.ids.dtype == filled.labels.dtype == np.int32


def test_padding_can_be_a_target() -> None:
    assert pad_to_block(sample(5), 8, fill=2, label=2).labels.tolist() == [IGNORE, 1, 2, 3, 4, 2, 2, 2]


def test_long_samples_are_cut_and_those_without_a_response_refused() -> None:
    assert len(fit(sample(50, prompt=10), 16, "here").ids) == 16
    with pytest.raises(BadRecord, match="here: no response"):
        fit(sample(50, prompt=16), 16, "here")


def test_packing_keeps_samples_whole_and_in_order() -> None:
    lengths = [10, 20, 2, 30, 32, 1, 31, 5]
    rows = pack([sample(n) for n in lengths], 32)
    assert [len(s.ids) for row in rows for s in row] == lengths
    assert [[len(s.ids) for s in row] for row in rows] == [[10, 20, 2], [30], [32], [1, 31], [5]]


def test_collator_numbers_documents_and_pads_rows() -> None:
    rows = Rows([[sample(3), sample(2)], [sample(4)]])
    batch = Collator(mask_id=77)([rows[1], rows[0]])
    assert batch["index"].tolist() == [1, 0]
    assert batch["input_ids"].tolist() == [[0, 1, 2, 3, 77], [0, 1, 2, 0, 1]]
    assert batch["labels"].tolist() == [[IGNORE, 1, 2, 3, IGNORE], [IGNORE, 1, 2, IGNORE, 1]]
    assert batch["documents"].tolist() == [[0, 0, 0, 0, PADDING], [0, 0, 0, 1, 1]]
    assert batch["position_ids"].tolist() == [[0, 1, 2, 3, 0], [0, 1, 2, 0, 1]]


def test_collator_never_targets_a_documents_first_token() -> None:
    batch = Collator(mask_id=77)([Row(0, [sample(3, prompt=0), sample(2, prompt=0)])])
    assert batch["labels"].tolist() == [[IGNORE, 1, 2, IGNORE, 1]]


def test_collator_without_document_mask_makes_one_document() -> None:
    batch = Collator(mask_id=77, width=8, document_mask=False)([Row(0, [sample(3), sample(2)])])
    assert batch["documents"].tolist() == [[0] * 5 + [PADDING] * 3]
    assert batch["position_ids"].tolist() == [[0, 1, 2, 3, 4, 0, 0, 0]]
    assert all(tensor.dtype == torch.long for tensor in batch.values())
