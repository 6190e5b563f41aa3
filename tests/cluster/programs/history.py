"""Does to files whatever a seed says; what they hold at the end follows from the arguments.

    mpirun -n N python3 history.py --seed S --steps T --gate FILE [--closed] DIR

Each process has a directory of its own, DIR/rank-K, with a log of what it found in its files and did to them. Without
--closed it changes only files that it has open and names of these, or makes them new; with it also files that it has
closed, or never opened. The first one has an HDF5 file as well. Before its last steps it waits until there is the file
--gate.
"""

import argparse
import ctypes
import mmap
import os
import random
import time
import zlib
from collections.abc import Callable
from contextlib import suppress
from pathlib import Path

NAMES = [f"file-{letter}" for letter in "abcdefgh"]
MAPPED = 1 << 16
PAUSE = 0.005
LAST = 30
"""Steps after the gate."""


class Open:
    """A file that stays open. name: None when it has none, or one that is not known by its descriptor."""

    def __init__(self, name: str, append: bool) -> None:
        flags = os.O_RDWR | os.O_CREAT | os.O_TRUNC | (os.O_APPEND if append else 0)
        self.fd = os.open(name, flags, 0o640)
        os.fchmod(self.fd, 0o640)  # a closed file of that name has kept its own
        self.name: str | None = name
        self.append = append
        self.map: mmap.mmap | None = None

    def close(self) -> None:
        if self.map is not None:
            self.map.close()
        os.close(self.fd)

    def checksum(self) -> int:
        return zlib.crc32(os.pread(self.fd, 1 << 20, 0))


class History:
    """In the working directory."""

    def __init__(self, dice: random.Random, closed: bool) -> None:
        self.dice = dice
        self.open = [Open(name, append=False) for name in NAMES[:4]]
        self.acts: list[Callable[[Open], object]] = [self.write] * 6 + [self.truncate, self.rename, self.remove]
        self.acts += [self.create, self.create, self.map, self.hide, self.chmod, self.sync]
        if closed:
            self.acts += [self.grow_closed, self.rewrite_closed, self.remove_closed]
            self.acts += [self.rename_closed, self.link_closed, self.directory]

    def step(self) -> str:
        file = self.dice.choice(self.open)
        act = self.dice.choice(self.acts)
        act(file)
        return f"{act.__name__} {' '.join(f'{file.checksum():08x}' for file in self.open)}"

    def data(self) -> bytes:
        return self.dice.randbytes(self.dice.choice((1, 100, 5000, 50_000)))

    def anywhere(self) -> int:
        """A place in a file, at times so far behind its end that there is a hole."""
        return self.dice.randrange(1 << self.dice.choice((12, 17, 24)))

    def name(self) -> str:
        """Any that no open file has: a mapped one must not be cut, by whatever descriptor."""
        taken = {file.name for file in self.open}
        return self.dice.choice([name for name in NAMES if name not in taken])

    # --- open files -----------------------------------------------------------------------------------------------

    def write(self, file: Open) -> None:
        data, place = self.data(), self.anywhere()
        if file.append:
            os.write(file.fd, data)
        elif file.map is not None:
            place %= MAPPED - len(data)
            file.map[place : place + len(data)] = data
        else:
            os.pwrite(file.fd, data, place)

    def truncate(self, file: Open) -> None:
        if file.map is None:
            os.ftruncate(file.fd, self.anywhere())

    def map(self, file: Open) -> None:
        if file.map is None:
            os.ftruncate(file.fd, MAPPED)
            file.map = mmap.mmap(file.fd, MAPPED)

    def create(self, file: Open) -> None:
        """What was open there is closed, with or without a name."""
        new = Open(self.name(), append=self.dice.random() < 0.4)
        file.close()
        self.open[self.open.index(file)] = new

    def rename(self, file: Open) -> None:
        name = self.dice.choice(NAMES)
        if file.name is not None and file.name != name:
            for other in self.open:
                if other.name == name:
                    other.name = None
            os.rename(file.name, name)
            file.name = name

    def remove(self, file: Open) -> None:
        if file.name is not None:
            os.unlink(file.name)
            file.name = None

    def hide(self, file: Open) -> None:
        """The name it was opened by goes, another one comes."""
        if file.name is not None:
            with suppress(FileNotFoundError):
                os.unlink(f"{file.name}-kept")
            os.link(file.name, f"{file.name}-kept")
            self.remove(file)

    def chmod(self, file: Open) -> None:
        os.fchmod(file.fd, self.dice.choice((0o600, 0o640, 0o644, 0o755)))

    def sync(self, file: Open) -> None:
        os.fsync(file.fd)

    # --- others ---------------------------------------------------------------------------------------------------

    def grow_closed(self, _: Open) -> None:
        with open(self.name(), "ab") as file:
            file.write(self.data())

    def rewrite_closed(self, _: Open) -> None:
        """What is in it next follows from what is."""
        path = Path("closed", self.dice.choice(NAMES))
        path.parent.mkdir(exist_ok=True)
        before = path.read_bytes() if path.exists() else b""
        path.write_bytes(b"%08x" % zlib.crc32(before) + self.data())

    def remove_closed(self, _: Open) -> None:
        with suppress(FileNotFoundError):
            Path("closed", self.dice.choice(NAMES)).unlink()

    def rename_closed(self, _: Open) -> None:
        one, two = self.dice.sample(NAMES, 2)
        with suppress(FileNotFoundError):
            Path("closed", one).rename(Path("closed", two))

    def link_closed(self, _: Open) -> None:
        one, two = self.dice.sample(NAMES, 2)
        with suppress(FileNotFoundError, FileExistsError):
            Path("closed", two).hardlink_to(Path("closed", one))

    def directory(self, _: Open) -> None:
        path = Path("closed", f"directory-{self.dice.randrange(3)}")
        if path.exists():
            path.rmdir()
        else:
            path.mkdir(parents=True)


