"""What code of the model is locked into: probed and prepared once, entered by every call."""

import contextlib
import itertools
import os
import pwd
import resource
import signal
import sys
import tempfile
from collections.abc import Callable

from . import kernel, syscalls

# The base of the unused user ids: far above those of people, services and subordinate ranges.
_FIRST_UID = 1_000_000_000
_SLOTS = 256

# What a call may use beside its memory and time.
_PROCESSES = 16
_OPEN_FILES = 32
# Pending signals and timers: memory of the kernel that is not counted elsewhere.
_SIGNALS = 1024
_FILE_BYTES = 16 << 20
_FOLDER_BYTES = 32 << 20
_FOLDER_FILES = 4096

_OLD_ROOT = "old"
_JAIL = "/jail"
# Out of reach of the code: what is to be shown below the private folder, which covers that place anew in every call.
_STORE = "/store"

DEVICES = ["/dev/null", "/dev/zero", "/dev/full", "/dev/random", "/dev/urandom"]


class Jail:
    """The mechanisms that work here. `missing` maps each one that does not to the reason."""

    def __init__(self, readable: list[str]) -> None:
        self.missing: dict[str, str] = {}
        self.preloaded_bytes = 0
        self.proc = os.open("/proc", os.O_RDONLY | os.O_DIRECTORY | os.O_CLOEXEC)
        self._readable = _readable_paths() + readable
        self._uids = _unused_uids()
        self._owner = (os.getuid(), os.getgid())
        self._landlock = 0
        self._nested_users = False
        self._stored: list[str] = []

    def prepare(self) -> None:
        """Put this process, the server, into the namespaces that all calls share."""
        if _refusal(lambda: kernel.unshare(kernel.NEWNS, "unshare")) is not None:
            self._nested_users = self._try("unused identity", self._enter_user_namespace)
        if not self._nested_users and self._try(
            "unused identity", lambda: kernel.become(self._uids[0]), only_probe=True
        ):
            self.missing.pop("unused identity", None)
        self._try("network namespace", lambda: kernel.unshare(kernel.NEWNET | kernel.NEWUTS, "unshare network"))
        self._try("ipc namespace", lambda: kernel.unshare(kernel.NEWIPC, "unshare ipc"))
        self._try("pid namespace", _probe_pid_namespace, only_probe=True)
        self._try("private root", self._build_root)
        self._try("system call filter", _filter_calls, only_probe=True)
        try:
            self._landlock = kernel.landlock_version()
        except OSError as error:
            self.missing["landlock"] = str(error)

    @property
    def has_root(self) -> bool:
        return "private root" not in self.missing

    @property
    def has_pid_namespace(self) -> bool:
        return "pid namespace" not in self.missing

    @property
    def _has_identity(self) -> bool:
        return "unused identity" not in self.missing

    @property
    def _changes_uid(self) -> bool:
        return self._has_identity and not self._nested_users

    def _try(self, mechanism: str, act: Callable[[], None], *, only_probe: bool = False) -> bool:
        """Do `act` here if it works in a child process; note the reason where it does not."""
        reason = _refusal(act)
        if reason is None and not only_probe:
            act()
        if reason is not None:
            self.missing[mechanism] = reason
        return reason is None

    def _enter_user_namespace(self) -> None:
        kernel.unshare(kernel.NEWUSER, "unshare user")
        kernel.map_ids(self.proc, 0, *self._owner)

    def _build_root(self) -> None:
        """A root that holds the interpreter's libraries and five devices, all read-only, and an empty /tmp."""
        kernel.unshare(kernel.NEWNS, "unshare mount")
        sources = [(path, os.path.realpath(path)) for path in self._readable + DEVICES if os.path.exists(path)]
        kernel.enter_empty_root("/tmp", _OLD_ROOT)
        for path, source in sources:
            below_private_folder = path.startswith("/tmp/")
            if below_private_folder:
                self._stored.append(path)
            root = _STORE if below_private_folder else _JAIL
            _bind(f"/{_OLD_ROOT}{source}", root + path, devices=path in DEVICES)
        os.makedirs(f"{_JAIL}/tmp", exist_ok=True)
        kernel.leave_old_root(_OLD_ROOT)
        kernel.make_read_only("/")

    def open_call(self, slot: int) -> str:
        """In the supervisor of one call: its own namespaces and private folder, whose path is returned."""
        shared = (("pid namespace", kernel.NEWPID), ("private root", kernel.NEWNS), ("ipc namespace", kernel.NEWIPC))
        flags = sum(flag for name, flag in shared if name not in self.missing)
        if flags:
            kernel.unshare(flags, "unshare call")
        if "ipc namespace" not in self.missing:
            # Memory that no limit of a process counts.
            for name in ("shmmni", "msgmni"):
                self._write_if_allowed(f"sys/kernel/{name}", "0")
        owner = self._uids[slot % _SLOTS] if self._changes_uid else os.getuid()
        if self.has_root:
            # In this call's own mount namespace: the folder and what is in it vanish with the last process.
            limits = f"size={_FOLDER_BYTES},nr_inodes={_FOLDER_FILES}"
            kernel.mount_tmpfs(f"{_JAIL}/tmp", f"{limits},mode=700,uid={owner},gid={owner}")
            for path in self._stored:
                _bind(_STORE + path, _JAIL + path)
            return "/tmp"
        folder = tempfile.mkdtemp(prefix="arpo-python-")
        os.chown(folder, owner, -1)
        return folder

    def close_call(self, folder: str) -> None:
        """Remove the private folder where it does not vanish by itself; all processes of the call have ended."""
        if not self.has_root:
            with contextlib.suppress(OSError):
                _remove(folder)

    def _write_if_allowed(self, name: str, text: str) -> None:
        with contextlib.suppress(OSError):
            kernel.write_at(self.proc, name, text)

    def enter(self, slot: int, folder: str, *, memory_mb: int, cpu_s: int) -> None:
        """In the process that will run the code: lock the door and throw the key away."""
        self._write_if_allowed("self/oom_score_adj", "1000")
        if self._nested_users:
            outer = os.getuid(), os.getgid()
            kernel.unshare(kernel.NEWUSER, "unshare user")
            kernel.map_ids(self.proc, _FIRST_UID, *outer)
        if self.has_root:
            # A process with another root than its namespace's cannot make user namespaces, and so gain capabilities.
            os.chroot(_JAIL)
        os.chdir(folder)
        for name, value in (
            (resource.RLIMIT_AS, (memory_mb << 20) + self.preloaded_bytes),
            (resource.RLIMIT_CPU, cpu_s),
            (resource.RLIMIT_NPROC, _PROCESSES if self._has_identity else 0),
            (resource.RLIMIT_NOFILE, _OPEN_FILES),
            (resource.RLIMIT_FSIZE, _FILE_BYTES),
            (resource.RLIMIT_SIGPENDING, _SIGNALS),
            (resource.RLIMIT_CORE, 0),
            (resource.RLIMIT_MSGQUEUE, 0),
            (resource.RLIMIT_MEMLOCK, 0),
        ):
            kernel.limit(name, value)
        if self._changes_uid:
            kernel.become(self._uids[slot % _SLOTS])
        kernel.drop_capabilities()
        kernel.no_new_privileges()
        if self._landlock:
            readable = ["/"] if self.has_root else self._readable
            kernel.landlock(self._landlock, readable, DEVICES, [folder])
        if "system call filter" not in self.missing:
            syscalls.refuse_calls()


