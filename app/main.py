"""create_app: builds every object once, joins them, starts them in order and stops them in the reverse."""

import asyncio
import contextlib
from collections.abc import AsyncIterator

from fastapi import FastAPI

from app import __version__
from app.api import Readiness, api_router, one_error_shape
from app.calls import Calls, role_of
from app.carriers import TwilioDoor, twilio_router
from app.console.pages import console_router
from app.engine import Engine, EngineProcess, Role, SpeechEngine
from app.engine_choice import Choice, choose_engine
from app.metrics import Metrics
from app.personas import PersonaFolder
from app.settings import Settings
from app.store import Store


class Service:
    """Everything that runs, and whether it is ready for calls."""

    def __init__(self, store: Store, personas: PersonaFolder, choice: Choice) -> None:
        self.store = store
        self.personas = personas
        self.engine_name = choice.name
        self.metrics = Metrics()
        self.calls = Calls(store, self.metrics, choice.name)
        self.engine = self._engine(choice)
        self._watching = asyncio.Event()
        self._gauge()

    def _engine(self, choice: Choice) -> SpeechEngine:
        if choice.own_process:
            return EngineProcess(choice.make, choice.rows, self.calls.deliver, self._roles())
        return Engine(choice.make(), self.calls.deliver, self._roles())

    def _roles(self) -> list[Role]:
        return [role_of(persona) for persona in self.personas.current if not persona.required]

    def _gauge(self) -> None:
        self.metrics.rows.set_function(lambda: self.engine.capacity)
        self.metrics.rows_in_use.set_function(lambda: self.engine.in_use)
        self.metrics.live.set_function(lambda: self.calls.live)
        self.metrics.store_queue.set_function(lambda: self.store.queued)

    def readiness(self) -> Readiness:
        """What keeps calls from being answered now; personas that could not be reloaded do not."""
        engine, refusal = self.engine, self.engine.refusal
        return Readiness(
            engine=self.engine_name,
            engine_ready=engine.ready,
            rows=engine.capacity,
            rows_free=engine.capacity - engine.in_use,
            store_fault=self.store.fault,
            persona_faults=[str(fault) for fault in self.personas.faults],
            engine_reason="" if refusal is None else str(refusal),
        )

    @contextlib.asynccontextmanager
    async def running(self, app: FastAPI) -> AsyncIterator[None]:
        """The service's life. What was started first is stopped last."""
        self.calls.start(self.engine)
        self.engine.start()
        watch = asyncio.create_task(self.personas.watch(self._watching), name="persona files")
        try:
            yield
        finally:
            await self.calls.close()
            self._watching.set()
            await watch
            await asyncio.to_thread(self.engine.close)
            await asyncio.to_thread(self.store.close)


def create_app(settings: Settings, choice: Choice | None = None) -> FastAPI:
    """The whole service. Opens the database and reads the personas now; the engine loads while it serves.

    `choice` is an engine for a trial, in place of the one that the settings name.

    Raises StoreFault, PersonaFaults, ModelFileFault, EngineFault: each a user's to mend, each says how.
    """
    personas = PersonaFolder(settings.personas_dir)
    choice = choice or choose_engine(settings)
    service = Service(Store.open(settings.database_url), personas, choice)
    app = FastAPI(title="Personaline", version=__version__, lifespan=service.running, docs_url=None, redoc_url=None)
    app.state.service = service
    door = TwilioDoor(settings, service.calls, personas, service.store)
    one_error_shape(app)
    app.include_router(twilio_router(door))
    app.include_router(api_router(service.store, service.readiness, service.metrics))
    app.include_router(console_router(service.store))
    return app
