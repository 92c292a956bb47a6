"""Entry point of `grit-jax`."""

from __future__ import annotations

import argparse
import glob
import importlib
import io
import os
import sys

import grit_jax
from grit_jax.cli.command import Command
from grit_jax.errors import InputError
from grit_jax.files import DeniedError, UnreachableError
from grit_jax.parallel.chips import DEVICE_FILES, LIBTPU_WITHOUT_TPU

_NAMES = (
    "fetch", "data", "train", "status", "plot", "plan", "encode", "index", "search", "answer", "export-faiss",
    "generate", "serve", "evaluate", "export-hf", "verify-export", "import-hf", "push-hf", "merge", "quickstart",
    "doctor",
)  # fmt: skip
COMMANDS: dict[str, Command] = {
    name: importlib.import_module(f"grit_jax.cli.{name.replace('-', '_')}").run for name in _NAMES
}

_EXIT_CODES = """\
exit codes: 0 done, 2 bad input (do not retry), 3 a plan that does not fit,
70 a step hung and 75 stopped by a signal and saved (run the same command again), 1 anything else
"""

_GPU_PLATFORMS = {"cuda", "gpu", "rocm"}


def make_parser() -> argparse.ArgumentParser:
    """The parser of all commands; importing them imports nothing heavy."""
    raw = argparse.RawDescriptionHelpFormatter
    parser = argparse.ArgumentParser(
        prog="grit-jax",
        description="Train and use language models that both embed and generate.",
        epilog=_EXIT_CODES,
        formatter_class=raw,
    )
    parser.add_argument("--version", action="version", version=f"grit-jax {grit_jax.__version__}")
    commands = parser.add_subparsers(dest="command", metavar="COMMAND", required=True)
    for name, command in COMMANDS.items():
        command.add_to(
            commands.add_parser(
                name,
                help=command.help,
                description=command.help,
                epilog=f"examples:\n{command.examples}",
                formatter_class=raw,
                allow_abbrev=False,
            )
        )
    return parser


def main(argv: list[str] | None = None) -> int:
    """Runs one command and returns its exit code."""
    if isinstance(sys.stdout, io.TextIOWrapper):  # not so in a notebook
        sys.stdout.reconfigure(errors="backslashreplace")  # a record's keys and file names may not be valid text
    args, overrides = make_parser().parse_known_args(argv)
    platforms = os.environ.get("JAX_PLATFORMS")
    found = {kind for kind, patterns in DEVICE_FILES.items() if any(map(glob.glob, patterns))}
    # Without a TPU, an installed TPU library would search for one and complain.
    quiet = ({} if "TPU" in found else LIBTPU_WITHOUT_TPU) | ({} if found else {"JAX_PLATFORMS": "cpu"})
    os.environ.update(quiet | os.environ)
    try:
        return COMMANDS[args.command].execute(args, overrides, args.command)
    except (InputError, DeniedError) as error:
        print(f"error: {error}", file=sys.stderr)
        return 2
    except UnreachableError as error:
        print(f"error: {error}; run the same command again", file=sys.stderr)
        return 1
    except (RuntimeError, AssertionError) as error:
        if (problem := _unusable_platform(error, platforms)) is None:
            raise
        print(f"error: {problem}; `grit-jax doctor` says what this machine has", file=sys.stderr)
        return 2 if platforms else 1
    except KeyboardInterrupt:
        return 130


def _unusable_platform(error: Exception, platforms: str | None) -> str | None:
    """Why JAX cannot use the platforms that the user or JAX itself has chosen; None for any other error.

    Args:
      error: The error that a command raised.
      platforms: The user's JAX_PLATFORMS.
    """
    reason = " ".join(str(error).split())
    # JAX asserts, without a message, that CUDA and ROCm have devices.
    silent = (
        isinstance(error, AssertionError)
        and not reason
        and set(platforms.split(",") if platforms else ()) & _GPU_PLATFORMS
    )
    if not silent and not reason.startswith("Unable to initialize backend"):
        return None
    reason = reason.partition(" (set JAX_PLATFORMS")[0] or type(error).__name__
    return f"JAX_PLATFORMS={platforms}: JAX cannot use that here ({reason}); unset it" if platforms else reason
