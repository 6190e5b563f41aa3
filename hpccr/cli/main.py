"""`hpccr`: finds the verb, imports its module alone, and turns errors into messages and exit codes."""

from __future__ import annotations

import argparse
import errno
import importlib
import os
import sys
import traceback
from collections.abc import Mapping, Sequence
from typing import Any

import hpccr
from hpccr.errors import ExitCode, HpccrError, error_for

VERBS = (
    "run",
    "checkpoint",
    "requeue",
    "restore",
    "status",
    "list",
    "inspect",
    "verify",
    "gc",
    "rm",
    "export",
    "import",
    "doctor",
    "agent",
)
"""Each is a module of hpccr.cli with add_parser(subparsers) and, as the parser's default `run`, run(args, config)."""

HINTS = {
    errno.ENOSPC: "make room there, or name another store with --dir or HPCCR_STORE_DIR",
    errno.EDQUOT: "make room in your quota, or name another store with --dir or HPCCR_STORE_DIR",
    errno.EROFS: "is that storage meant to be written to here? --dir or HPCCR_STORE_DIR names another store",
    errno.EACCES: "it has to belong to you: a store is its owner's alone",
    errno.EPERM: "it has to belong to you: a store is its owner's alone",
    errno.ENOENT: "has it been removed, or is shared storage not mounted here?",
    errno.ESTALE: "shared storage was away: try again",
    errno.EIO: "is that storage well? try again, and ask its administrator",
}
"""What to do about an error of the operating system that nothing nearer to its cause has explained."""
UNKNOWN = "--debug prints where it happened"

EXIT_CODES = (
    "exit codes: 0 ok, 1 failed, 2 wrong usage, 10 no checkpoint, 11 locked, 12 corrupt or unsealed, "
    "13 unsupported, 14 node or peer lost, 130 interrupted; `hpccr run` and `restore` pass the job's own code"
)


def entry(argv: Sequence[str] | None = None, environ: Mapping[str, str] | None = None) -> int:
    """The command: exit code as in errors.ExitCode. argv without the program's name. Does not return where a job's
    command has been ended by a signal: this process ends by the same one."""
    argv = list(sys.argv[1:] if argv is None else argv)
    environ = os.environ if environ is None else environ
    _fill_closed()
    args = _parser(argv).parse_args(_spelt_out(argv))
    try:
        # Loading it here keeps `hpccr --help` alive when the file is broken.
        from hpccr import config

        code: int = args.run(args, config.load(args.config, environ=environ))
        sys.stdout.flush()
        if code < 0:
            from hpccr.capsule.spawn import end_like

            sys.stderr.flush()
            end_like(code)
        return code
    except HpccrError as error:
        return _complain(error, debug=args.debug)
    except KeyboardInterrupt:
        return 130
    except BrokenPipeError:
        # Whoever read our output has enough (`hpccr list | head`); keep the interpreter's last flush quiet too.
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        return int(ExitCode.FAILED)
    except OSError as error:
        where = f"{error.filename}: " if error.filename else ""
        failure = error_for(ExitCode.FAILED, f"{where}{error.strerror or error}", HINTS.get(error.errno or 0, UNKNOWN))
        return _complain(failure, debug=args.debug)


def _fill_closed() -> None:
    """/dev/null where the caller has closed a standard stream: a file that is opened later would take its place, and a
    job's output."""
    for number, (name, mode) in enumerate((("stdin", "r"), ("stdout", "w"), ("stderr", "w"))):
        try:
            os.fstat(number)
        except OSError:
            os.set_inheritable(os.open(os.devnull, os.O_RDWR), True)  # the lowest number that is free
            setattr(sys, name, open(number, mode, closefd=False))  # noqa: SIM115 - it is for good


def _complain(error: HpccrError, *, debug: bool) -> int:
    if debug:
        traceback.print_exc()
    print(f"hpccr: error: {error.message}", file=sys.stderr)
    if error.hint:
        print(f"hint: {error.hint}", file=sys.stderr)
    return int(error.code)


def _parser(argv: Sequence[str]) -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        prog="hpccr",
        description="Checkpoint and restart whole multi-node MPI jobs under Slurm, programs and MPI unmodified.",
        epilog=EXIT_CODES,
    )
    parser.add_argument("--version", action="version", version=f"hpccr {hpccr.__version__}")
    _common(parser, verbose=0, debug=False, config=None)
    subparsers = parser.add_subparsers(dest="verb", metavar="VERB", required=True)
    verb = _verb(argv)
    for name in (verb,) if verb else VERBS:
        importlib.import_module(f"hpccr.cli.{name}").add_parser(_Verbs(subparsers))
    return parser


def _verb(argv: Sequence[str]) -> str | None:
    """The verb in a command line, None if there is none that we know (then all modules are needed, for the help)."""
    words = iter(argv)
    for word in words:
        if word in ("--config", "-h", "--help", "--version"):
            if word != "--config":
                return None
            next(words, None)
        elif not word.startswith("-"):
            return word if word in VERBS else None
    return None


def _spelt_out(argv: Sequence[str]) -> list[str]:
    """`--quiesce` of verbs with a JOB as `--quiesce=require`: argparse would take the JOB for its value."""
    if _verb(argv) not in ("checkpoint", "requeue"):
        return list(argv)
    return ["--quiesce=require" if word == "--quiesce" else word for word in argv]


class _Verbs:
    """What add_parser() of a verb's module gets: argparse's subparsers, with the options that all verbs share."""

    def __init__(self, subparsers: Any) -> None:
        self._subparsers = subparsers

    def add_parser(self, name: str, **options: Any) -> argparse.ArgumentParser:
        options.setdefault("epilog", EXIT_CODES)
        options.setdefault("description", options.get("help"))
        parser: argparse.ArgumentParser = self._subparsers.add_parser(name, **options)
        # Without defaults: they would undo what was given in front of the verb.
        _common(parser, **dict.fromkeys(("verbose", "debug", "config"), argparse.SUPPRESS))
        return parser


def _common(parser: argparse.ArgumentParser, *, verbose: Any, debug: Any, config: Any) -> None:
    group = parser.add_argument_group("common options")
    group.add_argument("-v", "--verbose", action="count", default=verbose, help="say more; twice: even more")
    group.add_argument("--debug", action="store_true", default=debug, help="print a traceback with an error")
    group.add_argument(
        "--config", metavar="FILE", default=config, help="configuration file (default: /etc/hpccr/hpccr.toml)"
    )


if __name__ == "__main__":
    sys.exit(entry())
