"""The web service that `python -m flux2.serve` runs.

    GET  /health                 {"status": "ok"}; needs no token
    GET  /identity?length=512    what embeddings depend on, and the model
    POST /encode                 {"prompts": ["...", ...], "length": 512} -> safetensors with `embeddings` (B, L, D)
    POST /caption                an image -> a caption, with --captions (captions.py)

One thread encodes, one prompt at a time: in a batch the rounding of an embedding depends on its neighbors (on a CPU in
bfloat16, and in float32 with several threads), and an embedding must not depend on other clients. A prompt is padded to
hundreds of tokens, which occupy a processor alone, so batches gain little. With `batch` > 1 waiting prompts are still
encoded together, and the identity records it.

An invalid request is answered with a 4xx and {"error": reason} before anything is computed.
"""

import asyncio
import hmac
import logging
from collections import deque
from collections.abc import AsyncIterator, Callable, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import asynccontextmanager
from dataclasses import dataclass, field
from typing import Any, TypeVar

import safetensors.torch
import torch
from fastapi import Depends, FastAPI, HTTPException, Request, Response
from fastapi.concurrency import run_in_threadpool
from fastapi.exceptions import RequestValidationError
from fastapi.responses import JSONResponse
from pydantic import BaseModel, ConfigDict, Field, ValidationError
from starlette.exceptions import HTTPException as StarletteHTTPException
from starlette.requests import ClientDisconnect
from torch import Tensor

from flux2.models.text_encoder import TextEncoder
from flux2.prompts.captioning import CaptionModel
from flux2.prompts.remote_protocol import CUT_HEADER, IDENTITY_HEADER
from flux2.serve.captions import CaptionRequest, caption_work
from flux2.utils.cli import is_out_of_memory

log = logging.getLogger(__name__)
BODY_SECONDS = 30.0  # time limit for the body of a request
BUSY = {"Retry-After": "2"}
Encoded = tuple[Tensor, bool]  # embedding (length, D), and whether the prompt was truncated
Question = TypeVar("Question", bound=BaseModel)
Result = TypeVar("Result")


@dataclass(frozen=True)
class Limits:
    """Limits of requests and of the queue."""

    batch: int = 1  # prompts that are encoded together
    characters: int = 20_000  # of a prompt
    prompts: int = 32  # of a request
    length: int = 512  # tokens that a prompt may be padded to
    body: int = 1 << 20  # bytes of a request
    image: int = 4 << 20  # bytes of a request with an image
    waiting: int = 256  # prompts and images of all requests; further ones are answered with 503


@dataclass(frozen=True)
class ServedEncoder:
    """The encoder and its description. `identity` takes the number of tokens that prompts are padded to."""

    encoder: TextEncoder
    model: str
    kind: str
    layers: tuple[int, ...]
    width: int
    length: int
    identity: Callable[[int], str]


class EncodeRequest(BaseModel):
    """The body of POST /encode."""

    model_config = ConfigDict(extra="forbid", strict=True)
    prompts: list[str] = Field(min_length=1)
    length: int | None = Field(default=None, ge=1)


@dataclass
class PendingPrompt:
    """A prompt that waits for its embedding."""

    prompt: str
    length: int
    result: Future[Encoded] = field(default_factory=Future)


