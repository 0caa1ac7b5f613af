"""Limits of the connections of `python -m flux2.serve`, which uvicorn does not have.

uvicorn waits for the headers of a request for as long as a client likes, and accepts connections until the process has
no file descriptors left; then nobody can connect, and every attempt is a traceback in the log. Here a connection has a
few seconds for its headers, a client that does not read its answer is cut off, and when there are too many connections
the oldest one without a request makes room.
"""

import asyncio
import sys
from typing import Any

import h11
import uvicorn
from fastapi import FastAPI
from uvicorn.protocols.http.h11_impl import H11Protocol

KEEP_ALIVE = 75  # seconds that a connection may be idle between two requests
HEADER_SECONDS = 10.0  # from the connection, or the first byte of a further request, to the end of its headers
STALLED_SECONDS = 60.0  # that a client may not read while an answer is sent to it
LAST_REQUESTS = 600  # seconds that current requests may take at shutdown
MOST_CONNECTIONS = 256
BACKLOG = 64  # connections that are accepted at once, before a protocol counts them
OWN_FILES = 64  # descriptors for everything but connections


def most_connections() -> int:
    """Return the number of connections that leave file descriptors for everything else."""
    if sys.platform == "win32":  # it has no limit on sockets that a process would reach
        return MOST_CONNECTIONS
    import resource  # Windows has none

    files, _ = resource.getrlimit(resource.RLIMIT_NOFILE)
    if files == resource.RLIM_INFINITY:
        return MOST_CONNECTIONS
    return max(8, min(MOST_CONNECTIONS, files - BACKLOG - OWN_FILES))


class StrictConnection(h11.Connection):
    """The HTTP state of a connection. Refuses what a proxy in front may read as another request than this server."""

    def next_event(self) -> Any:
        event = super().next_event()
        if isinstance(event, h11.Request):
            names = {name.lower() for name, _ in event.headers}
            if {b"content-length", b"transfer-encoding"} <= names:
                raise h11.RemoteProtocolError("Content-Length and Transfer-Encoding exclude each other")
        return event


class BoundedProtocol(H11Protocol):
    """A connection of uvicorn with limits."""

    most = MOST_CONNECTIONS

    def __init__(self, *arguments: Any, **settings: Any) -> None:
        super().__init__(*arguments, **settings)
        self.conn = StrictConnection(h11.SERVER)
        self._headers_due: asyncio.TimerHandle | None = None
        self._reading_due: asyncio.TimerHandle | None = None

    @property
    def is_idle(self) -> bool:
        """Whether no request is in progress."""
        return self.cycle is None or self.cycle.response_complete

    def connection_made(self, transport: asyncio.Transport) -> None:  # type: ignore[override]
        super().connection_made(transport)
        self.began = self.loop.time()
        if len(self.connections) > self.most:
            idle = (one for one in self.connections if isinstance(one, BoundedProtocol) and one.is_idle)
            min(idle, key=lambda one: one.began).drop()  # this one, if all others have a request in progress
        self._watch()

    def data_received(self, data: bytes) -> None:
        super().data_received(data)
        self._watch()

    def on_response_complete(self) -> None:
        super().on_response_complete()
        self._watch()

    def connection_lost(self, exc: Exception | None) -> None:
        for timer in (self._headers_due, self._reading_due):
            if timer is not None:
                timer.cancel()
        super().connection_lost(exc)

    def pause_writing(self) -> None:
        super().pause_writing()
        self._reading_due = self.loop.call_later(STALLED_SECONDS, self.drop)

    def resume_writing(self) -> None:
        super().resume_writing()
        if self._reading_due is not None:
            self._reading_due.cancel()

    def drop(self) -> None:
        """Close the connection without an answer."""
        self.connections.discard(self)
        self.transport.abort()

    def _watch(self) -> None:
        """Limit the time until a request is there, while uvicorn's time for an idle connection does not run."""
        waits = self.is_idle and self.timeout_keep_alive_task is None and not self.transport.is_closing()
        if waits and self._headers_due is None:
            self._headers_due = self.loop.call_later(HEADER_SECONDS, self.drop)
        elif not waits and self._headers_due is not None:
            self._headers_due.cancel()
            self._headers_due = None


def server_config(app: FastAPI, **settings: Any) -> uvicorn.Config:
    """Return the configuration of a server with these limits. Clients' faults are not logged; `settings` add to it."""
    BoundedProtocol.most = most_connections()
    return uvicorn.Config(
        app,
        http=BoundedProtocol,
        ws="none",
        log_level="error",  # requests that are refused are warnings
        access_log=False,
        server_header=False,
        backlog=BACKLOG,
        timeout_keep_alive=KEEP_ALIVE,
        timeout_graceful_shutdown=LAST_REQUESTS,
        **settings,
    )
