"""Drives a carrier's media protocol over a WebSocket."""

from starlette.websockets import WebSocket, WebSocketDisconnect, WebSocketState

from telephony.events import CallEnded, Event
from telephony.twilio import TwilioStream

POLICY_VIOLATION = 1008
NORMAL = 1000
INTERNAL_ERROR = 1011


class WebSocketLeg:
    """One socket, one protocol. Event loop only."""

    def __init__(self, websocket: WebSocket, protocol: TwilioStream) -> None:
        self.protocol = protocol
        self._websocket = websocket

    async def receive(self) -> list[Event]:
        """Wait for one message and say what it meant; a socket that closes ends the call.

        Raises:
            RemoteProtocolError: the carrier broke its own rules.
        """
        message = await self._websocket.receive()
        if message["type"] == "websocket.disconnect":
            return [CallEnded(f"the carrier closed the socket with code {message.get('code')}")]
        text = message.get("text")
        return self.protocol.receive(text if text is not None else "")

    async def send(self) -> bool:
        """Write what the protocol has to say. False once the carrier is gone."""
        try:
            for text in self.protocol.data_to_send():
                await self._websocket.send_text(text)
        except WebSocketDisconnect:
            return False
        return True

    async def close(self, code: int, reason: str = "") -> None:
        """Close the socket; for a carrier that waits for us to, this ends the call. Twice is harmless."""
        if self._websocket.application_state is WebSocketState.CONNECTED:
            try:
                await self._websocket.close(code, reason[:120])
            except (WebSocketDisconnect, RuntimeError):
                return  # the carrier was faster