class Worker:
    """The thread that encodes prompts in the order of their arrival."""

    def __init__(self, encoder: TextEncoder, batch: int, most: int) -> None:
        self.encoder, self.batch, self.most = encoder, batch, most
        self.waiting: deque[PendingPrompt] = deque()
        self.images: set[Future[Any]] = set()  # captions that are not complete
        self._thread = ThreadPoolExecutor(1, "encoder")

    def stop(self) -> None:
        """End the thread after it has encoded all waiting prompts."""
        self._thread.shutdown()

    @property
    def count(self) -> int:
        """Number of prompts and images that wait."""
        return len(self.waiting) + sum(not image.running() for image in list(self.images))

    def _check_room(self, more: int) -> None:
        if self.count + more > self.most:
            raise HTTPException(503, "too many prompts are waiting: try again", BUSY)

    def submit_image(self, work: Callable[[], Any]) -> Future[Any]:
        """Return a future of the result of `work`. Raises HTTPException if too many prompts wait."""
        self._check_room(1)
        result = self._thread.submit(work)
        self.images.add(result)
        result.add_done_callback(self.images.discard)
        return result

    def submit(self, prompts: Sequence[str], length: int) -> list[Future[Encoded]]:
        """Return futures of the embeddings. Raises HTTPException if too many prompts wait."""
        self._check_room(len(prompts))
        units = [PendingPrompt(prompt, length) for prompt in prompts]
        self.waiting += units
        for _ in units:
            self._thread.submit(self._encode_next)
        return [unit.result for unit in units]

    def _encode_next(self) -> None:
        """Encode the first waiting prompt together with the next ones of its length, up to the batch size."""
        units: list[PendingPrompt] = []
        while self.waiting and len(units) < self.batch and self.waiting[0].length == (units or self.waiting)[0].length:
            units.append(self.waiting.popleft())
        units = [unit for unit in units if unit.result.set_running_or_notify_cancel()]
        if not units:
            return
        try:
            self.encoder.cut.clear()
            embeddings = self.encoder.encode([unit.prompt for unit in units], units[0].length).cpu()
            cut = set(self.encoder.cut)
        except Exception as error:  # the thread must outlive a prompt that fails
            log.exception("a prompt could not be encoded")
            for unit in units:
                unit.result.set_exception(error)
            return
        for unit, embedding in zip(units, embeddings, strict=True):
            unit.result.set_result((embedding, unit.prompt in cut))


def application(
    served: ServedEncoder, limits: Limits, token: str | None, captioner: CaptionModel | None = None
) -> FastAPI:
    """Return the service. With `token` every request except /health must carry it."""
    worker = Worker(served.encoder, limits.batch, limits.waiting)

    @asynccontextmanager
    async def lifespan(_: FastAPI) -> AsyncIterator[None]:
        yield
        await run_in_threadpool(worker.stop)

    app = FastAPI(title="flux2 text encoder", lifespan=lifespan, docs_url=None, redoc_url=None, openapi_url=None)

    async def authorize(request: Request) -> None:
        given = request.headers.get("Authorization", "").encode()
        if token is not None and not hmac.compare_digest(given, f"Bearer {token}".encode()):
            raise HTTPException(401, "a bearer token is required", {"WWW-Authenticate": "Bearer"})

    def checked_length(length: int | None) -> int:
        length = served.length if length is None else length
        if not 1 <= length <= limits.length:
            raise HTTPException(422, f"length={length} must be from 1 to {limits.length}")
        return length

    def identity(length: int) -> str:
        return served.identity(length) + (f" batches of {limits.batch}" if limits.batch > 1 else "")

    @app.exception_handler(StarletteHTTPException)
    async def refused(_: Request, error: StarletteHTTPException) -> JSONResponse:
        return JSONResponse({"error": error.detail}, error.status_code, error.headers)

    @app.exception_handler(RequestValidationError)
    async def invalid(_: Request, error: RequestValidationError) -> JSONResponse:
        return JSONResponse({"error": first_problem(error.errors())}, 422)

    @app.get("/health")
    async def health() -> dict[str, str | int]:
        return {"status": "ok", "waiting": worker.count}

    @app.get("/identity", dependencies=[Depends(authorize)])
    def get_identity(length: int | None = None) -> dict[str, object]:
        tokens = checked_length(length)
        about = {key: getattr(served, key) for key in ("model", "kind", "layers", "width")}
        return {**about, "length": tokens, "identity": identity(tokens)}

    @app.post("/encode", dependencies=[Depends(authorize)])
    async def encode(request: Request) -> Response:
        question = await read_question(request, limits.body, EncodeRequest)
        length = checked_length(question.length)
        if len(question.prompts) > limits.prompts:
            raise HTTPException(422, f"{len(question.prompts)} prompts are more than {limits.prompts} per request")
        longest = max(map(len, question.prompts))
        if longest > limits.characters:
            raise HTTPException(422, f"a prompt has {longest} characters, more than {limits.characters}")
        encoded = await wait_for_results(request, worker.submit(question.prompts, length))
        content = await run_in_threadpool(pack, [embedding for embedding, _ in encoded])
        cut = ",".join(str(i) for i, (_, is_cut) in enumerate(encoded) if is_cut)
        headers = {IDENTITY_HEADER: identity(length), CUT_HEADER: cut}
        return Response(content, media_type="application/octet-stream", headers=headers)

    @app.post("/caption", dependencies=[Depends(authorize)])
    async def caption(request: Request) -> JSONResponse:
        if captioner is None:
            raise HTTPException(404, "no captions are served here: start the server with --captions")
        question = await read_question(request, limits.image, CaptionRequest)
        longest = max(len(question.system), len(question.request))
        if longest > limits.characters:
            raise HTTPException(422, f"a text has {longest} characters, more than {limits.characters}")
        try:
            work = await run_in_threadpool(caption_work, captioner, question)
        except ValueError as error:
            raise HTTPException(422, str(error)) from error
        (answer,) = await wait_for_results(request, [worker.submit_image(work)])
        return JSONResponse(answer)

    return app


