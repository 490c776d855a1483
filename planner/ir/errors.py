"""One error for each way to be wrong; each says what was asked, what is true, and what to try."""


class MemplanError(Exception):
    """Anything memplan refuses to do."""


class BudgetError(MemplanError, ValueError):
    """A budget that cannot be read, or that no known schedule meets.

    Attributes:
        minimum: the smallest budget known to work, in bytes; None where the budget could not be read.
        levers: what is not allowed and would take less, such as "optimizer_in_backward and offload" -> bytes, estimated.
    """

    def __init__(self, message: str, minimum: int | None = None, levers: dict[str, int] | None = None):
        super().__init__(message)
        self.minimum = minimum
        self.levers = levers or {}


class CaptureError(MemplanError):
    """The model cannot be traced into one program; the message names the line of the model."""


class InvalidSchedule(MemplanError):
    """The referee's verdict on a schedule that breaks a rule.

    Attributes:
        rule: the name of the first rule broken (a key of `memplan.planner.ir.referee.RULES`).
        instruction: the index of the instruction that breaks it, or None for the schedule as a whole.
    """

    def __init__(self, rule: str, instruction: int | None, message: str):
        where = "the schedule" if instruction is None else f"instruction {instruction}"
        super().__init__(f"{where} breaks '{rule}': {message}")
        self.rule = rule
        self.instruction = instruction


class PlanMismatch(MemplanError):
    """A plan that does not belong to this model, these arguments, or this version of the file format."""


class MachineError(MemplanError, ValueError):
    """A machine description that is unknown or cannot be read."""


class TraceError(MemplanError, ValueError):
    """A file of buffers that cannot be read; the message names row and column."""


class PlacementError(MemplanError):
    """Addresses that cannot be had, or that are wrong: which buffers at which time show it."""


class MemplanWarning(UserWarning):
    """Something that memplan does, and that is perhaps not what was meant.

    Attributes:
        kind: a word for it: see `memplan.backends.eager.witness.Seen`.
        bytes: what it takes beside the budget; 0 where that is not known, or nothing.
    """

    def __init__(self, message: str, kind: str = "", bytes: int = 0):
        super().__init__(message)
        self.kind = kind
        self.bytes = bytes


class BudgetWarning(MemplanWarning):
    """Memory that a plan does not count was in use beside its budget."""


class UnplannedWarning(MemplanWarning):
    """A planned module was trained by other code than the planned step."""
