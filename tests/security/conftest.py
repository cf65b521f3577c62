"""The whole of poolsweep as it is set up where it must be safe, once for all tests here.

Redis lets in one user, who may do only what poolsweep needs, behind TLS with a private authority
and client certificates. A worker, a scheduler and an intake run without capabilities, without a
home and in a folder that nothing can be written to, at log level debug, with secrets of every kind.
What they did is looked at by the tests.
"""

from __future__ import annotations

import base64
import contextlib
import functools
import http.server
import itertools
import json
import os
import pickle
import signal
import subprocess
import sys
import threading
import time
import urllib.error
import urllib.request
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any, Final

import psutil
import pytest
import redis as sync_redis
from celery import Celery
from pydantic import SecretStr

from scheduler.intake.broker import QUEUE, TASK
from scheduler.intake.clients import new_token, token_hash
from tests.security.authority import Authority, door
from tests.sweep.conftest import Project, Sandbox, eventually, serving
from tests.worker.conftest import Process
from worker import embedded_redis
from worker.broker import EXECUTE_BATCH, KEY_PREFIX, queue_name
from worker.ledger import keys
from worker.settings import Settings

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator, Sequence

ROOT: Final = Path(__file__).parents[2]
CONFINED: Final = Path(__file__).with_name("confined.py")
NOWHERE: Final = Path("/nonexistent")
"""The home of the image's user, where nothing can be written."""
NO_HOME: Final = Path("/proc/nonexistent")
"""The same for who is root here, and could make the other."""
ACL_FILE: Final = ROOT / "examples" / "redis-users.acl"
PLACEHOLDER: Final = "CHANGE-THIS-PASSWORD"
EVIL: Final = (
    '\x1b[31mred\x1b[0m\x1b]8;;http://x\x07\r\n{"event": "forged"}\n'
    "\u202ebidi\u2066\x9b2J\x00\x08[red][link=http://x]=1+1\ud800"
)
"""What forges lines, colours, links and formulas wherever it is shown as it is."""

PROMPT: Final = {
    "RATE_LIMIT": "0",
    "VERIFY_INTERVAL_S": "0.2",
    "PRECONDITION_MAX_AGE_S": "1",
    "BACKOFF_BASE_S": "0.1",
    "BACKOFF_CAP_S": "0.2",
    "MAX_ATTEMPTS": "2",
    "LOG_LEVEL": "debug",
    "LOG_FORMAT": "json",
}


@dataclass(frozen=True)
class Secrets:
    """What must be seen nowhere. None has a character that any spelling changes."""

    iam_password: str = "s3cret-iam-password-5d1f0c"
    token: str = "s3cret-token-of-the-cloud-77aa"
    ak: str = "S3CRETACCESSKEY0042"
    sk: str = "s3cret-secret-key-91bc"
    redis_password: str = "s3cret-redis-password-e2f4"
    stream_password: str = "s3cret-stream-password-c8d6"
    webhook: str = "s3cret-in-a-clients-webhook-3b9e"
    signing_key: str = "s3cret-signing-key-of-webhooks-60fd"
    channel: str = "s3cret-in-a-policies-channel-1a2b"
    bearer: str = field(default_factory=lambda: new_token()[0])

    def all(self) -> dict[str, str]:
        """Each by its name."""
        return dict(vars(self))


class Receiver:
    """Takes what is posted to it: the paths, in order."""

    def __init__(self) -> None:
        self.paths: list[str] = []
        paths = self.paths

        class Handler(http.server.BaseHTTPRequestHandler):
            def do_POST(self) -> None:
                self.rfile.read(int(self.headers["Content-Length"]))
                paths.append(self.path)
                self.send_response(204)
                self.end_headers()

            def log_message(self, *_: Any) -> None:
                """Nothing."""

        self._server = http.server.ThreadingHTTPServer(("127.0.0.1", 0), Handler)
        self._thread = threading.Thread(target=self._server.serve_forever)
        self._thread.start()
        self.host = f"127.0.0.1:{self._server.server_address[1]}"

    def close(self) -> None:
        """Take no more."""
        self._server.shutdown()
        self._thread.join()
        self._server.server_close()


