"""Clients that work with OpenAI work here: what they send, as it was recorded, and the clients themselves."""

import json
import os
import subprocess
import sys
from pathlib import Path

import httpx2
import numpy as np
import pytest

from grit_jax.serve.app import Server
from grit_jax.serve.service import Limits
from grit_jax.text import prompts
from tests.serve.conftest import NAME, running
from tests.serve.test_api import QUESTION

HERE = Path(__file__).parent / "clients"
CLIENTS = ("openai", "langchain", "llama_index")
RECORD = "GRIT_JAX_RECORD"  # an environment variable, with which the long test writes down anew what clients send
BEGUN = "The sea is"  # an answer that is gone on from
KEPT_HEADERS = ("accept", "accept-encoding", "authorization", "content-type", "user-agent")


def recorded(client):
    return [json.loads(line) for line in (HERE / f"{client}.jsonl").read_text().splitlines()]


@pytest.mark.parametrize("client", CLIENTS)
def test_what_a_client_sends_is_answered(server, client):
    for request in recorded(client):
        response = httpx2.request(
            request["method"], f"{server}{request['path']}", headers=request["headers"],
            content=request["body"].encode(), timeout=60,
        )  # fmt: skip
        assert response.status_code == request["status"], (request, response.text)
        assert "error" not in response.text or request["status"] == 400


class Recorder:
    """The server, which also writes down what it is sent."""

    def __init__(self, server):
        self._app, self.app, self.requests = server.app, self, []

    async def __call__(self, scope, receive, send):
        if scope["type"] != "http":
            return await self._app(scope, receive, send)
        headers = {name.decode(): value.decode() for name, value in scope["headers"]}
        request = {
            "method": scope["method"], "path": scope["path"],
            "headers": {name: headers[name] for name in KEPT_HEADERS if name in headers}, "body": "", "status": None,
        }  # fmt: skip

        async def received():
            message = await receive()
            request["body"] += message.get("body", b"").decode()
            return message

        async def sent(message):
            request["status"] = message.get("status", request["status"])
            await send(message)

        self.requests.append(request)
        await self._app(scope, received, sent)


def environment_of(client, folder):
    """The Python of a virtual environment that has the client."""
    python = folder / client / "bin" / "python"
    subprocess.run([sys.executable, "-m", "venv", folder / client], check=True)
    install = [python, "-m", "pip", "install", "--quiet", "--disable-pip-version-check", "-r", HERE / f"{client}.txt"]
    subprocess.run(install, check=True)
    return python


@pytest.mark.long
@pytest.mark.parametrize("client", CLIENTS)
def test_a_client_gets_what_the_library_gives(model, tmp_path, client):
    recorder = Recorder(Server(model, name=NAME, limits=Limits(max_length=1024, rows=4)))
    python, tokenizer = environment_of(client, tmp_path), model.tokenizer
    with running(recorder) as address:
        recorder.requests.clear()
        tokens = ",".join(tokenizer.token_bytes(token).hex() for token in range(256))
        run = [python, HERE / f"run_{client}.py", address, NAME, *[tokens] * (client == "langchain")]
        ended = subprocess.run(run, capture_output=True, text=True, timeout=300)
    assert ended.returncode == 0, ended.stderr
    found, short = json.loads(ended.stdout), {"max_new_tokens": 12, "temperature": 0}
    for vectors in filter(None, (found["vectors"], found.get("vectors_by_token_ids"))):
        assert np.allclose(vectors, model.encode(["one", "two"]), atol=1e-5)
    assert np.allclose(found["vector"], model.encode(["one"])[0], atol=1e-5)
    asked = [{"role": "system", "content": "Be brief."}, *QUESTION]
    answer = model.generate(asked, **short)
    assert {found[name] for name in ("answer", "answer_with_neutral_fields") if name in found} == {answer}
    more = [*asked, {"role": "assistant", "content": answer}, {"role": "user", "content": "More?"}]
    assert found["second_answer"] == model.generate(more, **short)
    assert found["completion"] == model.generate("Once", raw=True, **short)
    alone = model.generate(QUESTION, **short)
    if client == "openai":
        assert found["models"] == [NAME]
        assert found["prefilled"] == model.generate(QUESTION, prefix=BEGUN, **short)
        assert found["streamed"] == alone and found["at_once"] == [alone] * 3
        for (param, message), name in zip(
            found["refused"], ("tools", "response_format", "messages.0.content", "modalities"), strict=True
        ):
            assert param == name and name in message
    else:
        assert found["streamed"] == answer and set(found.get("at_once", [answer])) == {answer}
    sent = [as_kept(request) for request in recorder.requests]
    if os.environ.get(RECORD):
        (HERE / f"{client}.jsonl").write_text("".join(json.dumps(request) + "\n" for request in sent))
    assert sorted(map(json.dumps, sent)) == sorted(map(json.dumps, recorded(client)))


