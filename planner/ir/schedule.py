"""`Schedule`: the answer. A time-ordered list of instructions over a program's ops and buffers.

    Schedule    = Instruction*
    Instruction = Run op | Free buffer | Start buffer link | Wait buffer link

Running an op a second time is rematerialisation; nothing else marks it. What an instruction may do is written down
once, in the referee.
"""

from collections.abc import Iterable
from typing import Literal

import msgspec

from .errors import MemplanError

LEVERS = ("reorder", "recompute", "offload")  # what a plan may do to a step
DEFAULT = ("reorder", "recompute")  # unless somebody asks for others


def check_levers(allow: Iterable[str] | None) -> set[str]:
    """The levers that may be used.

    Raises:
        MemplanError: a name that is no lever, or that of one that does not exist yet.
    """
    if allow is None:
        return set(DEFAULT)
    levers = {allow} if isinstance(allow, str) else set(allow)
    if "tile" in levers:
        raise MemplanError(f"allow='tile' does not exist yet: the levers are {', '.join(LEVERS)}")
    unknown = levers - set(LEVERS)
    if unknown:
        raise MemplanError(f"allow={sorted(unknown)[0]!r}: the levers are {', '.join(LEVERS)}")
    return levers


class Run(msgspec.Struct, frozen=True, tag="run", array_like=True):
    """Run an op.

    Attributes:
        op: index into `Program.ops`.
        keep: the written buffers that live on; the others are dropped when the op ends.
        reuse: pairs (written, read), out of the op's own: the first takes the bytes of the second, which dies.
        unit: the machine's unit that runs it.
    """

    op: int
    keep: tuple[int, ...]
    reuse: tuple[tuple[int, int], ...] = ()
    unit: int = 0


class Free(msgspec.Struct, frozen=True, tag="free", array_like=True):
    """Give a buffer's bytes in one tier back."""

    buffer: int
    tier: int = 0


class Start(msgspec.Struct, frozen=True, tag="start", array_like=True):
    """Put a copy of a buffer into a link's queue; its bytes in the target tier are taken from now on."""

    buffer: int
    link: int


class Wait(msgspec.Struct, frozen=True, tag="wait", array_like=True):
    """Wait until a started copy has arrived; from now on the target tier's copy may be read."""

    buffer: int
    link: int


Instruction = Run | Free | Start | Wait


class Placement(msgspec.Struct, frozen=True, array_like=True):
    """Where one life of a buffer lies: `[offset, offset + bytes)` of a tier during instructions `[lower, upper)`."""

    buffer: int
    tier: int
    offset: int
    lower: int
    upper: int


class Schedule(msgspec.Struct, frozen=True):
    """A step's instructions, in time order.

    Attributes:
        program: `Program.digest` of the program it belongs to.
        instructions: what happens.
        placements: addresses, where they have been planned; empty means that the backend's allocator chooses.
        outside: buffers that have none though others do: they lie where the kernels put them that make them.
        lent: outputs that have one, which others have not: they are the caller's until the next step begins.
        homes: resident buffers that lie in another tier before the step and after it, and outputs that lie there after it:
            pairs (buffer, tier).
    """

    program: str
    instructions: tuple[Instruction, ...]
    placements: tuple[Placement, ...] = ()
    outside: tuple[int, ...] = ()
    lent: tuple[int, ...] = ()
    homes: tuple[tuple[int, int], ...] = ()
    version: Literal[1] = 1
