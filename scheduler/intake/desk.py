"""Takes requests in: the same checks and the same record, whichever way they come."""

from __future__ import annotations

import json
from datetime import UTC, datetime
from typing import TYPE_CHECKING

import structlog

from scheduler.dispatch import Order
from scheduler.intake.request import Fault, Request, RequestError, Way
from scheduler.intake.requests import Filed, Requests
from scheduler.intake.webhooks import check
from worker.ledger import Source, new_run_id

if TYPE_CHECKING:
    from collections.abc import Sequence

    from scheduler.intake.clients import Client
    from worker.ledger import Ledger
    from worker.projects import Directory

LONGEST_KEY = 255

log = structlog.get_logger(__name__)


class NotAllowedError(PermissionError):
    """A client may not ask for this; the text is one line.

    Attributes:
        faults: what it may not.
    """

    def __init__(self, faults: Sequence[Fault]) -> None:
        self.faults = list(faults)
        super().__init__("; ".join(f"{fault.pointer}: {fault.detail}" for fault in faults))


class Desk:
    """Takes requests in.

    Args:
        requests: where they wait to be planned.
        ledger: where their runs are seen from then on.
        directory: how projects are reached.
    """

    def __init__(self, requests: Requests, ledger: Ledger, directory: Directory) -> None:
        self._requests = requests
        self._ledger = ledger
        self._directory = directory

    async def accept(
        self, request: Request, client: Client, way: Way, *, key: str | None = None
    ) -> str:
        """Accept a request, or say why not. Accepted, it survives whatever dies.

        Args:
            request: what is asked for.
            client: who asks; who they say they are has been checked.
            way: how it came in.
            key: their idempotency key, up to 255 characters; None: every request is another.

        Returns:
            The id of its run, which is in the ledger: the same again for the same key.

        Raises:
            NotAllowedError: the client may not ask for this, or not this way.
            RequestError: it cannot be carried out as one run.
            KeyReusedError: the key was used for something else.
            RedisError: it may or may not be accepted; with a key, repeating it is safe.
        """
        filed = Filed(
            run_id=new_run_id(datetime.now(UTC)),
            client=client.name,
            way=way,
            endpoint=self._weigh(request, client, way),
            request=request,
            accepted_ms=await self._ledger.now_ms(),
        )
        run_id = await self._requests.accept(filed, key=key)
        # Whoever plans it does this too; but it is to be seen before it is acknowledged. A run that
        # was planned long ago, and whose records have aged out, must not come back to wait.
        if run_id == filed.run_id or await self._requests.waits(run_id):
            await self._ledger.queue(order_of(filed).new_run(run_id, request.projects))
        log.info(
            "request_accepted" if run_id == filed.run_id else "request_repeated",
            run_id=run_id,
            client=client.name,
            way=str(way),
            projects=request.projects,
            dry_run=request.dry_run,
        )
        return run_id

    def _weigh(self, request: Request, client: Client, way: Way) -> str:
        """The endpoint that a request's projects are at."""
        faults = may_not(request, client)
        if way not in client.ways:
            faults.insert(0, Fault("", f"client {client.name} may not send requests by {way}"))
        if faults:
            raise NotAllowedError(faults)
        endpoints = {self._directory.endpoint(each).url for each in request.projects}
        if len(endpoints) > 1:
            raise RequestError(
                [Fault("/targets", "the projects are at different endpoints; ask for each alone")]
            )
        return endpoints.pop()


def may_not(request: Request, client: Client) -> list[Fault]:
    """What of a request its client may not ask for: pure.

    Args:
        request: what is asked for.
        client: who asks.
    """
    faults = [
        Fault(
            f"/targets/{place}/project_id",
            f"client {client.name} may delete nothing in project {project_id}",
        )
        for place, project_id in enumerate(request.projects)
        if project_id not in client.projects
    ]
    if request.webhook is not None and (why := check(request.webhook, client)):
        faults.append(Fault("/webhook", why))
    return faults


def order_of(filed: Filed) -> Order:
    """The run that an accepted request asks for, apart from its brakes."""
    request = filed.request
    selectors = {
        target.project_id: target.selector.model_dump(
            mode="json", by_alias=True, exclude_unset=True
        )
        for target in request.targets
        if target.selector is not None
    }
    return Order(
        endpoint=filed.endpoint,
        source=Source.INTAKE,
        requester=request.requester or filed.client,
        reason=request.reason,
        verify=request.verify,
        run_id=filed.run_id,
        client=filed.client,
        selector=json.dumps(selectors) if selectors else "",
        dry_run=request.dry_run,
    )