class GuardedRedis:
    """A Redis with the users of the example, and an append-only file.

    Args:
        folder: where its files are.
        passwords: what the placeholders in the example are replaced by, in their order.
    """

    def __init__(self, folder: Path, *passwords: str) -> None:
        folder.mkdir()
        self.folder = folder
        self.socket = folder / "redis.sock"
        text = ACL_FILE.read_text()
        assert text.count(PLACEHOLDER) == len(passwords)
        for password in passwords:
            text = text.replace(PLACEHOLDER, password, 1)
        # Redis keeps no password, but its hash.
        (folder / "users.acl").write_text(text + "user looker on nopass ~* &* +@all\n")
        options = ["--port", "0", "--unixsocket", "redis.sock", "--save", ""]
        options += ["--appendonly", "yes", "--aclfile", "users.acl"]
        self._process = Process(
            [embedded_redis.find_server_binary(), *options], folder / "redis.log", cwd=folder
        )
        with self.looker() as client:
            eventually(lambda: _answers(client))
            client.acl_save()

    def looker(self) -> sync_redis.Redis:
        """A connection that may do everything."""
        return sync_redis.Redis(
            unix_socket_path=str(self.socket), username="looker", decode_responses=True
        )

    def kill(self) -> None:
        self._process.kill()


def _answers(client: sync_redis.Redis) -> bool:
    try:
        return bool(client.ping())
    except sync_redis.ConnectionError:
        return False


@dataclass(frozen=True)
class Ended:
    """A command that has ended."""

    code: int
    out: str
    err: str


