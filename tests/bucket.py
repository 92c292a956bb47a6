"""A bucket on this machine, for programs that are started with its environment."""

import contextlib
import functools
import os
import socket
import urllib.parse
import urllib.request
from http import HTTPStatus

BUCKET = "bucket"


class Bucket:
    """Serves `gs://bucket` from `start` to `stop`, also again with what it held before.

    Attributes:
      environment: What the client libraries must be started with.
    """

    def __init__(self):
        from gcp_storage_emulator.handlers.buckets import create_bucket
        from gcp_storage_emulator.storage import Storage

        _honour_generations()
        self._storage = Storage(use_memory_fs=True)
        create_bucket(BUCKET, self._storage)
        with socket.socket() as free:
            free.bind(("127.0.0.1", 0))
            self._port = free.getsockname()[1]
        self.environment = environment(f"http://127.0.0.1:{self._port}")

    def start(self):
        from gcp_storage_emulator.server import APIThread

        self._thread = APIThread("127.0.0.1", self._port, self._storage)
        self._thread.start()
        self._thread.is_running.wait()

    def stop(self):
        self._thread.join()

    def put(self, name, content):
        """Makes `gs://bucket/name`."""
        query = urllib.parse.urlencode({"uploadType": "media", "name": name})
        address = f"{self.environment['STORAGE_EMULATOR_HOST']}/upload/storage/v1/b/{BUCKET}/o?{query}"
        urllib.request.urlopen(urllib.request.Request(address, content)).close()


def environment(address):
    """The environment of programs whose buckets are served at `address`."""
    return os.environ | {
        "STORAGE_EMULATOR_HOST": address,
        "TENSORSTORE_GCS_HTTP_URL": address,
        "NO_GCE_CHECK": "true",
        "GCSFS_EXPERIMENTAL_ZB_HNS_SUPPORT": "false",
    }


@contextlib.contextmanager
def emulator():
    """Serves `gs://bucket`; gives the environment."""
    bucket = Bucket()
    bucket.start()
    try:
        yield bucket.environment
    finally:
        bucket.stop()


@functools.cache
def _honour_generations():
    """Makes the emulator send the generations of what it serves, and refuse changes of others than are asked for."""
    from gcp_storage_emulator.exceptions import NotFound
    from gcp_storage_emulator.handlers import objects
    from gcp_storage_emulator.server import HANDLERS

    def generation(storage, bucket, name):
        try:
            return storage.get_file_obj(bucket, name)["generation"]
        except NotFound:
            return "0"

    def download(request, response, storage, *more, **options):
        objects.download(request, response, storage, *more, **options)
        if response.status < 300:
            response["x-goog-generation"] = generation(
                storage, request.params["bucket_name"], request.params["object_id"]
            )

    def conditional(change):
        def changed(request, response, storage, *more, **options):
            asked = request.query.get("ifGenerationMatch")
            name = request.params.get("object_id") or request.query.get("name", [None])[0]
            if name is None and isinstance(request.data, dict):  # in the body
                name = request.data.get("meta", request.data).get("name")
            if asked and asked[0] != generation(storage, request.params["bucket_name"], name):
                response.status = HTTPStatus.PRECONDITION_FAILED
                response.json({"error": {"code": 412, "message": "conditionNotMet"}})
            else:
                change(request, response, storage, *more, **options)

        return changed

    instead = {objects.download: download} | {
        change: conditional(change) for change in (objects.insert, objects.delete)
    }
    for _, methods in HANDLERS:
        for method, handler in methods.items():
            methods[method] = instead.get(handler, handler)
