"""Google Cloud's notice that it is about to take a machine away.

A spot or preemptible machine, with TPUs or not, has 30 seconds left after the notice of its metadata server. A machine
that cannot migrate announces maintenance a minute or more ahead; such a notice is ignored if older than this process,
or a restarted run would stop at once, again and again.
"""

from __future__ import annotations

import http.client
import logging
import os
import socket
import threading
import urllib.error
import urllib.parse
import urllib.request
from collections.abc import Generator
from contextlib import contextmanager

_HOST = "metadata.google.internal"
_PREEMPTED, _MAINTENANCE = "preempted", "maintenance-event"
_NOTICES = {_PREEMPTED: "TRUE", _MAINTENANCE: "TERMINATE_ON_HOST_MAINTENANCE"}
_ANSWER_SECONDS = 60  # after which the server responds without a change
_LONGEST_WAIT = 60.0  # between requests to a failing server

_log = logging.getLogger(__name__)


@contextmanager
def preemption_notices(stop: threading.Event) -> Generator[None]:
    """Sets `stop`, from a thread, when the metadata server announces the machine's end; only Google Cloud has one.

    `GCE_METADATA_HOST` names another server.
    """
    ended = threading.Event()
    for key in _NOTICES:
        threading.Thread(target=_watch, args=(key, stop, ended), name=f"notices of {key}", daemon=True).start()
    try:
        yield
    finally:
        ended.set()


def _watch(key: str, stop: threading.Event, ended: threading.Event) -> None:
    host = os.environ.get("GCE_METADATA_HOST") or _HOST
    try:
        socket.getaddrinfo(host.rpartition(":")[0] or host, None)
    except OSError:
        return  # another cloud, or none
    tag, wait = "", 1.0
    while not ended.is_set():
        try:
            value, new_tag = _ask(host, key, tag)
        except (OSError, http.client.HTTPException) as error:
            if isinstance(error, urllib.error.HTTPError) and error.code == 404:
                return
            ended.wait(wait)
            wait = min(2 * wait, _LONGEST_WAIT)
            continue
        if value == _NOTICES[key] and (tag or key == _PREEMPTED):
            _log.warning("Google Cloud announces %s=%s: the run saves and stops", key, value)
            stop.set()
            return
        tag, wait = new_tag, 1.0


def _ask(host: str, key: str, tag: str) -> tuple[str, str]:
    """The value of an instance's key and its tag; given the last tag, once the value has changed."""
    query = {"timeout_sec": str(_ANSWER_SECONDS)}
    if tag:
        query |= {"wait_for_change": "true", "last_etag": tag}
    address = f"http://{host}/computeMetadata/v1/instance/{key}?{urllib.parse.urlencode(query)}"
    request = urllib.request.Request(address, headers={"Metadata-Flavor": "Google"})
    with _direct.open(request, timeout=2 * _ANSWER_SECONDS) as response:
        value, tag = response.read().decode().strip(), response.headers.get("ETag")
        if response.headers.get("Metadata-Flavor") != "Google" or not tag:
            raise OSError(f"{host} is not a metadata server")
        return value, tag


_direct = urllib.request.build_opener(urllib.request.ProxyHandler({}))  # the server is the machine's own
