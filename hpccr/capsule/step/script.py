"""What a task runs before it becomes the user's program: a script for sh that finds out which task it is.

One text for all tasks of a step, whoever starts them: the launch roots say the task id, of mpirun's tasks the PMI does.
A shell that stays costs some 100 KiB in a checkpoint, an interpreter of Python a hundred times as much.
"""

from __future__ import annotations

import os
import sys

from hpccr.capsule.step import layout
from hpccr.capsule.step.options import Options, Usage

TYPE_CHECKING = False  # typing itself would take 1 MiB
if TYPE_CHECKING:
    from collections.abc import Mapping

MAX_SCRIPT = 128 << 10
"""Bytes of one argument of a program (MAX_ARG_STRLEN of Linux, with pages of 4 KiB)."""

LEFT_OVER = (
    "SLURM_PROCID",
    "SLURM_LOCALID",
    "SLURM_NODEID",
    "SLURM_GTIDS",
    "SLURM_TASK_PID",
    "SLURM_STEP_ID",
    "SLURM_STEPID",
    "SLURM_STEP_GPUS",
    "PMI_RANK",
    "PMI_SIZE",
    "PMI_FD",
    "PMI_PORT",
    "PMI_ID",
    "PMIX_RANK",
    "PMIX_NAMESPACE",
    "PMIX_SERVER_URI",
    "OMPI_COMM_WORLD_RANK",
    "OMPI_COMM_WORLD_SIZE",
    "OMPI_COMM_WORLD_LOCAL_RANK",
    "MPI_LOCALRANKID",
    "MPI_LOCALNRANKS",
)
"""Of a task that calls srun itself: void for the tasks of the step that it starts."""


def is_left_over(name: str) -> bool:
    """Whether a variable says to its process which rank it is: another one must not believe that."""
    return name in LEFT_OVER or (name.startswith(("PMIX_", "PMI2_")) and not name.startswith("PMIX_MCA_"))


