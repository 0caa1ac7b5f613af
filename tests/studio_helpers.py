"""A studio without a server: requests as its own pages send them."""

import re
import sys
import time
from html import unescape
from pathlib import Path

import pytest
from fastapi.testclient import TestClient

from train.pages.app import application
from train.pages.base import Studio
from train.pages.queue import Queue, QueuedJob, is_known
from train.pages.workspace import Workspace

HOST = "127.0.0.1:8760"
PYTHON = sys.executable


class Page(TestClient):
    """Requests to a studio; `known` is what it was started with."""

    def __init__(self, known: Studio) -> None:
        super().__init__(application(known), base_url=f"http://{HOST}", follow_redirects=False)
        self.known = known

    def submit(self, address: str, /, **values: object) -> dict:
        """Send a form and return the answer, with its status."""
        answer = self.post(address, json=values, headers={"Origin": f"http://{HOST}"})
        return {"status": answer.status_code, **answer.json()}


def wait_for_job(queue: Queue, number: int, *states: str, seconds: float = 30) -> QueuedJob:
    """Wait until a job has one of the states, and start what may start meanwhile."""
    until = time.monotonic() + seconds
    while (job := queue.job(number)).state not in states:
        assert time.monotonic() < until, (job, queue.tail(number))
        time.sleep(0.05)
        queue.start_next()
    return job


def part(page: Page, run: Path, name: str) -> str:
    """A part of the page of a run."""
    answer = page.get("/runs/part", params={"folder": str(run), "name": name})
    assert answer.status_code == 200
    return answer.text


def words(text: str) -> str:
    """The texts of a page, without tags and line breaks."""
    return " ".join(unescape(re.sub(r"<[^>]+>", " ", text)).split())


@pytest.fixture
def studio_page(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    """`studio_page(token)`: of a studio that has opened the folder `opened` in tmp_path."""
    opened = tmp_path / "opened"
    opened.mkdir()
    monkeypatch.chdir(opened)
    monkeypatch.setenv("XDG_STATE_HOME", str(tmp_path / "state"))

    def make(token: str | None = None, known=is_known) -> Page:
        workspace = Workspace([opened], opened / "outputs")
        return Page(Studio(workspace, Queue(opened / "outputs/studio/queue", known), frozenset({HOST}), token))

    return make
