"""The API client as the settings want it."""

from __future__ import annotations

from importlib.metadata import version
from typing import TYPE_CHECKING

from worker.modelarts import ClientOptions, ModelArtsClient, make_authenticator

if TYPE_CHECKING:
    from redis.asyncio import Redis

    from worker.settings import Settings

SPARE_CONNECTIONS = 20
"""For reads beside the DELETE calls."""


def make_client(settings: Settings, redis: Redis) -> ModelArtsClient:
    """A client for the settings' endpoint and credentials.

    Args:
        settings: endpoint, credentials, times.
        redis: where workers share an IAM token, sealed.

    Raises:
        SettingsError: the endpoint or the credentials are missing or not usable.
    """
    options = ClientOptions(
        connect_timeout_s=settings.connect_timeout_s,
        total_timeout_s=settings.total_timeout_s,
        max_connections=settings.in_flight + SPARE_CONNECTIONS,
        request_type=settings.request_type,
        user_id=settings.user_id,
        user_agent=f"poolsweep/{version('poolsweep')}",
    )
    authenticator = make_authenticator(settings.credentials, redis)
    return ModelArtsClient(settings.api_endpoint, authenticator, options)
