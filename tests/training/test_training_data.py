# SPDX-License-Identifier: Apache-2.0
"""From files to batches: formats, bad records, response-only labels, padding, packing."""

from __future__ import annotations

import copy
import gzip
import json
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from tokenizers import AddedToken
from transformers import PreTrainedTokenizerFast

from fastdllm.prompts import encode_messages
from fastdllm.training.collator import Collator, Row, Rows
from fastdllm.training.masks import PADDING
from fastdllm.training.objective import IGNORE
from fastdllm.training.records import (
    INSTRUCTIONS,
    BadRecord,
    Conversation,
    Record,
    keep_good,
    read_records,
    to_conversation,
)
from fastdllm.training.samples import Sample, encode, fit, pack, pad_to_block
from tests.examples import examples

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


TEMPLATE_ERRORS = {
    "its own": "{{ raise_exception('no system prompts') }}",
    "index": "{{ messages[7]['role'] }}",
    "type": "{{ messages[0]['content'] + 1 }}",
    "division": "{{ 1 // 0 }}",
    "syntax": "{% if %}",
}


@pytest.mark.parametrize("line", BAD_LINES, ids=range(len(BAD_LINES)))
def test_bad_records_are_fatal_by_choice(line: str, tmp_path: Path) -> None:
    path = tmp_path / "bad.jsonl"
    path.write_text(json.dumps({"messages": TALK}) + "\n" + line)
    with pytest.raises(BadRecord, match=r"bad\.jsonl:2"):
        list(keep_good(read_records(path), to_conversation, "error", print))


def test_files_that_cannot_be_read_are_reported_and_the_others_used(tmp_path: Path) -> None:
    (tmp_path / "a_broken.json").write_text('[{"messages": ')
    (tmp_path / "b_text.json").write_text(json.dumps({"type": "text_only", "instances": []}))
    (tmp_path / "c_deep.json").write_text("[" * 100_000)
    (tmp_path / "d_good.json").write_text(json.dumps([{"messages": TALK}]))
    (tmp_path / "e_folder.json").mkdir()
    (tmp_path / "dataset_info.json").write_text(json.dumps({"alpaca": {"file_name": "d_good.json"}}))
    reports: list[str] = []
    kept = list(keep_good(read_records(tmp_path), to_conversation, "skip", reports.append))
    assert [talk.messages for talk in kept] == [TALK]
    assert [Path(report.partition(":")[0]).name for report in reports] == ["a_broken.json", "b_text.json[0]", "c_deep.json"]


def test_a_missing_file_is_always_fatal(tmp_path: Path) -> None:
    (tmp_path / "dataset_info.json").write_text("{}")
    for source in (tmp_path / "nowhere.json", tmp_path):
        with pytest.raises(FileNotFoundError, match="no such file"):
            list(read_records(source))
    with pytest.raises(ValueError, match="on_bad_record='ignore'"):
        list(keep_good([], to_conversation, "ignore", print))


def test_json_lines_are_known_by_any_name(tmp_path: Path) -> None:
    path = tmp_path / "lines.json"
    path.write_text("\n".join([json.dumps({"messages": TALK}), "{broken", json.dumps({"messages": TALK})]))
    reports: list[str] = []
    assert len(list(keep_good(read_records(path), to_conversation, "skip", reports.append))) == 2
    assert [report.startswith(f"{path}:2:") for report in reports] == [True]


@pytest.mark.parametrize("name", ["data.json", "data.jsonl"])
def test_a_byte_order_mark_is_no_part_of_the_text(tmp_path: Path, name: str) -> None:
    record = {"messages": TALK}
    text = json.dumps(record if name.endswith("l") else [record])
    (tmp_path / name).write_text(text, encoding="utf-8-sig")
    assert [talk.messages for talk in read(tmp_path)] == [TALK]


