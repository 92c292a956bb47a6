"""The GRIT text format, and which characters of it are pooled or scored.

The markers are plain text. BOS and EOS are the model's own strings; they become single tokens.
"""

from __future__ import annotations

import hashlib
from collections.abc import Mapping, Sequence
from typing import Literal, NamedTuple, get_args

import numpy as np

from grit_jax.errors import InputError
from grit_jax.text.tokenizer import Tokenizer

HASH_BITS = 56  # of a prompt's hash

_USER, _ASSISTANT, _EMBED = "<|user|>\n", "<|assistant|>\n", "<|embed|>\n"

RagMethod = Literal[
    "none",
    "query_first",
    "document_first",
    "document_cache",
    "query_cache",
    "query_document_cache",
    "document_query_cache",
]
RAG_METHODS: tuple[RagMethod, ...] = get_args(RagMethod)
# The opening of a text to embed: BOS, or the separator from another text read before it.
CacheForm = Literal["first", "second"]
CACHE_FORMS: tuple[CacheForm, ...] = get_args(CacheForm)
SYSTEM_ROLES = ("system", "developer")
# Whether a cached text after another keeps its own positions or moves behind the other.
Positions = Literal["own", "corrected"]
POSITIONS: tuple[Positions, ...] = get_args(Positions)

_AFTER = "Optionally using the prior context answer the query prior to it"
_BEFORE = "Answer the prior query while optionally using the context prior to it"
# The texts that a method takes from the embedding pass, in order, and the user message after them.
_RAG: dict[RagMethod, tuple[tuple[Literal["query", "document"], ...], str]] = {
    "none": ((), "{query}"),
    "query_first": ((), f"{{query}}\n\n{{passage}}\n\n{_AFTER}"),
    "document_first": ((), f"{{passage}}\n\n{{query}}\n\n{_BEFORE}"),
    "document_cache": (("document",), f"{{query}}\n\n{_BEFORE}"),
    "query_cache": (("query",), f"{{passage}}\n\n{_AFTER}"),
    "query_document_cache": (("query", "document"), _AFTER),
    "document_query_cache": (("document", "query"), _BEFORE),
}


