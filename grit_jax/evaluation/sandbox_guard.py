"""Runs inside the process of a program: confines it, runs it, says how it ended.

Started by `sandbox.run` with the number of a pipe, bytes of memory and seconds; reads a token and the program from its
standard input. It imports nothing of this package.
"""

import ctypes
import os
import platform
import resource
import signal
import sys

# What a program may ask of the kernel, with the number on x86-64 and on ARM64 (-1 where there is none): to read files,
# use its memory, its clock and its threads' locks, and to end.
_ALLOWED = {
    "read": (0, 63), "close": (3, 57), "fstat": (5, 80), "lseek": (8, 62), "mmap": (9, 222), "mprotect": (10, 226),
    "munmap": (11, 215), "brk": (12, 214), "rt_sigaction": (13, 134), "rt_sigprocmask": (14, 135),
    "rt_sigreturn": (15, 139), "pread64": (17, 67), "readv": (19, 65), "access": (21, -1),
    "sched_yield": (24, 124), "mremap": (25, 216), "madvise": (28, 233), "nanosleep": (35, 101), "getpid": (39, 172),
    "exit": (60, 93), "uname": (63, 160), "fcntl": (72, 25), "getcwd": (79, 17), "readlink": (89, -1),
    "gettimeofday": (96, 169), "getrusage": (98, 165), "sysinfo": (99, 179), "times": (100, 153), "getuid": (102, 174),
    "getgid": (104, 176), "geteuid": (107, 175), "getegid": (108, 177), "sigaltstack": (131, 132), "gettid": (186, 178),
    "futex": (202, 98), "sched_getaffinity": (204, 123), "getdents64": (217, 61), "clock_gettime": (228, 113),
    "clock_getres": (229, 114), "clock_nanosleep": (230, 115), "exit_group": (231, 94), "newfstatat": (262, 79),
    "readlinkat": (267, 78), "faccessat": (269, 48), "getrandom": (318, 278), "statx": (332, 291),
    "rseq": (334, 293), "faccessat2": (439, 439),
}  # fmt: skip
_OPEN, _OPENAT, _WRITE = (2, -1), (257, 56), (1, 64)  # these by their arguments: only to read, only to the pipe
_ARCHITECTURE = (0xC000003E, 0xC00000B7)
_WRITING = os.O_WRONLY | os.O_RDWR | os.O_CREAT | os.O_TRUNC
_PR_SET_NO_NEW_PRIVS, _PR_SET_SECCOMP, _SECCOMP_MODE_FILTER = 38, 22, 2
_ALLOW, _REFUSE, _KILL = 0x7FFF0000, 0x00050000 | 1, 0x80000000  # refused: EPERM
_LOAD, _EQUAL, _ANY_BIT, _RETURN = 0x20, 0x15, 0x45, 0x06
_NUMBER_AT, _ARCHITECTURE_AT, _ARGUMENTS_AT = 0, 4, 16


class _Instruction(ctypes.Structure):
    _fields_ = [("code", ctypes.c_ushort), ("yes", ctypes.c_ubyte), ("no", ctypes.c_ubyte), ("value", ctypes.c_uint)]


class _Program(ctypes.Structure):
    _fields_ = [("length", ctypes.c_ushort), ("instructions", ctypes.POINTER(_Instruction))]


def _filter(machine: int, pipe: int) -> list[tuple[int, int, int, int]]:
    """A program for the kernel: each call is allowed, allowed with some arguments, or refused."""
    steps = [(_LOAD, 0, 0, _ARCHITECTURE_AT), (_EQUAL, 1, 0, _ARCHITECTURE[machine]), (_RETURN, 0, 0, _KILL)]
    steps.append((_LOAD, 0, 0, _NUMBER_AT))
    for numbers in _ALLOWED.values():
        if numbers[machine] >= 0:
            steps += [(_EQUAL, 0, 1, numbers[machine]), (_RETURN, 0, 0, _ALLOW)]
    for numbers, argument in ((_OPEN, 1), (_OPENAT, 2)):
        if numbers[machine] >= 0:
            steps += [
                (_EQUAL, 0, 4, numbers[machine]),
                (_LOAD, 0, 0, _ARGUMENTS_AT + 8 * argument),
                (_ANY_BIT, 0, 1, _WRITING),
                (_RETURN, 0, 0, _REFUSE),
                (_RETURN, 0, 0, _ALLOW),
            ]
    steps += [
        (_EQUAL, 0, 5, _WRITE[machine]),
        (_LOAD, 0, 0, _ARGUMENTS_AT),
        (_EQUAL, 0, 1, pipe),
        (_RETURN, 0, 0, _ALLOW),
        (_EQUAL, 0, 1, 1),  # what it prints goes nowhere
        (_RETURN, 0, 0, _ALLOW),
    ]
    return [*steps, (_RETURN, 0, 0, _REFUSE)]


def _confine(pipe: int, memory: int, seconds: float) -> None:
    machine = ("x86_64", "aarch64").index(platform.machine())
    whole = max(1, -(-seconds // 1))
    for limit, most in (
        (resource.RLIMIT_AS, memory),
        (resource.RLIMIT_CPU, int(whole)),
        (resource.RLIMIT_FSIZE, 0),
        (resource.RLIMIT_NOFILE, 64),
        (resource.RLIMIT_CORE, 0),
    ):
        resource.setrlimit(limit, (most, most))
    signal.setitimer(signal.ITIMER_REAL, seconds)  # its signal ends the process, unless the program is let catch it
    steps = _filter(machine, pipe)
    instructions = (_Instruction * len(steps))(*(_Instruction(*step) for step in steps))
    library = ctypes.CDLL(None, use_errno=True)
    if library.prctl(_PR_SET_NO_NEW_PRIVS, 1, 0, 0, 0) or library.prctl(
        _PR_SET_SECCOMP, _SECCOMP_MODE_FILTER, ctypes.byref(_Program(len(steps), instructions)), 0, 0
    ):
        raise OSError(ctypes.get_errno(), "no system-call filter")


def main() -> None:
    """Confines this process and runs the program."""
    pipe, memory, seconds = int(sys.argv[1]), int(sys.argv[2]), float(sys.argv[3])
    token, _, program = sys.stdin.buffer.read().decode(errors="replace").partition("\n")
    try:
        _confine(pipe, memory, seconds)
    except Exception as error:
        os.write(pipe, f"{type(error).__name__}: {error}\n".encode())
        return
    os.write(pipe, b"ready\n")
    try:
        exec(compile(program, "program", "exec"), {"__name__": "__main__"})
        said = f"passed {token}"
    except BaseException as error:
        said = f"failed {type(error).__name__}: {' '.join(str(error)[:300].split())}".rstrip(": ")
    os.write(pipe, said.encode(errors="replace"))
    os._exit(0)


if __name__ == "__main__":
    main()
