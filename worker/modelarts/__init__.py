"""The ModelArts API: its documents, its calls, signing in, and what its answers mean."""

from worker.modelarts.answers import Answer, Body, Failure, Verdict, VerdictKind, classify
from worker.modelarts.auth import (
    AccessKey,
    Authenticator,
    AuthError,
    Credentials,
    IamUser,
    Token,
    make_authenticator,
)
from worker.modelarts.client import ApiError, ClientOptions, ModelArtsClient, PoolListing
from worker.modelarts.names import Endpoint, validate_pool_name, validate_project_id
from worker.modelarts.pool import (
    Billing,
    Pool,
    UnreadablePoolError,
    UnreadableTagsError,
    node_billing,
    nodes_obstacle,
)
from worker.modelarts.precondition import Precondition, changes

__all__ = [
    "AccessKey",
    "Answer",
    "ApiError",
    "AuthError",
    "Authenticator",
    "Billing",
    "Body",
    "ClientOptions",
    "Credentials",
    "Endpoint",
    "Failure",
    "IamUser",
    "ModelArtsClient",
    "Pool",
    "PoolListing",
    "Precondition",
    "Token",
    "UnreadablePoolError",
    "UnreadableTagsError",
    "Verdict",
    "VerdictKind",
    "changes",
    "classify",
    "make_authenticator",
    "node_billing",
    "nodes_obstacle",
    "validate_pool_name",
    "validate_project_id",
]