class Prompt(NamedTuple):
    """Formatted text.

    Attributes:
      text: The text to tokenize, BOS included.
      spans: Character ranges [start, end) that are pooled (embedding) or scored (generation).
      ending: Number of characters that stay at the end of a cut text: those of the tokenizer's `ending`.
    """

    text: str
    spans: tuple[tuple[int, int], ...]
    ending: int = 0

    @property
    def hash(self) -> int:
        """A hash of the text, from 0, of `HASH_BITS` bits."""
        return int.from_bytes(hashlib.blake2b(self.text.encode(), digest_size=HASH_BITS // 8).digest())


class TokenizedPrompt(NamedTuple):
    """Tokens of a prompt.

    Attributes:
      tokens: int32 [tokens].
      spans: int32 [spans, 2]; token ranges [start, end). A token belongs to the span where it starts.
      ending: Number of tokens that stay at the end of a cut text.
    """

    tokens: np.ndarray
    spans: np.ndarray
    ending: int = 0

    def kept(self, limit: int) -> np.ndarray:
        """Indices of the tokens that a cut keeps, int [at most `limit`]: the first ones and the ending."""
        length = len(self.tokens)
        ending = min(self.ending, limit)
        return np.arange(length) if length <= limit else np.r_[: limit - ending, length - ending : length]

    def cut(self, limit: int) -> TokenizedPrompt:
        """The `kept` tokens and the rest of the spans."""
        if len(self.tokens) <= limit:
            return self
        spans = np.minimum(self.spans, limit)
        return TokenizedPrompt(self.tokens[self.kept(limit)], spans[spans[:, 0] < spans[:, 1]], min(self.ending, limit))


def stripped(instruction: str) -> str:
    """An instruction as the model reads it: without tabs, newlines, spaces and colons around it."""
    return instruction.strip("\t\n :")


def embedding(text: str, instruction: str = "", *, bos: str, ending: str = "") -> Prompt:
    r"""`<s><|user|>\n{instruction}\n<|embed|>\n{text}`, or `<s><|embed|>\n{text}`; the text is pooled.

    The instruction is `stripped`. The tokenizer's `ending` follows the text and is pooled with it.
    """
    instruction = stripped(instruction)
    head = f"{bos}{_USER}{instruction}\n{_EMBED}" if instruction else f"{bos}{_EMBED}"
    text += ending if text else ""
    return Prompt(head + text, ((len(head), len(head) + len(text)),), len(ending) if text else 0)


def opening(form: CacheForm, *, bos: str) -> str:
    r"""The BOS of an `embedding` whose keys and values are kept: BOS itself, or `\n` after a first text.

    Both texts of `document_query_cache` keep their BOS and have the first form; the document of `query_document_cache`
    has the second.
    """
    return bos if form == "first" else "\n"


def cached_parts(method: RagMethod) -> tuple[Literal["query", "document"], ...]:
    """The texts whose keys and values a method takes from the embedding pass, in order."""
    return _RAG[method][0]


def document_form(method: RagMethod) -> CacheForm:
    """The form in which a method embeds the document for its keys and values."""
    return "second" if cached_parts(method) == ("query", "document") else "first"


def rag(method: RagMethod, query: str, passage: str = "", *, bos: str) -> str:
    """The prompt after a method's keys and values, if any; the answer continues it.

    The prompt ends with `The answer is`, and has no BOS after keys and values.

    Args:
      method: How query and passage reach the model.
      query: The question.
      passage: Title and text of the document found.
      bos: The model's BOS.
    """
    parts, user = _RAG[method]
    text = user.format(query=query, passage=passage)
    return generation(text, bos=opening("second" if parts else "first", bos=bos), eos="", prefix="The answer is")


def conversation(turns: Sequence[str], *, bos: str, eos: str) -> Prompt:
    """A training conversation of user and assistant turns; assistant texts and their EOS are scored."""
    text, spans = bos, []
    for number, turn in enumerate(turns):
        separator = "\n" if number else ""
        if number % 2 == 0:
            text += f"{separator}{_USER}{turn}"
        else:
            text += f"\n{_ASSISTANT}"
            start = len(text)
            text += turn.strip() + eos
            spans.append((start, len(text)))
    return Prompt(text, tuple(spans))


def fold_system(messages: Sequence[Mapping[str, str]]) -> list[dict[str, str]]:
    r"""The conversation with its system messages in the first user message, as `{system}\n\n{user}`.

    System texts are stripped; blank ones are left out; several are joined by blank lines. `developer` is another name
    for `system`. Without a system message the conversation is unchanged.

    Args:
      messages: `{"role", "content"}` each; system messages come before all others.

    Raises:
      InputError: A system message comes after another message, or no user message follows it.
    """
    roles = [message["role"] for message in messages]
    first = next((i for i, role in enumerate(roles) if role not in SYSTEM_ROLES), len(roles))
    if late := [i for i in range(first, len(roles)) if roles[i] in SYSTEM_ROLES]:
        raise InputError(
            f"message {late[0] + 1} has the role {roles[late[0]]!r}; a system message must come before all others"
        )
    system = [text for message in messages[:first] if (text := message["content"].strip())]
    rest = [{"role": message["role"], "content": message["content"]} for message in messages[first:]]
    if first and roles[first : first + 1] != ["user"]:
        raise InputError("no user message follows the system message, which becomes part of it; add one")
    if system:
        rest[0]["content"] = "\n\n".join([*system, rest[0]["content"]])
    return rest


def plain(text: str, *, bos: str) -> Prompt:
    """Text without roles; all of it is scored."""
    return Prompt(bos + text, ((len(bos), len(bos) + len(text)),))


def generation(messages: str | Sequence[Mapping[str, str]], *, bos: str, eos: str, prefix: str = "") -> str:
    """The prompt that the assistant continues.

    Args:
      messages: One user message, or alternating `{"role": "user" | "assistant", "content": str}`, the first and the
        last by the user; system messages before them are folded in (`fold_system`).
      bos: The model's BOS.
      eos: The model's EOS.
      prefix: The beginning of the completion.

    Raises:
      InputError: Roles are not user and assistant in turn.
    """
    messages = [{"role": "user", "content": messages}] if isinstance(messages, str) else fold_system(messages)
    roles = [message["role"] for message in messages]
    if roles != ["user", "assistant"] * (len(roles) // 2) + ["user"]:
        raise InputError(f"messages have the roles {roles}; they must be user and assistant in turn, ending with user")
    history = conversation([message["content"] for message in messages], bos=bos, eos=eos)
    return f"{history.text}\n{_ASSISTANT}{prefix}"


def begun(text: str, *, bos: str) -> str:
    """The text after BOS, unless it already begins with BOS."""
    return text if text.startswith(bos) else bos + text


def awaits_completion(text: str) -> bool:
    """Whether a text ends where the assistant's turn begins."""
    return text.endswith(_ASSISTANT)


def tokenize(prompts: Sequence[Prompt], tokenizer: Tokenizer) -> list[TokenizedPrompt]:
    """Tokenizes each prompt whole, then finds the tokens of its spans by character offset."""
    encodings = tokenizer.encode_batch([prompt.text for prompt in prompts])
    return [
        TokenizedPrompt(
            encoding.ids,
            _token_spans(encoding.starts, prompt.spans),
            int(np.sum(encoding.starts >= len(prompt.text) - prompt.ending)) if prompt.ending else 0,
        )
        for prompt, encoding in zip(prompts, encodings, strict=True)
    ]


def _token_spans(starts: np.ndarray, spans: Sequence[tuple[int, int]]) -> np.ndarray:
    ranges = np.searchsorted(starts, np.array(spans, np.int64).reshape(-1, 2)).astype(np.int32)
    return ranges[ranges[:, 0] < ranges[:, 1]]
