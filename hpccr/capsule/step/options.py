"""The command line and the variables of srun(1), as far as a step inside of the capsules has use for them.

Three kinds of options: those with an effect, those without one here (what an allocation is asked for with, limits and
binding, which a capsule leaves as they are), and those that are refused by name, as is whatever is not known.
"""

from __future__ import annotations

import os

TYPE_CHECKING = False  # typing itself would take 1 MiB
if TYPE_CHECKING:
    from collections.abc import Mapping, Sequence

NO, YES, MAYBE = 0, 1, 2
"""Whether an option has a value; MAYBE: only behind "=", or at once behind the letter."""

EFFECT = {
    "chdir": ("D", YES),
    "cpus-per-task": ("c", YES),
    "distribution": ("m", YES),
    "error": ("e", YES),
    "exact": ("", NO),
    "exclude": ("x", YES),
    "exclusive": ("", MAYBE),
    "export": ("", YES),
    "gres": ("", YES),
    "help": ("h", NO),
    "input": ("i", YES),
    "job-name": ("J", YES),
    "jobid": ("", YES),
    "kill-on-bad-exit": ("K", MAYBE),
    "label": ("l", NO),
    "mpi": ("", YES),
    "multi-prog": ("", NO),
    "nodelist": ("w", YES),
    "nodes": ("N", YES),
    "ntasks": ("n", YES),
    "ntasks-per-node": ("", YES),
    "open-mode": ("", YES),
    "output": ("o", YES),
    "overcommit": ("O", NO),
    "overlap": ("", NO),
    "quiet": ("Q", NO),
    "relative": ("r", YES),
    "time": ("t", YES),
    "unbuffered": ("u", NO),
    "usage": ("", NO),
    "verbose": ("v", NO),
    "version": ("V", NO),
    "wait": ("W", YES),
}
"""Options that mean something here: letter, value."""

SAID = {
    "cpu-bind": ("", YES),
    "hint": ("", YES),
    "mem-bind": ("", YES),
    "threads-per-core": ("", YES),
}
"""Accepted without effect, which is said when one is given on the command line."""

SILENT = {
    "account": ("A", YES),
    "acctg-freq": ("", YES),
    "begin": ("b", YES),
    "comment": ("", YES),
    "constraint": ("C", YES),
    "core-spec": ("S", YES),
    "cores-per-socket": ("", YES),
    "cpu-freq": ("", YES),
    "deadline": ("", YES),
    "dependency": ("d", YES),
    "disable-status": ("X", NO),
    "extra-node-info": ("B", YES),
    "immediate": ("I", MAYBE),
    "mem": ("", YES),
    "mem-per-cpu": ("", YES),
    "mincpus": ("", YES),
    "msg-timeout": ("", YES),
    "nice": ("", MAYBE),
    "no-kill": ("k", NO),
    "ntasks-per-core": ("", YES),
    "ntasks-per-socket": ("", YES),
    "oversubscribe": ("s", NO),
    "partition": ("p", YES),
    "priority": ("", YES),
    "profile": ("", YES),
    "propagate": ("", MAYBE),
    "qos": ("q", YES),
    "quit-on-interrupt": ("", NO),
    "reservation": ("", YES),
    "slurmd-debug": ("", YES),
    "sockets-per-node": ("", YES),
    "switches": ("", YES),
    "time-min": ("", YES),
    "tmp": ("", YES),
    "wckey": ("", YES),
    "whole": ("", NO),
}
"""What srun itself leaves out of account inside a job, or what changes nothing here."""

