"""`grit-jax index` in a process that kills itself at a chosen moment of its writing."""

import subprocess
import sys

from tests.commands import environment

# Moments: before a file is written, with half of it written beside its place, before it is put there, and after; and
# before each piece of a file of keys and values is written.
_SCRIPT = """
import os, signal, sys
from pathlib import Path
from grit_jax import files
from grit_jax.retrieval import kv_file

left = int(sys.argv.pop(1))

def moment(before_death=lambda: None):
    global left
    left -= 1
    if left == 0:
        before_death()
        os.kill(os.getpid(), signal.SIGKILL)

replace, write_bytes, quantize = os.replace, files.write_bytes, kv_file.quantize

def killing_replace(source, target):
    moment()
    replace(source, target)
    moment()

def killing_write_bytes(path, content):
    path = Path(path)
    moment()
    half = path.with_name(f".{path.name}.{os.urandom(4).hex()}.partial")
    moment(lambda: half.write_bytes(content[:len(content) // 2]))
    write_bytes(path, content)

def killing_quantize(*arguments):
    moment()
    return quantize(*arguments)

os.replace, files.write_bytes, kv_file.quantize = killing_replace, killing_write_bytes, killing_quantize
from grit_jax.cli.main import main
code = main()
print("moments left:", left, file=sys.stderr)
sys.exit(code)
"""


def run(moment, *arguments, devices=2):
    """Runs `grit-jax` with these arguments until a moment, 0 for none; returns the finished process.

    The last line of its stderr, where it lives, says which moment would come next, as a negative number.
    """
    command = [sys.executable, "-c", _SCRIPT, str(moment), *map(str, arguments)]
    return subprocess.run(command, capture_output=True, text=True, env=environment(devices), timeout=300)