class Plan:
    """A step that has its place."""

    def __init__(
        self, options: Options, number: int, counts: dict[int, int], job: Mapping[str, str], address: str
    ) -> None:
        """number: the step's; counts: tasks on each capsule; job: the environment of srun; address: of its capsule."""
        self.options, self.number, self.counts = options, number, counts
        self.tasks = sum(counts.values())
        # With a task for each node it is the same, and srun calls it this.
        self.cyclic = self.tasks <= len(counts) if options.cyclic is None else options.cyclic
        self.ranks = layout.ranks(counts, cyclic=self.cyclic)
        self.job, self.address = job, address

    def order(self) -> list[tuple[int, int]]:
        """(task id, capsule) of all tasks, by id."""
        return sorted((rank, index) for index, ranks in self.ranks.items() for rank in ranks)

    def environment(self) -> dict[str, str]:
        """The variables that are the same for all tasks (srun(1), "OUTPUT ENVIRONMENT VARIABLES")."""
        nodes, tasks = layout.node_list(self.counts), layout.compress_counts(self.counts.values())
        result = {
            "SLURM_STEP_ID": str(self.number),
            "SLURM_STEPID": str(self.number),
            "SLURM_NNODES": str(len(self.counts)),
            "SLURM_NTASKS": str(self.tasks),
            "SLURM_NPROCS": str(self.tasks),
            "SLURM_TASKS_PER_NODE": tasks,
            "SLURM_STEP_NODELIST": nodes,
            "SLURM_STEP_NUM_NODES": str(len(self.counts)),
            "SLURM_STEP_NUM_TASKS": str(self.tasks),
            "SLURM_STEP_TASKS_PER_NODE": tasks,
            "SLURM_DISTRIBUTION": self.options.distribution or ("cyclic" if self.cyclic else "block"),
            "SLURM_LAUNCH_NODE_IPADDR": self.address,
            "SLURM_SRUN_COMM_HOST": self.address,
            "SLURM_UMASK": f"{_umask():04o}",
        }
        if self.options.cpus_per_task:
            result["SLURM_CPUS_PER_TASK"] = str(self.options.cpus_per_task)
        if "job-name" in self.options.given:
            result["SLURM_JOB_NAME"] = self.options.job_name
        return result

    # --- the script -------------------------------------------------------------------------------------------------

    def script(self, *, report: str = "", stdin: str = "") -> str:
        """report: shell command that is run with $r (task id) and $c (exit code) when a task has failed; with it the
        task id is mpirun's business, and the shell stays. Else task id and node are the script's first arguments.
        stdin: file that each task opens as its input. Raises Usage."""
        if report:
            lines = ["read -r h </proc/sys/kernel/hostname", "r=${PMIX_RANK:-${OMPI_COMM_WORLD_RANK:-$PMI_RANK}}"]
        else:
            lines = ["r=$1 h=$2", "shift 2"]
        lines += ["case $h in"]
        for number, (index, ranks) in enumerate(self.ranks.items()):
            lines.append(f"{layout.NAME}{index}) n={number} g={','.join(map(str, ranks))} ;;")
        lines += ["esac", "l=0 f= IFS=,"]
        lines += ["for t in $g; do [ $t = $r ] && f=1 && break; l=$((l+1)); done", "unset IFS"]
        elsewhere = 'echo "hpccr: error: srun: task $r was started on $h, not one of tasks $g" >&2; c=1'
        lines.append(f'[ "$f" ] || {{ {elsewhere}; {report or ":"}; exit 1; }}')
        lines += [f"export {name}={quote(value)}" for name, value in self.environment().items()]
        lines.append(
            "export SLURM_PROCID=$r SLURM_LOCALID=$l SLURM_NODEID=$n SLURM_GTIDS=$g SLURMD_NODENAME=$h "
            "SLURM_TOPOLOGY_ADDR=$h SLURM_TASK_PID=$$"
        )
        if self.options.multi_prog:
            lines += self._programs()
        if stdin:
            lines.append(f"exec <{quote(stdin)}")
        elif report:
            # mpirun gives its input to task 0; Hydra leaves the others its proxy's, which nobody ends.
            lines.append("[ $r = 0 ] || exec </dev/null")
        lines += self._redirections()
        run = '"$@"'
        labelled = "12" if report else self.own_files()
        if self.options.label and labelled:
            label = os.path.join(os.path.dirname(os.path.dirname(__file__)), "label.py")
            python = quote(os.environ.get("HPCCR_PYTHON") or sys.executable)
            run = f'{python} -I -S {quote(label)} {labelled} "$(printf %{self.width()}d: $r) " "$@"'
        if report:
            # Signals are sent to the whole group by mpirun; the shell outlives them, to tell how the program ended.
            # Meanwhile it has no stderr, on which it would tell the user too.
            lines += ["k=", "trap k=1 TERM", "trap : HUP INT QUIT USR1 USR2 ALRM", "exec 3>&2 2>/dev/null"]
            lines += [f"/bin/sh -c 'export SLURM_TASK_PID=$$; exec \"$@\"' sh {run} 2>&3 3>&-"]
            lines += ["c=$?", "exec 2>&3 3>&-"]
            lines += [f'[ $c = 0 ] || [ "$k" ] || {report}', "exit $c"]
        else:
            lines.append(f"exec {run}")
        text = "\n".join(lines)
        if len(text) >= MAX_SCRIPT:
            raise Usage("srun: the step has too many tasks for one --multi-prog", "write the choice into a script")
        return text

    def width(self) -> int:
        """Digits of the largest task id: labels are padded to it."""
        return len(str(self.tasks - 1))

    def _programs(self) -> list[str]:
        path = self.options.command[0]
        try:
            with open(path, encoding="utf-8", errors="surrogateescape") as file:
                programs = read_programs(file.read(), self.tasks)
        except OSError as error:
            raise Usage(f"srun: cannot read the configuration of --multi-prog {path}: {error.strerror}") from None
        lines = ["case $r in"]
        for rank, words in enumerate(programs):
            lines.append(f"{rank}) set -- {' '.join(map(quote, words))} ;;")
        return [*lines, "esac"]

    # --- files ------------------------------------------------------------------------------------------------------

    def own_files(self) -> str:
        """Digits of the outputs for which tasks have files of their own, which they open themselves."""
        own = is_per_task(self.options.output), is_per_task(self.options.error or self.options.output)
        return "".join(str(number) for number, is_own in enumerate(own, 1) if is_own)

    def _redirections(self) -> list[str]:
        lines = []
        output, error = self.options.output, self.options.error
        if is_per_task(self.options.input):
            lines.append(f"exec <{self._name(self.options.input)}")
        if is_per_task(output):
            lines.append(f"exec {self._arrow(output)}{self._name(output)}{'' if error else ' 2>&1'}")
        if is_per_task(error):
            lines.append(f"exec 2{self._arrow(error)}{self._name(error)}")
        return lines

    def _arrow(self, text: str) -> str:
        # Several tasks of a node may share a file; srun has emptied it.
        return ">" if "t" in letters(text) and not self.options.append else ">>"

    def _name(self, text: str) -> str:
        """A file name pattern as a word of the script."""
        word = ""
        for piece, width, letter in split_pattern(text):
            word += quote(piece) if piece else ""
            shell = {"t": "$r", "n": "$n", "N": "$h"}.get(letter)
            if shell and letter != "N" and width:
                word += f'"$(printf %0{width}d {shell})"'
            elif shell:
                word += f'"{shell}"'
            elif letter:
                word += quote(self.constant(letter, width))
        return word

    def files(self, text: str) -> list[str]:
        """The names that a pattern without %t stands for: one, or one for each node."""
        result = []
        for number, index in enumerate(self.counts):
            name = ""
            for piece, width, letter in split_pattern(text):
                node = {"n": str(number).zfill(width), "N": f"{layout.NAME}{index}"}
                name += piece + (node.get(letter) or self.constant(letter, width) if letter else "")
            if name not in result:
                result.append(name)
        return result

    def constant(self, letter: str, width: int) -> str:
        job = self.job.get("SLURM_JOB_ID", "0")
        number = {
            "A": self.job.get("SLURM_ARRAY_JOB_ID", job),
            "a": self.job.get("SLURM_ARRAY_TASK_ID", "4294967294"),
            "j": job,
            "s": str(self.number),
        }
        if letter in number:
            return number[letter].zfill(width)
        if letter == "J":
            return f"{job.zfill(width)}.{self.number}"
        if letter == "u":
            return self.job.get("USER", str(os.getuid()))
        return self.options.job_name


