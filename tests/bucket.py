"""A bucket on this machine, for programs that are started with `environment`."""

import contextlib
import os
import socket

BUCKET = "bucket"


@contextlib.contextmanager
def emulator():
    """Serves `gs://bucket`; gives the environment that the client libraries must be started with."""
    from gcp_storage_emulator.server import create_server

    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    server = create_server("127.0.0.1", port, in_memory=True, default_bucket=BUCKET)
    server.start()
    address = f"http://127.0.0.1:{port}"
    try:
        yield os.environ | {
            "STORAGE_EMULATOR_HOST": address,
            "TENSORSTORE_GCS_HTTP_URL": address,
            "NO_GCE_CHECK": "true",
            "GCSFS_EXPERIMENTAL_ZB_HNS_SUPPORT": "false",
        }
    finally:
        server.stop()
