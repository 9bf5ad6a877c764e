"""The carriers' webhooks and media sockets: who calls, which persona answers, and whether it is really the carrier."""

import logging
import uuid
from typing import Annotated
from urllib.parse import parse_qsl

from fastapi import APIRouter, Depends, HTTPException, Query, Request, Response, WebSocket
from starlette.datastructures import Headers

from app.call import CallFacts
from app.calls import Calls, role_of
from app.engine import EngineFull
from app.legs.websocket import POLICY_VIOLATION, WebSocketLeg
from app.lifecycle import Outcome
from app.personas import Persona, PersonaFolder, WrongVariables
from app.settings import Settings
from app.store import Store
from telephony import twilio

_BODY_MAX_BYTES = 65_536
_OVER = {"completed", "busy", "failed", "no-answer", "canceled"}

_log = logging.getLogger("personaline.carriers")

Form = list[tuple[str, str]]


class TwilioDoor:
    """Twilio's way in. A request is taken only with its signature, unless DEV_ALLOW_UNSIGNED=1."""

    def __init__(self, settings: Settings, calls: Calls, personas: PersonaFolder, store: Store) -> None:
        token = settings.twilio_auth_token
        self._token = token.get_secret_value() if token is not None else ""
        self._unsigned = settings.dev_allow_unsigned
        self._base_url = settings.base_url
        self._calls = calls
        self._personas = personas
        self._store = store

    async def form(self, request: Request) -> Form:
        """The parameters of a request that Twilio signed.

        Raises HTTPException: 503 without a token to check by, 403 for a wrong or missing signature, 413.
        """
        body = b""
        async for part in request.stream():
            body += part
            if len(body) > _BODY_MAX_BYTES:
                raise HTTPException(413, f"a webhook of over {_BODY_MAX_BYTES} bytes is not Twilio's")
        form = parse_qsl(body.decode("utf-8", "replace"), keep_blank_values=True)
        query = request.scope["query_string"].decode("latin-1")
        url = f"{self._base_url}{request.url.path}{'?' + query if query else ''}"
        self._check(url, form, request.headers)
        return form

    def _check(self, url: str, form: Form, headers: Headers) -> None:
        if self._unsigned:
            return
        if not self._token:
            raise HTTPException(503, "TWILIO_AUTH_TOKEN is not set, so no request can be known to come from Twilio")
        signature = headers.get("x-twilio-signature", "")
        if not twilio.signature_valid(self._token, url, form, signature):
            _log.warning("refused: X-Twilio-Signature %s for %s", "wrong" if signature else "missing", url)
            raise HTTPException(403, "X-Twilio-Signature does not match; is PUBLIC_URL the address that Twilio calls?")

    def answer(self, form: Form, persona_name: str | None) -> str:
        """The document that connects this call to its stream, or turns it away as busy: by the persona's busy words if
        it has some, else by the tone.
        """
        fields = dict(form)
        persona = self._persona(persona_name, fields.get("To", ""))
        facts = CallFacts(
            id=uuid.uuid4().hex,
            carrier="twilio",
            carrier_call_id=fields.get("CallSid", ""),
            caller=fields.get("From", ""),
            called=fields.get("To", ""),
            persona=persona,
        )
        try:
            token = self._calls.admit(facts, role_of(persona))
        except EngineFull as error:
            _log.info("call %s from Twilio refused as busy: %s", facts.carrier_call_id, error)
            words = persona.fill().busy
            return twilio.say_document(words) if words else twilio.reject_document()
        except WrongVariables as error:
            raise HTTPException(422, str(error)) from error
        parameters = {"persona": persona.name, "from": facts.caller}
        return twilio.connect_document(
            f"{self._socket_url}/twilio/media/{token}", parameters, f"{self._base_url}/twilio/stream-status"
        )

    def _persona(self, name: str | None, called: str) -> Persona:
        personas = self._personas.current
        if name is None:
            return personas.for_number(called)
        if name not in personas.by_name:
            raise HTTPException(404, f"no persona {name!r}; there are {', '.join(personas.by_name)}")
        return personas.by_name[name]

    @property
    def _socket_url(self) -> str:
        return "ws" + self._base_url.removeprefix("http")

    async def media(self, websocket: WebSocket, token: str) -> None:
        """One call's media. An upgrade that is not Twilio's, or whose token is not good, is refused with 403."""
        url = f"{self._socket_url}{websocket.url.path}"
        try:
            self._check(url, [], websocket.headers)
        except HTTPException as error:
            await websocket.close(POLICY_VIOLATION, str(error.detail)[:120])
            return
        call = self._calls.claim(token)
        if call is None:
            _log.warning("refused: a media socket with a token that was never given, has expired or was used before")
            await websocket.close(POLICY_VIOLATION, "this token is not good, or not any more")
            return
        await websocket.accept()
        await self._calls.run(call, WebSocketLeg(websocket, twilio.TwilioStream()))

    def note(self, form: Form, kind: str) -> None:
        """Keep a status callback with its call, and end one that is over before its media came."""
        fields = dict(form)
        call = self._calls.by_carrier_id("twilio", fields.get("CallSid", ""))
        if call is None:
            return
        told = {name: fields[name] for name in _TOLD if name in fields}
        self._store.event(call.facts.id, kind, told, call.clock_s)
        if fields.get("CallStatus") in _OVER:
            call.end(Outcome.COMPLETED, f"caller: Twilio says {fields['CallStatus']}")


_TOLD = ("CallStatus", "CallDuration", "SipResponseCode", "StreamEvent", "StreamError", "StreamSid")


def twilio_router(door: TwilioDoor) -> APIRouter:
    """`/twilio/*`."""
    router = APIRouter(prefix="/twilio", tags=["twilio"])
    signed = Annotated[Form, Depends(door.form)]

    @router.post("/voice", response_class=Response)
    async def voice(form: signed, persona: Annotated[str | None, Query()] = None) -> Response:
        """Twilio asks what to do with a call. `?persona=NAME` chooses who answers, whatever number was called."""
        return Response(door.answer(form, persona), media_type="application/xml")

    @router.post("/status", status_code=204)
    async def status(form: signed) -> None:
        door.note(form, "carrier.status")

    @router.post("/stream-status", status_code=204)
    async def stream_status(form: signed) -> None:
        door.note(form, "carrier.stream")

    @router.websocket("/media/{token}")
    async def media(websocket: WebSocket, token: str) -> None:
        await door.media(websocket, token)

    return router
