"""Runs a script in several JAX processes that form one mesh on this machine."""

import contextlib
import socket
import subprocess
import sys
import tempfile
import textwrap
import time

from tests.commands import command, environment

# Every process starts with this; the script after it sees all devices. Only Python prints to standard output: the
# threads of the collectives' library write there in the middle of each other's lines, so it gets standard error. A
# process that raises ends at once: the usual way out waits for the others.
_START = """
import os, sys
sys.stdout = os.fdopen(os.dup(1), "w", buffering=1)
os.dup2(2, 1)
import jax
def _end(*error):
    sys.__excepthook__(*error)
    sys.stderr.flush()
    os._exit(1)
sys.excepthook = _end
jax.config.update("jax_cpu_collectives_implementation", "gloo")
_address, _count, _index = sys.argv[1:4]
jax.distributed.initialize(coordinator_address=_address, num_processes=int(_count), process_id=int(_index))
del sys.argv[1:4]
"""


def run(script, *arguments, num_processes=2, devices_each=2, device_order="interleaved", timeout=300):
    """Runs `script` in processes that form one mesh, and returns what each printed.

    Args:
      script: Python source, indented as its surroundings are; `jax.distributed` is initialised before it.
      *arguments: Its `sys.argv[1:]`.
      num_processes: How many processes run it.
      devices_each: CPU devices of each.
      device_order: Of the devices in a mesh, as `tests.commands.environment` takes it; by default as on a pod.
      timeout: Seconds after which all are killed.

    Returns:
      The standard output of each process, by its index.

    Raises:
      AssertionError: A process failed, or the time is up; the message holds the end of every process's stderr.
    """
    source = _START + textwrap.dedent(script)
    address = free_address()
    with contextlib.ExitStack() as stack:
        processes, streams = [], []
        for index in range(num_processes):
            process_command = [
                sys.executable,
                "-c",
                source,
                address,
                str(num_processes),
                str(index),
                *map(str, arguments),
            ]
            # Files and not pipes: a process that fills a pipe waits for its reader, and the others for it.
            files = [stack.enter_context(tempfile.TemporaryFile("w+")) for _ in range(2)]
            variables = environment(devices_each, device_order=device_order)
            process = subprocess.Popen(process_command, env=variables, stdout=files[0], stderr=files[1])
            processes.append(process)
            streams.append(files)
        _wait(processes, time.monotonic() + timeout)
        outputs = [[_content(file) for file in files] for files in streams]
    ends = [f"process {i} ended with {p.returncode}:\n{outputs[i][1][-3000:]}" for i, p in enumerate(processes)]
    assert not any(process.returncode for process in processes), "\n".join(ends)
    return [out for out, _ in outputs]


def run_commands(
    *arguments, own=lambda index: [], code=0, num_processes=2, devices_each=2, device_order="interleaved", timeout=300
):
    """Runs a command of the command line in processes that find each other.

    Args:
      *arguments: Of all processes.
      own: More arguments of one process, by its index.
      code: The exit code that all processes must have.

    Returns:
      Standard output and error of each process, by its index.

    Raises:
      AssertionError: A process ended with another code.
    """
    address = free_address()
    processes = [
        subprocess.Popen(
            command(
                *arguments, *own(index), f"--distributed.coordinator={address}",
                f"--distributed.num_processes={num_processes}", f"--distributed.process_id={index}",
            ),
            env=environment(devices_each, device_order=device_order),
            stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True,
        )
        for index in range(num_processes)
    ]  # fmt: skip
    outputs = [process.communicate(timeout=timeout) for process in processes]
    assert [process.returncode for process in processes] == [code] * num_processes, outputs
    return outputs


def free_address():
    """A `host:port` of this machine that nothing listens to."""
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        return f"127.0.0.1:{free.getsockname()[1]}"


def _wait(processes, deadline):
    """Returns when all have ended; kills all once one has failed, the deadline has passed or the test is stopped."""
    try:
        while time.monotonic() < deadline:
            codes = [process.poll() for process in processes]  # of all: any() would stop at the first that runs
            if None not in codes or any(codes):
                break
            time.sleep(0.05)
    finally:
        for process in processes:
            process.kill()
            process.wait()


def _content(file):
    file.seek(0)
    return file.read()
