"""The files behind --input, --output and --error that srun opens itself; those of single tasks are opened by them."""

from __future__ import annotations

import os

from hpccr.capsule import link
from hpccr.capsule.step import script
from hpccr.capsule.step.options import Usage

NULL = "/dev/null"


class Outputs:
    """Descriptors for the tasks' outputs. only: of one task alone, by stream; the others' go to /dev/null."""

    def __init__(self) -> None:
        self.fds: dict[int, int] = {}
        self.only: dict[int, int] = {}
        self._null = -1

    def of(self, rank: int) -> dict[int, int]:
        """Descriptor by stream for that task."""
        return {stream: fd if self.only.get(stream, rank) == rank else self.null() for stream, fd in self.fds.items()}

    def null(self) -> int:
        if self._null < 0:
            self._null = os.open(NULL, os.O_WRONLY)
        return self._null


def open_outputs(plan: script.Plan) -> Outputs:
    """Open, and empty unless --open-mode=append, what the step writes to. Raises Usage."""
    options = plan.options
    outputs = Outputs()
    texts = {link.STDOUT: options.output, link.STDERR: options.error}
    for stream, text in texts.items():
        if not text and stream == link.STDERR and options.output not in ("", "all"):
            if not script.is_per_task(options.output):
                outputs.fds[stream] = outputs.fds[link.STDOUT]
                if link.STDOUT in outputs.only:
                    outputs.only[stream] = outputs.only[link.STDOUT]
                    outputs.fds[stream] = stream
                continue
            text = ""
        outputs.fds[stream] = stream
        if text in ("", "all"):
            continue
        if text == "none":
            outputs.fds[stream] = outputs.null()
        elif text.isdecimal() and text.isascii():
            outputs.only[stream] = int(text)
        elif not script.is_per_task(text):
            outputs.fds[stream] = _open(plan.files(text)[0], append=options.append)
        elif "t" not in script.letters(text):
            for name in plan.files(text):
                os.close(_open(os.path.join(options.chdir, name), append=options.append))
    return outputs


def open_input(plan: script.Plan) -> tuple[int, int | None]:
    """The descriptor that tasks read from, and which of them alone reads it; None: all. Raises Usage."""
    text = plan.options.input
    if text in ("", "all") or script.is_per_task(text):
        return link.STDIN, None
    if text == "none":
        return os.open(NULL, os.O_RDONLY), None
    if text.isdecimal() and text.isascii():
        if int(text) >= plan.tasks:
            raise Usage(f"srun: --input={text}: there is no task of that number")
        return link.STDIN, int(text)
    name = plan.files(text)[0]
    try:
        return os.open(name, os.O_RDONLY), None
    except OSError as error:
        raise Usage(f"srun: Could not open stdin file {name}: {error.strerror}") from None


def _open(name: str, *, append: bool) -> int:
    # Appending also when the file is emptied: another step, or the other stream, may write to it too.
    flags = os.O_WRONLY | os.O_CREAT | os.O_APPEND | (0 if append else os.O_TRUNC)
    try:
        return os.open(name, flags, 0o666)
    except OSError as error:
        raise Usage(f"srun: Could not open output file {name}: {error.strerror}") from None
