"""The file behind one space of a `FileTier`: nameless, reserved, on a disk.

A file that never has a name is gone with the process, however that ends. Where the file system knows no such files, the
name is taken away at once. Blocks are reserved when the file is made: a full disk is refused before the step begins, not
in the middle.
"""

import errno
import os
import tempfile
import weakref
from contextlib import suppress
from pathlib import Path

from ...planner.cost import disk
from ...planner.ir.errors import MemplanError
from ...planner.ir.units import show_bytes
from .store import Space

NO_NAMELESS_FILES = {errno.EOPNOTSUPP, errno.EISDIR, errno.EINVAL, errno.ENOENT, errno.ENOSYS}
NO_RESERVATION = {errno.EOPNOTSUPP, errno.EINVAL, errno.ENOSYS}
NO_ROOM = {errno.ENOSPC, errno.EDQUOT, errno.EFBIG}
IN_MEMORY = set(disk.IN_MEMORY)
file_system = disk.system_of  # of a directory
ANOTHER_DISK = "free space there, or set MEMPLAN_OFFLOAD to a directory on another disk"


class File(Space):
    """A file without a name, of a fixed size. Dropping it gives its blocks back.

    Attributes:
        directory: where it is.
        fd: its descriptor; -1 once it is closed, and in a child that was forked.
    """

    def __init__(self, directory: Path, size: int):
        """Reserve `size` bytes.

        Raises:
            MemplanError: the directory cannot be written to, lies in memory, or has no room.
        """
        super().__init__()
        self.directory = directory
        self.fd = -1
        FILES.add(self)
        try:
            _, kind = disk.made_directory(directory)
            if kind in IN_MEMORY:
                raise MemplanError(f"{directory} lies in memory ({kind}), where offloading saves none: "
                                   "set MEMPLAN_OFFLOAD to a directory on a disk")  # fmt: skip
            self.fd = nameless_file(directory)
            reserve(self.fd, size)
        except OSError as error:
            if self.fd >= 0 and error.errno in NO_ROOM:
                free = show_bytes(room(self.fd))
                raise MemplanError(f"cannot reserve {show_bytes(size)} for offloaded tensors in {directory}, where {free} are "
                                   f"free: {error.strerror}: {ANOTHER_DISK}") from None  # fmt: skip
            raise MemplanError(f"cannot offload tensors to {directory}: {error.strerror}: "
                               "set MEMPLAN_OFFLOAD to a directory that can be written to") from None  # fmt: skip

    @property
    def usable(self) -> bool:
        """Whether this process has it open."""
        return self.fd >= 0

    def close(self) -> None:
        """Give its blocks back."""
        fd, self.fd = self.fd, -1
        if fd >= 0:
            with suppress(OSError):
                os.close(fd)

    def __del__(self) -> None:
        self.close()


FILES: "weakref.WeakSet[File]" = weakref.WeakSet()


def close_inherited() -> None:
    """In a child that was forked: close the parent's files, or their blocks would stay taken as long as the child lives."""
    for file in list(FILES):
        file.close()


if hasattr(os, "register_at_fork"):
    os.register_at_fork(after_in_child=close_inherited)


def nameless_file(directory: Path) -> int:
    """The descriptor of a new file, for its owner alone, that the directory does not list.

    Raises:
        OSError: the directory cannot be written to.
    """
    flag = getattr(os, "O_TMPFILE", 0)
    if flag:
        try:
            return os.open(directory, flag | os.O_RDWR | os.O_EXCL, 0o600)
        except OSError as error:
            if error.errno not in NO_NAMELESS_FILES:
                raise
    fd, name = tempfile.mkstemp(prefix="memplan-", dir=directory)
    try:
        os.unlink(name)
    except OSError:
        os.close(fd)
        raise
    return fd


def reserve(fd: int, size: int) -> None:
    """Give a file its size and, where the file system can, its blocks.

    Raises:
        OSError: there is no room.
    """
    if size == 0:
        return
    if hasattr(os, "posix_fallocate"):
        if size > room(fd):  # asking for it would take all there is first, from everybody
            raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
        try:
            os.posix_fallocate(fd, 0, size)
            return
        except OSError as error:
            if error.errno not in NO_RESERVATION:
                raise
    os.ftruncate(fd, size)


def room(fd: int) -> float:
    """Free bytes of the file system that a file is on; infinite where that does not tell."""
    found = os.statvfs(fd)
    return found.f_bavail * found.f_frsize if found.f_blocks else float("inf")
