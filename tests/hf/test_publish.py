"""What is sent to a stand-in of the Hugging Face Hub."""

import os
import re

import pytest

from grit_jax.cli.main import main
from grit_jax.config import EmbeddingConfig
from grit_jax.hf.model_folder import save_folder
from tests import hub
from tests.hf.test_model_folder import random_model

# Of the client's own use of its HTTP library.
pytestmark = pytest.mark.filterwarnings("ignore:Use 'content=:DeprecationWarning")


@pytest.fixture(scope="module")
def exports(tmp_path_factory):
    """Exports that together have every file that one may have."""
    folder = tmp_path_factory.mktemp("exports")
    save_folder(folder / "plain", *random_model(tie_embeddings=False))
    pretrained, params = random_model(EmbeddingConfig(pooling="last_token", projection_dim=16), family="llama")
    save_folder(folder / "large", pretrained, params, max_shard_bytes=20_000)
    return folder


@pytest.fixture
def export(exports, tmp_path):
    """A copy of one, to be changed."""
    for name, content in hub.folder_files(exports / "large").items():
        (tmp_path / "export" / name).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / "export" / name).write_bytes(content)
    return tmp_path / "export"


@pytest.fixture
def server(tmp_path, monkeypatch):
    with hub.serve(tmp_path / "cache") as (server, _):
        hub.ask_from_here(server, monkeypatch)
        yield server


@pytest.fixture
def push(capfd):
    """Exit code and the lines on stderr; what went wrong is one of them."""

    def run(folder, *arguments):
        code = main(["push-hf", str(folder), "me/pushed", *arguments])
        printed = capfd.readouterr()
        assert "Traceback" not in printed.err, printed.err
        assert printed.out.count("me/pushed") == (code == 0)
        return code, re.findall(r"(?:error|left out): .*", printed.err)

    return run


@pytest.mark.parametrize("name", ["plain", "large"])
def test_all_of_an_export_is_sent_bit_by_bit(exports, server, push, name):
    files = hub.folder_files(exports / name)
    assert {"modeling_grit.py", "1_Pooling/config.json"} < set(files)
    assert ("model.safetensors.index.json" in files) == (name == "large")
    for options, branch in ([], "main"), (["--revision", "step-200"], "step-200"):
        assert push(exports / name, *options) == (0, [])
        assert server.repositories["me/pushed"][branch] == files


NO_PARTS = [
    ".env", ".gitattributes", ".README.md.swp", "run.log", "secrets.json", "trainer_state.json", "optimizer.pt",
    "model.bin", "metrics.jsonl", "README.md~", "notes.txt", "evil.py", "1_Pooling/.env", "1_Pooling/run.log",
]  # fmt: skip
NO_FOLDERS = {
    ".git": ".git/config", ".cache": ".cache/huggingface/upload/README.md.metadata", "__pycache__": "__pycache__/x.pyc",
    "logs": "logs/README.md", "wandb": "wandb/config.json", "checkpoints": "checkpoints/model.safetensors",
    "1_Pooling/more": "1_Pooling/more/config.json",
}  # fmt: skip


def test_nothing_else_in_the_folder_is_sent_and_that_is_said(export, server, push):
    files = hub.folder_files(export)
    for name in [*NO_PARTS, *NO_FOLDERS.values()]:
        (export / name).parent.mkdir(parents=True, exist_ok=True)
        (export / name).write_bytes(b"\xff secret")
    code, [line] = push(export)
    assert code == 0
    assert set(line.removeprefix("left out: ").split(", ")) == {*NO_PARTS, *(f"{name}/" for name in NO_FOLDERS)}
    assert server.repositories["me/pushed"]["main"] == files


def test_what_a_link_leads_out_to_is_not_sent_and_that_is_said(export, server, push, tmp_path):
    for name in ("elsewhere/config.json", "export/.env", "export/NOTICE.d/more", "export/9_Module/README.md"):
        (tmp_path / name).parent.mkdir(exist_ok=True)
        (tmp_path / name).write_text("secret")
    links = {
        "LICENSE": tmp_path / "elsewhere/config.json", "LICENSE.txt": ".env", "NOTICE": "NOTICE.d/more",
        "vocab.txt": "nowhere",
        "8_Linked": tmp_path / "elsewhere", "9_Module/config.json": "../../elsewhere/config.json",
        "added_tokens.json": "tokenizer.json",
    }  # fmt: skip
    for name, target in links.items():
        (export / name).symlink_to(target)
    os.mkfifo(export / "merges.txt")
    code, [line] = push(export)
    assert code == 0
    elsewhere = tmp_path / "elsewhere/config.json"
    assert set(line.removeprefix("left out: ").split(", ")) == {
        f"LICENSE (a link to {elsewhere})", f"LICENSE.txt (a link to {export / '.env'})",
        f"NOTICE (a link to {export / 'NOTICE.d/more'})", f"vocab.txt (a link to {export / 'nowhere'})", "8_Linked/",
        f"9_Module/config.json (a link to {elsewhere})", "merges.txt (not a file)", ".env", "NOTICE.d/",
        "9_Module/README.md",
    }  # fmt: skip
    sent = server.repositories["me/pushed"]["main"]
    assert sent["added_tokens.json"] == sent["tokenizer.json"]
    assert not any(b"secret" in content for content in sent.values())