@dataclass
class Scene:
    """Where it all happens.

    Attributes:
        folder: `logs/` has what was written, `config/` what is read, secrets in files too.
        redis: the server.
        authority: who vouches for it, and for its clients.
        port: where it is reached with TLS.
        sandbox: the cloud.
        receiver: of notices.
        secrets: what must be seen nowhere.
        by_iam, by_token, by_key: projects, by how poolsweep signs in to them.
        processes: the worker, the scheduler and the intake, by name.
        commands: the command lines of all processes that were seen.
        opened: the files that these processes had open for writing.
        outputs: what commands printed.
        journal: the calls that the cloud had.
        redis_while_running, redis_afterwards: all that Redis held.
        refused_by_redis: what it did not let its users do.
    """

    folder: Path
    redis: GuardedRedis
    authority: Authority
    port: int
    sandbox: Sandbox
    receiver: Receiver
    secrets: Secrets
    by_iam: Project
    by_token: Project
    by_key: Project
    processes: dict[str, Process] = field(default_factory=dict)
    commands: list[str] = field(default_factory=list)
    outputs: list[str] = field(default_factory=list)
    journal: list[tuple[str, str]] = field(default_factory=list)
    refused_by_redis: list[Any] = field(default_factory=list)
    redis_while_running: list[str] = field(default_factory=list)
    redis_afterwards: list[str] = field(default_factory=list)
    opened: list[str] = field(default_factory=list)

    @property
    def logs(self) -> Path:
        return self.folder / "logs"

    @property
    def config(self) -> Path:
        return self.folder / "config"

    @property
    def read_only(self) -> Path:
        return self.folder / "read-only"

    @property
    def pwned(self) -> Path:
        """Is there if a message was executed."""
        return self.folder / "tmp" / "pwned"

    @property
    def redis_url(self) -> str:
        return f"rediss://poolsweep:{self.secrets.redis_password}@localhost:{self.port}/0"

    def redis_settings(self, **changes: Any) -> Settings:
        """How Redis is reached."""
        given: dict[str, Any] = {
            "redis_url": SecretStr(self.redis_url),
            "redis_ca_cert": self.authority.file,
            "redis_client_cert": self.config / "client.pem",
            "redis_client_key": self.config / "client.key",
        }
        return Settings(**given | changes)

    def environment(self, **settings: str) -> dict[str, str]:
        """The variables of a process."""
        secrets = self.secrets
        ours = {
            **PROMPT,
            "REDIS_URL": self.redis_url,
            "REDIS_CA_CERT": str(self.authority.file),
            "REDIS_CLIENT_CERT": str(self.config / "client.pem"),
            "REDIS_CLIENT_KEY": str(self.config / "client.key"),
            "ENDPOINT": self.sandbox.url,
            "IAM_ENDPOINT": self.sandbox.url,
            "IAM_USER": "sandbox-user",
            "IAM_PASSWORD": secrets.iam_password,
            "IAM_DOMAIN": "sandbox-domain",
            "POLICIES_FILE": str(self.config / "policies.yaml"),
            "CLIENTS_FILE": str(self.config / "clients.yaml"),
            "INTAKE_PORT": "0",
            **settings,
        }
        return {
            **{f"POOLSWEEP_{name}": value for name, value in ours.items()},
            "HOME": str(NO_HOME),
            "TMPDIR": str(self.folder / "tmp"),
            "CLOUD_TOKEN": secrets.token,
            "CHANNEL_URL": f"http://{self.receiver.host}/{secrets.channel}",
            "SIGNING_KEY": secrets.signing_key,
        }

    def command(self, *arguments: str) -> list[str]:
        """The command line of a command of poolsweep's."""
        return [
            *(sys.executable, "-I", str(CONFINED)),
            *(sys.executable, "-m", "scheduler.cli", *arguments),
        ]

    def start(self, name: str, *arguments: str) -> None:
        """Start a process that goes on."""
        self.processes[name] = Process(
            self.command(name, *arguments),
            self.logs / f"{name}.log",
            env=self.environment(),
            cwd=self.read_only,
        )

    def run(self, *arguments: str, **settings: str) -> Ended:
        """Run a command to its end."""
        with subprocess.Popen(
            self.command(*arguments),
            env={**os.environ, **self.environment(**settings)},
            cwd=self.read_only,
            stdin=subprocess.DEVNULL,
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            text=True,
        ) as process:
            out, err = process.communicate(timeout=60)
        self.outputs += [out, err]
        return Ended(process.returncode, out, err)

    def intake_url(self) -> str:
        """Where the intake serves, once it takes requests."""
        intake = self.processes["intake"]

        def ready() -> list[dict[str, Any]]:
            for name, process in self.processes.items():
                assert process._popen.poll() is None, (name, process.text)
            return intake.events("intake_ready")

        url = str(eventually(ready)[0]["url"])
        eventually(lambda: _is_ready(url))
        return url

    def ask(self, url: str, document: Any, bearer: str) -> tuple[int, Any]:
        """Ask the intake by HTTP. Returns the status, and what is answered."""
        request = urllib.request.Request(  # noqa: S310 - a loopback address
            f"{url}/v1/runs",
            data=json.dumps(document).encode(),
            headers={"Content-Type": "application/json", "Authorization": f"Bearer {bearer}"},
        )
        try:
            with urllib.request.urlopen(request, timeout=30) as answer:  # noqa: S310
                return answer.status, json.loads(answer.read())
        except urllib.error.HTTPError as error:
            with error:
                return error.code, json.loads(error.read())

    def look_at_processes(self) -> None:
        """Note the command lines of all processes, and what ours have open for writing."""
        for process in psutil.process_iter():
            with contextlib.suppress(psutil.Error):
                self.commands.append("\n".join(process.cmdline()))
        for name in self.processes:
            found = psutil.Process(self.processes[name].pid)
            for each in found.open_files():
                if getattr(each, "mode", "r") != "r":
                    self.opened.append(each.path)

    def stop(self) -> dict[str, int]:
        """Stop the processes in order. Returns their exit statuses."""
        for process in self.processes.values():
            process.send(signal.SIGTERM)
        statuses = {}
        for name, process in self.processes.items():
            eventually(functools.partial(_has_ended, process))
            statuses[name] = int(process._popen.returncode)
        return statuses


def _has_ended(process: Process) -> bool:
    return process._popen.poll() is not None


def _is_ready(url: str) -> bool:
    try:
        with urllib.request.urlopen(f"{url}/readyz", timeout=5) as answer:  # noqa: S310
            return bool(answer.status == 200)
    except OSError:
        return False


def dump(client: sync_redis.Redis) -> list[str]:
    """Every key of a Redis, with all that is in it."""
    read: dict[str, Callable[[str], Any]] = {
        "string": client.get,
        "hash": client.hgetall,
        "list": lambda key: client.lrange(key, 0, -1),
        "set": client.smembers,
        "zset": lambda key: client.zrange(key, 0, -1, withscores=True),
        "stream": client.xrange,
        "none": lambda _: None,
    }
    found = [str(key) for key in client.scan_iter(count=1_000)]
    return [f"{key}\n{read[str(client.type(key))](key)!r}" for key in found]


