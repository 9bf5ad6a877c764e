"""REST under /api/v1, the stream of events, health, readiness and metrics."""

import asyncio
from collections.abc import AsyncIterable, AsyncIterator, Callable, Sequence
from dataclasses import dataclass
from typing import Annotated, Literal

from fastapi import APIRouter, Depends, FastAPI, Header, HTTPException, Query, Request, Response
from fastapi.exceptions import RequestValidationError
from fastapi.responses import JSONResponse
from fastapi.sse import EventSourceResponse, ServerSentEvent
from starlette.exceptions import HTTPException as StarletteHTTPException

from app.metrics import Metrics
from app.security import here_only, near_only
from app.store import CallRecord, Change, Store, StoreFault, Subscription, TranscriptLine

EVENTS_AT_ONCE = 500

CODES = {
    400: "bad_request",
    403: "forbidden",
    404: "not_found",
    405: "method_not_allowed",
    413: "too_large",
    422: "invalid_request",
    503: "unavailable",
}


@dataclass(frozen=True, slots=True)
class Readiness:
    """Whether another call can be taken. Personas with faults do not stop one: those loaded before go on.

    `engine_reason` says why the engine takes none, all rows being in use apart; "" if it does.
    """

    engine: str
    engine_ready: bool
    rows: int
    rows_free: int
    store_fault: str = ""
    persona_faults: Sequence[str] = ()
    engine_reason: str = ""

    @property
    def reasons(self) -> list[str]:
        unready = "" if self.engine_ready else f"the {self.engine} engine is not ready"
        return [reason for reason in (self.engine_reason or unready, self.store_fault) if reason]

    @property
    def warnings(self) -> list[str]:
        full = self.engine_ready and not self.rows_free
        taken = f"all {self.rows} row{'s are' if self.rows > 1 else ' is'} taken: another caller hears busy"
        return [*([taken] if full else []), *self.persona_faults]


@dataclass(frozen=True, slots=True)
class Health:
    status: Literal["alive"]


@dataclass(frozen=True, slots=True)
class Ready:
    """`reasons` say why calls cannot be served well now; `warnings` are to be looked after, but stop no call."""

    ready: bool
    reasons: list[str]
    warnings: list[str]
    engine: str
    rows: int
    rows_free: int


@dataclass(frozen=True, slots=True)
class CallPage:
    """Newest first. `next` goes into `before` for the page after this one; null on the last."""

    calls: list[CallRecord]
    next: str | None


@dataclass(frozen=True, slots=True)
class TranscriptReply:
    call_id: str
    lines: list[TranscriptLine]


@dataclass(frozen=True, slots=True)
class ErrorBody:
    code: str
    message: str


@dataclass(frozen=True, slots=True)
class ErrorReply:
    """What every refusal and failure looks like."""

    error: ErrorBody


def api_router(store: Store, readiness: Callable[[], Readiness], metrics: Metrics) -> APIRouter:
    """All of it. Add `one_error_shape(app)` to the same app; errors are documented in that shape."""
    router = APIRouter()
    router.include_router(_status_router(readiness, metrics))
    router.include_router(_calls_router(store))
    router.include_router(_events_router(store))
    return router


def one_error_shape(app: FastAPI) -> None:
    """Answer every HTTPException, malformed request and store fault of this app as an ErrorReply."""

    @app.exception_handler(StarletteHTTPException)
    async def refused(_request: Request, error: StarletteHTTPException) -> Response:
        return _error(error.status_code, str(error.detail), error.headers)

    @app.exception_handler(RequestValidationError)
    async def malformed(_request: Request, error: RequestValidationError) -> Response:
        faults = [f"{'.'.join(str(part) for part in fault['loc'])}: {fault['msg']}" for fault in error.errors()]
        return _error(422, "; ".join(faults))

    @app.exception_handler(StoreFault)
    async def unreadable(_request: Request, error: StoreFault) -> Response:
        return _error(503, str(error))


def _error(status: int, message: str, headers: object = None) -> Response:
    body = {"error": {"code": CODES.get(status, "error"), "message": message}}
    return JSONResponse(body, status, headers=dict(headers) if isinstance(headers, dict) else None)


def _documented(*statuses: int) -> dict[int | str, dict[str, object]]:
    return {status: {"model": ErrorReply} for status in statuses}