def test_a_linked_folder_is_pushed_as_what_it_is(export, server, push, tmp_path):
    (tmp_path / "link").symlink_to(export)
    assert push(tmp_path / "link") == (0, [])
    assert server.repositories["me/pushed"]["main"] == hub.folder_files(export)


def test_what_is_no_whole_export_is_refused_before_the_hub_is_asked(exports, export, server, push, tmp_path):
    def refusal(folder):
        code, [line] = push(folder)
        assert (code, server.requests) == (2, [])
        return line

    assert f"{tmp_path / 'nothing'}: no such folder" in refusal(tmp_path / "nothing")
    (tmp_path / "empty").mkdir()
    message = "no README.md and no config.json and no model.safetensors; export the model with grit-jax export-hf first"
    assert message in refusal(tmp_path / "empty")
    shard = next(export.glob("model-00002-*.safetensors"))
    shard.rename(tmp_path / shard.name)
    assert f"no {shard.name}; export the model" in refusal(export)
    shard.symlink_to(tmp_path / shard.name)
    assert f"no {shard.name}; put files in place of {shard.name} (a link to {tmp_path / shard.name})" in refusal(export)
    (export / "model.safetensors.index.json").write_text("{")
    assert "model.safetensors.index.json: cannot be read" in refusal(export)
    (export / "model.safetensors.index.json").write_text("[]")
    assert "model.safetensors.index.json: holds [], not an object with keys" in refusal(export)


REFUSALS = [
    (401, "create", "401: said so); log in with `hf auth login` or set HF_TOKEN to a token that may write to it"),
    (403, "commit/main", "403: said so); log in with `hf auth login` or set HF_TOKEN to a token that may write to it"),
    (400, "objects/batch", "the Hub refuses (400: said so)"),
    (404, "create", "the Hub refuses (404: said so)"),
    (403, "^/objects/", "403: said so); log in with `hf auth login` or set HF_TOKEN to a token that may write to it"),
]
FAILURES = [
    (500, "commit/main", "the Hub cannot answer now (500: said so); run the same command again"),
    (503, "create", "the Hub cannot answer now (503: said so); run the same command again"),
    (429, "create", "the Hub cannot answer now (429: said so); run the same command again"),
    (412, "commit/main", "the Hub cannot answer now (412: said so); run the same command again"),
]


@pytest.mark.parametrize(
    ("expected", "status", "call", "message"), [(2, *row) for row in REFUSALS] + [(1, *row) for row in FAILURES]
)
def test_a_hub_that_refuses_differs_from_one_that_fails(exports, server, push, expected, status, call, message):
    server.broken[call] = (status, {"error": "said so"})
    code, [line] = push(exports / "plain")
    assert (code, line.startswith("error: me/pushed: "), message in line) == (expected, True, True), line
    server.broken.clear()
    assert push(exports / "plain") == (0, [])
    assert server.repositories["me/pushed"]["main"] == hub.folder_files(exports / "plain")


def test_an_answer_that_is_none_of_the_hubs_may_pass(exports, server, push):
    server.broken["create"] = (200, b"<html>Log in to this network</html>")
    code, [line] = push(exports / "plain")
    assert (code, "me/pushed: the Hub cannot be reached (JSONDecodeError" in line) == (1, True)
    assert line.endswith("; run the same command again")


def test_without_a_network_one_line_says_so(exports, server, push, monkeypatch):
    from huggingface_hub import constants

    monkeypatch.setattr(constants, "ENDPOINT", "http://127.0.0.1:9")
    code, [line] = push(exports / "plain")
    assert (code, "me/pushed: the Hub cannot be reached (ConnectError: " in line) == (1, True)
    assert line.endswith("; run the same command again")


def test_what_cannot_be_asked_is_the_users_to_mend(exports, server, push, monkeypatch):
    monkeypatch.setenv("HF_TOKEN", "hf_\u00fc")
    code, [line] = push(exports / "plain")
    assert (code, "the Hub cannot be asked (UnicodeEncodeError" in line, "or HF_TOKEN" in line) == (2, True, True)
    monkeypatch.undo()
    assert main(["push-hf", str(exports / "plain"), "a name/with spaces"]) == 2


def test_a_hub_that_may_not_be_asked_is_not(exports, server, push, monkeypatch):
    from huggingface_hub import constants

    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", True)
    code, [line] = push(exports / "plain")
    assert (code, "me/pushed: HF_HUB_OFFLINE is set, so the Hub is not asked; unset it" in line) == (2, True)
    assert server.requests == []
