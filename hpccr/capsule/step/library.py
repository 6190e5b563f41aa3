"""Which MPI library a program uses, found without running it, and the mpirun that belongs to that library.

A program tells by the libraries that it is linked to (ELF, DT_NEEDED), through any number of others. A program that
runs another one (nice, env, a shell script) uses what that one uses, unless that is an mpirun. A Python program uses
mpi4py, or it uses none: that is asked of the same interpreter. HPCCR_MPI=openmpi|mpich|intel|none says what cannot be
found this way.
"""

from __future__ import annotations

import os
import struct

from hpccr.capsule.spawn import fork
from hpccr.capsule.step.options import Usage

TYPE_CHECKING = False  # typing itself would take 1 MiB
if TYPE_CHECKING:
    from collections.abc import Iterator, Mapping, Sequence

OPEN_MPI, MPICH, INTEL, NONE = "openmpi", "mpich", "intel", "none"
VARIABLE = "HPCCR_MPI"

LIBRARIES = {
    "libmpi.so.40": OPEN_MPI,
    "libmpi.so.20": OPEN_MPI,
    "libmpich.so.12": MPICH,
    "libmpi.so.12": MPICH,
    "libmpi_abi.so.0": MPICH,
    "libmpi_abi.so.1": MPICH,
}
"""By the name a program asks for. libmpi.so.12 is the common name of MPICH's kin, libmpi_abi.so that of MPI 5's
standard ABI; what is in the file tells whose it is. Cray's libmpi_gnu_123.so.12 and the like are MPICH's kin too."""
INSCRIPTIONS = ((b"Intel(R) MPI Library", INTEL), (b"Open MPI v", OPEN_MPI))
"""What tells whose a library with a common name is; else it is MPICH's."""

STARTERS = ("mpirun", "mpiexec", "prterun", "orterun")
"""Names of programs, or their beginnings, that start MPI programs themselves."""
BEFORE_COMMANDS = ("exec", "time", "env", "nice", "if", "then", "else", "elif", "do", "while", "until", "!", "{")
USERS_OF_MPI4PY = (b"mpi4py", b"petsc4py", b"slepc4py", b"dolfinx", b"firedrake", b"gpaw")
"""Words of a Python program that leave no doubt that it uses MPI."""

LAUNCHERS = {
    OPEN_MPI: ("mpirun.openmpi", "mpirun", "mpiexec"),
    MPICH: ("mpiexec.hydra", "mpirun.mpich", "mpirun", "mpiexec"),
    INTEL: ("mpiexec.hydra", "mpirun", "mpiexec"),
}
VERSIONS = {OPEN_MPI: (b"Open MPI", b"OpenRTE", b"prterun", b"PRRTE"), MPICH: (b"HYDRA",), INTEL: (b"Intel",)}
"""What `LAUNCHER --version` says."""

USUAL = ("/lib", "/usr/lib", "/lib64", "/usr/lib64", "/usr/local/lib")
SYSTEM = ("libc.so", "libm.so", "libpthread", "libdl.so", "librt.so", "libstdc++", "libgcc_s", "ld-linux")
"""Libraries that use no MPI: not looked into."""
MOST = 400
"""Files that are looked into for one program."""
SCRIPT = 256 << 10

INTERPRETERS = ("sh", "bash", "dash", "ksh", "zsh")
ASK_PYTHON = (
    "import sys; sys.path[0:0] = [p for p in sys.argv[1:] if p]; from mpi4py import rc; rc.initialize = False; "
    "from mpi4py import MPI; print(MPI.Get_library_version().split('\\n')[0]); "
    "print(*{l.split()[-1] for l in open('/proc/self/maps') if '/libmpi' in l}, sep='\\n')"
)
MISSING = f"put its bin directory on the PATH, or say what the program uses: {VARIABLE}=openmpi|mpich|intel|none"


class Found:
    """A library: its kind, and its file where it was found. sure: the program uses it, not only may use it."""

    def __init__(self, kind: str, path: str, *, sure: bool = True) -> None:
        self.kind, self.path, self.sure = kind, path, sure