def spellings(secret: str) -> set[str]:
    """A secret as it is, and as it stands in base64 wherever in a text it begins."""
    raw = secret.encode()
    found = {secret}
    for shift in range(3):
        text = base64.b64encode(b"\0" * shift + raw).decode().rstrip("=")
        # Without what depends on the neighbours.
        found.add(text[(0, 2, 3)[shift] : len(text) - 2])
    return found


def seen_in(texts: Sequence[str], secret: str) -> list[str]:
    """The places where a secret is, shortened."""
    return [
        text[max(0, at - 150) : at + 40]
        for text in texts
        for each in spellings(secret)
        if (at := text.find(each)) >= 0
    ]


def _write_config(scene: Scene) -> None:
    projects = {
        "iam": {"id": scene.by_iam.project},
        "token": {
            "id": scene.by_token.project,
            "credentials": {"token": {"env": "CLOUD_TOKEN"}},
        },
        "key": {
            "id": scene.by_key.project,
            "credentials": {
                "ak": {"file": str(scene.config / "ak")},
                "sk": {"file": str(scene.config / "sk")},
            },
        },
    }
    idle = {"all": [{"idle": "0s"}, {"utilisation": {"of": "gpu", "below": 50, "over": "1h"}}]}
    policies = {
        "projects": projects,
        "notifications": {"ops": {"url": {"env": "CHANNEL_URL"}}},
        "policies": {
            "nightly": {
                "projects": ["iam"],
                "match": {"any": [{"expired": {"tag": "expires-at"}}, idle]},
                "schedule": "* * * * * *",
                "brakes": {"max_percent": 100},
                "notify": ["ops"],
            }
        },
    }
    (scene.config / "policies.yaml").write_text(json.dumps(policies))
    (scene.config / "ak").write_text(scene.secrets.ak)
    (scene.config / "sk").write_text(scene.secrets.sk)
    clients = {
        "ci": {
            "tokens": [token_hash(scene.secrets.bearer)],
            "ways": ["http", "celery", "stream"],
            "projects": [scene.by_token.project, scene.by_key.project],
            "brakes": {"max_percent": 100},
            "webhooks": {
                "hosts": [scene.receiver.host],
                "allow_private": True,
                "secret": {"env": "SIGNING_KEY"},
            },
        }
    }
    (scene.config / "clients.yaml").write_text(json.dumps({"clients": clients}))


def sender(scene: Scene, username: str, password: str) -> Celery:
    """A Celery app as another system has one."""
    app = Celery(broker=f"redis+socket://{username}:{password}@{scene.redis.socket}")
    app.conf.broker_transport_options = {"global_keyprefix": KEY_PREFIX}
    return app


class Bomb:
    """What makes a file when it is unpickled."""

    def __init__(self, path: Path) -> None:
        self._path = path

    def __reduce__(self) -> tuple[Any, ...]:
        return Path.touch, (self._path,)


def _send_what_executes(scene: Scene) -> None:
    """Messages that run code wherever a serializer other than JSON is taken."""
    path = f"!!python/object/apply:pathlib.Path [{scene.pwned}]"
    yaml = f"!!python/object/apply:pathlib.Path.touch\n- {path}"
    bodies = {
        "application/x-python-serialize": pickle.dumps(([], {"run_id": Bomb(scene.pwned)}, {})),
        "application/x-yaml": yaml.encode(),
    }
    queues = {queue_name(scene.sandbox.url): EXECUTE_BATCH, QUEUE: TASK}
    with scene.redis.looker() as client:
        for (kind, body), (queue, task) in itertools.product(bodies.items(), queues.items()):
            message = {
                "body": base64.b64encode(body).decode(),
                "content-type": kind,
                "content-encoding": "binary",
                "headers": {"task": task, "id": f"{kind}-{queue}", "lang": "py"},
                "properties": {
                    "body_encoding": "base64",
                    "delivery_tag": f"{kind}-{queue}",
                    "delivery_info": {"exchange": "", "routing_key": queue},
                },
            }
            client.lpush(KEY_PREFIX + queue, json.dumps(message))
    for name in ("worker", "intake"):
        # Both say that they refuse it.
        eventually(functools.partial(_refuses_both, scene, name))


