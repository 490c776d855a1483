"""How a file is written that somebody asked for: whole, or not at all."""

import os
import secrets
import stat
from contextlib import suppress
from pathlib import Path

LONGEST = 128  # characters of a temporary file's name that are the file's: file systems allow 255 bytes


def write_file(path: str | Path, content: str | bytes, durable: bool = True) -> None:
    """Write a file so that its name has the old content or the new one, never a part, whatever happens meanwhile.

    A temporary file beside it is written and then renamed. A link stays one: what it leads to is replaced. The permissions
    are those of the file that was there, else what the process makes files with. What is no ordinary file, such as
    `/dev/stdout`, is written to as it is.

    Args:
        path: the file; its folder exists.
        content: text becomes UTF-8.
        durable: the content is on the disk before the name is, so that a power cut leaves no empty file.

    Raises:
        OSError: it cannot be written, as on a full disk; the error names the file, which is as it was.
    """
    raw = content.encode() if isinstance(content, str) else content
    try:
        known = os.stat(path) if os.path.exists(path) else None
        if known is not None and (not stat.S_ISREG(known.st_mode) or os.path.abspath(path).startswith(("/dev/", "/proc/"))):
            Path(path).write_bytes(raw)
            return
        target = Path(os.path.realpath(path))
        temporary = target.with_name(f".{target.name[:LONGEST].rstrip()}.{secrets.token_hex(6)}.tmp")
        try:
            write_new(temporary, raw, known, durable)
            os.replace(temporary, target)
        except BaseException:
            with suppress(OSError):
                temporary.unlink()
            raise
    except OSError as error:
        kept = "; the file that was there is as it was" if os.path.isfile(path) else ""
        raise type(error)(error.errno, f"cannot be written: {error.strerror}{kept}", str(path)) from error


def write_new(path: Path, raw: bytes, like: os.stat_result | None, durable: bool) -> None:
    """Write a file that does not exist yet, with the permissions of another."""
    with os.fdopen(os.open(path, os.O_WRONLY | os.O_CREAT | os.O_EXCL, 0o666), "wb") as file:
        if like is not None:
            os.chmod(path, stat.S_IMODE(like.st_mode))
        file.write(raw)
        file.flush()
        if durable:
            os.fsync(file.fileno())