class Elf:
    """The dynamic section of an ELF file of 64 bits, little-endian. Raises ValueError for another file, OSError."""

    def __init__(self, path: str) -> None:
        self.needed: list[str] = []
        self.rpath: list[str] = []
        self.runpath: list[str] = []
        with open(path, "rb") as file:
            head = file.read(64)
            if len(head) < 64 or head[:6] != b"\x7fELF\x02\x01":
                raise ValueError(path)
            offset, size, count = *struct.unpack_from("<Q", head, 32), *struct.unpack_from("<HH", head, 54)
            file.seek(offset)
            table = file.read(size * count)
            loads, dynamic = [], (0, 0)
            for at in range(0, len(table) - 55, size):
                kind, _, start, address, _, length, _ = struct.unpack_from("<IIQQQQQ", table, at)
                if kind == 1:
                    loads.append((address, start, length))
                elif kind == 2:
                    dynamic = (start, length)
            file.seek(dynamic[0])
            data = file.read(dynamic[1])
            entries = [struct.unpack_from("<QQ", data, at) for at in range(0, len(data) - 15, 16)]
            strings = next((value for tag, value in entries if tag == 5), None)
            place = next((s + strings - a for a, s, n in loads if strings is not None and a <= strings < a + n), None)
            if place is None:
                return

            def text(at: int) -> str:
                file.seek(place + at)
                return os.fsdecode(file.read(4096).partition(b"\0")[0])

            origin = os.path.dirname(os.path.realpath(path))
            for tag, value in entries:
                if tag == 1:
                    self.needed.append(text(value))
                elif tag in (15, 29):
                    words = text(value).replace("${ORIGIN}", origin).replace("$ORIGIN", origin).split(":")
                    (self.rpath if tag == 15 else self.runpath).extend(words)


