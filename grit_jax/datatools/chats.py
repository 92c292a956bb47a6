"""Conversations of other formats: Alpaca, ShareGPT and OpenAI.

GRIT's format has user and assistant turns, and every assistant turn is scored. Anything else is refused: tools, images,
and assistant turns that must not be trained on.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any

from grit_jax.data.records import RecordError
from grit_jax.data.text_files import Entry, Row, converted, read_objects
from grit_jax.errors import InputError
from grit_jax.text.prompts import SYSTEM_ROLES, fold_system

Messages = list[tuple[str, Any]]

_SHAREGPT_ROLES = {
    "human": "user",
    "gpt": "assistant",
    "chatgpt": "assistant",
    "bing": "assistant",
    "bard": "assistant",
}
_SYSTEM = ("system", "system_prompt", "system_message")  # keys of a record
# Keys whose values, unless 1, say that a record or a message is not trained on like others.
_ROW_WEIGHTS, _MESSAGE_WEIGHTS = ("weight", "kto_tag"), ("weight", "train", "loss")
_NO_ANSWER = ("user", "human", *SYSTEM_ROLES)
_UNSUPPORTED = ("tools", "functions", "image", "images", "video", "videos", "audio", "audios")  # of a record
_CALLS = ("tool_calls", "function_call")  # of a message
_ABSENT = (None, False, "", "[]", [], {})


def alpaca(source: Path) -> Iterator[Entry[Row]]:
    """Records with `instruction`, `input` (may be empty) and `output`; optionally `system` and `history`, pairs."""
    return _converted(source, _alpaca_messages)


def sharegpt(source: Path) -> Iterator[Entry[Row]]:
    """Records with `conversations`: a list of `{"from": "human" | "gpt" | "system", "value": text}`."""
    return _converted(source, _sharegpt_messages)


def openai(source: Path) -> Iterator[Entry[Row]]:
    """Records with `messages`: a list of `{"role": "user" | "assistant" | "system", "content": text or parts}`."""
    return _converted(source, _openai_messages)


def _alpaca_messages(row: Row) -> Messages:
    task, more, answer = ("" if row.get(key) is None else row[key] for key in ("instruction", "input", "output"))
    if not all(isinstance(text, str) for text in (task, more, answer)) or not task.strip() or not answer.strip():
        raise RecordError("no instruction or output", '"instruction" and "output" must be texts that are not empty')
    return [*_history(row), ("user", f"{task}\n{more}" if more else task), ("assistant", answer)]


def _sharegpt_messages(row: Row) -> Messages:
    found = []
    for part in _parts(row, "conversations", '"from" and "value"'):
        role = str(part.get("from", part.get("role")))
        found.append((_SHAREGPT_ROLES.get(role, role), part.get("value", part.get("content"))))
    return found


def _openai_messages(row: Row) -> Messages:
    parts = _parts(row, "messages", '"role" and "content"')
    return [(str(part.get("role")), _joined(part.get("content"))) for part in parts]


def _converted(source: Path, messages: Callable[[Row], Messages]) -> Iterator[Entry[Row]]:
    return converted(read_objects(source), lambda row: _conversation(row, messages(row)))


def _conversation(row: Row, messages: Messages) -> Row:
    """The GRIT record of a foreign record with these messages."""
    _refuse_weights(row, _ROW_WEIGHTS, "the row")
    for key in _UNSUPPORTED:
        if row.get(key) not in _ABSENT:
            raise RecordError("keys that GRIT cannot hold", f'"{key}" is given, which GRIT\'s format cannot hold')
    system = [("system", row[key]) for key in _SYSTEM if row.get(key) is not None]
    return {"text": _turns([*system, *messages])}


def _turns(messages: Messages) -> list[str]:
    """Alternating user and assistant texts; system messages are folded in by `fold_system`."""
    for role, text in messages:
        if role in SYSTEM_ROLES and not isinstance(text, str):
            raise RecordError("no text", "the system message holds no text")
    own = [role for role, _ in messages if role not in SYSTEM_ROLES]
    if not own or own != ["user", "assistant"] * (len(own) // 2):
        shown = ", ".join(own[:8]) + (", ..." if len(own) > 8 else "")
        raise RecordError(
            "roles not in turn", f"the roles are {shown or 'none'}; they must be user and assistant in turn, user first"
        )
    for number, (role, text) in enumerate(messages, start=1):
        if role not in SYSTEM_ROLES and (not isinstance(text, str) or not text.strip()):
            raise RecordError("no text", f"message {number} holds no text")
    try:
        folded = fold_system([{"role": role, "content": text} for role, text in messages])
    except InputError as error:
        raise RecordError("a system message out of place", str(error)) from error
    return [message["content"] for message in folded]


def _parts(row: Row, key: str, keys: str) -> list[Row]:
    parts = row.get(key)
    if not isinstance(parts, list) or not all(isinstance(part, dict) for part in parts):
        raise RecordError(f"no {key}", f'"{key}" must be a list of objects with {keys}')
    for number, part in enumerate(parts, start=1):
        if part.get("role", part.get("from")) not in _NO_ANSWER:
            _refuse_weights(part, _MESSAGE_WEIGHTS, f"message {number}")
        if any(part.get(key) not in _ABSENT for key in _CALLS):
            raise RecordError("a call of a tool", f"message {number} calls a tool, which GRIT's format cannot hold")
    return parts


def _refuse_weights(thing: Row, keys: Sequence[str], what: str) -> None:
    for key in keys:
        if thing.get(key) not in (None, 1):
            message = f'"{key}" of {what} is {thing[key]!r:.60}; in GRIT\'s format every assistant turn is scored alike'
            raise RecordError("a weight", message)


def _history(row: Row) -> Iterator[tuple[str, Any]]:
    history = row.get("history") or []
    if not isinstance(history, list) or not all(isinstance(pair, list) and len(pair) == 2 for pair in history):
        raise RecordError("no history", '"history" must be a list of pairs: what the user said, and the answer')
    for user, answer in history:
        yield "user", user
        yield "assistant", answer


def _joined(content: Any) -> Any:
    """The text of a message's parts; anything else as it is."""
    if not isinstance(content, list):
        return content
    texts = [part.get("text") for part in content if isinstance(part, dict) and part.get("type") == "text"]
    return "".join(texts) if len(texts) == len(content) and all(isinstance(text, str) for text in texts) else None
