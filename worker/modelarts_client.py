"""The API client as the settings and the projects want it."""

from __future__ import annotations

from importlib.metadata import version
from typing import TYPE_CHECKING

from worker.limiter import Limiter
from worker.modelarts import Endpoint
from worker.modelarts.auth import ProjectAuthenticator, make_authenticator
from worker.modelarts.client import ClientOptions, ModelArtsClient
from worker.settings import SettingsError

if TYPE_CHECKING:
    from collections.abc import Callable

    from redis.asyncio import Redis

    from worker.modelarts import Answer
    from worker.projects import Directory

SPARE_CONNECTIONS = 20
"""For reads beside the DELETE calls."""


def make_client(
    directory: Directory,
    redis: Redis,
    endpoint: str,
    *,
    observe: Callable[[Answer], None] | None = None,
) -> ModelArtsClient:
    """A client for one endpoint; each project signs in with its own credentials, if it has any.

    Args:
        directory: the settings, and the projects that have something of their own.
        redis: where workers share an IAM token, sealed.
        endpoint: the base URL of the API.
        observe: is told what came of each call.

    Raises:
        SettingsError: credentials are missing or not usable.
    """
    settings = directory.settings
    options = ClientOptions(
        connect_timeout_s=settings.connect_timeout_s,
        total_timeout_s=settings.total_timeout_s,
        # One for each job that the process can hold: no project waits for another's.
        max_connections=settings.worker_batches * settings.batch_size + SPARE_CONNECTIONS,
        request_type=settings.request_type,
        user_id=settings.user_id,
        user_agent=f"poolsweep/{version('poolsweep')}",
    )
    own = {
        project_id: make_authenticator(credentials, redis)
        for project_id in directory.at(endpoint)
        if (credentials := directory.credentials(project_id)) is not None
    }
    try:
        others = make_authenticator(settings.credentials, redis)
    except SettingsError:
        if not own:
            raise
        others = None
    return ModelArtsClient(
        Endpoint(endpoint), ProjectAuthenticator(own, others), options, observe=observe
    )


def make_limiter(directory: Directory, redis: Redis, endpoint: str) -> Limiter:
    """The rate limits of one endpoint's projects.

    Args:
        directory: the settings, and the projects that have something of their own.
        redis: a connection that decodes responses.
        endpoint: the base URL of the API.
    """
    settings = directory.settings
    return Limiter(
        redis,
        endpoint=endpoint,
        rate=settings.rate_limit,
        burst=settings.burst,
        own={project_id: directory.quota(project_id) for project_id in directory.at(endpoint)},
    )