def as_kept(request):
    """A request without what other machines would answer otherwise: what the model has said before."""
    if not request["body"]:
        return request
    body = json.loads(request["body"])
    for message in body.get("messages", ()):
        if message["role"] == "assistant" and message["content"] != BEGUN:
            message["content"] = "Water."
    return request | {"body": json.dumps(body)}


def test_a_system_message_is_the_beginning_of_the_first_users(server, model):
    folded = [{"role": "user", "content": "Be brief.\n\nWhat is the sea?"}]
    expected = model.generate(folded, max_new_tokens=12, temperature=0)
    for role in prompts.SYSTEM_ROLES:
        body = {"model": NAME, "messages": [{"role": role, "content": "Be brief."}, *QUESTION], "max_tokens": 12}
        answer = httpx2.post(f"{server}/v1/chat/completions", json=body | {"temperature": 0}).json()
        assert answer["choices"][0]["message"]["content"] == expected


@pytest.mark.parametrize("begun", ["The sea is", ["The ", "sea is"], "", None])
def test_an_assistants_last_message_is_gone_on_from(server, model, begun):
    content = [{"type": "text", "text": text} for text in begun] if isinstance(begun, list) else begun
    messages = [*QUESTION, {"role": "assistant", "content": content}]
    body = {"model": NAME, "messages": messages, "max_tokens": 12, "temperature": 0}
    prefix = "".join(begun or "")
    expected = model.generate(QUESTION, prefix=prefix, max_new_tokens=12, temperature=0)
    answer = httpx2.post(f"{server}/v1/chat/completions", json=body).json()
    assert answer["choices"][0]["message"]["content"] == expected
    assert answer["usage"]["prompt_tokens"] == len(model.prompt_tokens([QUESTION], prefix=prefix)[0])


def test_token_ids_are_those_of_the_model(server, model):
    ids = [model.tokenizer.encode(text).ids.tolist() for text in ("one", "two")]
    for inputs, texts in ((ids[0], ["one"]), (ids, ["one", "two"])):
        response = httpx2.post(f"{server}/v1/embeddings", json={"model": NAME, "input": inputs}).json()
        assert np.allclose([one["embedding"] for one in response["data"]], model.encode(texts), atol=1e-5)
        body = {"model": NAME, "prompt": inputs, "max_tokens": 12, "temperature": 0}
        response = httpx2.post(f"{server}/v1/completions", json=body).json()
        expected = model.generate(texts, raw=True, max_new_tokens=12, temperature=0)
        assert [choice["text"] for choice in response["choices"]] == expected
        with_bos = [[model.tokenizer.bos_id, *one] for one in (inputs if len(texts) > 1 else [inputs])]
        again = httpx2.post(f"{server}/v1/completions", json=body | {"prompt": with_bos}).json()
        assert [choice["text"] for choice in again["choices"]] == expected


