"""A studio without a server: requests as its own pages send them."""

import sys
from pathlib import Path

import pytest
from fastapi.testclient import TestClient

from train.pages.app import application
from train.pages.base import Studio
from train.pages.queue import Queue, is_known
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


@pytest.fixture
def studio_page(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    """`studio_page(token)`: of a studio that has opened the folder `opened` in tmp_path."""
    opened = tmp_path / "opened"
    opened.mkdir()
    monkeypatch.chdir(opened)

    def make(token: str | None = None, known=is_known) -> Page:
        workspace = Workspace([opened], opened / "outputs")
        return Page(Studio(workspace, Queue(opened / "outputs/studio/queue", known), frozenset({HOST}), token))

    return make
