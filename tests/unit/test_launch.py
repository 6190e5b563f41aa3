"""The launch root: the user's command, signals, reaping, strangers on its port."""

from __future__ import annotations

import os
import resource
import signal
import socket
import subprocess
from pathlib import Path

import pytest
from capsule_processes import DEADLINE, children, is_alive, launch, launch_root, wait_until

from hpccr.capsule import link, root, spawn


def finish(process: subprocess.Popen[bytes], data: bytes = b"") -> tuple[int, bytes, bytes]:
    with process:
        out, err = process.communicate(data, timeout=DEADLINE)
    return process.returncode, out, err


@pytest.mark.parametrize(
    ("script", "code"), [("exit 0", 0), ("exit 7", 7), ("kill -KILL $$", -9), ("kill -SEGV $$", -11), ("exit 139", 139)]
)
def test_ends_as_its_command_does(script: str, code: int) -> None:
    assert finish(launch("sh", "-c", script))[0] == code


def test_streams_are_the_commands() -> None:
    code, out, err = finish(launch("sh", "-c", "cat; echo error >&2"), b"\0binary\xff\n")
    assert (code, out, err) == (0, b"\0binary\xff\n", b"error\n")


@pytest.mark.parametrize(
    ("command", "code", "reason"),
    [("no-such-program", 127, b"No such file"), ("/no/such/program", 127, b"No such file"), ("/etc", 126, b"denied")],
)
def test_command_that_cannot_run(command: str, code: int, reason: bytes) -> None:
    found, _, err = finish(launch(command))
    assert found == code
    assert command.encode() in err and reason in err and err.count(b"\n") == 1


def test_script_without_interpreter_line_is_run_by_sh(tmp_path: Path) -> None:
    script = tmp_path / "script"
    script.write_text("echo $1")
    script.chmod(0o755)
    assert finish(launch(str(script), "word"))[:2] == (0, b"word\n")


def test_environment_is_passed_unchanged() -> None:
    environ = {"A": "1", "EMPTY": "", "PATH": os.environ["PATH"]}
    _, out, _ = finish(launch("env", "-0", env=environ))
    found = dict(word.partition(b"=")[::2] for word in out.split(b"\0") if word)
    assert found == {key.encode(): value.encode() for key, value in environ.items()}


def test_only_the_launch_root_may_open_more_files() -> None:
    hard = resource.getrlimit(resource.RLIMIT_NOFILE)[1]
    script = "ulimit -Sn; grep 'open files' /proc/$PPID/limits"
    process = launch("sh", "-c", script, preexec_fn=lambda: resource.setrlimit(resource.RLIMIT_NOFILE, (200, hard)))
    assert finish(process)[1].split() == f"200 Max open files {hard} {hard} files".encode().split()


def test_signals_have_their_defaults_in_the_command() -> None:
    _, out, _ = finish(launch("grep", "-E", "Sig(Ign|Blk)", "/proc/self/status"))
    # Whatever mask these tests were started with: 32 and 33 are the C library's own, which no program can change.
    own = 1 << 31 | 1 << 32
    assert [int(line.split()[1], 16) & ~own for line in out.splitlines()] == [0, 0]


@pytest.mark.parametrize("name", ["TERM", "USR1", "USR2", "HUP", "ALRM", "WINCH", "RTMIN"])
def test_signals_reach_the_command_alone(name: str) -> None:
    script = f'exec 3<&0; trap "echo caught; exit 5" {name}; '
    script += f'sh -c "trap \\"echo child too\\" {name}; echo up; read x <&3" & wait'
    process = launch("sh", "-c", script)
    assert process.stdout is not None
    assert process.stdout.readline() == b"up\n"
    process.send_signal(signal.Signals[f"SIG{name}"])
    assert process.stdout.readline() == b"caught\n"
    assert process.wait(DEADLINE) == 5
    assert finish(process)[1] == b""


def test_interrupt_reaches_the_whole_group() -> None:
    process = launch("sh", "-c", "trap 'echo parent' INT; sh -c 'echo up; exec sleep 60'; echo end")
    assert process.stdout is not None
    assert process.stdout.readline() == b"up\n"
    process.send_signal(signal.SIGINT)
    assert finish(process)[:2] == (0, b"parent\nend\n")


def test_orphans_are_adopted_and_reaped() -> None:
    process = launch("sh", "-c", "(sleep 60 & echo $!); read x")
    assert process.stdout is not None
    orphan = int(process.stdout.readline())
    wait_until(lambda: orphan in children(process.pid))
    os.kill(orphan, signal.SIGKILL)
    wait_until(lambda: not Path(f"/proc/{orphan}").exists())
    assert finish(process, b"\n")[0] == 0


def test_everything_is_in_the_launch_roots_session() -> None:
    process = launch("sh", "-c", "cut -d' ' -f5,6 /proc/self/stat; exit 0")
    group, session = finish(process)[1].split()
    assert int(session) == process.pid
    assert int(group) != process.pid