def _refuses_both(scene: Scene, name: str) -> bool:
    process = scene.processes[name]
    refused = process.events("message_refused")
    said = process.text.count("Received invalid task message: Refusing")
    return said == 2 or len([e for e in refused if "untrusted" in e["reason"]]) == 2


def _act(scene: Scene) -> None:
    """Delete pools by every way."""
    secrets, token, key = scene.secrets, scene.by_token, scene.by_key
    hook = f"http://{scene.receiver.host}/hook/{secrets.webhook}"
    url = scene.intake_url()

    def asks(project: Project, *pools: str, **more: Any) -> dict[str, Any]:
        return {"targets": [{"project_id": project.project, "pools": list(pools)}], **more}

    oddly_named = token.add(2)
    for each in oddly_named:
        token.change(each, labels={"os.modelarts/name": EVIL})
    status, made = scene.ask(url, asks(token, *oddly_named, webhook=hook), secrets.bearer)
    assert status == 202
    assert scene.ask(url, asks(token, *oddly_named), secrets.bearer + "x")[0] == 401
    request = {"client": "ci", "request": asks(key, *key.add(1), webhook=hook)}
    with sender(scene, "poolsweep", secrets.redis_password) as app:
        app.send_task(TASK, kwargs=request, queue=QUEUE)
    entry = {"client": "ci", "request": json.dumps(asks(token, *token.add(1), webhook=hook))}
    refused = {**entry, "client": "nobody"}
    with sync_redis.Redis(
        unix_socket_path=str(scene.redis.socket),
        username="portal",
        password=secrets.stream_password,
    ) as portal:
        portal.xadd(keys.STREAM, entry)
        portal.xadd(keys.STREAM, refused)
    scene.look_at_processes()
    _send_what_executes(scene)
    scene.by_iam.add(1)
    scene.by_iam.add(1, tags={})  # what decides is its activity
    key.add(1, behaviour="doomed")
    doomed = [name for name in key.there() if key.pools()[name]["behaviour"] == "doomed"]
    ended = scene.run("delete", "--project", "key", "--yes", "--reason", "the whole way", *doomed)
    assert ended.code == 1, ended.err
    eventually(lambda: len([path for path in scene.receiver.paths if "/hook/" in path]) == 3)
    eventually(lambda: any(secrets.channel in path for path in scene.receiver.paths))
    eventually(lambda: not scene.by_iam.there())
    for arguments in (
        ("plan", str(scene.config / "policies.yaml"), "--json"),
        ("results", made["run_id"], "--csv"),
        ("results", made["run_id"], "--json"),
    ):
        ended = scene.run(*arguments)
        assert ended.code == 0, ended.err


@pytest.fixture(scope="session")
def scene(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Scene]:
    """The scene, when all is over: only Redis and the cloud still run."""
    folder = tmp_path_factory.mktemp("scene")
    for name in ("logs", "config", "read-only", "tmp"):
        (folder / name).mkdir()
    (folder / "read-only").chmod(0o555)
    secrets = Secrets()
    cloud = {name: getattr(secrets, name) for name in ("iam_password", "token", "ak", "sk")}
    with contextlib.ExitStack() as stack:
        redis = GuardedRedis(folder / "redis", secrets.redis_password, secrets.stream_password)
        stack.callback(redis.kill)
        authority = Authority(folder / "config")
        authority.issue("client")
        port = stack.enter_context(door(redis.socket, authority, "localhost"))
        sandbox = stack.enter_context(serving(**cloud))
        receiver = Receiver()
        stack.callback(receiver.close)
        made = Scene(
            folder,
            redis,
            authority,
            port,
            sandbox,
            receiver,
            secrets,
            by_iam=sandbox.project(),
            by_token=sandbox.project(),
            by_key=sandbox.project(),
        )
        _write_config(made)
        for name in ("worker", "scheduler", "intake"):
            made.start(name)
            stack.callback(made.processes[name].kill)
        before = time.monotonic()
        _act(made)
        with redis.looker() as client:
            made.redis_while_running = dump(client)
        statuses = made.stop()
        assert set(statuses.values()) == {0}, statuses
        with redis.looker() as client:
            made.redis_afterwards = dump(client)
            made.refused_by_redis = client.acl_log()
        made.journal = [
            (call.method, call.path) for call in sandbox.running.server.calls if call.at >= before
        ]
        yield made