REFUSED = {
    "accel-bind": ("", YES),
    "attach": ("a", YES),
    "bcast": ("", MAYBE),
    "container": ("", YES),
    "cpus-per-gpu": ("", YES),
    "epilog": ("", YES),
    "gpus": ("G", YES),
    "gpus-per-node": ("", YES),
    "gpus-per-socket": ("", YES),
    "gpus-per-task": ("", YES),
    "het-group": ("", YES),
    "interactive": ("", NO),
    "mem-per-gpu": ("", YES),
    "network": ("", YES),
    "no-allocate": ("Z", NO),
    "preserve-env": ("E", NO),
    "prolog": ("", YES),
    "pty": ("", MAYBE),
    "resv-ports": ("", MAYBE),
    "spread-job": ("", NO),
    "task-epilog": ("", YES),
    "task-prolog": ("", YES),
    "tres-bind": ("", YES),
    "tres-per-task": ("", YES),
    "uid": ("", YES),
    "gid": ("", YES),
    "use-min-nodes": ("", NO),
    "x11": ("", MAYBE),
}

HINTS = {
    "pty": "a terminal cannot be checkpointed; without --pty the program's output goes to the job's",
    "het-group": "heterogeneous jobs are not supported",
    "jobid": "a step in another job would not be checkpointed with this one: run it from outside",
    "bcast": "capsules share the job's file systems: copy the file to /tmp with `srun --ntasks-per-node=1 cp`",
    "attach": "there is nothing to attach to: the output goes where srun's does",
    "distribution": "use block or cyclic",
}
USUAL_HINT = "leave it out, or start MPI programs by mpirun, which hpccr serves on all nodes of the job"

ALIASES = {"cpu_bind": "cpu-bind", "mem_bind": "mem-bind"}

INPUTS = (
    ("ntasks", ("SLURM_NTASKS", "SLURM_NPROCS")),
    ("nodes", ("SLURM_NNODES", "SLURM_JOB_NUM_NODES")),
    ("ntasks-per-node", ("SLURM_NTASKS_PER_NODE",)),
    ("cpus-per-task", ("SRUN_CPUS_PER_TASK",)),
    ("output", ("SRUN_OUTPUT", "SLURM_STDOUTMODE")),
    ("error", ("SRUN_ERROR", "SLURM_STDERRMODE")),
    ("input", ("SRUN_INPUT", "SLURM_STDINMODE")),
    ("label", ("SLURM_LABELIO",)),
    ("unbuffered", ("SLURM_UNBUFFEREDIO",)),
    ("distribution", ("SLURM_DISTRIBUTION",)),
    ("exact", ("SLURM_EXACT",)),
    ("overlap", ("SLURM_OVERLAP",)),
    ("overcommit", ("SLURM_OVERCOMMIT",)),
    ("kill-on-bad-exit", ("SLURM_KILL_BAD_EXIT",)),
    ("wait", ("SLURM_WAIT",)),
    ("mpi", ("SLURM_MPI_TYPE",)),
    ("export", ("SRUN_EXPORT_ENV", "SLURM_EXPORT_ENV")),
    ("job-name", ("SLURM_JOB_NAME",)),
    ("chdir", ("SLURM_WORKING_DIR",)),
    ("time", ("SLURM_TIMELIMIT",)),
    ("multi-prog", ("SLURM_MULTI_PROG",)),
)
"""Variables that stand for options, the first that is set.

Not SLURM_OPEN_MODE: `sbatch --checkpoint` sets it for the job's own output, and no step starts a second time.
"""

KILL_WAIT = 30.0
"""Seconds between SIGTERM and SIGKILL for tasks that have to end."""


class Usage(Exception):
    """The step cannot be as it is asked for. code: srun's exit code; hint: what to do."""

    def __init__(self, message: str, hint: str = "", code: int = 1) -> None:
        super().__init__(message)
        self.hint, self.code = hint, code


UNSUPPORTED = 13


