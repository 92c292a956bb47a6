"""A Hugging Face Hub on this machine, for programs that are started with `environment`."""

import base64
import contextlib
import hashlib
import json
import os
import re
import threading
import time
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer


class Hub:
    """Repositories by name: branch -> file -> bytes; data sets are called `datasets/org/name`.

    Attributes:
      gated: Repositories whose files nobody gets.
      damaged: What is sent in place of a file's content, by the file's name.
      held: Files that are not sent while they are in it.
      broken: What is answered instead, status and content, by a pattern that paths are searched for.
      requests: Method and path of all requests so far.
    """

    def __init__(self):
        self.repositories, self.gated, self.requests, self._objects = {}, set(), [], {}
        self.damaged, self.held, self.broken = {}, set(), {}

    def sent(self):
        """Names of the files that were asked for, in order."""
        return [path.rpartition("/")[2] for method, path in self.requests if method == "GET" and "/resolve/" in path]

    def files(self, repository, revision):
        """The files of a branch or commit."""
        branches = self.repositories[repository]
        return next(files for branch, files in branches.items() if revision in (branch, commit(files)))

    def answer(self, method, path, body):
        """Status, headers and content of one request; the calls that huggingface_hub makes and no others."""
        for pattern, (status, content) in self.broken.items():
            if re.search(pattern, path):
                return status, {}, content
        if path == "/api/repos/create":
            about = json.loads(body)
            name = f"{about.get('organization') or 'me'}/{about['name']}"
            self.repositories.setdefault(name, {"main": {}})
            return 200, {}, {"url": f"{self.address}/{name}", "name": name, "id": name}
        if path == "/api/validate-yaml":
            return 200, {}, {"errors": [], "warnings": []}
        if match := re.fullmatch(r"/objects/(\w+)", path):
            self._objects[match[1]] = body
            return 200, {}, {}
        match = (
            re.fullmatch(r"/api/models/([^/]+/[^/]+)/(revision|branch|preupload|commit|tree)/(.+)", path)
            or re.fullmatch(r"/api/models/([^/]+/[^/]+)()()", path)
            or re.fullmatch(r"/api/(datasets/[^/]+/[^/]+)/(revision)/(.+)", path)
            or re.fullmatch(r"/((?:datasets/)?[^/]+/[^/]+)/(resolve)/(.+)", path)
            or re.fullmatch(r"/([^/]+/[^/]+)\.git/(info/lfs/objects/batch)()", path)
        )
        if not match or match[1] not in self.repositories:
            return 404, {"X-Error-Code": "RepoNotFound"}, {"error": "Repository not found"}
        call = match[2].split("/")[0] or "revision"
        if match[1] in self.gated and call != "revision":  # everybody may see what there is
            return 403, {"X-Error-Code": "GatedRepo"}, {"error": "Access to it is restricted"}
        return getattr(self, "_" + call)(match[1], match[3] or "main", body)

    def _revision(self, repository, revision, _):
        try:
            files = self.files(repository, revision)
        except StopIteration:
            return 404, {"X-Error-Code": "RevisionNotFound"}, {"error": "Revision not found"}
        about = {"id": repository, "modelId": repository, "sha": commit(files), "private": False, "tags": []}
        about |= {"downloads": 0, "likes": 0, "siblings": [sibling(name, content) for name, content in files.items()]}
        if licence := re.search(r"^license: (.*)$", files.get("README.md", b"").decode(), re.MULTILINE):
            about["cardData"] = {"license": licence[1]}
        return 200, {}, about

    def _tree(self, repository, revision, _):
        files = self.files(repository, revision).items()
        return 200, {}, [{"type": "file", "path": n, "size": len(c), "oid": commit({n: c})} for n, c in files]

    def _resolve(self, repository, place, _):
        revision, _, name = place.partition("/")
        content = self.files(repository, revision)[name]
        about = sibling(name, content)
        tag = about["lfs"]["sha256"] if "lfs" in about else about["blobId"]
        headers = {"ETag": f'"{tag}"', "X-Repo-Commit": commit(self.files(repository, revision))}
        return 200, headers, self.damaged.get(name, content)

    def _branch(self, repository, branch, _):
        self.repositories[repository].setdefault(branch, dict(self.repositories[repository]["main"]))
        return 200, {}, {}

    def _preupload(self, repository, _, body):
        files = json.loads(body)["files"]
        modes = [(file["path"], "lfs" if file["path"].endswith(".safetensors") else "regular") for file in files]
        return 200, {}, {"files": [{"path": p, "uploadMode": mode, "shouldIgnore": False} for p, mode in modes]}

    def _info(self, repository, _, body):
        objects = [
            {**entry, "actions": {"upload": {"href": f"{self.address}/objects/{entry['oid']}"}}}
            for entry in json.loads(body)["objects"]
        ]
        return 200, {}, {"transfer": "basic", "objects": objects}

    def _commit(self, repository, branch, body):
        files = self.repositories[repository][branch]
        for line in map(json.loads, body.splitlines()):
            if line["key"] == "file":
                files[line["value"]["path"]] = base64.b64decode(line["value"]["content"])
            elif line["key"] == "lfsFile":
                files[line["value"]["path"]] = self._objects[line["value"]["oid"]]
        place = f"{self.address}/{repository}/commit/{commit(files)}"
        return 200, {}, {"success": True, "commitOid": commit(files), "commitUrl": place, "hookOutput": ""}


