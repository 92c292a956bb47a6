"""A hostile program: each function says what it achieved, so that a sandbox that holds gives empty lists.

`test_sandbox.py` runs the whole file as a program of a model; it imports nothing of this package.
"""

import _socket
import _thread
import contextlib
import ctypes
import fcntl
import gc
import glob
import json
import mmap
import os
import signal
import stat
import struct
import subprocess
import sys
import time

SYSTEM = ctypes.CDLL(None, use_errno=True)


def achieved(actions):
    done = []
    for name, action in actions.items():
        with contextlib.suppress(OSError, MemoryError, RuntimeError):
            action()
            done.append(name)
    return done


def hoard(size):
    done = achieved({
        "allocated": lambda: bytearray(size),
        "mapped": lambda: mmap.mmap(-1, size),
        "in a file of memory": lambda: os.memfd_create("x"),
    })  # fmt: skip
    for name, given in {"shmget": (0, size, 0o1600), "msgget": (0, 0o1600), "semget": (0, 9, 0o1600)}.items():
        if getattr(SYSTEM, name)(*given) >= 0:
            done.append(name)
    return done


def multiply():
    return achieved({
        "fork": lambda: os.fork() or os._exit(0),
        "spawn": lambda: os.posix_spawn(sys.executable, [sys.executable, "-c", ""], {}),
        "run": lambda: subprocess.run([sys.executable, "-c", ""], check=True),
        "thread": lambda: _thread.start_new_thread(print, ()),
    })  # fmt: skip


def reach(port):
    def connect():
        with contextlib.closing(_socket.socket()) as one:
            one.connect(("127.0.0.1", port))

    return achieved({"connected": connect})


def open_sockets():
    families = [name for name in dir(_socket) if name.startswith("AF_")]
    kinds = [_socket.SOCK_STREAM, _socket.SOCK_DGRAM, _socket.SOCK_RAW, _socket.SOCK_SEQPACKET]
    return achieved({
        (name, kind): lambda name=name, kind=kind: _socket.socket(getattr(_socket, name), kind, 0)
        for name in families
        for kind in kinds
    } | {"pair": _socket.socketpair})  # fmt: skip


def write(paths):
    there = [
        "/",
        "/tmp",
        "/dev",
        "/dev/shm",
        "/etc",
        "/usr/lib",
        "/root",
        "/home",
        "/guest.py",
        "/task.json",
        os.__file__,
    ]
    done = []
    for path in [*paths, *there]:
        inside = f"{path}/grit-was-here"
        actions = {
            "open": lambda path=path: os.open(path, os.O_RDWR),
            "truncate": lambda path=path: os.truncate(path, 0),
            "remove": lambda path=path: os.remove(path),
            "rmdir": lambda path=path: os.rmdir(path),
            "rename": lambda path=path: os.rename(path, f"{path}-"),
            "chmod": lambda path=path: os.chmod(path, 0o777),
            "utime": lambda path=path: os.utime(path),
            "setxattr": lambda path=path: os.setxattr(path, "user.x", b"x"),
            "nameless": lambda path=path: os.open(path, os.O_TMPFILE | os.O_RDWR),
            "create": lambda inside=inside: os.open(inside, os.O_CREAT | os.O_WRONLY),
            "mkdir": lambda inside=inside: os.mkdir(inside),
            "symlink": lambda inside=inside: os.symlink("a", inside),
            "mkfifo": lambda inside=inside: os.mkfifo(inside),
        }
        done += [(path, name) for name in achieved(actions)]
    return done


def read(paths, python):
    """`python` are the files and folders that Python needs."""
    done = [path for path in paths if os.path.exists(path)]
    done += achieved({path: lambda path=path: os.listdir(path) for path in ("/proc", "/sys", "/tmp", "/home", "/var")})
    done += glob.glob(f"{os.path.dirname(os.__file__)}/site-packages/*")
    for folder, _, files in os.walk("/"):
        places = [os.path.join(folder, name) for name in files]
        done += [place for place in places if not place.startswith((*python, "/dev/null", "/guest.py", "/task.json"))]
    with open("/task.json") as file:
        done += set(json.load(file)) - {"program", "function"}
    null = os.stat("/dev/null").st_ino
    kept = []  # numbers of its open files
    for number in range(3, 1024):
        with contextlib.suppress(OSError):
            about = os.fstat(number)
            kept.append(number)
            if not stat.S_ISFIFO(about.st_mode) and about.st_ino != null:
                done.append(f"file {number}")
    return (done if len(kept) <= 3 else [*done, kept])[:20]


def signal_other(victim):
    ends = os.pipe()
    done = achieved({
        "kill": lambda: os.kill(victim, signal.SIGKILL),
        "kill its group": lambda: os.killpg(victim, signal.SIGKILL),
        "have a handle": lambda: os.pidfd_open(victim),
        "make it own a pipe": lambda: fcntl.fcntl(ends[0], fcntl.F_SETOWN, victim),
        "make its group own one": lambda: fcntl.fcntl(ends[0], fcntl.F_SETOWN, -victim),
        "make its thread own one": lambda: fcntl.fcntl(ends[0], 15, struct.pack("2i", 0, victim)),  # F_SETOWN_EX
    })  # fmt: skip
    fcntl.fcntl(ends[0], fcntl.F_SETFL, os.O_ASYNC | os.O_NONBLOCK)
    os.write(ends[1], b"x")
    event, timer = (ctypes.c_int * 16)(0, 0, signal.SIGTERM, 4, victim), ctypes.c_void_p()  # SIGEV_THREAD_ID
    if SYSTEM.timer_create(1, event, ctypes.byref(timer)) == 0:
        SYSTEM.timer_settime(timer, 0, struct.pack("4q", 0, 0, 0, 1), None)
        done.append("let a timer signal it")
    if SYSTEM.tgkill(victim, victim, signal.SIGKILL) == 0:
        done.append("kill its thread")
    time.sleep(0.2)
    return done


def gain_privilege():
    calls = {
        "mount": (b"x", b"/", b"tmpfs", 0, None), "unshare": (1 << 28,), "chroot": (b"/lib",), "setns": (0, 0),
        "setuid": (0,), "setgid": (0,), "sethostname": (b"x", 1), "ptrace": (16, 1, 0, 0),
    }  # fmt: skip
    done = [name for name, given in calls.items() if getattr(SYSTEM, name)(*given) == 0]
    bounding_set, no_new_privileges = 23, 39
    done += [f"capability {number}" for number in range(41) if SYSTEM.prctl(bounding_set, number, 0, 0, 0) == 1]
    return done if SYSTEM.prctl(no_new_privileges, 0, 0, 0, 0) == 1 else [*done, "may gain more"]


def look_around():
    names, there = ctypes.POINTER(ctypes.c_char_p).in_dll(SYSTEM, "environ"), []
    while names[len(there)]:
        there.append(names[len(there)].decode())
    return [name for name in [*os.environ, *there] if name.partition("=")[0] not in ("PWD", "LC_CTYPE")]


def find_the_test(mark):
    """`mark` comes twice in the test's code."""
    texts = [one for one in gc.get_objects() if isinstance(one, dict | list | tuple)]
    frame, found = sys._getframe(1), []
    while frame:
        texts += [frame.f_locals, frame.f_globals]
        frame = frame.f_back
    for one in texts:
        values = list(one.values()) if isinstance(one, dict) else list(one)
        found += [text[:60] for text in values if isinstance(text, str) and mark * 2 in text]
    return found
