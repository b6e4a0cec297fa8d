"""/admin/usage: what requests used, from the state database."""

from collections.abc import Callable

import msgspec
from fastapi import FastAPI, HTTPException
from fastapi.responses import Response

from gateway.observability.usage import UsageRecorder
from gateway.observability.usage_report import DEFAULT_BY, DEFAULT_SINCE, parse_query, usage_report
from serving.errors import StateAway, TooMuchUsage


def add_usage(app: FastAPI, recorder: UsageRecorder | None, wall_clock: Callable[[], float]) -> None:
    """Add the route; without a recorder it says why there is nothing."""

    @app.get("/admin/usage", response_class=Response, responses={400: {}, 404: {}, 503: {}})
    async def usage(by: str = DEFAULT_BY, since: str = DEFAULT_SINCE, until: str | None = None) -> Response:
        """Requests, tokens, seconds and external cost of all workers, by `key`, `alias`, `precision`, `day`, `hour`.

        `since` and `until` are ages (`6h`, `1d`) or times of ISO 8601; whole hours count. What this worker has counted
        is included, what others have counted is at most 10 s old.
        """
        if recorder is None:
            raise HTTPException(404, "usage is not recorded: gateway.usage_days is 0")
        try:
            query = parse_query(by, since, until, wall_clock())
            groups = await recorder.grouped(query.by, query.since_hour, query.until_hour)
        except (ValueError, TooMuchUsage) as error:
            raise HTTPException(400, str(error)) from error
        except StateAway as away:
            raise HTTPException(503, f"{away}; usage is kept in memory until it is back") from away
        body = msgspec.json.encode(usage_report(query, groups))
        return Response(body, headers={"content-type": "application/json"})
