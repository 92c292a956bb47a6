"""Versions, devices and likely problems of this machine; works without a working JAX."""

from __future__ import annotations

import collections
import dataclasses
import fcntl
import glob
import importlib.metadata
import os
import platform
from collections.abc import Iterator, Mapping
from pathlib import Path

from packaging.requirements import Requirement
from packaging.specifiers import SpecifierSet
from packaging.version import Version

from grit_jax.errors import install
from grit_jax.parallel.chips import DEVICE_FILES

LOCK_FILE = "/tmp/libtpu_lockfile"

_PLUGINS = ("jax-cuda12-plugin", "jax-cuda13-plugin")
_PACKAGES = ("jax", "jaxlib", "libtpu", *_PLUGINS, "flax", "optax", "orbax-checkpoint", "grain", "grit-jax")


@dataclasses.dataclass(frozen=True)
class Devices:
    """Devices of one type.

    Attributes:
      platform: JAX's platform: `tpu`, `gpu` or `cpu`.
      kind: JAX's `device_kind`.
      count: Their number in all processes.
      memory_bytes: Memory of one device that JAX may use; None if unknown.
    """

    platform: str
    kind: str
    count: int
    memory_bytes: int | None


@dataclasses.dataclass(frozen=True)
class Environment:
    """Facts of this process and its machine.

    Attributes:
      versions: Versions of Python and of each package; None if not installed.
      fitting: The installed jax's version specifiers for other packages.
      device_files: Device files of this machine, by type of accelerator.
      platforms: The environment variable JAX_PLATFORMS.
      lock: Why libtpu's lock file cannot be taken; None if it can be, or does not exist.
      devices: JAX's devices; empty if it does not start.
      process_index: Number of this process in its job.
      process_count: Processes of the job.
      error: Why JAX does not start; None if it does.
    """

    versions: Mapping[str, str | None]
    fitting: Mapping[str, str]
    device_files: Mapping[str, tuple[str, ...]]
    platforms: str | None
    lock: str | None
    devices: tuple[Devices, ...]
    process_index: int
    process_count: int
    error: str | None


@dataclasses.dataclass(frozen=True)
class Problem:
    """A likely problem.

    Attributes:
      text: The problem.
      remedy: Its solution.
    """

    text: str
    remedy: str


@dataclasses.dataclass(frozen=True)
class _Support:
    """JAX's support for an accelerator: names in JAX_PLATFORMS, alternative packages, and the extra with them."""

    platforms: tuple[str, ...]
    packages: tuple[str, ...]
    extra: str

    @property
    def device_platform(self) -> str:
        return self.platforms[0]


_SUPPORT = {
    "TPU": _Support(("tpu",), ("libtpu",), "tpu"),
    "NVIDIA GPU": _Support(("gpu", "cuda"), _PLUGINS, "cuda12"),
}


def inspect() -> Environment:
    """Gathers the facts; starts JAX if it has not started."""
    versions = {"python": platform.python_version(), **{name: _version(name) for name in _PACKAGES}}
    lock = _lock(Path(LOCK_FILE))  # JAX takes the lock itself when it starts
    try:
        import jax

        devices, error = _devices(), None
        process_index, process_count = jax.process_index(), jax.process_count()
    except Exception as reason:  # has many types: incompatible packages, devices in use
        devices, error = (), " ".join(f"{type(reason).__name__}: {reason}".split())
        process_index, process_count = 0, 1
    return Environment(
        versions=versions,
        fitting=_fitting(),
        device_files={
            accelerator: tuple(file for pattern in patterns for file in sorted(glob.glob(pattern)))
            for accelerator, patterns in DEVICE_FILES.items()
        },
        platforms=os.environ.get("JAX_PLATFORMS"),
        lock=lock,
        devices=devices,
        process_index=process_index,
        process_count=process_count,
        error=error,
    )


def _version(package: str) -> str | None:
    try:
        return importlib.metadata.version(package)
    except importlib.metadata.PackageNotFoundError:
        return None


def _fitting() -> dict[str, str]:
    """The requirements of jax's own metadata on the packages that depend on its version."""
    required = (Requirement(line) for line in importlib.metadata.requires("jax") or ())
    # A package's first requirement is that of an installation without extras.
    return {need.name: str(need.specifier) for need in reversed(list(required)) if need.name in ("jaxlib", "libtpu")}


def _lock(path: Path) -> str | None:
    try:
        with path.open("r+b") as file:
            fcntl.lockf(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
            fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except FileNotFoundError:
        return None
    except BlockingIOError:
        return "another process holds it"
    except OSError:
        return "it belongs to another user"
    return None


def _devices() -> tuple[Devices, ...]:
    import jax

    limits = {device.device_kind: (device.memory_stats() or {}).get("bytes_limit") for device in jax.local_devices()}
    counts = collections.Counter((device.platform, device.device_kind) for device in jax.devices())
    return tuple(Devices(*names, count, limits.get(names[1])) for names, count in counts.items())


def find_problems(facts: Environment) -> Iterator[Problem]:
    """The likely problems that follow from the facts."""
    yield from _version_problems(facts.versions, facts.fitting)
    if facts.error:
        unset = facts.platforms and "Unable to initialize backend" in facts.error
        remedy = "unset JAX_PLATFORMS" if unset else "see the other problems, and `python -c 'import jax'`"
        yield Problem(f"JAX does not start: {facts.error}", remedy)
    found = {device.platform for device in facts.devices}
    for accelerator, support in _SUPPORT.items():
        if (files := facts.device_files.get(accelerator)) and support.device_platform not in found:
            yield _unused(f"{accelerator} ({', '.join(files)})", support, facts)


def _version_problems(versions: Mapping[str, str | None], fitting: Mapping[str, str]) -> Iterator[Problem]:
    def reinstall(extra: str) -> str:
        return f"install them together: {install(extra)}"

    for name, wanted in fitting.items():
        version = versions.get(name)
        if version and not SpecifierSet(wanted).contains(version, prereleases=True):
            extra = "tpu" if name == "libtpu" else "EXTRA"
            yield Problem(
                f"{name} {version} does not fit jax {versions['jax']}, which takes {wanted}", reinstall(extra)
            )
    jaxlib = versions.get("jaxlib")
    for name in _PLUGINS:
        version = versions.get(name)
        if version and jaxlib and Version(version).release != Version(jaxlib).release:
            extra = name.split("-")[1]
            yield Problem(f"{name} {version} does not match jaxlib {jaxlib}, so JAX ignores it", reinstall(extra))


def _unused(accelerator: str, support: _Support, facts: Environment) -> Problem:
    """Why JAX does not use an accelerator of this machine."""
    allowed = facts.platforms.split(",") if facts.platforms else support.platforms
    if not set(allowed) & set(support.platforms):
        return Problem(f"JAX_PLATFORMS={facts.platforms} hides a {accelerator}", "unset JAX_PLATFORMS")
    if not any(facts.versions.get(name) for name in support.packages):
        return Problem(
            f"JAX has no support for a {accelerator}: {' or '.join(support.packages)} is not installed",
            install(support.extra),
        )
    if facts.lock and support.device_platform == "tpu":
        return Problem(
            f"{LOCK_FILE} cannot be taken: {facts.lock}",
            "end the process that uses the TPU (sudo lsof -w /dev/accel* /dev/vfio/*); if there is none, "
            f"sudo rm {LOCK_FILE}",
        )
    return Problem(
        f"JAX does not use a {accelerator} of this machine",
        "see what JAX_LOGGING_LEVEL=DEBUG python -c 'import jax; jax.devices()' says, and the driver's own tools",
    )