CHAT = {"model": NAME, "messages": QUESTION, "max_tokens": 2}
NEUTRAL = {
    "tools": [[]], "tool_choice": ["none", "auto"], "functions": [[]], "function_call": ["none"],
    "parallel_tool_calls": [True, False], "response_format": [{"type": "text"}], "modalities": [["text"]],
    "store": [False], "metadata": [{}, {"run": "7"}], "service_tier": ["auto", "default"], "logit_bias": [{}],
    "frequency_penalty": [0, 0.0], "presence_penalty": [0], "n": [1], "user": ["me"], "seed": [7], "logprobs": [False],
    "top_logprobs": [0], "stream_options": [{"include_usage": True}, {}], "stop": [[], ""], "audio": [],
    "safety_identifier": ["me"], "prompt_cache_key": ["me"], "reasoning_effort": ["none"], "verbosity": ["medium"],
}  # fmt: skip
REFUSED = {
    "tools": [[{"type": "function", "function": {"name": "f"}}]], "tool_choice": ["required"], "functions": [[{}]],
    "response_format": [{"type": "json_object"}, {"type": "json_schema", "json_schema": {"name": "x"}}, {}, "text"],
    "modalities": [["text", "audio"]], "audio": [{"voice": "x", "format": "wav"}], "store": [True, 0],
    "service_tier": ["flex"], "logit_bias": [{"5": 1}], "frequency_penalty": [0.5, False], "reasoning_effort": ["high"],
    "web_search_options": [{}], "top_k": [5],
}  # fmt: skip


def test_a_nucleus_of_nothing_is_the_likeliest_token(server, model):
    body = CHAT | {"max_tokens": 12, "temperature": 2, "top_p": 0}
    answer = httpx2.post(f"{server}/v1/chat/completions", json=body).json()
    expected = model.generate(QUESTION, max_new_tokens=12, temperature=0)
    assert answer["choices"][0]["message"]["content"] == expected


@pytest.mark.parametrize("name", NEUTRAL)
def test_a_field_that_asks_for_nothing_is_taken(server, name):
    for value in [*NEUTRAL[name], None]:
        response = httpx2.post(f"{server}/v1/chat/completions", json=CHAT | {name: value})
        assert response.status_code == 200, response.text


@pytest.mark.parametrize("name", REFUSED)
def test_a_field_that_the_model_cannot_follow_is_refused_by_name(server, name):
    for value in REFUSED[name]:
        response = httpx2.post(f"{server}/v1/chat/completions", json=CHAT | {name: value})
        error = response.json()["error"]
        assert (response.status_code, error["type"], error["param"]) == (400, "invalid_request_error", name)
        assert error["message"].startswith(f"{name}: ") and error["message"].endswith("leave it out")


@pytest.mark.parametrize(
    ("message", "told"),
    [
        (
            {"content": [{"type": "image_url", "image_url": {"url": "x"}}]},
            "part 0 is of type 'image_url'; the model reads",
        ),
        ({"content": [{"type": "text", "text": "a"}, {"type": "input_audio", "input_audio": {}}]}, "'input_audio'"),
        ({"content": [{"type": "file", "file": {}}]}, "part 0 is of type 'file'"),
        ({"content": [{"type": "text"}]}, "part 0 must be"),
        ({"content": [{"type": "text", "text": 5}]}, "part 0 must be"),
        ({"content": [{"type": "text", "text": "a", "more": 1}]}, "part 0 must be"),
        ({"content": ["text"]}, "part 0 is of type 'None'"),
        ({"content": []}, "has 0 parts"),
        ({"content": {"type": "text", "text": "a"}}, "valid string"),
    ],
)
def test_what_is_no_text_is_refused_by_name(server, message, told):
    body = CHAT | {"messages": [{"role": "user", **message}]}
    response = httpx2.post(f"{server}/v1/chat/completions", json=body)
    error = response.json()["error"]
    assert (response.status_code, error["param"]) == (400, "messages.0.content") and told in error["message"]


def test_an_assistants_message_is_taken_as_clients_give_it_back(server):
    said = {
        "role": "assistant", "content": "Water.", "refusal": None, "tool_calls": [], "function_call": None,
        "annotations": [], "audio": None, "name": "grit",
    }  # fmt: skip
    body = CHAT | {"messages": [*QUESTION, said, {"role": "user", "content": "More?"}]}
    assert httpx2.post(f"{server}/v1/chat/completions", json=body).status_code == 200
    said["tool_calls"] = [{"id": "1", "type": "function", "function": {"name": "f", "arguments": "{}"}}]
    refused = httpx2.post(f"{server}/v1/chat/completions", json=body)
    assert refused.status_code == 400 and refused.json()["error"]["param"] == "messages.1.tool_calls"
