"""The studio's web application: who may send requests, how pages are made, and how errors are told.

Every request must come from the studio's own pages: its Host is one of those that the studio was started with, so that
no name of another site leads here, what changes something says that it comes from this origin, and with a token every
request has it in a cookie. Pages load nothing from elsewhere, and run no script but static/studio.js and its libraries.
"""

from __future__ import annotations

import hmac
from collections.abc import Awaitable, Callable
from pathlib import Path

from fastapi import FastAPI, Request, Response
from fastapi.exceptions import RequestValidationError
from fastapi.responses import FileResponse, JSONResponse, RedirectResponse
from starlette.exceptions import HTTPException

from flux2.utils.images import open_image
from train.pages import compare, export, jobs, pictures, runs, start, trying
from train.pages.base import Form, Studio, error_response, page
from train.pages.workspace import Refused
from train.reports import html

HERE = Path(__file__).parent
STATIC = {
    **{name: HERE / "static" / name for name in ("studio.css", "studio.js")},
    **{name: html.TEMPLATES / name for name in ("page.css", "uPlot.min.css", "uPlot.iife.min.js")},
    **{name: html.TEMPLATES / name for name in ("charts.js", "slider.js")},
}
COOKIE = "flux2_studio"
MOST_BODY = 4 << 20  # bytes of a form
POLICY = (
    "default-src 'none'; img-src 'self' data:; style-src 'self' 'unsafe-inline'; script-src 'self'; "
    "connect-src 'self'; form-action 'self'; base-uri 'none'; frame-ancestors 'none'"
)
HEADERS = {
    "Content-Security-Policy": POLICY,
    "X-Content-Type-Options": "nosniff",
    "Referrer-Policy": "no-referrer",
    "Cross-Origin-Resource-Policy": "same-origin",
    "Cache-Control": "no-store",
}


class Login(Form):
    token: str


def refusal(request: Request, known: Studio) -> tuple[int, str] | None:
    """Return the status and the reason why a request is not answered, or None."""
    headers = request.headers
    host = headers.get("host", "")
    if known.hosts is not None and host not in known.hosts:
        return 421, f"this is not the studio of {host!r}"
    is_own = headers.get("origin", "") in (f"http://{host}", f"https://{host}")
    if request.method not in ("GET", "HEAD") and not is_own:
        return 403, "the request does not come from a page of the studio"
    if headers.get("sec-fetch-site") == "cross-site" and headers.get("sec-fetch-mode") != "navigate":
        return 403, "the request comes from another site"
    length = headers.get("content-length", "")
    if request.method not in ("GET", "HEAD") and not (length.isdecimal() and int(length) <= MOST_BODY):
        return 413, f"a form has at most {MOST_BODY:,} bytes, and says how many"
    given = request.cookies.get(COOKIE, "")
    if known.token is not None and not hmac.compare_digest(given.encode(), known.token.encode()):
        return 401, "the token is missing"
    return None


def application(known: Studio) -> FastAPI:
    """Return the application."""
    app = FastAPI(title="flux2-lora studio", docs_url=None, redoc_url=None, openapi_url=None)
    app.state.studio = known

    @app.middleware("http")
    async def guard(request: Request, answer: Callable[[Request], Awaitable[Response]]) -> Response:
        refused, path = refusal(request, known), request.url.path
        if refused is None or (refused[0] == 401 and (path == "/login" or path.startswith("/static/"))):
            response = await answer(request)
        elif refused[0] == 401 and request.method == "GET":
            response = RedirectResponse("/login", 303)
        else:
            response = JSONResponse({"error": refused[1], "field": ""}, refused[0])
        for name, value in HEADERS.items():
            response.headers.setdefault(name, value)
        return response

    @app.exception_handler(RequestValidationError)
    async def invalid(request: Request, error: RequestValidationError) -> Response:
        first = error.errors()[0]
        field = str(first["loc"][-1]) if first["loc"] else ""
        return error_response(request, 422, f"{field}: {first['msg']}", field)

    @app.exception_handler(Refused)
    async def outside(request: Request, error: Refused) -> Response:
        return error_response(request, 403, str(error))

    @app.exception_handler(HTTPException)
    async def no_page(request: Request, error: HTTPException) -> Response:
        return error_response(request, error.status_code, str(error.detail))

    for kind in (ValueError, OSError):

        @app.exception_handler(kind)
        async def failed(request: Request, error: Exception) -> Response:
            return error_response(request, 400, str(error), getattr(error, "field", ""))

    @app.get("/")
    def first() -> Response:
        return RedirectResponse("/runs" if known.workspace.runs() else "/pictures", 303)

    @app.get("/login")
    def ask(request: Request) -> Response:
        return page(request, "login.html", title="Token")

    @app.post("/login")
    def enter(request: Request, login: Login) -> Response:
        if known.token is None or not hmac.compare_digest(login.token.strip().encode(), known.token.encode()):
            return error_response(request, 403, "this is not the token that the studio has written", "token")
        response = JSONResponse({"redirect": "/"})
        response.set_cookie(COOKIE, known.token, httponly=True, samesite="strict", max_age=30 * 24 * 3600)
        return response

    @app.get("/static/{name}")
    def static(name: str) -> Response:
        if name not in STATIC:
            raise HTTPException(404, "there is no such file")
        return FileResponse(STATIC[name], headers={"Cache-Control": "no-cache"})

    @app.get("/image")
    def image(path: str, v: str = "") -> Response:
        """An image file of the opened folders; what is no image is not sent. `v` makes a changed file another one."""
        file = known.workspace.resolve(path)
        with open_image(file) as opened:
            kind = (opened.format or "").lower()
        if kind not in ("png", "jpeg", "webp", "gif"):
            raise ValueError(f"{path} is no image that a browser shows")
        return FileResponse(file, media_type=f"image/{kind}")

    for module in (jobs, pictures, start, runs, compare, trying, export):
        app.include_router(module.router)
    return app
