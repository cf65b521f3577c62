"""The ModelArts API: its documents, and what its answers mean.

Its calls and signing in are in `client` and `auth`, to be imported from there: they take an HTTP
library and cryptography along, which many commands have no use for.
"""

from worker.modelarts.answers import (
    Answer,
    ApiError,
    Body,
    Failure,
    Verdict,
    VerdictKind,
    classify,
)
from worker.modelarts.credentials import AccessKey, AuthError, Credentials, IamUser, Token
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
    "Billing",
    "Body",
    "Credentials",
    "Endpoint",
    "Failure",
    "IamUser",
    "Pool",
    "Precondition",
    "Token",
    "UnreadablePoolError",
    "UnreadableTagsError",
    "Verdict",
    "VerdictKind",
    "changes",
    "classify",
    "node_billing",
    "nodes_obstacle",
    "validate_pool_name",
    "validate_project_id",
]
