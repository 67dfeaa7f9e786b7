"""The system calls that code of the model may not make, as a seccomp filter.

A list of what is refused, not of what is allowed: libc, Python and numeric libraries keep finding new ways to do the
same, and namespaces, limits and identity hold what the allowed calls do. Refused is what those do not hold: sockets
that reach past the network namespace (a virtual machine's host answers on AF_VSOCK), keyrings that outlive the call,
kernel memory that no limit counts, and wide interfaces of the kernel that Python code has no use for.
"""

import ctypes
import errno
import os
import struct

from . import kernel

# Name -> numbers on x86_64 and on aarch64, None where the architecture has no such call.
_REFUSED = {
    "acct": (163, 89),
    "add_key": (248, 217),
    "adjtimex": (159, 171),
    "bpf": (321, 280),
    "chroot": (161, 51),
    "clock_adjtime": (305, 266),
    "clock_settime": (227, 112),
    "delete_module": (176, 106),
    "fanotify_init": (300, 262),
    "finit_module": (313, 273),
    "fsconfig": (431, 431),
    "fsmount": (432, 432),
    "fsopen": (430, 430),
    "fspick": (433, 433),
    "init_module": (175, 105),
    "inotify_init": (253, None),
    "inotify_init1": (294, 26),
    "io_setup": (206, 0),
    "io_uring_enter": (426, 426),
    "io_uring_register": (427, 427),
    "io_uring_setup": (425, 425),
    "ioperm": (173, None),
    "iopl": (172, None),
    "kcmp": (312, 272),
    "kexec_file_load": (320, 294),
    "kexec_load": (246, 104),
    "keyctl": (250, 219),
    "memfd_create": (319, 279),
    "memfd_secret": (447, 447),
    "migrate_pages": (256, 238),
    "modify_ldt": (154, None),
    "mount": (165, 40),
    "mount_setattr": (442, 442),
    "move_mount": (429, 429),
    "move_pages": (279, 239),
    "mq_open": (240, 180),
    "msgget": (68, 186),
    "name_to_handle_at": (303, 264),
    "open_by_handle_at": (304, 265),
    "open_tree": (428, 428),
    "perf_event_open": (298, 241),
    "personality": (135, 92),
    "pidfd_getfd": (438, 438),
    "pivot_root": (155, 41),
    "process_madvise": (440, 440),
    "process_vm_readv": (310, 270),
    "process_vm_writev": (311, 271),
    "ptrace": (101, 117),
    "quotactl": (179, 60),
    "quotactl_fd": (443, 443),
    "reboot": (169, 142),
    "request_key": (249, 218),
    "semget": (64, 190),
    "setdomainname": (171, 162),
    "sethostname": (170, 161),
    "setns": (308, 268),
    "settimeofday": (164, 170),
    "shmget": (29, 194),
    "swapoff": (168, 225),
    "swapon": (167, 224),
    "syslog": (103, 116),
    "umount2": (166, 39),
    "unshare": (272, 97),
    "userfaultfd": (323, 282),
    "uselib": (134, None),
    "vhangup": (153, 58),
}
_CLONE, _CLONE3, _SOCKET = (56, 220), (435, 435), (41, 198)
# The newest call that was looked at (cachestat). Newer ones are unknown here, as are those of x86_64's other calling
# convention, whose numbers start far above; libc knows what to do without them.
_NEWEST = 451
# NEWTIME, NEWNS, NEWCGROUP, NEWUTS, NEWIPC, NEWUSER, NEWPID, NEWNET.
_NEW_NAMESPACES = 0x7E020080
_SOCKET_FAMILIES = (1, 2, 10)  # AF_UNIX, AF_INET, AF_INET6

# Machine -> column above, AUDIT_ARCH_*.
_MACHINES = {"x86_64": (0, 0xC000003E), "aarch64": (1, 0xC00000B7)}

_LOAD, _JUMP_EQUAL, _JUMP_GREATER, _JUMP_ANY_BIT, _RETURN = 0x20, 0x15, 0x25, 0x45, 0x06
_ALLOW, _KILL, _ERRNO = 0x7FFF0000, 0x80000000, 0x00050000
# Offsets in struct seccomp_data.
_NUMBER, _ARCHITECTURE, _ARGUMENT = 0, 4, 16
_PR_SET_SECCOMP, _FILTER = 22, 2

_Instruction = tuple[int, int, int, int]


def refuse_calls() -> None:
    """From now on, for this process and all it starts. Needs `no_new_privileges` first; OSError where it cannot be."""
    machine = os.uname().machine
    if machine not in _MACHINES:
        raise OSError(f"seccomp: system calls are not known on {machine}; known on {', '.join(_MACHINES)}")
    program = b"".join(struct.pack("HBBI", *instruction) for instruction in _program(*_MACHINES[machine]))
    instructions = ctypes.create_string_buffer(program, len(program))
    head = struct.pack("HP", len(program) // 8, ctypes.addressof(instructions))
    kernel.prctl(_PR_SET_SECCOMP, "prctl PR_SET_SECCOMP", _FILTER, head)


def _program(column: int, architecture: int) -> list[_Instruction]:
    """Filter instructions (code, jump if true, jump if false, operand); jumps count the instructions they skip."""
    lines: list[_Instruction] = [
        (_LOAD, 0, 0, _ARCHITECTURE),
        (_JUMP_EQUAL, 1, 0, architecture),
        (_RETURN, 0, 0, _KILL),
        (_LOAD, 0, 0, _NUMBER),
        (_JUMP_GREATER, 0, 1, _NEWEST),
        (_RETURN, 0, 0, _ERRNO | errno.ENOSYS),
        (_JUMP_EQUAL, 0, 1, _CLONE3[column]),
        (_RETURN, 0, 0, _ERRNO | errno.ENOSYS),  # its flags are in memory, where a filter cannot look
    ]
    for numbers in _REFUSED.values():
        if numbers[column] is not None:
            lines += [(_JUMP_EQUAL, 0, 1, numbers[column]), (_RETURN, 0, 0, _ERRNO | errno.EPERM)]
    lines += [
        (_JUMP_EQUAL, 0, 4, _CLONE[column]),
        (_LOAD, 0, 0, _ARGUMENT),
        (_JUMP_ANY_BIT, 0, 1, _NEW_NAMESPACES),
        (_RETURN, 0, 0, _ERRNO | errno.EPERM),
        (_RETURN, 0, 0, _ALLOW),
        (_JUMP_EQUAL, 0, 2 + len(_SOCKET_FAMILIES), _SOCKET[column]),
        (_LOAD, 0, 0, _ARGUMENT),
    ]
    last = len(_SOCKET_FAMILIES)
    lines += [(_JUMP_EQUAL, last - i, 0, family) for i, family in enumerate(_SOCKET_FAMILIES)]
    return [*lines, (_RETURN, 0, 0, _ERRNO | errno.EAFNOSUPPORT), (_RETURN, 0, 0, _ALLOW)]