def _status_router(readiness: Callable[[], Readiness], metrics: Metrics) -> APIRouter:
    router = APIRouter(tags=["status"])

    @router.get("/health")
    async def health() -> Health:
        """The process is alive and its event loop turns."""
        return Health("alive")

    @router.get("/ready", responses={503: {"model": Ready, "description": "Calls cannot be served well now."}})
    async def ready(response: Response) -> Ready:
        """Whether calls can be taken, and if not, why. All rows being in use is no reason: callers hear busy."""
        now = readiness()
        response.status_code = 503 if now.reasons else 200
        return Ready(not now.reasons, now.reasons, now.warnings, now.engine, now.rows, now.rows_free)

    @router.get(
        "/metrics",
        dependencies=[Depends(near_only)],
        response_class=Response,
        responses={200: {"content": {"text/plain": {"schema": {"type": "string"}}}}, **_documented(403)},
    )
    def metrics_text() -> Response:
        """Prometheus's text format. For this machine and its private network."""
        return Response(metrics.text(), media_type=metrics.content_type)

    return router


def _calls_router(store: Store) -> APIRouter:
    router = APIRouter(
        prefix="/api/v1", tags=["calls"], dependencies=[Depends(here_only)], responses=_documented(403, 422, 503)
    )

    def known(call_id: str) -> CallRecord:
        call = store.call(call_id)
        if call is None:
            raise HTTPException(404, f"there is no call {call_id}")
        return call

    Known = Annotated[CallRecord, Depends(known)]

    @router.get("/calls")
    def calls(
        limit: Annotated[int, Query(ge=1, le=200)] = 50,
        before: Annotated[str | None, Query(description="`next` of the page before")] = None,
        live: Annotated[bool | None, Query(description="true: calls that are up; false: ended ones")] = None,
    ) -> CallPage:
        """Calls, newest first, page by page."""
        last = None if before is None else store.call(before)
        if before is not None and last is None:
            raise HTTPException(422, f"query.before: there is no call {before}; `next` of the page before is right")
        found = store.calls(limit + 1, last, live)
        return CallPage(found[:limit], found[limit - 1].id if len(found) > limit else None)

    @router.get("/calls/{call_id}", responses=_documented(404))
    def call(call: Known) -> CallRecord:
        return call

    @router.get("/calls/{call_id}/transcript", responses=_documented(404))
    def transcript(call: Known) -> TranscriptReply:
        """What both sides said, in the order it began. Times are seconds on the call's clock."""
        return TranscriptReply(call.id, store.transcript(call.id))

    return router


def _events_router(store: Store) -> APIRouter:
    router = APIRouter(prefix="/api/v1", tags=["calls"], dependencies=[Depends(here_only)])

    @router.get("/events", response_class=EventSourceResponse, responses=_documented(403, 422))
    async def events(
        last_event_id: Annotated[int | None, Header(ge=0, description="sent by browsers when they reconnect")] = None,
    ) -> AsyncIterable[ServerSentEvent]:
        """Changes as they are committed, as server-sent events whose data is JSON with `call_id`.

        `hello` comes first, and again when the client was too slow: nothing is missed from there on, read afresh
        what you show. `call.started`, `call.answered`, `call.ended` and what else happens in a call carry an id;
        with Last-Event-ID all since that one are sent again. `transcript.updated` is a line as it now is, and
        replaces the one with its number.
        """
        with store.feed.subscribe() as changes:
            async for change in changes_since(store, last_event_id, changes):
                event_id = None if change.event_id is None else str(change.event_id)
                yield ServerSentEvent(data={"call_id": change.call_id} | change.data, event=change.type, id=event_id)

    return router


async def changes_since(store: Store, event_id: int | None, changes: Subscription) -> AsyncIterator[Change]:
    """The first `hello`, what was stored after `event_id`, then what comes; no stored event twice."""
    following = aiter(changes)
    async for change in following:
        yield change
        break
    sent = 0
    while event_id is not None:
        missed = await asyncio.to_thread(store.events_after, max(event_id, sent), EVENTS_AT_ONCE)
        for event in missed:
            yield Change(event.type, event.call_id, event.data, event.id)
            sent = event.id
        if len(missed) < EVENTS_AT_ONCE:
            break
    async for change in following:
        if change.event_id is None or change.event_id > sent:
            yield change