class Search:
    """Looks for the MPI library of programs, with an environment's search paths."""

    def __init__(self, environ: Mapping[str, str], directory: str) -> None:
        self._environ, self._directory = environ, directory
        self._path = [place for place in environ.get("LD_LIBRARY_PATH", "").replace(";", ":").split(":") if place]
        self._path_of_system: list[str] = []
        self._seen: set[str] = set()

    # --- programs ---------------------------------------------------------------------------------------------------

    def find(self, command: Sequence[str], tasks: int) -> Found | None:
        """The library that `command` will use; None: none. tasks: how many there are of it."""
        for at, word in enumerate(command):
            path = self.program(word)
            if path is None:
                continue
            found = self._of_file(path, command[at:], tasks, programs_only=at > 0)
            if found is not None:
                return found
        return None

    def program(self, word: str) -> str | None:
        """The executable file that a word names: by PATH, or in the working directory (srun(1))."""
        places = [""] if "/" in word else [*self._environ.get("PATH", "").split(":"), "."]
        for place in places:
            path = os.path.join(self._directory, place, word)
            if word and os.path.isfile(path) and os.access(path, os.X_OK):
                return path
        return None

    def _of_file(self, path: str, command: Sequence[str], tasks: int, *, programs_only: bool) -> Found | None:
        name = os.path.basename(path)
        if name.startswith("python"):
            return None if programs_only and len(command) == 1 else self._of_python(path, command, tasks)
        try:
            with open(path, "rb") as file:
                head = file.read(SCRIPT)
        except OSError:
            return None
        if head.startswith(b"\x7fELF"):
            if name in INTERPRETERS:
                return self._of_shell(command)
            return self._of_elf(path)
        if not head.startswith(b"#!"):
            return None
        first, _, text = head.partition(b"\n")
        words = os.fsdecode(first[2:]).split()
        interpreter = next((w for w in words if os.path.basename(w) not in ("env",) and not w.startswith("-")), "")
        if os.path.basename(interpreter).startswith("python"):
            python = self.program(interpreter)
            return self._of_python(python, [interpreter, path, *command[1:]], tasks) if python else None
        if os.path.basename(interpreter) in INTERPRETERS:
            return self._of_words(os.fsdecode(text))
        return None

    def _of_shell(self, command: Sequence[str]) -> Found | None:
        for at, option in enumerate(command[1:-1], 2):
            if option.startswith("-") and option.endswith("c"):
                return self._of_words(command[at])
            if not option.startswith("-"):
                break
        script = next((word for word in command[1:] if not word.startswith("-")), None)
        if script is None:
            return None
        try:
            with open(os.path.join(self._directory, script), "rb") as file:
                return self._of_words(os.fsdecode(file.read(SCRIPT)))
        except OSError:
            return None

    def _of_words(self, text: str) -> Found | None:
        """The library of any program that a shell script names; a script that calls mpirun is one program itself."""
        if calls_mpirun(text):
            return None
        for character in "\"'`;|&()<>{}=\n\t":
            text = text.replace(character, " ")
        for word in dict.fromkeys(text.split(" ")):
            path = self.program(word) if word and not word.startswith(("-", "$", "#")) else None
            try:
                found = self._of_elf(path) if path is not None else None
            except (OSError, ValueError):
                found = None
            if found is not None:
                return found
        return None

    def _of_python(self, python: str, command: Sequence[str], tasks: int) -> Found | None:
        """A program of one task is its own MPI world, unless it says that it is about MPI. One of several that does not
        say so may use MPI in what it imports, or be one of a hundred that have nothing to do with each other."""
        sure = self._names_mpi4py(command)
        if tasks == 1 and not sure:
            return None
        script = next((word for word in command[1:] if not word.startswith("-")), "")
        place = os.path.dirname(os.path.join(self._directory, script)) if script.endswith(".py") else self._directory
        lines = output([python, "-c", ASK_PYTHON, place], self._environ).splitlines()
        if not lines:
            return None
        version, paths = lines[0], lines[1:]
        kind = OPEN_MPI if "Open MPI" in version else INTEL if "Intel" in version else MPICH
        return Found(kind, min(paths, key=len, default=""), sure=sure)

    def _names_mpi4py(self, command: Sequence[str]) -> bool:
        def named(text: bytes) -> bool:
            return any(word in text for word in USERS_OF_MPI4PY)

        if any(named(os.fsencode(word)) for word in command[1:]):
            return True
        for word in command[1:]:
            if not word.startswith("-"):
                try:
                    with open(os.path.join(self._directory, word), "rb") as file:
                        return named(file.read(SCRIPT))
                except OSError:
                    return False
        return False

    # --- libraries --------------------------------------------------------------------------------------------------

    def _of_elf(self, path: str, inherited: tuple[str, ...] = ()) -> Found | None:
        real = os.path.realpath(path)
        if real in self._seen or len(self._seen) > MOST:
            return None
        self._seen.add(real)
        try:
            elf = Elf(real)
        except (OSError, ValueError, struct.error):
            return None
        # ld.so(8): DT_RPATH counts for what a library needs too, and not where there is a DT_RUNPATH
        rpath = () if elf.runpath else (*elf.rpath, *inherited)
        for name in elf.needed:
            kind = LIBRARIES.get(name)
            if kind is None and name.startswith("libmpi_") and name.endswith(".so.12"):
                kind = MPICH
            if kind is not None:
                found = self._library(name, (*rpath, *self._path, *elf.runpath)) or ""
                return Found(_inscribed(found) or MPICH if kind == MPICH else kind, found)
        for name in elf.needed:
            if not name.startswith(SYSTEM):
                library = self._library(name, (*rpath, *self._path, *elf.runpath))
                result = self._of_elf(library, rpath) if library else None
                if result is not None:
                    return result
        return None

    def _library(self, name: str, places: Sequence[str]) -> str | None:
        if "/" in name:
            return name if os.path.exists(name) else None
        for place in (*places, *self._system()):
            path = os.path.join(place, name)
            if os.path.exists(path):
                return path
        return None

    def _system(self) -> list[str]:
        """The directories of ld.so.conf(5)."""
        if not self._path_of_system:
            self._path_of_system = [*_configured("/etc/ld.so.conf", 0), *USUAL]
        return self._path_of_system


