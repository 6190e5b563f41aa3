"""hpccr-rsh against a real launch root: streams, exit codes, signals, ends of either side."""

from __future__ import annotations

import hashlib
import os
import signal
import socket
import subprocess
import sys
import threading
from collections.abc import Iterator
from pathlib import Path

import pytest
from capsule_processes import (
    CAPSULE,
    DEADLINE,
    SECRET,
    Endpoint,
    children,
    free_port,
    is_alive,
    launch_root,
    peak_memory,
    wait_until,
)

from hpccr.capsule.client import CONNECT_TIMEOUT, Failure, Invocation, find_address

MEGABYTES = 12 << 20


@pytest.fixture(scope="module")
def endpoint() -> Iterator[Endpoint]:
    with launch_root(grace=0.2) as endpoint:
        yield endpoint


# --- exit codes and surroundings ---------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("command", "code"), [("exit 0", 0), ("exit 41", 41), ("kill -KILL $$", 137), ("no-such-program", 127)]
)
def test_exit_code(endpoint: Endpoint, command: str, code: int) -> None:
    assert endpoint.run(command).returncode == code


def test_words_are_joined_and_read_by_a_shell(endpoint: Endpoint) -> None:
    assert endpoint.run("echo", '"two', 'words"', ";", "echo", "$((6*7))").stdout == b"two words\n42\n"


def test_options_of_ssh_are_accepted(endpoint: Endpoint) -> None:
    assert endpoint.run("-x", "-q", "echo", "-n", "here").stdout == b"here"


def test_environment_directory_umask_and_limits_are_the_callers(endpoint: Endpoint, tmp_path: Path) -> None:
    script = f"cd {tmp_path}; umask 027; ulimit -Sn 77; exec {CAPSULE}/hpccr-rsh 127.0.0.1 "
    script += "'pwd; umask; ulimit -Sn; echo $SPECIAL; echo $HOSTNAME'"
    environ = endpoint.environment({"SPECIAL": "a 'b' \n c", "HOSTNAME": "hpccr-0"})
    result = subprocess.run(["sh", "-c", script], env=environ, capture_output=True, timeout=DEADLINE)
    assert result.stdout.decode() == f"{tmp_path}\n0027\n77\na b c\nhpccr-1\n".replace("a b c", "a 'b' c")


def test_missing_directory_is_said_and_home_is_used(endpoint: Endpoint, tmp_path: Path) -> None:
    (tmp_path / "gone").mkdir()
    script = f"cd {tmp_path}/gone; rmdir ../gone; exec {CAPSULE}/hpccr-rsh 127.0.0.1 pwd"
    environ = endpoint.environment({"HOME": str(tmp_path)})
    result = subprocess.run(["sh", "-c", script], env=environ, capture_output=True, timeout=DEADLINE)
    assert result.returncode == 0
    # getcwd() of a removed directory fails, and then there is nothing to enter but /
    assert result.stdout in (b"/\n", f"{tmp_path}\n".encode())


def test_everything_of_a_shells_environment_arrives(endpoint: Endpoint) -> None:
    result = endpoint.run("env", "-0", env={"LARGE": "x" * 100_000, "EQUALS": "a=b=c"})
    found = dict(word.partition(b"=")[::2] for word in result.stdout.split(b"\0") if word)
    expected = {key.encode(): value.encode() for key, value in endpoint.environment().items()}
    assert found[b"LARGE"] == b"x" * 100_000 and found[b"EQUALS"] == b"a=b=c"
    assert expected.items() <= found.items()
    assert found.keys() - expected.keys() <= {b"LARGE", b"EQUALS", b"PWD"}


# --- streams -----------------------------------------------------------------------------------------------------


def test_streams_are_byte_exact_and_separate(endpoint: Endpoint) -> None:
    data = os.urandom(MEGABYTES)
    result = endpoint.run(f"tee /dev/stderr | {sys.executable} -c {REVERSE!r}", input=data)
    assert result.returncode == 0
    assert digest(result.stderr) == digest(data)
    assert digest(result.stdout) == digest(data[::-1])