@pytest.mark.parametrize("name", ["data.json", "data.jsonl"])
def test_bytes_that_are_not_utf8_spoil_their_own_record(tmp_path: Path, name: str) -> None:
    good = json.dumps({"messages": TALK}).encode()
    latin = b'{"prompt": "caf\xe9?", "completion": "oui"}'
    parts = [good, latin, good]
    (tmp_path / name).write_bytes(b"\n".join(parts) if name.endswith("l") else b"[" + b",".join(parts) + b"]")
    reports: list[str] = []
    assert len(list(keep_good(read_records(tmp_path), to_conversation, "skip", reports.append))) == 2
    assert len(reports) == 1
    assert "UTF-8" in reports[0]


USER, SAID = {"role": "user", "content": "2+2?"}, {"role": "assistant", "content": "4"}
FORMS = {
    "sharegpt": {"id": "a_0", "conversations": [{"from": "human", "value": "2+2?"}, {"from": "gpt", "value": "4"}]},
    "sharegpt with roles": {"conversations": [USER, SAID]},
    "mixed spelling": {"conversations": [{"from": "USER", "content": "2+2?"}, {"role": "Assistant", "value": "4"}]},
    "content parts": {"messages": [{"role": "user", "content": [{"type": "text", "text": "2+2?"}]}, SAID]},
    "prompt and completion": {"prompt": "2+2?", "completion": "4"},
    "prompt and response": {"prompt": "2+2?", "response": "4"},
    "question and answer": {"question": "2+2?", "answer": "4"},
    "dolly": {"instruction": "2+2?", "context": "", "response": "4", "category": "open_qa"},
    "alpaca": {"instruction": "2+2?", "input": "", "output": "4"},
    "lmsys": {"conversation_id": "a", "conversation": [USER, SAID]},
}


@pytest.mark.parametrize("form", FORMS)
def test_every_common_form_gives_the_same_conversation(form: str) -> None:
    assert to_conversation(Record("here", FORMS[form])).messages == [USER, SAID]


@pytest.mark.parametrize("form", FORMS)
@pytest.mark.parametrize("key", ["messages", "conversations", "conversation"])
def test_an_empty_list_does_not_hide_another_form(form: str, key: str) -> None:
    """Tables of records of several forms fill up with it."""
    assert to_conversation(Record("here", {key: [], **FORMS[form]})).messages == [USER, SAID]
    assert to_conversation(Record("here", {**FORMS[form], key: FORMS[form].get(key, [])})).messages == [USER, SAID]


@pytest.mark.parametrize("form", FORMS)
@pytest.mark.parametrize("key", ["images", "image", "videos", "audio", "audios", "chosen", "rejected", "label", "kto_tag"])
def test_what_makes_it_another_conversation_is_not_left_out(form: str, key: str) -> None:
    """A picture, a better or a worse answer, the word that the answer is a bad one: it was trained on without them."""
    verdict = key in ("label", "kto_tag")
    with pytest.raises(BadRecord, match=f"here: .*{key}"):
        to_conversation(Record("here", {**FORMS[form], key: False if verdict else ["a.png"]}))
    for harmless in (None, True) if verdict else (None, [], ""):
        assert to_conversation(Record("here", {**FORMS[form], key: harmless})).messages == [USER, SAID]


@pytest.mark.parametrize("value", [0, False, 0.0, {}, 7, ["a"]])
@pytest.mark.parametrize(
    ("form", "key"), [("alpaca", "input"), ("dolly", "context"), ("alpaca", "system"), ("lmsys", "system")]
)
def test_what_is_no_text_is_reported_rather_than_left_out(form: str, key: str, value: object) -> None:
    """Those that are false were: "Is it even?" about 0 was trained on without the 0."""
    with pytest.raises(BadRecord, match=f"here: '{key}' is not a string"):
        to_conversation(Record("here", {**FORMS[form], key: value}))


@pytest.mark.parametrize("form", FORMS)
def test_null_is_absent(form: str) -> None:
    """A table of records of several forms writes every key into every record, null where the record has none."""
    keys = {key for value in FORMS.values() for key in value} - {"role", "from"}
    value = dict.fromkeys(sorted(keys)) | FORMS[form]
    for name in ("messages", "conversations", "conversation"):
        if value[name]:
            blank = dict.fromkeys(("role", "from", "content", "value", "weight", "loss", "name"))
            value[name] = [blank | message for message in value[name]]
    assert to_conversation(Record("here", value)).messages == [USER, SAID]


