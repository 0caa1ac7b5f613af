"""An HTTP session in which the time of an answer is that of the whole answer.

The timeout of `requests` is that of one read from the socket: a server that sends a byte now and then, in the TLS
handshake, in the headers, or as one `100 Continue` after another, holds a client for ever. Here a timer shuts the
connection down, which ends any read of the thread that waits for it.

Redirects are not looked at: `requests` reads the body of one, of any size, and parses its address even if it does not
follow it.
"""

import socket
import threading
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from typing import Any

import requests
import urllib3
from requests.adapters import HTTPAdapter
from urllib3.connection import HTTPConnection, HTTPSConnection


class Deadline:
    """Shuts the sockets that it is given down after some seconds."""

    def __init__(self) -> None:
        self.passed = False
        self._sockets: list[socket.socket] = []
        self._lock = threading.Lock()

    def add(self, opened: socket.socket) -> None:
        with self._lock:
            self._sockets.append(opened)
            if self.passed:
                shut_down(opened)

    def end(self) -> None:
        with self._lock:
            self.passed = True
            for opened in self._sockets:
                shut_down(opened)


def shut_down(opened: socket.socket) -> None:
    with suppress(OSError):  # it is closed already
        socket.socket.shutdown(opened, socket.SHUT_RDWR)  # of the TCP connection, also below TLS


class _Thread(threading.local):
    """What a thread waits for: its deadline, and the connections that it opened and may use again."""

    deadline: Deadline | None = None

    def __init__(self) -> None:
        self.sockets: list[socket.socket] = []


_thread = _Thread()


def _note(opened: socket.socket) -> socket.socket:
    _thread.sockets = [one for one in _thread.sockets if one.fileno() >= 0] + [opened]
    if _thread.deadline is not None:
        _thread.deadline.add(opened)
    return opened


class TimedHTTPConnection(HTTPConnection):
    def _new_conn(self) -> socket.socket:
        return _note(super()._new_conn())


class TimedHTTPSConnection(HTTPSConnection):
    def _new_conn(self) -> socket.socket:
        return _note(super()._new_conn())


class TimedHTTPPool(urllib3.HTTPConnectionPool):
    ConnectionCls = TimedHTTPConnection


class TimedHTTPSPool(urllib3.HTTPSConnectionPool):
    ConnectionCls = TimedHTTPSConnection


class TimedAdapter(HTTPAdapter):
    """Opens connections that a `Deadline` of their thread shuts down, also those through a proxy."""

    def init_poolmanager(self, *arguments: Any, **settings: Any) -> None:
        super().init_poolmanager(*arguments, **settings)
        self.poolmanager.pool_classes_by_scheme = {"http": TimedHTTPPool, "https": TimedHTTPSPool}

    def proxy_manager_for(self, *arguments: Any, **settings: Any) -> Any:
        manager = super().proxy_manager_for(*arguments, **settings)
        manager.pool_classes_by_scheme = {"http": TimedHTTPPool, "https": TimedHTTPSPool}
        return manager


class TimedSession(requests.Session):
    """A session of one thread for requests `within` a time. It follows no redirect and looks at none."""

    def __init__(self) -> None:
        super().__init__()
        for scheme in ("http://", "https://"):
            self.mount(scheme, TimedAdapter())

    def get_redirect_target(self, resp: requests.Response) -> None:
        return None


@contextmanager
def within(seconds: float) -> Iterator[Deadline]:
    """Context manager in which connections of this thread's sessions are shut down when `seconds` are over."""
    deadline = _thread.deadline = Deadline()
    for opened in _thread.sockets:
        deadline.add(opened)
    timer = threading.Timer(seconds, deadline.end)
    timer.daemon = True
    timer.start()
    try:
        yield deadline
    finally:
        timer.cancel()
        _thread.deadline = None