REVERSE = "import sys; sys.stdout.buffer.write(sys.stdin.buffer.read()[::-1])"


def digest(data: bytes) -> tuple[int, str]:
    return len(data), hashlib.sha256(data).hexdigest()


def test_end_of_input_is_passed_while_output_goes_on(endpoint: Endpoint) -> None:
    with endpoint.start("cat; echo end; read x; echo $?") as process:
        out, _ = process.communicate(b"line\n", timeout=DEADLINE)
    assert out == b"line\nend\n1\n"


def test_input_that_nobody_reads_is_not_waited_for(endpoint: Endpoint) -> None:
    with subprocess.Popen(["yes"], stdout=subprocess.PIPE) as source:
        assert endpoint.run("head -n 1", stdin=source.stdout).stdout == b"y\n"
        assert source.stdout is not None
        source.stdout.close()
        assert source.wait(DEADLINE) == -signal.SIGPIPE


def test_input_closed_by_the_command_is_closed_here(endpoint: Endpoint) -> None:
    with endpoint.start("exec <&-; echo closed; sleep 60") as process:
        assert process.stdout is not None and process.stdin is not None
        assert process.stdout.readline() == b"closed\n"
        with pytest.raises(BrokenPipeError):
            while True:
                os.write(process.stdin.fileno(), bytes(1000))
        process.stdin.close()
        process.terminate()


def test_output_closed_by_the_command_ends_here(endpoint: Endpoint) -> None:
    with endpoint.start("echo last; exec >&-; read x; exit 9") as process:
        assert process.stdout is not None and process.stdin is not None
        assert process.stdout.read() == b"last\n"
        process.stdin.close()
        assert process.wait(DEADLINE) == 9


def test_command_gets_sigpipe_when_our_reader_is_gone(endpoint: Endpoint) -> None:
    with endpoint.start("exec yes") as process:
        assert process.stdout is not None and process.stdin is not None
        assert process.stdout.readline() == b"y\n"
        process.stdout.close()
        assert process.wait(DEADLINE) == 128 + signal.SIGPIPE


def test_null_input(endpoint: Endpoint) -> None:
    with endpoint.start("-n", "cat; echo end") as process:
        assert process.stdout is not None
        assert process.stdout.read() == b"end\n"  # though nobody has closed our stdin
        assert process.wait(DEADLINE) == 0
        assert process.stdin is not None
        process.stdin.close()


def test_closed_standard_streams(endpoint: Endpoint) -> None:
    script = f"exec {CAPSULE}/hpccr-rsh 127.0.0.1 'cat; echo out; echo err >&2; exit 6' <&- >&- 2>&-"
    assert subprocess.run(["sh", "-c", script], env=endpoint.environment(), timeout=DEADLINE).returncode == 6


def test_blocked_output_blocks_nothing_else_and_is_not_hoarded() -> None:
    flood = f"(echo go >&2; exec head -c {5 * MEGABYTES} /dev/zero)"
    with launch_root() as endpoint:
        before = peak_memory(endpoint.process.pid)
        script = f"trap 'echo term >&2' TERM; {flood} & read x; echo $x >&2; wait; wait"
        with endpoint.start(script) as process:
            assert process.stdout is not None and process.stdin is not None and process.stderr is not None
            assert process.stderr.readline() == b"go\n"
            process.stdin.write(b"word\n")
            process.stdin.flush()
            assert process.stderr.readline() == b"word\n"
            process.terminate()
            # head is of the same process group and dies of it; the shell is told though stdout is full
            assert process.stderr.readline() == b"term\n"
            assert len(process.stdout.read()) < 5 * MEGABYTES
            assert process.wait(DEADLINE) == 0
        assert peak_memory(endpoint.process.pid) - before < 4 << 20


# --- signals and ends --------------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", ["HUP", "INT", "QUIT", "TERM", "USR1", "USR2"])
def test_signals_are_passed(endpoint: Endpoint, name: str) -> None:
    script = f"exec 3<&0; trap 'echo caught; exit 12' {name}; echo up; (read x <&3) & wait"
    with endpoint.start(script) as process:
        assert process.stdout is not None and process.stdin is not None
        assert process.stdout.readline() == b"up\n"
        process.send_signal(signal.Signals[f"SIG{name}"])
        assert process.stdout.readline() == b"caught\n"
        process.stdin.close()
        assert process.wait(DEADLINE) == 12