LINE = json.dumps({"messages": [USER, SAID]})
TEXTS = {
    "lines": f"{LINE}\n{LINE}\n",
    "array": f"[{LINE},\n{LINE}]",
    "indented": json.dumps([json.loads(LINE)] * 2, indent=1),
}
ENCODINGS = ["utf-8", "utf-8-sig", "utf-16", "utf-16-le", "utf-16-be", "utf-32", "gzip"]


@pytest.mark.parametrize("ending", [".json", ".jsonl", ".json.gz", ".jsonl.gz"])
@pytest.mark.parametrize("encoding", ENCODINGS)
@pytest.mark.parametrize("text", TEXTS)
def test_what_a_file_holds_counts_not_what_it_is_called(tmp_path: Path, ending: str, encoding: str, text: str) -> None:
    data = gzip.compress(TEXTS[text].encode()) if encoding == "gzip" else TEXTS[text].encode(encoding)
    (tmp_path / f"data{ending}").write_bytes(data)
    reports: list[str] = []
    kept = list(keep_good(read_records(tmp_path), to_conversation, "skip", reports.append))
    assert [talk.messages for talk in kept] == [[USER, SAID]] * 2 and not reports


NO_TEXTS = {
    "a git-lfs pointer": b"version https://git-lfs.github.com/spec/v1\noid sha256:46\nsize 12\n",
    "a Parquet file": b"PAR1" + bytes(range(256)),
    "a zip archive": b"PK\x03\x04" + bytes(64),
    "not a whole gzip file": gzip.compress(LINE.encode())[:-9],
}


@pytest.mark.parametrize("kind", NO_TEXTS)
@pytest.mark.parametrize("ending", ["json", "jsonl"])
def test_files_that_are_no_text_are_named_once_and_the_others_used(tmp_path: Path, kind: str, ending: str) -> None:
    (tmp_path / f"a.{ending}").write_bytes(NO_TEXTS[kind])
    (tmp_path / "b.jsonl").write_text(LINE)
    reports: list[str] = []
    assert len(list(keep_good(read_records(tmp_path), to_conversation, "skip", reports.append))) == 1
    assert len(reports) == 1 and kind in reports[0] and len(reports[0].splitlines()) == 1


@pytest.mark.parametrize(
    "start", [b"\x1f\x8b\x08", b"PAR1", b"PK\x03\x04", b"\xff\xfe", b"\xfe\xff", b"\x00", b"\x00\x00\x00"]
)
def test_a_line_that_begins_like_another_kind_of_file_spoils_itself_only(tmp_path: Path, start: bytes) -> None:
    (tmp_path / "data.jsonl").write_bytes(start + b"\n" + LINE.encode() + b"\n")
    reports: list[str] = []
    assert len(list(keep_good(read_records(tmp_path), to_conversation, "skip", reports.append))) == 1
    assert len(reports) == 1


@pytest.mark.parametrize("encoding", ["utf-16", "utf-32", "utf-16-le"])
@pytest.mark.parametrize("lost", range(1, 8))
def test_a_torn_file_of_wide_characters_loses_its_last_line_only(tmp_path: Path, encoding: str, lost: int) -> None:
    (tmp_path / "data.jsonl").write_bytes(f"{LINE}\n{LINE}".encode(encoding)[:-lost])
    reports: list[str] = []
    assert len(list(keep_good(read_records(tmp_path), to_conversation, "skip", reports.append))) == 1
    assert len(reports) == 1


def test_files_with_a_mark_each_may_be_appended_to_each_other(tmp_path: Path) -> None:
    (tmp_path / "data.jsonl").write_bytes((LINE + "\n").encode("utf-8-sig") * 2)
    assert len(read(tmp_path)) == 2


@pytest.mark.parametrize("flag", [0.5, "0", "false", "no", -1, 2, float("nan"), [], [0], {}], ids=repr)
@pytest.mark.parametrize("name", ["weight", "loss"])
def test_a_flag_that_is_no_flag_is_a_bad_record(name: str, flag: object) -> None:
    """Else a turn that somebody meant to leave out would be trained on."""
    with pytest.raises(BadRecord, match=rf"{name}=.* of message 1 is none of 0, 1, false and true"):
        to_conversation(Record("here", {"messages": [USER, {**SAID, name: flag}, USER, SAID]}))