def pack(embeddings: list[Tensor]) -> bytes:
    return safetensors.torch.save({"embeddings": torch.stack(embeddings)})


def first_problem(errors: Sequence[Any]) -> str:
    """Return the first of pydantic's errors as text, without the input."""
    place = ".".join(str(part) for part in errors[0]["loc"] if part not in ("body", "query"))
    return f"{place}: {errors[0]['msg']}" if place else str(errors[0]["msg"])


async def read_question(request: Request, limit: int, kind: type[Question]) -> Question:
    """Return a request's JSON body of up to `limit` bytes as an object of `kind`."""
    if request.headers.get("Content-Type", "").partition(";")[0].strip().lower() != "application/json":
        raise HTTPException(415, "the body must be application/json")
    body = await read_body(request, limit)
    try:
        return kind.model_validate_json(body)
    except ValidationError as error:
        raise HTTPException(422, first_problem(error.errors())) from error


async def read_body(request: Request, limit: int) -> bytes:
    """Return a request's body of up to `limit` bytes; a longer one is refused before it has arrived completely."""
    too_large = HTTPException(413, f"the body has more than {limit} bytes")
    declared = request.headers.get("Content-Length", "0")
    if not declared.isdecimal() or int(declared) > limit:
        raise too_large
    body = bytearray()
    try:
        async with asyncio.timeout(BODY_SECONDS):
            async for chunk in request.stream():
                body += chunk
                if len(body) > limit:
                    raise too_large
    except ClientDisconnect:
        raise HTTPException(499, "the client disconnected") from None
    except TimeoutError:
        raise HTTPException(408, f"the body did not arrive within {BODY_SECONDS:g} s") from None
    return bytes(body)


async def wait_for_results(request: Request, results: Sequence[Future[Result]]) -> list[Result]:
    """Return the results when all are complete. If the client disconnects first, prompts that wait are canceled."""
    work = asyncio.gather(*map(asyncio.wrap_future, results))
    gone = asyncio.ensure_future(wait_for_disconnect(request))
    either: list[asyncio.Future[Any]] = [work, gone]
    await asyncio.wait(either, return_when=asyncio.FIRST_COMPLETED)
    if not work.done():
        work.cancel()
        await asyncio.gather(work, return_exceptions=True)  # asyncio logs an exception that is not retrieved
        raise HTTPException(499, "the client disconnected")
    gone.cancel()
    try:
        return work.result()
    except Exception as error:
        if is_out_of_memory(error):
            raise HTTPException(503, "out of memory: try again, or with a smaller length", BUSY) from error
        raise HTTPException(500, f"the encoder failed ({type(error).__name__}); see its log") from error


async def wait_for_disconnect(request: Request) -> None:
    """Return when the client has disconnected. The body must have been read."""
    while (await request.receive())["type"] != "http.disconnect":
        continue
