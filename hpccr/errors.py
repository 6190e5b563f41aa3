"""Errors as users meet them: what was tried, what happened, what to do, and an exit code."""

import enum


class ExitCode(enum.IntEnum):
    """Exit codes of the `hpccr` commands; `hpccr run` otherwise passes the job's own code."""

    OK = 0
    FAILED = 1
    USAGE = 2
    NO_CHECKPOINT = 10
    LOCKED = 11
    CORRUPT = 12
    UNSUPPORTED = 13
    PEER_LOST = 14


def encodable(text: str) -> str:
    """The text with an escape for each byte that is not UTF-8, as names of files and arguments may bring them
    (surrogates: PEP 383): fit for JSON, for a message and for a terminal. Any other text stays as it is."""
    return text.encode(errors="backslashreplace").decode()


class HpccrError(Exception):
    """An error with a message for the user, a hint what to do (may be empty) and an exit code.

    Crosses every process boundary of hpccr as wire.messages.Failed with the same three fields, which is why message and
    hint are made encodable().
    """

    code: ExitCode = ExitCode.FAILED

    def __init__(self, message: str, *, hint: str = "", code: ExitCode | None = None) -> None:
        super().__init__(encodable(message))
        self.message = encodable(message)
        self.hint = encodable(hint)
        if code is not None:
            self.code = code


class UsageError(HpccrError):
    """The command line, the environment or the configuration says something impossible."""

    code = ExitCode.USAGE


class NoCheckpointError(HpccrError):
    """There is no complete checkpoint to use."""

    code = ExitCode.NO_CHECKPOINT


class LockedError(HpccrError):
    """Another command or checkpoint is at work on the same thing."""

    code = ExitCode.LOCKED


class SupersededError(LockedError):
    """A later run of the job has taken the step over, and the job's output with it: nothing may be written there."""


class CorruptError(HpccrError):
    """A checkpoint does not verify: a digest, a size or the seal is wrong."""

    code = ExitCode.CORRUPT


class UnsupportedError(HpccrError):
    """The job or the node has something that cannot be checkpointed or restored."""

    code = ExitCode.UNSUPPORTED


class PeerLostError(HpccrError):
    """A node, an agent or hpccrd is gone or does not answer."""

    code = ExitCode.PEER_LOST


_BY_CODE: dict[int, type[HpccrError]] = {
    cls.code: cls for cls in (UsageError, NoCheckpointError, LockedError, CorruptError, UnsupportedError, PeerLostError)
}


def error_for(code: int, message: str, hint: str = "") -> HpccrError:
    """The exception for an error that came over the wire; an unknown code becomes a plain failure."""
    return _BY_CODE.get(code, HpccrError)(message, hint=hint)
