"""One step at a time, where steps share memory: whoever is between a forward and its backward pass holds a token."""

import gc
import threading
import weakref
from dataclasses import dataclass, field
from typing import Any

from ...planner.ir.errors import MemplanError


class Token:
    """Held by a step between its forward and its backward pass."""


@dataclass
class Turn:
    """Something that one step at a time may use.

    Attributes:
        refusal: what is said to a second one.
        user: the step that is between its forward and backward pass, if there is one.
        lock: threads claim one after the other.
    """

    refusal: str
    user: "weakref.ref[Token] | None" = None
    lock: Any = field(default_factory=threading.Lock)

    def claim(self) -> Token:
        """Take it for one step; it is free again when the token is gone.

        Raises:
            MemplanError: another step has it.
        """
        with self.lock:
            if self.user is not None and self.user() is not None:
                gc.collect()  # a forward pass whose outputs were dropped may be alive in a cycle through what it saved
            if self.user is not None and self.user() is not None:
                raise MemplanError(self.refusal)
            token = Token()
            self.user = weakref.ref(token)
            return token