class Options:
    """What is asked for. `given` has the options that the command line named."""

    def __init__(self, argv: Sequence[str], environ: Mapping[str, str]) -> None:
        """Raises Usage."""
        words = _parse(list(argv))
        self.given = set(words.found)
        self.command = words.rest
        found = {
            name: environ[variable] for name, variables in INPUTS for variable in variables if environ.get(variable)
        }
        if "nodes" in self.given and "ntasks-per-node" in self.given | set(found):
            found.pop("ntasks", None)  # the job's, which is for all of its nodes
        found |= words.found
        get = found.get

        self.help, self.version = "help" in found or "usage" in found, "version" in found
        self.ntasks = _number("ntasks", get("ntasks"))
        self.ntasks_per_node = _number("ntasks-per-node", get("ntasks-per-node"))
        self.cpus_per_task = _number("cpus-per-task", get("cpus-per-task"))
        self.nodes, self.nodes_max = _range(get("nodes"))
        self.relative = _number("relative", get("relative"), least=0)
        self.nodelist, self.exclude = get("nodelist", ""), get("exclude", "")
        self.distribution = get("distribution", "")
        self.cyclic = _distribution(self.distribution)
        self.overlap = _flag(get("overlap"))
        self.exact = _flag(get("exact")) or "cpus-per-task" in found or "exclusive" in words.found
        self.overcommit = _flag(get("overcommit"))
        self.output, self.error, self.input = get("output", ""), get("error", ""), get("input", "")
        self.label, self.unbuffered = _flag(get("label")), _flag(get("unbuffered"))
        self.append = get("open-mode", "t")[:1].lower() == "a"
        self.multi_prog = _flag(get("multi-prog"))
        self.export = get("export", "ALL")
        self.chdir = get("chdir", "")
        self.job_name = get("job-name", "")
        self.kill_on_bad_exit = _flag(get("kill-on-bad-exit"))
        self.wait = _number("wait", get("wait"), least=0) or 0
        self.time = _minutes(get("time"))
        self.mpi = get("mpi", "").lower()
        self.quiet, self.verbose = "quiet" in found, "verbose" in found
        self.said = tuple(name for name in words.found if name in SAID)
        job = environ.get("SLURM_JOB_ID", "")
        if "jobid" in found and found["jobid"].partition(".")[0] != job:
            raise refusal("jobid", f"srun --jobid={found['jobid']}: this is job {job or 'none of Slurm'}")
        if get("gres", "none").lower() != "none":
            raise refusal("gres", f"srun --gres={found['gres']}: devices are not supported inside a checkpointed job")


class _Words:
    def __init__(self) -> None:
        self.found: dict[str, str] = {}
        self.rest: list[str] = []


def refusal(name: str, message: str = "") -> Usage:
    message = message or f"srun --{name} is not supported inside a checkpointed job"
    return Usage(message, HINTS.get(name, USUAL_HINT), UNSUPPORTED)


def _parse(argv: list[str]) -> _Words:
    known = EFFECT | SAID | SILENT | REFUSED
    letters = {letter: name for name, (letter, _) in known.items() if letter}
    words = _Words()
    while argv:
        word = argv.pop(0)
        if word == "--":
            break
        if not word.startswith("-") or word == "-":
            argv.insert(0, word)
            break
        if word.startswith("--"):
            name, equals, value = word[2:].partition("=")
            name = _long(name, known)
            wants = known[name][1]
            if wants == YES and not equals:
                if not argv:
                    raise Usage(f"srun: option --{name} needs a value")
                value = argv.pop(0)
            elif wants == NO and equals:
                raise Usage(f"srun: option --{name} has no value")
            _put(words, name, value)
            continue
        letter, rest = word[1], word[2:]
        while True:
            if letter not in letters:
                raise Usage(f"srun -{letter} is not understood inside a checkpointed job", USUAL_HINT, UNSUPPORTED)
            name = letters[letter]
            wants = known[name][1]
            if wants == NO:
                _put(words, name, "")
                if not rest:
                    break
                letter, rest = rest[0], rest[1:]
                continue
            if wants == YES and not rest:
                if not argv:
                    raise Usage(f"srun: option -{letter} needs a value")
                rest = argv.pop(0)
            _put(words, name, rest)
            break
    words.rest = argv
    if ":" in argv:
        raise refusal("het-group", "srun: a step of several components (`:`) inside a checkpointed job")
    return words


def _put(words: _Words, name: str, value: str) -> None:
    if name in REFUSED:
        raise refusal(name)
    words.found[name] = value