def _bind(source: str, target: str, *, devices: bool = False) -> None:
    if os.path.isdir(source):
        os.makedirs(target, exist_ok=True)
    else:
        os.makedirs(os.path.dirname(target), exist_ok=True)
        os.close(os.open(target, os.O_CREAT | os.O_WRONLY, 0o644))
    kernel.bind_read_only(source, target, devices=devices)


def _remove(folder: str) -> None:
    """Remove a folder that hostile code has filled: however deep, whatever may not be entered or read."""
    fresh = (f"{folder}/{os.urandom(8).hex()}" for _ in itertools.count())
    _open_up(folder)
    while entries := list(os.scandir(folder)):
        for entry in entries:
            if not entry.is_dir(follow_symlinks=False):
                os.unlink(entry.path)
                continue
            _open_up(entry.path)
            for inner in list(os.scandir(entry.path)):
                if inner.is_dir(follow_symlinks=False):
                    # Up to the top, so that no path gets long and nothing recurses.
                    _open_up(inner.path)
                    os.rename(inner.path, next(fresh))
                else:
                    os.unlink(inner.path)
            os.rmdir(entry.path)
    os.rmdir(folder)


def _open_up(folder: str) -> None:
    # Refused for a folder of the call's own user; whoever can change users mostly need not ask.
    with contextlib.suppress(PermissionError):
        os.chmod(folder, 0o700)


def _readable_paths() -> list[str]:
    """The folders of shared libraries and of the standard library, and files that they read."""
    folders = ["/lib", "/lib64", "/usr/lib", "/usr/lib64", "/usr/local/lib", f"{sys.base_prefix}/lib"]
    folders += [f"{sys.base_exec_prefix}/lib", "/usr/share/zoneinfo", *filter(os.path.isdir, sys.path)]
    chosen: list[str] = []
    for folder in sorted({os.path.normpath(f) for f in folders}):
        if not any(folder.startswith(f"{outer}/") for outer in chosen):
            chosen.append(folder)
    return [*chosen, "/etc/ld.so.cache", "/etc/localtime"]


def _unused_uids() -> list[int]:
    """Ids no account has, one per slot and, mostly, others for every server on this machine."""
    with open("/proc/self/uid_map") as file:
        ranges = [tuple(map(int, line.split())) for line in file]
    wanted = _FIRST_UID + os.getpid() % (1 << 20) * _SLOTS
    if any(first <= wanted and wanted + _SLOTS <= first + count for first, _, count in ranges):
        return list(range(wanted, wanted + _SLOTS))
    # A container that maps few ids: the highest without an account, the same for every server. Nobody is not unused.
    taken = {entry.pw_uid for entry in pwd.getpwall()} | {0, 65534, 65535}
    mapped = (uid for first, _, count in reversed(ranges) for uid in range(first + count - 1, first - 1, -1))
    free = list(itertools.islice((uid for uid in mapped if uid not in taken), _SLOTS))
    return free * _SLOTS


def _probe_pid_namespace() -> None:
    kernel.unshare(kernel.NEWPID, "unshare pid")
    child = os.fork()
    if child == 0:
        os._exit(0)
    os.waitpid(child, 0)


def _filter_calls() -> None:
    kernel.no_new_privileges()
    syscalls.refuse_calls()


def _refusal(act: Callable[[], None]) -> str | None:
    """Do `act` in a child process; why it was refused, or None."""
    read, write = os.pipe()
    child = os.fork()
    if child == 0:
        code = 1
        try:
            act()
            code = 0
        except OSError as error:
            os.write(write, (error.strerror or str(error)).encode())
        finally:
            os._exit(code)
    os.close(write)
    with os.fdopen(read, "rb") as pipe:
        reason = pipe.read().decode()
    _, status = os.waitpid(child, 0)
    code = os.waitstatus_to_exitcode(status)
    if code == 0:
        return None
    return reason or (f"stopped by {signal.Signals(-code).name}" if code < 0 else "failed without a reason")
