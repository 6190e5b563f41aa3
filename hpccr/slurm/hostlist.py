"""Slurm's short forms: host lists ("node[01-03,7],login") and task counts per node ("4(x2),1")."""

from __future__ import annotations

import re
from collections.abc import Iterable, Sequence

from hpccr.errors import UsageError

MAX_HOSTS = 65536
"""Hosts in one list, at most: what Slurm itself allows (MAX_SLURM_NODES is 65000)."""

_TASKS = re.compile(r"^([0-9]+)(?:\(x([0-9]+)\))?$", re.ASCII)
_RANGE = re.compile(r"^([0-9]+)(?:-([0-9]+))?$", re.ASCII)
_NUMBERED = re.compile(r"^(.*?)([0-9]{1,18})$", re.ASCII)


def expand(text: str) -> list[str]:
    """The host names of a host list, in its order, repetitions kept.

    Several bracket groups per name ("rack[1-2]n[1-4]") vary the last one fastest. Raises UsageError if it is none.
    """
    hosts: list[str] = []
    for term in _split(text):
        names = [""]
        for piece, is_range in _pieces(term, text):
            tails = _numbers(piece, text) if is_range else [piece]
            if len(names) * len(tails) + len(hosts) > MAX_HOSTS:
                raise UsageError(f"the host list {text!r} has more than {MAX_HOSTS} hosts")
            names = [name + tail for name in names for tail in tails]
        hosts += names
    return hosts


def compress(hosts: Iterable[str]) -> str:
    """A host list that expand() turns back into exactly these names in this order."""
    terms: list[str] = []
    prefix = ""
    ranges: list[tuple[str, str]] = []

    def finish() -> None:
        if len(ranges) == 1 and ranges[0][0] == ranges[0][1]:
            terms.append(prefix + ranges[0][0])
        elif ranges:
            terms.append(f"{prefix}[" + ",".join(a if a == b else f"{a}-{b}" for a, b in ranges) + "]")
        ranges.clear()

    for host in hosts:
        match = _NUMBERED.match(host)
        if match is None or "[" in host or "," in host:
            finish()
            terms.append(host)
            continue
        if match[1] != prefix:
            finish()
            prefix = match[1]
        number = match[2]
        if ranges and _successor(ranges[-1][1]) == number:
            ranges[-1] = (ranges[-1][0], number)
        else:
            ranges.append((number, number))
    finish()
    return ",".join(terms)


def expand_tasks(text: str) -> list[int]:
    """SLURM_TASKS_PER_NODE or SLURM_JOB_CPUS_PER_NODE as one number per node. Raises UsageError if it is none."""
    counts: list[int] = []
    for term in text.split(","):
        match = _TASKS.match(term)
        if match is None:
            raise UsageError(f"{text!r} is not a list of counts per node like '4(x2),1'")
        repeat = int(match[2] or 1)
        if repeat < 1 or len(counts) + repeat > MAX_HOSTS:
            raise UsageError(f"{text!r}: a repetition must be from 1 to {MAX_HOSTS}")
        counts += [int(match[1])] * repeat
    return counts


def compress_tasks(counts: Sequence[int]) -> str:
    """The inverse of expand_tasks, in Slurm's form."""
    terms: list[list[int]] = []
    for count in counts:
        if terms and terms[-1][0] == count:
            terms[-1][1] += 1
        else:
            terms.append([count, 1])
    return ",".join(str(count) if repeat == 1 else f"{count}(x{repeat})" for count, repeat in terms)


def _split(text: str) -> list[str]:
    """The terms between commas outside brackets."""
    terms, depth, start = [], 0, 0
    for at, character in enumerate(text):
        if character == "[":
            depth += 1
        elif character == "]":
            depth -= 1
        elif character == "," and not depth:
            terms.append(text[start:at])
            start = at + 1
        if depth not in (0, 1):
            raise _bad(text)
    terms.append(text[start:])
    if depth or not all(terms):
        raise _bad(text)
    return terms


def _pieces(term: str, text: str) -> list[tuple[str, bool]]:
    """The term as (literal, False) and (inside of brackets, True)."""
    pieces: list[tuple[str, bool]] = []
    for literal, inside in re.findall(r"([^\[\]]+)|\[([^\[\]]+)\]", term):
        pieces.append((literal, False) if literal else (inside, True))
    if sum(len(piece) + 2 * is_range for piece, is_range in pieces) != len(term):
        raise _bad(text)
    return pieces


def _numbers(inside: str, text: str) -> list[str]:
    numbers: list[str] = []
    for part in inside.split(","):
        match = _RANGE.match(part)
        if match is None:
            raise _bad(text)
        first, last = match[1], match[2] or match[1]
        if int(last) < int(first) or int(last) - int(first) >= MAX_HOSTS:
            raise _bad(text)
        numbers += [f"{number:0{len(first)}d}" for number in range(int(first), int(last) + 1)]
    return numbers


def _successor(number: str) -> str:
    return f"{int(number) + 1:0{len(number)}d}"


def _bad(text: str) -> UsageError:
    return UsageError(f"{text!r} is not a host list like 'node[01-03,7],login'")
