"""Parts of Windows for this project's code, on another system: in this process and in those that it starts.

Python imports this file when it starts with its folder in PYTHONPATH. Code in the folders of WINDOWS_CODE then finds
modules, names and constants as on Windows, while libraries see the system that there is. Modules of Unix are missing;
a file that this process has open cannot be renamed, replaced or deleted; text files need an encoding; there are no
signals but SIGINT, SIGTERM and SIGBREAK. Paths stay as they are, and so do the names of files that are allowed.
"""

import builtins
import errno
import fcntl
import mmap
import multiprocessing
import os
import signal
import subprocess
import sys
import sysconfig
import types
import warnings
from pathlib import Path
from typing import Any

import psutil

ROOTS = tuple(os.path.join(folder, "") for folder in os.environ.get("WINDOWS_CODE", "").split(os.pathsep) if folder)
STANDARD, INSTALLED = sysconfig.get_path("stdlib"), sysconfig.get_path("purelib")
MISSING = {"fcntl", "resource", "pwd", "grp", "termios", "tty", "pty", "posix", "crypt", "syslog"}
OF_OS = """
    fork forkpty getuid geteuid getgid getegid getgroups killpg getpgid getpgrp setsid setpgid sched_getaffinity
    sched_setaffinity statvfs fstatvfs mkfifo mknod uname chown lchown fchown fchmod fchdir chroot pread pwrite preadv
    pwritev posix_fadvise posix_fallocate posix_spawn sync fdatasync nice getpriority setpriority getloadavg confstr
    sysconf pathconf wait wait3 wait4 openpty sendfile getxattr setxattr memfd_create register_at_fork ctermid
    O_NOFOLLOW O_DIRECTORY O_NONBLOCK O_CLOEXEC O_DIRECT O_SYNC O_NOCTTY WNOHANG RTLD_NOW
""".split()
SIGNALS = "SIGINT SIGTERM SIGABRT SIGFPE SIGILL SIGSEGV SIG_DFL SIG_IGN".split()
O_BINARY, NEW_GROUP = 0x8000, 0x200
OTHERS = signal.SIGTTIN  # 21, the number of SIGBREAK
EVENTS = {0: signal.SIGINT, 1: OTHERS}  # CTRL_C_EVENT, CTRL_BREAK_EVENT


class StandIn(types.ModuleType):
    """A module without some names and with others, and otherwise as it is now."""

    def __init__(self, real: types.ModuleType, missing: list[str], **instead: Any) -> None:
        super().__init__(real.__name__)
        self.__dict__.update(instead, _real=real, _missing=frozenset(missing))

    def __getattr__(self, name: str) -> Any:
        if name in self._missing:
            raise AttributeError(f"module {self.__name__!r} has no attribute {name!r} on Windows")
        return getattr(self._real, name)

    def __setattr__(self, name: str, value: Any) -> None:
        setattr(self._real, name, value)


def is_ours(file: str | None) -> bool:
    return file is not None and os.path.abspath(file).startswith(ROOTS)


def called_by_us() -> bool:
    """Whether the first caller outside of the standard library is code of `ROOTS`."""
    frame: types.FrameType | None = sys._getframe(2)
    while frame is not None:
        file = frame.f_code.co_filename
        if file != __file__ and not (file.startswith((STANDARD, "<")) and not file.startswith(INSTALLED)):
            return is_ours(file)
        frame = frame.f_back
    return False


def absolute(path: Any, folder: int | None) -> str:
    base = os.getcwd() if folder is None else os.readlink(f"/proc/self/fd/{folder}")
    head, tail = os.path.split(os.path.join(base, os.fspath(path)).rstrip("/"))
    return os.path.join(os.path.realpath(head), tail)


def check_closed(path: Any, folder: int | None = None) -> None:
    """Raise PermissionError if this process has the file, or one in the folder, open or mapped."""
    place = absolute(path, folder)
    mapped = Path("/proc/self/maps").read_text(encoding="utf-8", errors="surrogateescape").splitlines()
    found = {line.split(None, 5)[5] for line in mapped if "/" in line}
    for number in os.listdir("/proc/self/fd"):
        try:
            found.add(os.readlink(f"/proc/self/fd/{number}"))
        except OSError:
            continue
    beginning = os.path.join(place, "")
    if any(name.strip() == place or (name.startswith(beginning) and os.path.isfile(name.strip())) for name in found):
        raise PermissionError(errno.EACCES, "being used by another process", place)


