"""Every error that memplan raises on purpose.

A message says what was found, where (FX node, the user's file and line) and what to do about it.
"""

from __future__ import annotations


class MemplanError(Exception):
    """Base of all errors of memplan.

    Parameters
    ----------
    message:
        What was found, and what to do.
    where:
        FX node or the user's ``file:line``; appended to the message.
    """

    def __init__(self, message: str, *, where: str = "") -> None:
        super().__init__(f"{message}\n  at {where}" if where else message)
        self.where = where


class OptionError(MemplanError):
    """An option is unknown or has a value that cannot be used."""


class UnsupportedError(MemplanError):
    """The platform, torch version or model construct is not supported."""


class CompilerError(MemplanError):
    """There is no working compiler, or it refused a source."""


class IndexOutOfRangeError(MemplanError, IndexError, RuntimeError):
    """An index that the user's tensors hold is out of range.

    Eager raises `IndexError` for some operators and `RuntimeError` for others; this is both.
    """


class CacheError(MemplanError):
    """The on-disk cache cannot be used."""


class LoweringError(MemplanError):
    """An operation could not be lowered; it runs as its ATen call instead.

    ``operation`` names the operation of the program, where the failure is one operation's alone; ``others`` are those
    of further operations of the same program.
    """

    def __init__(self, message: str, *, where: str = "", operation: str = "") -> None:
        super().__init__(message, where=where)
        self.operation = operation
        self.others: tuple[LoweringError, ...] = ()


class VerificationError(MemplanError):
    """A program or a plan breaks one of its rules: memplan's own fault, never the user's."""


class PlanningError(MemplanError):
    """No plan exists for what was asked (a budget that cannot be met, for example)."""


class ReportError(MemplanError):
    """A report file cannot be read: damaged, or of another version."""


class CommunicationError(MemplanError):
    """The ranks of a process group do not agree, or one of them does not come."""


class SavedModelError(MemplanError):
    """A model cannot be saved, or a saved one cannot be loaded here or called like this."""