def sibling(name, content):
    """What the Hub says about a file; large ones have a sha256 of their own."""
    about = {"rfilename": name, "size": len(content)}
    about["blobId"] = hashlib.sha1(b"blob %d\0" % len(content) + content).hexdigest()
    if name.endswith((".safetensors", ".jsonl")):
        about["lfs"] = {"size": len(content), "sha256": hashlib.sha256(content).hexdigest(), "pointerSize": 130}
    return about


def commit(files):
    """The commit of some contents."""
    return hashlib.sha1(repr(sorted(files.items())).encode()).hexdigest()


def folder_files(folder):
    """Every file of a folder by its path in it."""
    return {str(path.relative_to(folder)): path.read_bytes() for path in sorted(folder.rglob("*")) if path.is_file()}


@contextlib.contextmanager
def serve(cache):
    """Gives a `Hub` and the environment that programs which use it must be started with."""
    hub = Hub()

    class Handler(BaseHTTPRequestHandler):
        protocol_version = "HTTP/1.1"

        def handle_any(self):
            body = self.rfile.read(int(self.headers.get("Content-Length") or 0))
            path = self.path.partition("?")[0].replace("%2F", "/")
            hub.requests.append((self.command, path))
            while self.command == "GET" and path.rpartition("/")[2] in hub.held:
                time.sleep(0.02)
            status, headers, content = hub.answer(self.command, path, body)
            if not isinstance(content, bytes):
                content, headers = json.dumps(content).encode(), headers | {"Content-Type": "application/json"}
            self.send_response(status)
            for name, value in headers.items() | {("Content-Length", str(len(content)))}:
                self.send_header(name, value)
            self.end_headers()
            if self.command != "HEAD":
                with contextlib.suppress(ConnectionError):  # the client may be gone
                    self.wfile.write(content)

        do_GET = do_HEAD = do_POST = do_PUT = handle_any

        def log_message(self, *_):
            pass

    server = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
    hub.address = f"http://127.0.0.1:{server.server_port}"
    threading.Thread(target=server.serve_forever, daemon=True).start()
    try:
        yield hub, os.environ | {
            "HF_ENDPOINT": hub.address, "HF_HOME": str(cache), "HF_HUB_DISABLE_XET": "1", "HF_TOKEN": "hf_test",
            "HF_HUB_DISABLE_TELEMETRY": "1", "HF_HUB_DISABLE_PROGRESS_BARS": "1",
        }  # fmt: skip
    finally:
        server.shutdown()
        server.server_close()


def ask_from_here(hub, monkeypatch):
    """Makes this process ask the hub, as `environment` makes others."""
    from huggingface_hub import constants

    template = constants.HUGGINGFACE_CO_URL_TEMPLATE
    monkeypatch.setattr(constants, "HUGGINGFACE_CO_URL_TEMPLATE", template.replace(constants.ENDPOINT, hub.address))
    monkeypatch.setattr(constants, "ENDPOINT", hub.address)
    monkeypatch.setattr(constants, "HF_HUB_DISABLE_XET", True)
    monkeypatch.setenv("HF_TOKEN", "hf_test")
