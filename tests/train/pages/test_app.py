"""The studio's application: who may send what, and which files it reads."""

import pytest
from PIL import Image
from studio_helpers import HOST

pytest_plugins = ("studio_helpers",)

TOKEN = "a-token-of-some-length"


@pytest.mark.parametrize(
    ("headers", "status"),
    [
        ({"Origin": f"http://{HOST}"}, 400),  # there is no such job
        ({}, 403),
        ({"Origin": "http://evil.example"}, 403),
        ({"Origin": "null"}, 403),
        ({"Origin": f"http://{HOST}", "Host": "evil.example"}, 421),
        ({"Origin": "http://evil.example", "Host": "evil.example"}, 421),
        ({"Origin": f"http://{HOST}", "Sec-Fetch-Site": "cross-site"}, 403),
    ],
)
def test_only_its_own_pages_change_something(studio_page, headers, status):
    answer = studio_page().post("/jobs/stop", json={"number": 1}, headers=headers)
    assert answer.status_code == status
    assert answer.json()["error"]


def test_no_other_site_reads_anything(studio_page):
    page = studio_page()
    assert page.get("/jobs/live", headers={"Host": "evil.example"}).status_code == 421
    assert page.get("/jobs/live", headers={"Sec-Fetch-Site": "cross-site"}).status_code == 403
    answer = page.get("/jobs/live")
    assert answer.status_code == 200
    policy = answer.headers["content-security-policy"]
    assert "default-src 'none'" in policy
    assert "script-src 'self';" in policy
    assert "access-control-allow-origin" not in answer.headers


def test_with_a_token_nothing_is_answered_without_its_cookie(studio_page):
    page = studio_page(TOKEN)
    for path in ("/", "/jobs/live", "/runs", "/image?path=x"):
        answer = page.get(path)
        assert (answer.status_code, answer.headers["location"]) == (303, "/login")
    assert page.submit("/jobs/stop", number=1)["status"] == 401
    assert page.submit("/login", token="another")["status"] == 403
    assert TOKEN not in page.get("/login").text
    found = page.post("/login", json={"token": TOKEN}, headers={"Origin": f"http://{HOST}"})
    assert found.json() == {"redirect": "/"}
    kept = found.headers["set-cookie"].lower()
    assert "httponly" in kept
    assert "samesite=strict" in kept
    assert page.get("/jobs/live").status_code == 200


@pytest.mark.parametrize(
    "path", ["../secret.png", "/etc/passwd", "link/secret.png", "~root", "a\0b", "x/../../secret.png"]
)
def test_a_path_outside_of_the_opened_folders_is_refused(studio_page, tmp_path, path):
    page = studio_page()
    Image.new("RGB", (8, 8)).save(tmp_path / "secret.png")
    (tmp_path / "opened" / "link").symlink_to(tmp_path)
    answer = page.get("/image", params={"path": path})
    assert answer.status_code == 403
    assert "python train/studio.py" in answer.text or "is no path" in answer.text


def test_an_image_is_sent_and_nothing_else(studio_page, tmp_path):
    page = studio_page()
    Image.new("RGB", (8, 8), "red").save(tmp_path / "opened" / "a.png")
    (tmp_path / "opened" / "b.png").write_text("<script>alert(1)</script>")
    answer = page.get("/image", params={"path": "a.png"})
    assert (answer.status_code, answer.headers["content-type"]) == (200, "image/png")
    assert answer.content == (tmp_path / "opened" / "a.png").read_bytes()
    assert page.get("/image", params={"path": "b.png"}).status_code == 400
    assert page.get("/image", params={"path": "no.png"}).status_code == 400


def test_what_is_wrong_in_a_form_is_named_with_its_field(studio_page):
    page = studio_page()
    assert page.submit("/jobs/stop", number="1")["field"] == "number"
    assert page.submit("/jobs/stop", number=1, other=2)["field"] == "other"
    assert page.submit("/jobs/stop")["field"] == "number"


def test_names_are_shown_as_text(studio_page, tmp_path):
    page = studio_page(known=lambda command: True)
    page.known.queue.add("<b>job</b>", ["true"])
    shown = page.get("/jobs/1").text
    assert "&lt;b&gt;job" in shown
    assert "<b>job" not in shown
    assert "&lt;b&gt;job" in page.get("/jobs").text
    assert "&lt;b&gt;job" in page.get("/jobs/live").text
    assert "&lt;i&gt;" in page.get("/image", params={"path": "<i>"}).text


def test_a_form_has_a_length_within_bounds(studio_page):
    page = studio_page()
    headers = {"Origin": f"http://{HOST}", "Content-Type": "application/json"}
    assert page.post("/jobs/stop", content=b" " * (5 << 20), headers=headers).status_code == 413
    assert page.post("/jobs/stop", content=iter([b"{}"]), headers=headers).status_code == 413


def test_without_a_token_no_error_shows_what_runs(studio_page):
    page = studio_page(TOKEN, known=lambda command: True)
    page.known.queue.add("secret prompt", ["true"])
    assert page.get("/static/nothing").status_code == 404
    for path in ("/static/nothing", "/login", "/nothing"):
        assert "secret prompt" not in page.get(path).text


def test_names_that_are_not_utf_8_do_not_break_a_page(studio_page, tmp_path):
    page = studio_page()
    folder = tmp_path / "opened" / "n\udcff"
    folder.mkdir()
    Image.new("RGB", (64, 64)).save(folder / "a.png")
    run = tmp_path / "opened" / "outputs" / "r\udcff"
    run.mkdir(parents=True)
    (run / "config.yaml").write_text("steps: 1\n")
    for path in ("/pictures", "/runs/live", "/compare", "/try", "/export", "/jobs"):
        assert page.get(path).status_code == 200, path
