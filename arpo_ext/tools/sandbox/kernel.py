"""The kernel's isolation mechanisms by way of libc: namespaces, mounts, Landlock, identity.

Every function raises OSError, with the name of what was asked for, where the kernel refuses.
"""

import ctypes
import os
import resource
import select
import signal
import struct

NEWNS, NEWIPC, NEWUSER, NEWPID, NEWNET, NEWUTS = 0x20000, 0x8000000, 0x10000000, 0x20000000, 0x40000000, 0x4000000

_libc = ctypes.CDLL(None, use_errno=True)

# Numbers that are the same on every architecture (system calls added since Linux 5.1).
_SYS_MOUNT_SETATTR, _SYS_LANDLOCK_CREATE, _SYS_LANDLOCK_ADD, _SYS_LANDLOCK_RESTRICT = 442, 444, 445, 446
_SYS_PIVOT_ROOT = {"x86_64": 155, "aarch64": 41}
_SYS_CAPSET = {"x86_64": 126, "aarch64": 91}

_PR_SET_PDEATHSIG, _PR_SET_CHILD_SUBREAPER, _PR_SET_NO_NEW_PRIVS = 1, 36, 38
_MS_NOSUID, _MS_NODEV, _MS_BIND, _MS_REC, _MS_PRIVATE, _MNT_DETACH = 2, 4, 4096, 16384, 1 << 18, 2
_AT_FDCWD, _AT_RECURSIVE = -100, 0x8000
_ATTR_RDONLY, _ATTR_NOSUID, _ATTR_NODEV = 1, 2, 4


def _check(result: int, what: str) -> int:
    if result < 0:
        code = ctypes.get_errno()
        raise OSError(code, f"{what}: {os.strerror(code)}")
    return result


def _syscall(number: int, what: str, *args: object) -> int:
    wide = [ctypes.c_long(a) if isinstance(a, int) else a for a in args]
    return _check(_libc.syscall(ctypes.c_long(number), *wide), what)


def _machine_syscall(numbers: dict[str, int], what: str, *args: object) -> int:
    machine = os.uname().machine
    if machine not in numbers:
        raise OSError(f"{what}: not known on {machine}; known on {', '.join(numbers)}")
    return _syscall(numbers[machine], what, *args)


def unshare(flags: int, what: str) -> None:
    _check(_libc.unshare(flags), what)


def die_with_parent(parent: int) -> None:
    """SIGKILL for this process when its parent dies; at once if it has died. `parent`: a pidfd of it.

    The parent must be single-threaded: the kernel sends the signal when the creating thread ends. A change of the
    user id takes the wish back.
    """
    prctl(_PR_SET_PDEATHSIG, "prctl PR_SET_PDEATHSIG", signal.SIGKILL)
    if select.select([parent], [], [], 0)[0]:
        os._exit(1)


def adopt_orphans() -> None:
    """Become the parent of descendants whose own parent ends, so that none is lost."""
    prctl(_PR_SET_CHILD_SUBREAPER, "prctl PR_SET_CHILD_SUBREAPER", 1)


def prctl(option: int, what: str, *args: object) -> None:
    wide = [ctypes.c_ulong(a) if isinstance(a, int) else a for a in args]
    _check(_libc.prctl(option, *wide, *[ctypes.c_ulong(0)] * (4 - len(wide))), what)


def no_new_privileges() -> None:
    prctl(_PR_SET_NO_NEW_PRIVS, "prctl PR_SET_NO_NEW_PRIVS", 1)


def drop_capabilities() -> None:
    """Empty the effective, permitted and inheritable sets."""
    header = struct.pack("Ii", 0x20080522, 0)
    _machine_syscall(_SYS_CAPSET, "capset", header, bytes(24))


def become(uid: int) -> None:
    """Take `uid` as user and group, for good, without any supplementary group. Needs root."""
    os.setgroups([])
    os.setresgid(uid, uid, uid)
    os.setresuid(uid, uid, uid)


def map_ids(proc: int, inside: int, outside_uid: int, outside_gid: int) -> None:
    """In a fresh user namespace: be `inside` there, which is the own identity outside. `proc`: descriptor of /proc."""
    for name, line in (
        ("setgroups", "deny"),
        ("uid_map", f"{inside} {outside_uid} 1"),
        ("gid_map", f"{inside} {outside_gid} 1"),
    ):
        write_at(proc, f"self/{name}", line)


def write_at(directory: int, name: str, text: str) -> None:
    fd = os.open(name, os.O_WRONLY, dir_fd=directory)
    try:
        os.write(fd, text.encode())
    finally:
        os.close(fd)


def mount_tmpfs(target: str, options: str) -> None:
    _mount("tmpfs", target, "tmpfs", _MS_NOSUID | _MS_NODEV, options)