def test_signal_that_kills_the_command(endpoint: Endpoint) -> None:
    with endpoint.start("echo up; exec sleep 60") as process:
        assert process.stdout is not None
        assert process.stdout.readline() == b"up\n"
        process.terminate()
        assert process.wait(DEADLINE) == 128 + signal.SIGTERM


def test_killed_client_hangs_the_group_up(endpoint: Endpoint, tmp_path: Path) -> None:
    fifo = tmp_path / "fifo"
    os.mkfifo(fifo)
    script = f"exec 3>{fifo}; trap 'echo hangup >&3; exit' HUP; echo up; sleep 60 & wait"
    with endpoint.start(script) as process, open(fifo, "rb") as held:
        assert process.stdout is not None
        assert process.stdout.readline() == b"up\n"
        process.kill()
        assert held.read() == b"hangup\n"  # up to its end: every process that holds it is gone


def test_killed_client_kills_what_ignores_the_hangup(endpoint: Endpoint, tmp_path: Path) -> None:
    fifo = tmp_path / "fifo"
    os.mkfifo(fifo)
    with (
        endpoint.start(f"exec 3>{fifo}; trap '' HUP; echo up; sleep 60; sleep 60") as process,
        open(fifo, "rb") as held,
    ):
        assert process.stdout is not None
        assert process.stdout.readline() == b"up\n"
        process.kill()
        assert held.read() == b""


def test_killed_client_kills_children_that_outlive_the_shell(endpoint: Endpoint, tmp_path: Path) -> None:
    fifo = tmp_path / "fifo"
    os.mkfifo(fifo)
    script = f"exec 3>{fifo}; sh -c 'trap \"\" HUP; sleep 60' & echo up; wait"
    with endpoint.start(script) as process, open(fifo, "rb") as held:
        assert process.stdout is not None
        assert process.stdout.readline() == b"up\n"
        process.kill()
        assert held.read() == b""


def test_daemon_survives_and_belongs_to_the_launch_root(endpoint: Endpoint) -> None:
    daemonize = "import os,sys,time\nif os.fork(): sys.exit()\nos.setsid()\nprint(os.getpid(), flush=True)\n"
    daemonize += "null = os.open('/dev/null', os.O_RDWR)\nfor fd in 0, 1, 2: os.dup2(null, fd)\ntime.sleep(60)"
    result = endpoint.run(f'{sys.executable} -c "{daemonize}"')
    assert result.returncode == 0
    daemon = int(result.stdout)
    wait_until(lambda: daemon in children(endpoint.process.pid))
    assert endpoint.run("exit 3").returncode == 3
    assert is_alive(daemon)
    os.kill(daemon, signal.SIGKILL)
    wait_until(lambda: not Path(f"/proc/{daemon}").exists())


def test_background_child_holds_the_output_open(endpoint: Endpoint) -> None:
    result = endpoint.run("(read x <&3; echo late) 3<&0 & exit 5", input=b"\n")
    assert (result.returncode, result.stdout) == (5, b"late\n")


def test_lost_launch_root() -> None:
    with launch_root() as endpoint, endpoint.start("echo up; read x") as process:
        assert process.stdout is not None and process.stderr is not None and process.stdin is not None
        assert process.stdout.readline() == b"up\n"
        endpoint.process.kill()
        assert process.wait(DEADLINE) == 255
        assert b"connection" in process.stderr.read().lower()


