import pytest

from grit_jax.errors import InputError
from grit_jax.text import prompts
from grit_jax.text.tokenizer import Tokenizer

SPECIAL = {"bos": "<s>", "eos": "</s>"}


def spans(prompt):
    return [prompt.text[start:end] for start, end in prompt.spans]


def test_embedding_format():
    prompt = prompts.embedding("text", "do this", bos="<s>")
    assert prompt.text == "<s><|user|>\ndo this\n<|embed|>\ntext"
    assert spans(prompt) == ["text"]
    assert prompts.embedding("text", bos="<s>").text == "<s><|embed|>\ntext"


def test_conversation_format_scores_stripped_answers_with_their_eos():
    prompt = prompts.conversation(["u1 ", " a1 ", "u2", "a2"], **SPECIAL)
    assert prompt.text == "<s><|user|>\nu1 \n<|assistant|>\na1</s>\n<|user|>\nu2\n<|assistant|>\na2</s>"
    assert spans(prompt) == ["a1</s>", "a2</s>"]


def test_plain_text_is_scored_whole():
    prompt = prompts.plain("words", bos="<s>")
    assert (prompt.text, spans(prompt)) == ("<s>words", ["words"])


def test_a_generation_prompt_is_the_training_text_up_to_the_answer():
    messages = [{"role": role, "content": text} for role, text in [("user", "u1"), ("assistant", "a1"), ("user", "u2")]]
    training = prompts.conversation(["u1", "a1", "u2", "a2"], **SPECIAL)
    assert prompts.generation(messages, **SPECIAL) + "a2</s>" == training.text
    assert prompts.generation("u1", **SPECIAL) == prompts.generation(messages[:1], **SPECIAL)


@pytest.mark.parametrize("roles", [["assistant"], ["user", "user"], ["user", "assistant"], ["tool", "user"]])
def test_roles_out_of_turn_are_refused(roles):
    with pytest.raises(InputError, match="must be user and assistant in turn"):
        prompts.generation([{"role": role, "content": "x"} for role in roles], **SPECIAL)


def said(*pairs):
    return [{"role": role, "content": text} for role, text in pairs]


@pytest.mark.parametrize(
    ("messages", "folded"),
    [
        (
            [("system", " Be kind.\n"), ("user", "a"), ("assistant", "b")],
            [("user", "Be kind.\n\na"), ("assistant", "b")],
        ),
        ([("developer", "Be kind."), ("user", " a")], [("user", "Be kind.\n\n a")]),
        ([("system", "One."), ("developer", "Two."), ("user", "a")], [("user", "One.\n\nTwo.\n\na")]),
        ([("system", " \n"), ("user", "a")], [("user", "a")]),
        ([("user", "a"), ("assistant", "b")], [("user", "a"), ("assistant", "b")]),
        ([], []),
    ],
)
def test_a_system_message_becomes_part_of_the_first_user_message(messages, folded):
    before = said(*messages)
    assert prompts.fold_system(before) == said(*folded)
    assert before == said(*messages)
    if folded and folded[-1][0] == "user":
        assert prompts.generation(before, **SPECIAL) == prompts.generation(said(*folded), **SPECIAL)


@pytest.mark.parametrize(
    ("messages", "reason"),
    [
        (
            [("user", "a"), ("system", "b")],
            "message 2 has the role 'system'; a system message must come before all others",
        ),
        ([("system", "a"), ("user", "b"), ("developer", "c")], "message 3 has the role 'developer'"),
        ([("system", "a")], "no user message follows the system message"),
        ([("system", "a"), ("assistant", "b")], "no user message follows the system message"),
    ],
)
def test_a_system_message_without_a_place_is_refused(messages, reason):
    with pytest.raises(InputError, match=reason):
        prompts.fold_system(said(*messages))


@pytest.mark.parametrize("source", ["bytes", "golden/tokenizer", "data/models/stories260K"])
def test_token_spans_hold_exactly_the_answers(source, request):
    path = source if source == "bytes" else request.getfixturevalue("shared") / source
    tokenizer = Tokenizer.load(path)
    turns = ["héllo 你好 😀", " 😀你 ok é ", "again\n", "fine."]
    prompt = prompts.conversation(turns, bos=tokenizer.bos, eos=tokenizer.eos)
    (tokenized,) = prompts.tokenize([prompt], tokenizer)
    answers = [tokenizer.decode(tokenized.tokens[a:b], skip_special_tokens=False) for a, b in tokenized.spans]
    assert answers == ["😀你 ok é</s>", "fine.</s>"]


def test_an_empty_text_has_no_span():
    (tokenized,) = prompts.tokenize([prompts.embedding("", "do this", bos="<s>")], Tokenizer.load("bytes"))
    assert len(tokenized.spans) == 0


BEFORE = "Answer the prior query while optionally using the context prior to it"
AFTER = "Optionally using the prior context answer the query prior to it"


@pytest.mark.parametrize(
    ("method", "text"),
    [
        ("none", "<s><|user|>\nQ{\n"),
        ("query_first", f"<s><|user|>\nQ{{\n\nP\n\n{AFTER}\n"),
        ("document_first", f"<s><|user|>\nP\n\nQ{{\n\n{BEFORE}\n"),
        ("document_cache", f"\n<|user|>\nQ{{\n\n{BEFORE}\n"),
        ("query_cache", f"\n<|user|>\nP\n\n{AFTER}\n"),
        ("query_document_cache", f"\n<|user|>\n{AFTER}\n"),
        ("document_query_cache", f"\n<|user|>\n{BEFORE}\n"),
    ],
)
def test_formats_of_answers_from_documents(method, text):
    assert prompts.rag(method, "Q{", "P", bos="<s>") == f"{text}<|assistant|>\nThe answer is"


def test_a_cached_text_begins_with_bos_unless_it_comes_after_the_query():
    forms = {method: prompts.document_form(method) for method in prompts.RAG_METHODS if prompts.cached_parts(method)}
    assert [method for method, form in forms.items() if form == "second"] == ["query_document_cache"]
    assert (prompts.opening("first", bos="<s>"), prompts.opening("second", bos="<s>")) == ("<s>", "\n")
