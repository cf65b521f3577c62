"""What to do about a job that failed: pure.

Source: worker/modelarts/answers.py for what an answer means; the API document, errors.
"""

from __future__ import annotations

from typing import Final

RECORD_DAMAGED: Final = "record_damaged"
"""Stands for the code of the last call where the job's record does not tell it."""
_BY_CODE = {
    RECORD_DAMAGED: "Whether a call was made is not known: look for the pool, and plan anew.",
    "tls": "Check the endpoint, or a proxy in between: its certificate was not accepted.",
    "connect": "Check the endpoint and the network between the workers and the cloud, then retry.",
    "timeout": "Check the network between the workers and the cloud, then retry.",
    "reset": "Check the network between the workers and the cloud, then retry.",
    "oversized": "Check the endpoint: the answer was not the API's.",
    "invalid_answer": "Check the endpoint: the answer was not the API's.",
    "sign_in_failed": "Check the credentials, and the IAM endpoint if a user's password is used.",
    "lease_expired": "Workers were lost during the call: look at their logs, then retry.",
}
_GATEWAY = ("APIG.", "APIGW.")


def remedy(status: int, code: str) -> str:
    """What to do about failed jobs, in a sentence or two.

    Args:
        status: the HTTP status of the last call; 0: there was no answer, or no call.
        code: the cloud's error code or the kind of transport failure; empty: neither.
    """
    code = code.rpartition(" ")[2]  # a read's has the method before it
    match status:
        case 0 if code in _BY_CODE:
            return _BY_CODE[code]
        case 0 if code:
            return "A defect of the worker: look at its log for «job_crashed», and report it."
        case 0:
            return "No call was made: see the reason."
        case 401:
            return "Check the credentials: they were refused, also after signing in anew."
        case 403:
            return (
                "Check that the credentials are for this project and allow modelarts:pool:list, "
                ":get and :delete."
            )
        case 404 if code.startswith(_GATEWAY):
            return "Check the endpoint and its region: the gateway knows no such API."
        case 404:
            return "Check the endpoint, the project and a proxy in between: not the API's answer."
        case 409:
            return "See what keeps the pool busy, such as a change of its size, then retry."
        case 429:
            return "Lower POOLSWEEP_RATE_LIMIT or the workers of other systems, then retry."
        case status if 200 <= status <= 299 and not code:
            return (
                "The cloud accepted the deletion and did not finish it in time: look at the pool "
                "in the console, then retry or ask the cloud's support."
            )
        case status if status >= 500:
            return (
                "The cloud has a fault: retry later; if it stays, give the request id to the "
                "cloud's support."
            )
        case _:
            return "See the reason: it has the cloud's own words."