def test_many_at_once(endpoint: Endpoint) -> None:
    count = 24
    results: list[tuple[int, bytes]] = [(-1, b"")] * count

    def run(number: int) -> None:
        done = endpoint.run(f"cat; exit {number}", input=bytes((number,)) * 300_000)
        results[number] = done.returncode, done.stdout

    threads = [threading.Thread(target=run, args=(number,)) for number in range(count)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert results == [(number, bytes((number,)) * 300_000) for number in range(count)]


# --- who is asked ------------------------------------------------------------------------------------------------


def test_unknown_host(endpoint: Endpoint) -> None:
    command = [str(CAPSULE / "hpccr-rsh"), "hpccr-elsewhere", "true"]
    result = subprocess.run(command, env=endpoint.environment(), capture_output=True, timeout=DEADLINE)
    assert result.returncode == 255
    assert result.stderr.startswith(b"hpccr-rsh: hpccr-elsewhere: ") and result.stderr.count(b"\n") == 1


def test_no_secret(endpoint: Endpoint) -> None:
    result = endpoint.run("true", env={"HPCCR_STEP_SECRET": ""})
    assert result.returncode == 255 and b"HPCCR_STEP_SECRET is not set" in result.stderr


def test_nobody_listens() -> None:
    result = Endpoint(None, free_port()).run("-o", "ConnectTimeout=0.3", "true")
    assert result.returncode == 255 and b"no answer" in result.stderr


def test_waits_for_a_launch_root_that_is_still_starting() -> None:
    port = free_port()
    with Endpoint(None, port).start("echo late") as process:
        with socket.socket() as sock:
            sock.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
            sock.bind(("127.0.0.1", port))
            sock.listen()
            sock.settimeout(DEADLINE)
            first, _ = sock.accept()
            first.close()  # as if it had been killed before it answered: the next try must come by itself
            second, _ = sock.accept()
            second.sendall(b"other thing" * 20)
            assert process.wait(DEADLINE) == 255
            second.close()
        assert process.stderr is not None
        assert b"not a launch root" in process.stderr.read()


def test_secret_is_not_sent_and_a_false_server_is_not_trusted() -> None:
    port = free_port()
    with socket.socket() as sock:
        sock.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        sock.bind(("127.0.0.1", port))
        sock.listen()
        with Endpoint(None, port).start("rm -rf precious") as process:
            peer, _ = sock.accept()
            with peer:
                peer.sendall(b"hpccrsh\x01" + bytes(32))
                received = peer.recv(72, socket.MSG_WAITALL)
                peer.sendall(b"\x01" * 32)
                while data := peer.recv(1000):
                    received += data
            assert process.wait(DEADLINE) == 255
    assert len(received) == 72  # a nonce and a proof, and no request
    assert SECRET.encode() not in received


HOSTS = "127.0.0.1 localhost\n::1 localhost ip6\n# x\n10.90.0.10 hpccr-0\n10.90.0.11\thpccr-1  # one\n"


def test_find_address() -> None:
    assert find_address(HOSTS, "hpccr-1", "hpccr-0") == "10.90.0.11"
    assert find_address(HOSTS, "10.90.0.10", "hpccr-1") == "10.90.0.10"
    assert find_address(HOSTS, "localhost", "hpccr-1") == "10.90.0.11"
    assert find_address("", "localhost", "elsewhere") == "127.0.0.1"
    for name in ("hpccr-2", "hpccr", "one", "10.90.0.12", "x", ""):
        with pytest.raises(Failure, match="is no capsule of this job"):
            find_address(HOSTS, name, "hpccr-0")


def test_invocation() -> None:
    plain = Invocation(["-x", "hpccr-1", '"prog"', "-a", "b c"])
    assert (plain.host, plain.command, plain.null_input) == ("hpccr-1", '"prog" -a b c', False)
    assert plain.connect_timeout == CONNECT_TIMEOUT
    rich = Invocation(
        ["-nl", "me", "-oBatchMode=yes", "-o", "ConnectTimeout=5", "-p22", "me@hpccr-2", "-T", "--", "-c"]
    )
    assert (rich.host, rich.command, rich.null_input, rich.connect_timeout) == ("hpccr-2", "-c", True, 5.0)
    assert Invocation(["--external-launcher", "hpccr-1", "true"]).host == "hpccr-1"
    for bad in ([], ["-x"], ["hpccr-1"], ["-o", "ConnectTimeout=soon", "hpccr-1", "true"]):
        with pytest.raises(Failure):
            Invocation(bad)
