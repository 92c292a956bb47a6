import json

import pytest

from grit_jax.data.records import RecordError
from grit_jax.datatools import convert
from grit_jax.text import prompts


def outcome(tmp_path, kind, row):
    """The turns of a row, or why it is refused."""
    (tmp_path / "x.jsonl").write_text(json.dumps(row) + "\n")
    (entry,) = getattr(convert, kind)(tmp_path / "x.jsonl")
    if isinstance(entry, RecordError):
        assert str(entry).startswith(f"{tmp_path / 'x.jsonl'}:1: ")
        return entry.fault
    return entry[1]["text"]


def openai(*messages, **more):
    return {"messages": [{"role": role, "content": text} for role, text in messages], **more}


PAIR = [("user", "a"), ("assistant", "b")]


def test_a_system_message_means_what_it_means_to_the_server(tmp_path):
    for system in ([("system", " Be kind.\n")], [("developer", "Be kind.")], [("system", ""), ("system", "Be kind.")]):
        turns = outcome(tmp_path, "openai", openai(*system, *PAIR))
        assert turns == ["Be kind.\n\na", "b"]
        asked = prompts.generation(openai(*system, PAIR[0])["messages"], bos="<s>", eos="</s>")
        assert prompts.conversation(turns, bos="<s>", eos="</s>").text == f"{asked}b</s>"
    assert outcome(tmp_path, "openai", openai(("system", None), *PAIR)) == "no text"
    assert outcome(tmp_path, "openai", openai(*PAIR, ("system", "x"), *PAIR)) == "a system message out of place"


def test_what_a_row_says_about_all_of_its_conversation_is_kept(tmp_path):
    said = [{"from": "human", "value": "a"}, {"from": "gpt", "value": "b"}]
    for key in ("system", "system_prompt"):
        assert outcome(tmp_path, "sharegpt", {"conversations": said, key: "Be kind."}) == ["Be kind.\n\na", "b"]
    assert outcome(tmp_path, "sharegpt", {"conversations": said, "system": None, "tools": "[]", "images": []}) == [
        "a",
        "b",
    ]
    assert outcome(tmp_path, "sharegpt", {"conversations": said, "system": 7}) == "no text"
    named = [{"role": "user", "content": "a"}, {"role": "assistant", "content": "b"}]
    assert outcome(tmp_path, "sharegpt", {"conversations": named}) == ["a", "b"]


def test_the_history_of_an_alpaca_row_comes_before_its_question(tmp_path):
    row = {"instruction": "c", "input": "", "output": "d", "history": [["a", "b"]], "system": "Be kind."}
    assert outcome(tmp_path, "alpaca", row) == ["Be kind.\n\na", "b", "c", "d"]
    assert outcome(tmp_path, "alpaca", row | {"history": None, "system": None, "input": None}) == ["c", "d"]
    assert outcome(tmp_path, "alpaca", row | {"history": [["a", None]]}) == "no text"
    for history in ("a", [["a"]], [["a", "b", "c"]], {"a": "b"}):
        assert outcome(tmp_path, "alpaca", row | {"history": history}) == "no history"
    assert outcome(tmp_path, "alpaca", row | {"output": None}) == "no instruction or output"
    assert outcome(tmp_path, "alpaca", row | {"instruction": " \n"}) == "no instruction or output"


@pytest.mark.parametrize(
    ("change", "kind"),
    [
        ({"weight": 0}, "a weight"), ({"weight": 0.5}, "a weight"), ({"train": False}, "a weight"),
        ({"loss": False}, "a weight"), ({"tool_calls": [{"id": "1"}]}, "a call of a tool"),
        ({"function_call": {"name": "f"}}, "a call of a tool"), ({"content": None}, "no text"),
        ({"content": []}, "no text"), ({"content": [None]}, "no text"),
        ({"content": [{"type": "text", "text": None}]}, "no text"),
        ({"content": [{"type": "text", "text": "b"}, {"type": "image_url"}]}, "no text"),
        ({"role": "tool"}, "roles not in turn"), ({"role": "function"}, "roles not in turn"),
    ],
)  # fmt: skip
def test_what_the_format_cannot_say_is_refused(tmp_path, change, kind):
    row = openai(*PAIR, *PAIR)
    row["messages"][1] |= change
    assert outcome(tmp_path, "openai", row) == kind


@pytest.mark.parametrize(
    "more",
    [{"tools": [{"type": "function"}]}, {"functions": [{}]}, {"images": ["a.png"]}, {"tools": '[{"name": "f"}]'}],
)
def test_rows_with_tools_or_images_are_refused(tmp_path, more):
    assert outcome(tmp_path, "openai", openai(*PAIR, **more)) == "keys that GRIT cannot hold"


def test_a_row_that_is_not_trained_on_is_refused_and_full_weight_changes_nothing(tmp_path):
    assert outcome(tmp_path, "openai", openai(*PAIR, weight=0)) == "a weight"
    row = openai(*PAIR, weight=1.0)
    row["messages"][0]["weight"], row["messages"][1]["weight"] = 0, 1
    assert outcome(tmp_path, "openai", row) == ["a", "b"]


def test_turns_of_tools_in_sharegpt_are_refused(tmp_path):
    said = [("human", "a"), ("function_call", "f()"), ("observation", "1"), ("gpt", "b")]
    row = {"conversations": [{"from": who, "value": text} for who, text in said]}
    assert outcome(tmp_path, "sharegpt", row) == "roles not in turn"