def _long(name: str, known: Mapping[str, object]) -> str:
    """The option that `name` is, or is short for, as getopt_long(3) has it. Raises Usage."""
    name = ALIASES.get(name, name)
    if name in known:
        return name
    candidates = [option for option in known if name and option.startswith(name)]
    if len(candidates) == 1:
        return candidates[0]
    if candidates:
        raise Usage(f"srun: option --{name} is ambiguous: " + ", ".join(f"--{option}" for option in sorted(candidates)))
    raise Usage(f"srun --{name} is not understood inside a checkpointed job", USUAL_HINT, UNSUPPORTED)


def _flag(text: str | None) -> bool:
    return text is not None and text.lower() not in ("0", "no", "false")


def _number(name: str, text: str | None, least: int = 1) -> int | None:
    if text is None:
        return None
    if not (text.isascii() and text.isdecimal()) or int(text) < least:
        raise Usage(f"srun: invalid numeric value {text!r} for --{name}")
    return int(text)


def _range(text: str | None) -> tuple[int | None, int | None]:
    if text is None:
        return None, None
    least, dash, most = text.partition("-")
    first = _number("nodes", least)
    last = _number("nodes", most) if dash else first
    assert first is not None and last is not None  # noqa: S101 - for the type checker
    if last < first:
        raise Usage(f"srun: invalid number of nodes {text!r}")
    return first, last


def _distribution(text: str) -> bool | None:
    """Whether tasks go around the nodes; None if that is not said. What follows the first colon is about sockets."""
    first = text.lower().partition(":")[0].partition(",")[0]
    if first in ("*", "pack", "nopack", ""):
        return None
    if first == "block":
        return False
    if first == "cyclic":
        return True
    raise refusal("distribution", f"srun --distribution={text} is not supported inside a checkpointed job")


def _minutes(text: str | None) -> float | None:
    """Seconds of a time limit of Slurm's: minutes, min:sec, h:min:sec, days-h[:min[:sec]]; None for no limit."""
    if text is None or text.upper() in ("INFINITE", "UNLIMITED", "0", "-1"):
        return None
    days, dash, rest = text.partition("-")
    try:
        parts = [int(part) for part in (rest if dash else text).split(":")]
        if dash:
            hours, minutes, seconds = [*parts, 0, 0][:3]
            return int(days) * 86400.0 + hours * 3600 + minutes * 60 + seconds
        if len(parts) == 1:
            return parts[0] * 60.0
        hours, minutes, seconds = [0, *parts][-3:]
        return hours * 3600.0 + minutes * 60 + seconds
    except ValueError:
        raise Usage(f"srun: invalid time limit {text!r}") from None


KEPT = (
    b"SLURM_", b"HPCCR_", b"UCX_", b"FI_", b"I_MPI_", b"HYDRA_", b"MPIR_CVAR_", b"OMPI_MCA_", b"PRTE_MCA_",
    b"PMIX_MCA_",
)  # fmt: skip
"""Variables that tasks get whatever --export says."""


def exported(options: Options, environ: Mapping[bytes, bytes], own: Sequence[str]) -> dict[bytes, bytes]:
    """The tasks' environment by --export. own: names of hpccr's variables, without which nothing works in here.

    Nor does what the user has set for MPI instead: without UCX_TLS a library takes the fastest way, which cannot be
    restored.
    """
    words = options.export.split(",")
    if words[:1] and words[0].upper() == "ALL":
        result, words = dict(environ), words[1:]
    else:
        keep = {os.fsencode(name) for name in own} | {b"PATH", b"HOME", b"USER", b"SHELL", b"TMPDIR"}
        result = {name: value for name, value in environ.items() if name.startswith(KEPT) or name in keep}
        if words[:1] and words[0].upper() in ("NONE", "NIL"):
            words = words[1:]
    for word in filter(None, words):
        name, equals, value = os.fsencode(word).partition(b"=")
        if equals:
            result[name] = value
        elif name in environ:
            result[name] = environ[name]
    return result