@pytest.mark.parametrize("where", ["content", "tools", "tool_calls"])
@pytest.mark.parametrize("depth", [50, 400, 900, 100_000])
def test_nesting_is_a_sample_or_a_bad_record(
    tokenizer: PreTrainedTokenizerFast, tmp_path: Path, where: str, depth: int
) -> None:
    part = ('[{"type": "text", "text": ', "}]") if where == "content" else ("[", "]")
    deep = part[0] * depth + '"x"' + part[1] * depth
    values = {"content": '"q"', "tools": "null", "tool_calls": "null"} | {where: deep}
    talk = '[{"role": "user", "content": %(content)s}, {"role": "assistant", "content": "a", "tool_calls": %(tool_calls)s}]'
    path = tmp_path / "deep.jsonl"
    path.write_text(f'{{"messages": {talk % values}, "tools": {values["tools"]}}}\n{LINE}')
    reports: list[str] = []
    kept = list(keep_good(read_records(path), lambda r: encode(to_conversation(r), tokenizer), "skip", reports.append))
    assert len(kept) + len(reports) == 2 and len(kept) >= 1


def test_fields_beside_an_instruction_count() -> None:
    dolly = {"instruction": "When?", "context": "It was 1815.", "response": "1815"}
    assert to_conversation(Record("here", dolly)).messages[0]["content"] == "When?\n\nIt was 1815."
    value = {**FORMS["alpaca"], "system": "Be brief.", "history": [["1+1?", "2"], ["2+1?", "3"]]}
    contents = [(m["role"], m["content"]) for m in to_conversation(Record("here", value)).messages]
    assert contents == [
        ("system", "Be brief."),
        ("user", "1+1?"),
        ("assistant", "2"),
        ("user", "2+1?"),
        ("assistant", "3"),
        ("user", "2+2?"),
        ("assistant", "4"),
    ]


def targets(messages: list[dict[str, object]], tokenizer: PreTrainedTokenizerFast) -> str:
    encoded = encode(to_conversation(Record("here", {"messages": messages})), tokenizer)
    return tokenizer.decode(encoded.ids[encoded.labels != IGNORE])


def test_a_conversation_that_the_assistant_begins_is_trained_on(tokenizer: PreTrainedTokenizerFast) -> None:
    talk = [{"role": "assistant", "content": "Hello!"}, USER, SAID]
    encoded = encode(to_conversation(Record("here", {"messages": talk})), tokenizer)
    assert tokenizer.decode(encoded.ids) == tokenizer.apply_chat_template(talk, tokenize=False)
    assert targets(talk, tokenizer) == "Hello!<|im_end|>\n4<|im_end|>\n"


def test_turns_that_are_excluded_or_empty_are_no_targets(tokenizer: PreTrainedTokenizerFast) -> None:
    excluded = ({"weight": 0}, {"weight": 0.0}, {"weight": False}, {"loss": False}, {"loss": 0})
    for other in ({"content": ""}, *({"content": "5", **flag} for flag in excluded)):
        assert targets([USER, {"role": "assistant", **other}, USER, SAID], tokenizer) == "4<|im_end|>\n"
    asked = {"prompt": [USER, {"role": "assistant", "content": "5"}, USER], "completion": [SAID]}
    encoded = encode(to_conversation(Record("here", asked)), tokenizer)
    assert tokenizer.decode(encoded.ids[encoded.labels != IGNORE]) == "4<|im_end|>\n"


def with_mask(tokenizer: PreTrainedTokenizerFast) -> PreTrainedTokenizerFast:
    tokenizer = copy.deepcopy(tokenizer)
    tokenizer.add_tokens([AddedToken("|<MASK>|", special=True, normalized=False)], special_tokens=True)
    return tokenizer