def letters(text: str) -> str:
    return "".join(letter for _, _, letter in split_pattern(text))


def is_per_task(text: str) -> bool:
    """Whether the tasks open it themselves: one for each task or each node."""
    return bool(set(letters(text)) & set("tnN"))


def split_pattern(text: str) -> list[tuple[str, int, str]]:
    """A file name pattern of srun(1) as (literal, width, letter); a backslash in it switches all of that off."""
    if "\\" in text:
        return [(text.replace("\\", ""), 0, "")]
    pieces: list[tuple[str, int, str]] = []
    literal, at = "", 0
    while at < len(text):
        if text[at] != "%":
            literal += text[at]
            at += 1
            continue
        end = at + 1
        while end < len(text) and text[end].isdecimal():
            end += 1
        letter = text[end : end + 1]
        if letter and letter in "AaJjNnstux":
            pieces.append((literal, min(10, int(text[at + 1 : end] or 0)), letter))
            literal = ""
        else:
            literal += "%" if letter == "%" else text[at : end + 1]
        at = end + 1
    return [*pieces, (literal, 0, "")] if literal else pieces


def read_programs(text: str, tasks: int) -> list[list[str]]:
    """The command of each task by a --multi-prog configuration (srun(1), "MULTIPLE PROGRAM CONFIGURATION").

    %t is the task, %o its place among the tasks of its line ("*": all tasks). No quotes, as srun has it. Raises Usage.
    """
    programs: list[list[str] | None] = [None] * tasks
    for line in text.replace("\\\n", " ").splitlines():
        line = line.strip()
        if not line or line.startswith("#"):
            continue
        try:
            which, *words = line.split()
            if not words:
                raise ValueError
            rest = which == "*"
            chosen = list(range(tasks)) if rest else layout.numbers(which)
        except ValueError:
            raise Usage(f"srun: --multi-prog: this is no line of task ids and a program: {line}") from None
        for offset, rank in enumerate(chosen):
            if rank >= tasks or (rest and programs[rank] is not None):
                continue  # no such task; or it has its program, and "*" is the others
            if programs[rank] is not None:
                raise Usage(f"srun: --multi-prog: two programs for task {rank}")
            programs[rank] = [word.replace("%t", str(rank)).replace("%o", str(offset)) for word in words]
    missing = [rank for rank, words in enumerate(programs) if words is None]
    if missing:
        raise Usage(f"srun: --multi-prog: no program for task {missing[0]}")
    return [words for words in programs if words is not None]


def quote(text: str) -> str:
    """One word for sh."""
    if text and all(character.isalnum() or character in "_-./:=,+@%" for character in text) and text.isascii():
        return text
    return "'" + text.replace("'", "'\\''") + "'"


def _umask() -> int:
    mask = os.umask(0)
    os.umask(mask)
    return mask