def bind_read_only(source: str, target: str, *, devices: bool = False) -> None:
    """Show `source`, with what is mounted below it, at `target`; nothing can be changed through it."""
    _mount(source, target, None, _MS_BIND | _MS_REC, None)
    make_read_only(target, recursive=True, devices=devices)


def make_read_only(target: str, *, recursive: bool = False, devices: bool = False) -> None:
    # A device file opened for writing is not a change of its filesystem, so /dev/null still takes output.
    attributes = _ATTR_RDONLY | _ATTR_NOSUID | (0 if devices else _ATTR_NODEV)
    settings = struct.pack("QQQQ", attributes, 0, 0, 0)
    flags = _AT_RECURSIVE if recursive else 0
    what = f"mount_setattr {target}"
    _syscall(_SYS_MOUNT_SETATTR, what, _AT_FDCWD, os.fsencode(target), flags, settings, len(settings))


def enter_empty_root(base: str, old: str) -> None:
    """Make a fresh tmpfs the root of this mount namespace; the former root stays reachable at `/<old>`.

    `base` is any existing folder; it is only the place where the tmpfs is put first.
    """
    _mount("none", "/", None, _MS_REC | _MS_PRIVATE, None)
    mount_tmpfs(base, "mode=755,size=1m")
    os.mkdir(f"{base}/{old}")
    root = os.fsencode(base)
    _machine_syscall(_SYS_PIVOT_ROOT, "pivot_root", root, os.fsencode(f"{base}/{old}"))
    os.chdir("/")


def leave_old_root(old: str) -> None:
    _check(_libc.umount2(os.fsencode(f"/{old}"), _MNT_DETACH), f"umount /{old}")
    os.rmdir(f"/{old}")


def _mount(source: str, target: str, kind: str | None, flags: int, options: str | None) -> None:
    encoded = [None if v is None else os.fsencode(v) for v in (source, target, kind)]
    data = None if options is None else options.encode()
    _check(_libc.mount(*encoded, ctypes.c_ulong(flags), data), f"mount {kind or source} on {target}")


_FS_EXECUTE, _FS_WRITE_FILE, _FS_READ_FILE, _FS_READ_DIR = 1, 2, 4, 8
_FS_TRUNCATE, _FS_IOCTL_DEV = 1 << 14, 1 << 15
# Making character and block devices (bits 6 and 11) is never granted.
_FS_WRITE_TREE = 0x3FF0 & ~(1 << 6 | 1 << 11) | _FS_WRITE_FILE | _FS_TRUNCATE
_FS_READ = _FS_EXECUTE | _FS_READ_FILE | _FS_READ_DIR


def landlock_version() -> int:
    """The kernel's Landlock interface version (1, 2, ...); OSError where it has none."""
    return _syscall(_SYS_LANDLOCK_CREATE, "Landlock", None, 0, 1)


def landlock(version: int, readable: list[str], devices: list[str], writable: list[str]) -> None:
    """From now on: read below `readable`, read and write the files `devices`, everything below `writable`, no TCP
    (version 4 and later), no signals and no abstract sockets to processes outside (6 and later).

    Paths that do not exist are skipped. Needs `no_new_privileges` first.
    """
    handled = (1 << 13) - 1
    for since, right in ((2, 1 << 13), (3, _FS_TRUNCATE), (5, _FS_IOCTL_DEV)):
        handled |= right if version >= since else 0
    attributes = struct.pack("QQQ", handled, 3 if version >= 4 else 0, 3 if version >= 6 else 0)
    size = 24 if version >= 6 else 16 if version >= 4 else 8
    ruleset = _syscall(_SYS_LANDLOCK_CREATE, "Landlock", attributes, size, 0)
    for paths, rights in (
        (readable, _FS_READ),
        (devices, _FS_READ_FILE | _FS_WRITE_FILE),
        (writable, _FS_READ | _FS_WRITE_TREE),
    ):
        for path in filter(os.path.exists, paths):
            fd = os.open(path, os.O_PATH | os.O_CLOEXEC)
            granted = rights & handled
            if not os.path.isdir(path):
                granted &= _FS_EXECUTE | _FS_WRITE_FILE | _FS_READ_FILE | _FS_TRUNCATE | _FS_IOCTL_DEV
            _syscall(_SYS_LANDLOCK_ADD, f"Landlock {path}", ruleset, 1, struct.pack("=Qi", granted, fd), 0)
            os.close(fd)
    _syscall(_SYS_LANDLOCK_RESTRICT, "Landlock", ruleset, 0)
    os.close(ruleset)


def limit(name: int, value: int) -> None:
    """Set the soft and hard limit of a resource, or lower it as far as allowed."""
    hard = resource.getrlimit(name)[1]
    if hard != resource.RLIM_INFINITY:
        value = min(value, hard)
    resource.setrlimit(name, (value, value))