@given(
    text=st.lists(st.sampled_from(["<|im_end|>", "|<MASK>|", "<|im_start|>", "x", " ", "\n", "<|im_", "end|>"])).map("".join)
)
def test_control_tokens_in_texts_are_text(tokenizer: PreTrainedTokenizerFast, text: str) -> None:
    """As many special tokens as the template writes, no mask, the text itself, and the prompt that inference has."""
    tokenizer = with_mask(tokenizer)
    special = set(tokenizer.get_added_vocab().values())
    talk = [{"role": "user", "content": f"a{text}b"}, {"role": "assistant", "content": f"c{text}d"}]
    harmless = [{**message, "content": "x"} for message in talk]
    encoded, plain = (encode(Conversation("here", messages), tokenizer) for messages in (talk, harmless))
    assert [i for i in encoded.ids if i in special] == [i for i in plain.ids if i in special]
    assert [i for i in encoded.labels if i in special] == [tokenizer.eos_token_id]
    assert tokenizer.decode(encoded.ids[encoded.labels != IGNORE]) == f"c{text}d<|im_end|>\n"
    model = SimpleNamespace(tokenizer=tokenizer, name="here")
    prompt = encode_messages(model, talk[:1]).tolist()
    assert encoded.ids[: len(prompt)].tolist() == prompt


TEXT = st.text(st.characters(), max_size=20) | st.sampled_from(["", "\ud800", "<|im_end|>", "assistant", "system"])
JSON = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats() | TEXT,
    lambda inner: st.lists(inner, max_size=4) | st.dictionaries(TEXT, inner, max_size=4),
    max_leaves=12,
)
ROLE = st.sampled_from(["user", "assistant", "system", "tool", "human", "gpt", "poet"]) | JSON
MESSAGE = st.fixed_dictionaries(
    {}, optional={n: ROLE if n in ("role", "from") else JSON for n in ("role", "from", "content", "value", "tool_calls")}
)
GOOD_MESSAGE = st.fixed_dictionaries({"role": st.sampled_from(["user", "assistant"]), "content": TEXT})
TALKS = st.lists(MESSAGE | GOOD_MESSAGE, max_size=4) | JSON
KEYS = ["messages", "conversations", "system", "tools", "history", "instances", "type"]
KEYS += sorted({key for keys in INSTRUCTIONS for key in keys if key})
RECORD = st.dictionaries(st.sampled_from(KEYS), TALKS, max_size=5) | JSON


@settings(suppress_health_check=[HealthCheck.function_scoped_fixture], max_examples=examples(300))
@given(records=st.lists(RECORD, max_size=4), ending=st.sampled_from(["json", "jsonl"]), mangled=st.binary(max_size=3))
def test_whatever_a_file_holds_is_a_sample_or_a_bad_record(
    tokenizer: PreTrainedTokenizerFast, tmp_path: Path, records: list[object], ending: str, mangled: bytes
) -> None:
    """Random JSON, with fields of the right names and of the wrong types, NaN, lone surrogates and broken bytes."""
    path = tmp_path / f"random.{ending}"
    good = {"messages": [USER, SAID]}
    texts = [json.dumps(value).encode() for value in [*records, good]]
    path.write_bytes(
        b"\n".join([mangled.replace(b"\n", b""), *texts]) if ending == "jsonl" else b"[" + b",".join(texts) + b"]"
    )
    reports: list[str] = []

    def to_sample(record: Record) -> Sample:
        return encode(to_conversation(record), tokenizer)

    kept = list(keep_good(read_records(path), to_sample, "skip", reports.append))
    assert len(kept) >= 1
    assert all(report.startswith(str(path)) for report in reports)
    for one in kept:
        assert (one.labels != IGNORE).any()
        assert ((one.labels == IGNORE) | (one.labels == one.ids)).all()


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


@pytest.mark.parametrize("kind", TEMPLATE_ERRORS)
def test_whatever_a_template_raises_is_a_bad_record(
    tokenizer: PreTrainedTokenizerFast, monkeypatch: pytest.MonkeyPatch, kind: str
) -> None:
    monkeypatch.setattr(tokenizer, "chat_template", TEMPLATE_ERRORS[kind])
    with pytest.raises(BadRecord, match="here: the chat template refuses it"):
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