def test_without_a_command_it_lives_until_sigterm() -> None:
    with launch_root() as endpoint:
        endpoint.process.send_signal(signal.SIGUSR1)
        endpoint.process.send_signal(signal.SIGINT)
        assert endpoint.run("echo here").stdout == b"here\n"
        endpoint.process.terminate()
        assert endpoint.process.wait(DEADLINE) == 143


def test_ends_with_its_command_whatever_else_runs() -> None:
    command = ("sh", "-c", "trap 'exit 3' TERM; sleep 60 & wait")
    with launch_root(*command) as endpoint, endpoint.start("echo up; cat") as other:
        assert other.stdout is not None
        assert other.stdout.readline() == b"up\n"
        endpoint.process.terminate()
        assert endpoint.process.wait(DEADLINE) == 3
        assert other.wait(DEADLINE) == 255


def test_no_listening_without_a_secret() -> None:
    process = launch(env={"HPCCR_STEP_SECRET": ""})
    process.kill()
    finish(process)
    with pytest.raises(AssertionError), launch_root(env={"HPCCR_STEP_SECRET": ""}):
        pass


def test_strangers_cannot_keep_the_job_out() -> None:
    with launch_root() as endpoint:
        strangers = [endpoint.connect() for _ in range(root.MAX_STRANGERS + 5)]
        assert endpoint.run("echo in").stdout == b"in\n"
        first = strangers[0]
        assert len(first.recv(1000)) == len(link.MAGIC) + link.NONCE
        assert first.recv(1) == b""  # the oldest had to go
        for stranger in strangers:
            stranger.close()


def test_strangers_have_a_deadline() -> None:
    with launch_root(handshake=0.2) as endpoint, endpoint.connect() as stranger:
        while stranger.recv(1000):
            pass
        assert endpoint.run("exit 4").returncode == 4


def test_no_descriptors_left_for_a_while() -> None:
    with launch_root() as endpoint:
        resource.prlimit(endpoint.process.pid, resource.RLIMIT_NOFILE, (16, 16))
        strangers = [endpoint.connect() for _ in range(20)]
        for stranger in strangers:
            stranger.close()
        assert endpoint.run("echo in").stdout == b"in\n"


def test_wrong_proof_is_refused_and_nothing_is_run(tmp_path: Path) -> None:
    with launch_root() as endpoint:
        result = endpoint.run(f"touch {tmp_path}/ran", env={"HPCCR_STEP_SECRET": "wrong"})
        assert result.returncode == 255
        assert b"HPCCR_STEP_SECRET" in result.stderr
        assert not list(tmp_path.iterdir())


@pytest.mark.parametrize(
    "garbage",
    [
        bytes((link.DATA, 0)) + (1 << 31).to_bytes(4, "big"),
        bytes((99, 0, 0, 0, 0, 0)),
        bytes((link.SIGNAL, 0, 0, 0, 0, 0)),
        bytes((link.REQUEST, 0, 0, 0, 0, 1)) + b"x",
        bytes((link.REQUEST, 0, 0, 0, 0, 8)) + b"a\0/\x00999\0y",
    ],
)
def test_garbage_ends_one_connection_only(garbage: bytes) -> None:
    with launch_root() as endpoint, endpoint.connect() as sock:
        authenticate(sock)
        sock.sendall(garbage)
        assert sock.recv(1000) == b""
        assert endpoint.run("exit 4").returncode == 4


def authenticate(sock: socket.socket) -> None:
    from capsule_processes import SECRET

    greeting = sock.recv(len(link.MAGIC) + link.NONCE, socket.MSG_WAITALL)
    own = os.urandom(link.NONCE)
    peer = greeting[len(link.MAGIC) :]
    sock.sendall(link.MAGIC + own + link.proof(SECRET.encode(), b"client", own, peer))
    answer = sock.recv(link.DIGEST, socket.MSG_WAITALL)
    assert answer == link.proof(SECRET.encode(), b"server", peer, own)


def test_proof_is_hmac_sha256() -> None:
    import hmac

    for secret in (b"short", b"x" * 64, b"longer than a block" * 10):
        assert link.proof(secret, b"client", b"own", b"peer") == hmac.digest(secret, b"clientownpeer", "sha256")


def test_host_environment_renames_only_what_is_set() -> None:
    given = {b"SLURM_NODEID": b"0", b"SLURMD_NODENAME": b"hpccr-0", b"SLURM_TASK_PID": b"9", b"PATH": b"/bin"}
    assert spawn.host_environment(given, 12) == {
        b"SLURM_NODEID": b"12",
        b"SLURMD_NODENAME": b"hpccr-12",
        b"PATH": b"/bin",
    }


def test_private_memory_stays_small() -> None:
    with launch_root() as endpoint:
        endpoint.run("true")
        rollup = Path(f"/proc/{endpoint.process.pid}/smaps_rollup").read_text().splitlines()
        (anonymous,) = (int(line.split()[1]) for line in rollup if line.startswith("Anonymous:"))
        assert anonymous < 6 << 10  # KiB; about 3 when the modules are compiled, 4.4 when not
        assert is_alive(endpoint.process.pid)
