"""The console's pages, rendered on the server: the live board and a call's transcript."""

from collections.abc import Callable, Coroutine
from http import HTTPStatus
from pathlib import Path
from typing import Any

from fastapi import APIRouter, Depends, HTTPException, Request, Response
from fastapi.responses import HTMLResponse
from fastapi.routing import APIRoute
from fastapi.staticfiles import StaticFiles
from jinja2 import Environment, FileSystemLoader, StrictUndefined

from app.console.contexts import BoardPage, CallPage, ErrorPage, board_page, call_page
from app.security import here_only
from app.store import Store, StoreFault

HERE = Path(__file__).parent
LIVE_CALLS = 200
FINISHED_CALLS = 50
LINES_ON_BOARD = 6

HEADERS = {
    "Content-Security-Policy": "default-src 'self'; base-uri 'none'; form-action 'self'; frame-ancestors 'none'",
    "X-Content-Type-Options": "nosniff",
    "Referrer-Policy": "same-origin",
    "Cache-Control": "no-store",
}

Page = BoardPage | CallPage | ErrorPage

templates = Environment(
    loader=FileSystemLoader(HERE / "templates"),
    autoescape=True,
    undefined=StrictUndefined,
    trim_blocks=True,
    lstrip_blocks=True,
)


def render(template: str, page: Page, status: int = 200) -> HTMLResponse:
    return HTMLResponse(templates.get_template(template).render(page=page), status, HEADERS)


class PageRoute(APIRoute):
    """Refusals and faults of pages are pages too."""

    def get_route_handler(self) -> Callable[[Request], Coroutine[Any, Any, Response]]:
        handle = super().get_route_handler()

        async def handle_or_say_why(request: Request) -> Response:
            try:
                return await handle(request)
            except HTTPException as error:
                return error_page(error.status_code, str(error.detail))
            except StoreFault as error:
                return error_page(503, str(error))

        return handle_or_say_why


class Static(StaticFiles):
    """Asked for again with every page, and answered by 304 while nothing changed."""

    def file_response(self, *args: Any, **kwargs: Any) -> Response:
        response = super().file_response(*args, **kwargs)
        response.headers.update({"X-Content-Type-Options": "nosniff", "Cache-Control": "no-cache"})
        return response


def error_page(status: int, message: str) -> HTMLResponse:
    return render("error.html", ErrorPage(HTTPStatus(status).phrase, message), status)


def console_router(store: Store) -> APIRouter:
    """`/`, `/calls/{id}` and `/static`, for the app's root."""
    router = APIRouter(route_class=PageRoute, include_in_schema=False, default_response_class=HTMLResponse)
    router.mount("/static", Static(directory=HERE / "static"), name="static")

    @router.get("/", dependencies=[Depends(here_only)])
    def board() -> HTMLResponse:
        live = store.calls(LIVE_CALLS, live=True)
        said = store.last_lines([call.id for call in live], LINES_ON_BOARD)
        return render("board.html", board_page(live, store.calls(FINISHED_CALLS, live=False), said))

    @router.get("/calls/{call_id}", dependencies=[Depends(here_only)])
    def call(call_id: str) -> HTMLResponse:
        found = store.call(call_id)
        if found is None:
            raise HTTPException(404, "There is no such call. It may belong to another database.")
        return render("call.html", call_page(found, store.transcript(call_id)))

    return router
