"""A stand-in for the service: answers the webhook with what a test wants, and keeps all that came."""

import asyncio
import base64
import contextlib
import json
import socket
from collections.abc import AsyncIterator, Awaitable, Callable
from typing import Any
from urllib.parse import parse_qsl

import uvicorn
from fastapi import FastAPI, Request, Response, WebSocket, WebSocketDisconnect

from telephony.twilio import connect_document

TOKEN = "fake_auth_token_0123456789abcdef"
PUBLIC_URL = "https://voice.example.com"

Handler = Callable[["Leg"], Awaitable[None]]


class Leg:
    """The service's end of one media socket."""

    def __init__(self, websocket: WebSocket) -> None:
        self.websocket = websocket
        self.messages: list[dict[str, Any]] = []
        self.code: int | None = None

    @property
    def events(self) -> list[str]:
        return [message["event"] for message in self.messages]

    @property
    def media(self) -> list[dict[str, Any]]:
        return [message for message in self.messages if message["event"] == "media"]

    @property
    def stream_sid(self) -> str:
        return str(self.messages[1]["streamSid"])

    async def receive(self) -> dict[str, Any]:
        message: dict[str, Any] = json.loads(await self.websocket.receive_text())
        self.messages.append(message)
        return message

    async def until(self, event: str) -> dict[str, Any]:
        while True:
            message = await self.receive()
            if message["event"] == event:
                return message

    async def play(self, ulaw: bytes) -> None:
        await self.send("media", media={"payload": base64.b64encode(ulaw).decode()})

    async def send(self, event: str, **more: object) -> None:
        await self.websocket.send_text(json.dumps({"event": event, "streamSid": self.stream_sid, **more}))


async def take_all(leg: Leg) -> None:
    while True:
        await leg.receive()


class StandIn:
    """`document` answers the webhook; `handler` has each media socket, and its end is the socket's."""

    def __init__(self) -> None:
        self.url = ""
        self.status = 200
        self.document = connect_document(
            "wss://voice.example.com/twilio/media/t0", {}, f"{PUBLIC_URL}/twilio/stream-status"
        )
        self.handler: Handler = take_all
        self.posts: list[tuple[str, dict[str, str], str]] = []
        self.upgrades: list[tuple[str, str]] = []
        self.legs: list[Leg] = []
        self.done = asyncio.Event()

    def app(self) -> FastAPI:
        app = FastAPI()

        @app.post("/twilio/{path:path}")
        async def post(path: str, request: Request) -> Response:
            form = dict(parse_qsl((await request.body()).decode(), keep_blank_values=True))
            query = f"?{request.url.query}" if request.url.query else ""
            self.posts.append((f"/twilio/{path}{query}", form, request.headers.get("x-twilio-signature", "")))
            if path == "voice":
                return Response(self.document, self.status)
            return Response(status_code=204)

        @app.websocket("/twilio/media/{token}")
        async def media(websocket: WebSocket, token: str) -> None:
            self.upgrades.append((token, websocket.headers.get("x-twilio-signature", "")))
            await websocket.accept()
            leg = Leg(websocket)
            self.legs.append(leg)
            try:
                await leg.until("start")
                await self.handler(leg)
                await websocket.close(1000)
            except WebSocketDisconnect as closed:
                leg.code = closed.code
            finally:
                self.done.set()

        return app


@contextlib.asynccontextmanager
async def stand_in() -> AsyncIterator[StandIn]:
    standing = StandIn()
    with socket.create_server(("127.0.0.1", 0)) as listening:
        standing.url = f"http://127.0.0.1:{listening.getsockname()[1]}"
        config = uvicorn.Config(standing.app(), ws="websockets-sansio", log_config=None, lifespan="off")
        server = uvicorn.Server(config)
        serving = asyncio.create_task(server.serve(sockets=[listening]))
        try:
            await until(lambda: server.started)
            yield standing
        finally:
            server.should_exit = True
            await asyncio.wait_for(serving, 20)


async def until(holds: Callable[[], object], within_s: float = 10.0) -> None:
    """Until it holds; a test that waits in vain fails."""
    async with asyncio.timeout(within_s):
        while not holds():
            await asyncio.sleep(0.005)
