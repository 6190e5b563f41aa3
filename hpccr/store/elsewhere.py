"""Jobs whose checkpoints are not in the user's usual store: links in it that lead there, by which commands find them.

STORE/elsewhere/<cluster>-<job> is a symbolic link to OTHER-STORE/<cluster>-<job>.
"""

from __future__ import annotations

import os
from pathlib import Path

from hpccr.model import parse_job_directory
from hpccr.store.layout import Job, Store
from hpccr.store.publish import make_directory

NAME = "elsewhere"


def remember(store: Store, job: Job) -> None:
    """Let the usual store lead to a job in another one. Links to jobs that are gone are removed. Raises OSError."""
    place = store.root / NAME
    make_directory(place)
    for name in os.listdir(place):
        if not (place / name).exists():
            (place / name).unlink(missing_ok=True)
    link = place / job.path.name
    if not (link.is_symlink() and os.readlink(link) == str(job.path)):
        link.unlink(missing_ok=True)
        link.symlink_to(job.path)


def jobs(store: Store) -> list[Job]:
    """The jobs that are still where the links lead, by name. Raises OSError."""
    place = store.root / NAME
    try:
        names = sorted(os.listdir(place))
    except (FileNotFoundError, NotADirectoryError):
        return []
    found = []
    for name in names:
        parsed = parse_job_directory(name)
        if parsed is None or not (place / name).is_dir():
            continue
        target = Path(os.readlink(place / name))
        if target.is_absolute() and target.name == name:
            found.append(Job(target.parent, *parsed))
    return found
