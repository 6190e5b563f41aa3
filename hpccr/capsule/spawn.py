"""Programs of the job: how they are found and started, and what hpccr-rsh's request makes of their surroundings."""

from __future__ import annotations

import errno
import os

from hpccr.capsule import link

TYPE_CHECKING = False  # typing itself would take 1 MiB
if TYPE_CHECKING:
    import signal
    from collections.abc import Callable
    from typing import NoReturn
else:
    import _signal as signal


def exit_code(status: int) -> int:
    """A wait status as a shell gives it: 128 + n for signal n."""
    return shell_code(os.waitstatus_to_exitcode(status))


def shell_code(code: int) -> int:
    """An exit code, -n for signal n, as a shell gives it: 128 + n for signal n."""
    return code if code >= 0 else 128 - code


def end_like(code: int) -> NoReturn:
    """End at once with exit code `code`, or by signal -code if that is negative, as what we have waited for did: who
    waits for us (Slurm, a shell) tells the two apart."""
    if code < 0:
        import resource

        # It was not this process that crashed.
        resource.setrlimit(resource.RLIMIT_CORE, (0, 0))
        try:
            signal.signal(-code, signal.SIG_DFL)
        except (OSError, ValueError):
            pass  # SIGKILL has nothing else
        signal.pthread_sigmask(signal.SIG_UNBLOCK, [-code])
        os.kill(os.getpid(), -code)
    os._exit(shell_code(code))


def host_environment(environ: dict[bytes, bytes], index: int) -> dict[bytes, bytes]:
    """The caller's environment as it is on capsule `index`: what names the host or its place among the nodes, if set.

    The SLURM_ variables get the values that a step with one task per node has there.
    """
    name, number = b"hpccr-%d" % index, b"%d" % index
    here = {
        b"HOSTNAME": name,
        b"HOST": name,
        b"SLURMD_NODENAME": name,
        b"SLURM_TOPOLOGY_ADDR": name,
        b"SLURM_NODEID": number,
        b"SLURM_PROCID": number,
        b"SLURM_LOCALID": b"0",
        b"HPCCR_CAPSULE": number,
    }
    result = {key: here.get(key, value) for key, value in environ.items()}
    result.pop(b"SLURM_TASK_PID", None)
    return result


def execute(argv: list[bytes], environ: dict[bytes, bytes]) -> NoReturn:
    """Become the program, found on PATH as execvp(3) does, a script without `#!` included.

    Raises the OSError that a shell would report: EACCES if something was found but could not be run, else ENOENT.
    """
    name = argv[0]
    directories = [b""] if b"/" in name else environ.get(b"PATH", b"/usr/local/bin:/usr/bin:/bin").split(b":")
    failure: OSError = FileNotFoundError(errno.ENOENT, os.strerror(errno.ENOENT))
    for directory in directories:
        path = name if b"/" in name else (directory or b".") + b"/" + name
        try:
            os.execve(path, argv, environ)  # noqa: S606 - becoming the program is the point
        except OSError as error:
            if error.errno == errno.ENOEXEC:
                os.execve(b"/bin/sh", [b"sh", path, *argv[1:]], environ)  # noqa: S606 - becoming the program is the point
            if error.errno not in (errno.ENOENT, errno.ENOTDIR):
                failure = error
    raise failure


def become(
    prefix: str, argv: list[bytes], environ: dict[bytes, bytes], prepare: Callable[[], None], *, group: bool = True
) -> NoReturn:
    """In a forked child with all signals blocked: own process group, `prepare()`, default signals, the program.

    A failure is a line on stderr and exit code 127 (not found) or 126, as from a shell.
    """
    code = 126
    try:
        if group:
            os.setpgid(0, 0)
        prepare()
        for number in signal.valid_signals() - {signal.SIGKILL, signal.SIGSTOP}:
            # Ours, and what Python ignores by itself; what was ignored before us (nohup) stays ignored.
            if number in (signal.SIGPIPE, signal.SIGXFSZ) or signal.getsignal(number) is not signal.SIG_IGN:
                signal.signal(number, signal.SIG_DFL)
        signal.pthread_sigmask(signal.SIG_SETMASK, ())
        execute(argv, environ)
    except OSError as error:
        code = 127 if error.errno == errno.ENOENT else 126
        link.warn(f"{prefix}: cannot run {os.fsdecode(argv[0])}: {error.strerror}")
    finally:
        os._exit(code)


def fork(
    prefix: str, argv: list[bytes], environ: dict[bytes, bytes], prepare: Callable[[], None], *, group: bool = True
) -> int:
    """Start a program; its pid, which is also its process group's. Raises OSError if there can be no more processes.

    group: False leaves it in the caller's process group.
    """
    everything = signal.pthread_sigmask(signal.SIG_BLOCK, signal.valid_signals())
    try:
        pid = os.fork()
        if pid == 0:
            become(prefix, argv, environ, prepare, group=group)
    finally:
        signal.pthread_sigmask(signal.SIG_SETMASK, everything)
    if not group:
        return pid
    try:
        os.setpgid(pid, pid)  # whoever is first: a signal to the group must find it
    except OSError:
        pass  # the child has done so and runs its program
    return pid


class Request:
    """What hpccr-rsh asks for: NUL-separated command, directory, umask, soft limits (`N=VALUE,...`), environment."""

    def __init__(self, payload: bytes) -> None:
        parts = payload.split(b"\0")
        if len(parts) < 4:
            raise link.ProtocolError("a request of fewer than four parts")
        self.command, self.directory = parts[0], parts[1]
        try:
            self.umask = int(parts[2], 8) & 0o777
            self.limits = [
                (int(n), int(v)) for n, _, v in (item.partition(b"=") for item in parts[3].split(b",") if item)
            ]
        except ValueError:
            raise link.ProtocolError("a request with a malformed number") from None
        self.environ = {key: value for key, _, value in (item.partition(b"=") for item in parts[4:]) if key}

    def apply(self) -> None:
        """Give this process the caller's umask, soft limits (as far as the hard ones here allow) and directory."""
        import resource

        os.umask(self.umask)
        for number, soft in self.limits:
            try:
                hard = resource.getrlimit(number)[1]
                if hard != resource.RLIM_INFINITY and (soft == resource.RLIM_INFINITY or soft > hard):
                    soft = hard
                resource.setrlimit(number, (soft, hard))
            except (OSError, ValueError):
                pass  # a limit that this kernel does not have
        try:
            os.chdir(self.directory)
        except OSError as error:
            instead = self.environ.get(b"HOME", b"/")
            try:
                os.chdir(instead)
            except OSError:
                instead = b"/"
                os.chdir(instead)
            link.warn(
                f"hpccr-rsh: cannot enter {os.fsdecode(self.directory)} on {os.uname().nodename}: {error.strerror}; "
                f"working in {os.fsdecode(instead)}"
            )
        else:
            self.environ[b"PWD"] = self.directory