def guard(name: str) -> None:
    """Make a function of `os` refuse what Windows does."""
    real = getattr(os, name)

    def guarded(path: Any, *others: Any, **options: Any) -> Any:
        if called_by_us():
            check_closed(path, options.get("src_dir_fd", options.get("dir_fd")))
            for target in others:
                if name == "rename" and os.path.lexists(target):
                    raise FileExistsError(errno.EEXIST, "it exists already", str(target))
                if os.path.isdir(target):
                    raise PermissionError(errno.EACCES, "access is denied", str(target))
                check_closed(target)
        return real(path, *others, **options)

    setattr(os, name, guarded)


def open_binary(path: Any, flags: int, *others: Any, **options: Any) -> int:
    # Python's own open() has O_CLOEXEC here, and adds O_BINARY on Windows
    assert flags & (O_BINARY | os.O_CLOEXEC), f"os.open({path!r}) translates ends of lines"
    return os.open(path, flags & ~O_BINARY, *others, **options)


def flush(file: int) -> None:
    if fcntl.fcntl(file, fcntl.F_GETFL) & os.O_ACCMODE == os.O_RDONLY:
        raise OSError(errno.EBADF, "Bad file descriptor")
    os.fsync(file)


def kill(process: int, number: int) -> None:
    """Send a console event to a group of processes; anything else ends the process."""
    if number in EVENTS:
        os.killpg(process, EVENTS[number])
    else:
        os.kill(process, signal.SIGKILL)


def handle(number: int, handler: Any) -> Any:
    if number not in (*(getattr(signal, name) for name in SIGNALS), OTHERS):
        raise ValueError("invalid signal value")
    return signal.signal(number, handler)


class Popen(subprocess.Popen):
    def __init__(self, *words: Any, creationflags: int = 0, **options: Any) -> None:
        if unknown := {"start_new_session", "preexec_fn", "process_group"} & options.keys():
            raise ValueError(f"{unknown} is not supported on Windows platforms")
        super().__init__(*words, process_group=0 if creationflags & NEW_GROUP else None, **options)

    def send_signal(self, sig: int) -> None:
        if sig not in (signal.SIGTERM, *EVENTS):
            raise ValueError(f"Unsupported signal: {sig}")
        super().send_signal(EVENTS.get(sig, sig))


class Process(psutil.Process):
    def memory_info(self) -> Any:
        found = super().memory_info()
        return types.SimpleNamespace(rss=found.rss, vms=found.vms, peak_wset=found.rss)


def map_pages(fileno: int, length: int, tagname: str | None = None, access: int = 0, offset: int = 0) -> mmap.mmap:
    return mmap.mmap(fileno, length, access=access, offset=offset)


def lock(file: int, mode: int, length: int) -> None:
    try:
        fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except OSError as error:
        raise PermissionError(errno.EACCES, "Permission denied") from error


STAND_INS = {
    "os": StandIn(os, OF_OS, name="nt", O_BINARY=O_BINARY, open=open_binary, fsync=flush, kill=kill),
    "sys": StandIn(sys, [], platform="win32"),
    "signal": StandIn(
        signal,
        [name for name in dir(signal) if name.startswith("SIG") and name not in SIGNALS]
        + ["alarm", "setitimer", "pause"],
        **{"SIGBREAK": OTHERS, "CTRL_C_EVENT": 0, "CTRL_BREAK_EVENT": 1, "signal": handle},
    ),
    "subprocess": StandIn(subprocess, [], CREATE_NEW_PROCESS_GROUP=NEW_GROUP, Popen=Popen),
    "psutil": StandIn(psutil, [], Process=Process),
    "mmap": StandIn(mmap, [name for name in dir(mmap) if name.startswith(("MAP_", "PROT_"))], mmap=map_pages),
    "msvcrt": types.ModuleType("msvcrt"),
}
vars(STAND_INS["msvcrt"]).update(locking=lock, LK_NBLCK=2, LK_UNLCK=0)


def importing(name: str, variables: Any = None, *others: Any, **options: Any) -> Any:
    if variables is not None and is_ours(variables.get("__file__")):
        top = name.partition(".")[0]
        if top in MISSING:
            raise ModuleNotFoundError(f"No module named {name!r}", name=name)
        if top in STAND_INS:
            return STAND_INS[top]
    return python_import(name, variables, *others, **options)


if ROOTS:
    python_import, builtins.__import__ = builtins.__import__, importing
    for function in ("rename", "replace", "unlink", "remove", "rmdir"):
        guard(function)
    signal.signal(OTHERS, lambda *_: os._exit(255))  # what SIGBREAK does where nothing handles it
    multiprocessing.set_start_method("spawn", force=True)
    warnings.simplefilter("ignore", EncodingWarning)  # of libraries
    ours = "|".join([*(Path(root).name for root in ROOTS), "__main__"])
    warnings.filterwarnings("error", category=EncodingWarning, module=rf"({ours})(\.|$)")