class Table:
    """A data set of HDF5's that grows, in chunks; the library comes with LAMMPS."""

    def __init__(self, path: str) -> None:
        (library,) = Path("/usr/lib").glob("*/libhdf5_serial.so.???")
        self.lib = ctypes.CDLL(str(library))
        self.length = 0
        self.call("H5open")
        self.file = self.call("H5Fcreate", path.encode(), 2, 0, 0)
        self.kind = ctypes.c_int64.in_dll(self.lib, "H5T_NATIVE_LONG_g")
        settings = self.call("H5Pcreate", ctypes.c_int64.in_dll(self.lib, "H5P_CLS_DATASET_CREATE_ID_g"))
        self.call("H5Pset_chunk", settings, 1, self.sizes(64))
        self.call("H5Pset_obj_track_times", settings, 0)
        space = self.call("H5Screate_simple", 1, self.sizes(0), self.sizes((1 << 64) - 1))
        self.set = self.call("H5Dcreate2", self.file, b"numbers", self.kind, space, 0, settings, 0)

    def call(self, name: str, *arguments: object) -> ctypes.c_int64:
        function = getattr(self.lib, name)
        function.restype = ctypes.c_int64 if name.startswith(("H5F", "H5P", "H5S", "H5D")) else ctypes.c_int
        converted = [ctypes.c_int64(word) if isinstance(word, int) else word for word in arguments]
        result = function(*converted)
        if name in ("H5Pset_chunk", "H5Pset_obj_track_times", "H5Dset_extent", "H5Dwrite", "H5Dread", "H5Fflush",
                    "H5Sselect_hyperslab", "H5Fclose", "H5Dclose"):  # fmt: skip
            result = ctypes.c_int(result & 0xFFFFFFFF).value
        assert result >= 0, name
        return ctypes.c_int64(result)

    def sizes(self, *numbers: int) -> object:
        return (ctypes.c_uint64 * len(numbers))(*numbers)

    def add(self, number: int) -> None:
        self.call("H5Dset_extent", self.set, self.sizes(self.length + 1))
        there, one = self.call("H5Dget_space", self.set), self.call("H5Screate_simple", 1, self.sizes(1), None)
        self.call("H5Sselect_hyperslab", there, 0, self.sizes(self.length), None, self.sizes(1), None)
        self.call("H5Dwrite", self.set, self.kind, one, there, 0, ctypes.byref(ctypes.c_long(number)))
        for space in (there, one):
            self.call("H5Sclose", space)
        self.length += 1
        if self.length % 7 == 0:
            self.call("H5Fflush", self.file, 1)

    def close(self) -> list[int]:
        """All of its numbers."""
        found = (ctypes.c_long * self.length)()
        self.call("H5Dread", self.set, self.kind, 0, 0, 0, found)
        self.call("H5Dclose", self.set)
        self.call("H5Fclose", self.file)
        return list(found)


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--seed", type=int, required=True)
    parser.add_argument("--steps", type=int, required=True)
    parser.add_argument("--gate", required=True)
    parser.add_argument("--closed", action="store_true")
    parser.add_argument("directory")
    args = parser.parse_args()

    rank = int(os.environ["PMI_RANK"])
    gate = os.path.abspath(args.gate)
    os.makedirs(f"{args.directory}/rank-{rank}", exist_ok=True)
    os.chdir(f"{args.directory}/rank-{rank}")
    log = os.open("log", os.O_WRONLY | os.O_CREAT | os.O_APPEND, 0o600)
    history = History(random.Random(args.seed * 1000 + rank), args.closed)
    table = Table("table.h5") if rank == 0 else None
    for number in range(1, args.steps + 1):
        while number == args.steps - LAST and not os.path.exists(gate):
            time.sleep(0.05)
        os.write(log, f"{number} {history.step()}\n".encode())
        if table is not None:
            table.add(number * number)
        time.sleep(PAUSE)
    for file in history.open:
        file.close()
    assert table is None or table.close() == [number * number for number in range(1, args.steps + 1)]
    print("done", flush=True)


main()