def _configured(path: str, depth: int) -> Iterator[str]:
    try:
        with open(path, encoding="utf-8", errors="surrogateescape") as file:
            lines = file.read().splitlines()
    except OSError:
        return
    for line in lines:
        words = line.partition("#")[0].split()
        if words[:1] == ["include"] and depth < 8:
            for pattern in words[1:]:
                place, name = os.path.split(os.path.join(os.path.dirname(path), pattern))
                suffix = name.removeprefix("*")
                for entry in sorted(os.listdir(place)) if os.path.isdir(place) else ():
                    if entry == name or (suffix != name and entry.endswith(suffix)):
                        yield from _configured(os.path.join(place, entry), depth + 1)
        elif words:
            yield words[0]


def _inscribed(path: str) -> str:
    """Whose a library with a common name is, by what is in it; "": it does not say."""
    try:
        with open(path, "rb") as file:
            rest = b""
            while piece := file.read(1 << 20):
                for words, kind in INSCRIPTIONS:
                    if words in rest + piece:
                        return kind
                rest = piece[-64:]
    except OSError:
        pass
    return ""


def calls_mpirun(text: str) -> bool:
    """Whether a shell script starts MPI programs by itself."""
    for line in text.splitlines():
        line = "" if line.lstrip().startswith("#") else line.partition(" #")[0]
        for character in ";&|()`":
            line = line.replace(character, "\n")
        for command in line.split("\n"):
            words = command.split()
            while words and (words[0] in BEFORE_COMMANDS or "=" in words[0] or words[0].startswith("-")):
                del words[0]
            if words and os.path.basename(words[0].strip("\"'")).startswith(STARTERS):
                return True
    return False


# --- mpirun ---------------------------------------------------------------------------------------------------------


def choose(command: Sequence[str], *, tasks: int, mpi: str, environ: Mapping[str, str], directory: str) -> Found | None:
    """The MPI library for a step; None: it is started without. mpi: of --mpi. Raises Usage."""
    said = environ.get(VARIABLE, "").lower()
    if said and said not in (OPEN_MPI, MPICH, INTEL, NONE):
        raise Usage(f"{VARIABLE}={said} is not known", f"{VARIABLE}=openmpi, mpich, intel or none")
    if said == NONE or (mpi == NONE and not said):
        return None
    return Found(said, "") if said else Search(environ, directory).find(command, tasks)


def launcher(found: Found, environ: Mapping[str, str]) -> str:
    """The path of the mpirun that starts programs of that library. Raises Usage."""
    places: list[str] = []
    for start in dict.fromkeys((found.path, os.path.realpath(found.path))) if found.path else ():
        parent = os.path.dirname(start)
        while parent not in ("/", ""):
            parent = os.path.dirname(parent)
            places.append(os.path.join(parent, "bin"))
    # Beside the library first: there may be several of a kind. An empty word of PATH is the working directory.
    places = [*dict.fromkeys(places), *(place for place in environ.get("PATH", "").split(":") if place)]
    for place in dict.fromkeys(places):
        for name in LAUNCHERS[found.kind]:
            path = os.path.join(place, name)
            if os.access(path, os.X_OK) and os.path.isfile(path) and _is_kind(path, found.kind, environ):
                return path
    where = f" ({found.path})" if found.path else ""
    raise Usage(f"srun: the program uses {found.kind}{where}, and there is no mpirun of it", MISSING, 13)


def _is_kind(path: str, kind: str, environ: Mapping[str, str]) -> bool:
    said = output([path, "--version"], environ).encode()
    intel = any(word in said for word in VERSIONS[INTEL])
    return any(word in said for word in VERSIONS[kind]) and (kind == INTEL or not intel)


def output(argv: Sequence[str], environ: Mapping[str, str]) -> str:
    """What a program prints on stdout; "" if it fails. subprocess would take 3 MiB for this."""
    read, write = os.pipe()
    null = os.open("/dev/null", os.O_RDWR)

    def prepare() -> None:
        for number, fd in ((0, null), (1, write), (2, null)):
            os.dup2(fd, number)

    encoded = {os.fsencode(name): os.fsencode(value) for name, value in environ.items()}
    pid = fork("srun", [os.fsencode(word) for word in argv], encoded, prepare)
    os.close(write)
    os.close(null)
    pieces = []
    while piece := os.read(read, 4096):
        pieces.append(piece)
    os.close(read)
    _, status = os.waitpid(pid, 0)
    return os.fsdecode(b"".join(pieces)) if status == 0 else ""
