"""An engine of vLLM servers, in other processes or on other machines.

Prompts are divided over the servers. A server that fails is excluded, and the others take its prompts. Updates go to
all servers, but less often to excluded ones. A server that takes an update is in use again. Completions name the
version of their weights, so that those of a restarted server are not taken for the policy's.
"""

from __future__ import annotations

import asyncio
import base64
import io
import math
import uuid
import warnings
from collections import deque
from collections.abc import Awaitable, Callable, Coroutine, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal, TypeVar

import numpy as np
import torch
from numpy.typing import NDArray
from PIL import Image
from torch import Tensor

from vlmenv.agents.engines.access import server_token
from vlmenv.agents.engines.admission import LOCAL
from vlmenv.agents.engines.background import BackgroundLoop
from vlmenv.agents.engines.base import Engine, Request, assign_completions
from vlmenv.agents.engines.checks import check_names, check_prompt, untied
from vlmenv.agents.engines.direct import DirectTransfer
from vlmenv.agents.engines.files import NAME, private_folder, remove_stale, roomy, write_file
from vlmenv.agents.engines.ranks import broadcast_from_main
from vlmenv.agents.engines.remote import RetryPolicy, Server
from vlmenv.agents.engines.replies import Answer, OtherModelFault, RefusedTokenFault, Served, ServerFault
from vlmenv.agents.engines.settings import sampling_settings
from vlmenv.agents.engines.videos import packed
from vlmenv.agents.engines.worker import weight_shapes
from vlmenv.agents.families import Family
from vlmenv.agents.sampling import Sampled
from vlmenv.core.errors import EngineError
from vlmenv.core.sampling import Sampling

_AT_ONCE = 64
"""Maximum number of completions per request, and of requests to a server at a time."""

T = TypeVar("T")
_Give = Callable[[Server], Awaitable[object]]


@dataclass(frozen=True, slots=True)
class _Job:
    """A request for some of a prompt's completions."""

    request: int
    body: dict[str, Any]


@dataclass(slots=True)
class _Batch:
    """The jobs of one call of `generate`."""

    jobs: Sequence[_Job]
    version: str
    """version of the weights that must sample them"""
    waiting: deque[int]
    """jobs that no server works at"""
    answers: dict[int, Answer]
    """answers by job"""


class VLLMServerEngine(Engine):
    """An engine of servers that `vlmenv serve` started. It has no weights before the first `sync`.

    Args:
        servers: Addresses, as http://HOST:PORT, https://HOST:PORT or unix:PATH.
        folder: Folder of the trained model, in the published layout.
        family: The trainer's model and processor, with the tokens that are never sampled.
        transfer: Transfer of weights: "file" (servers read a file) or "direct" (from process to process).
        weights_folder: Folder for the files of weights. Servers on other machines need a shared one. Default: a folder
            in memory, or the one for temporary files if memory is short. "direct" does not use it.
        retry_policy: Time limits and retries.
        ca: File of the authorities that sign certificates of https servers. Default: those that the system trusts.

    Raises:
        ConfigError: An address is invalid, or there is no token.
        EngineError: A server serves another model or has another token; or no server answers.
    """

    max_images: int
    max_videos: int

    def __init__(
        self,
        servers: Sequence[str],
        folder: Path,
        family: Family,
        *,
        transfer: Literal["file", "direct"] = "file",
        weights_folder: Path | None = None,
        retry_policy: RetryPolicy | None = None,
        ca: Path | None = None,
    ) -> None:
        head = family.model.get_output_embeddings()
        assert head is not None
        self._family, self._vocabulary = family, int(head.weight.shape[0])
        self._shapes = untied(weight_shapes(folder), family)
        token = server_token()
        self._servers = [Server(url, token, retry_policy or RetryPolicy(), ca) for url in servers]
        self._news: list[str] = []
        self._version: str | None = None
        """version of the weights of the servers in use; None before the first `sync`"""
        self._given, self._run_id, self._weights_folder = 0, uuid.uuid4().hex, weights_folder
        remove_stale(weights_folder)
        self._direct = DirectTransfer(token) if transfer == "direct" else None
        self._dtype, self.max_length, self.max_images, self.max_videos = "", 0, 0, 0
        self._loop = BackgroundLoop()
        try:
            self._agree(self._run(self._meet_all()))
        except BaseException:
            self.close()
            raise

    def generate(
        self, requests: Sequence[Request], index: NDArray[np.int64], sampling: Sampling, rng: np.random.Generator
    ) -> list[Sampled]:
        if self._version is None:
            raise EngineError("the servers do not have the policy's weights: call sync first")
        jobs = self._jobs(requests, np.bincount(index, minlength=len(requests)), sampling, rng)
        answers = self._run(self._answer_all(jobs, self._version))
        written: list[list[Sampled]] = [[] for _ in requests]
        for job, answer in zip(jobs, answers, strict=True):
            check_prompt(requests[job.request], answer.prompt_ids)
            written[job.request] += answer.completions
        return assign_completions(index, written)

    def sync(self, weights: Mapping[str, Tensor], *, vision: tuple[int, ...] | None = None) -> None:
        # Features are never kept, because another run may have used a server in between, with another vision tower.
        check_names(weights, set(self._shapes))
        self._version = None
        self._version, faults = broadcast_from_main(lambda: self._hand_over(weights))
        for server, fault in zip(self._servers, faults, strict=True):
            server.fault = fault

    def checksums(self) -> dict[str, dict[str, str]]:
        """SHA-256 of every weight by vLLM's name, by the address of each server in use.

        Raises:
            EngineError: A server does not answer.
        """
        return {server.url: self._run(_named(server, server.checksums())) for server in self._used()}

    def clear(self) -> None:
        """Sets every weight of the servers in use to 0, until the next update.

        Raises:
            EngineError: A server does not answer.
        """
        for server in self._used():
            self._run(_named(server, server.clear()))

    def _used(self) -> list[Server]:
        return [server for server in self._servers if server.fault is None]

    def close(self) -> None:
        if self._direct is not None:
            self._direct.close()
        self._loop.run(self._close_all())
        self._loop.close()

    def _run(self, work: Coroutine[Any, Any, T]) -> T:
        """Runs a coroutine and gives its result. Warns about servers that were excluded or used again."""
        try:
            result = self._loop.run(work)
            for message in self._news:
                warnings.warn(message, RuntimeWarning, stacklevel=3)
            return result
        finally:
            self._news.clear()

    # The servers' models.

    async def _meet_all(self) -> list[Served]:
        met = await asyncio.gather(*[server.meet() for server in self._servers], return_exceptions=True)
        for server, served in zip(self._servers, met, strict=True):
            if isinstance(served, OtherModelFault | RefusedTokenFault):
                raise EngineError(f"{server.url}: {served}")
            if isinstance(served, ServerFault):
                self._leave_out(server, served)
            elif isinstance(served, BaseException):
                raise served
        if all(server.fault is not None for server in self._servers):
            raise self._none_left()
        return [served for served in met if isinstance(served, Served)]

    def _agree(self, met: Sequence[Served]) -> None:
        """Sets dtype and limits, or raises EngineError if servers differ."""
        self._dtype, self.max_length = met[0].dtype, min(served.max_length for served in met)
        self.max_images = min(served.max_images for served in met)
        self.max_videos = min(served.max_videos for served in met)
        for server, served in zip([one for one in self._servers if one.fault is None], met, strict=True):
            if unlike := self._difference(served):
                raise EngineError(f"{server.url}: {unlike}")

    def _difference(self, served: Served) -> str | None:
        """The difference of a server from the trainer or from the other servers; None without."""
        shapes = untied(served.weights, self._family)
        if unlike := sorted(
            name for name in shapes.keys() | self._shapes if shapes.get(name) != self._shapes.get(name)
        ):
            name = unlike[0]
            return (
                f"it serves another model than the one in training: {len(unlike)} weights have other names or shapes, "
                f"such as {name}, {shapes.get(name, 'none')} there and {self._shapes.get(name, 'none')} here"
            )
        if served.banned != self._family.banned_tokens.tolist():
            return "it bans other tokens than the trainer: their tokenizers differ"
        if served.dtype != self._dtype:
            return f"it has dtype {served.dtype}, but another server has {self._dtype}: give both the same --weights"
        if served.max_length < self.max_length:
            return f"it takes {served.max_length} tokens, but the others {self.max_length}: raise its --engine-length"
        if served.max_images < self.max_images:
            return f"it takes {served.max_images} images, but the others {self.max_images}: raise its --engine-images"
        if served.max_videos < self.max_videos:
            return f"it takes {served.max_videos} videos, but the others {self.max_videos}: raise its --engine-videos"
        return None

    # Completions.

    def _jobs(
        self, requests: Sequence[Request], counts: NDArray[np.int64], sampling: Sampling, rng: np.random.Generator
    ) -> list[_Job]:
        """Divides the requests' completions into jobs. Each job has its own seed, whichever server does it."""
        jobs = []
        for i, (request, count) in enumerate(zip(requests, counts.tolist(), strict=True)):
            prompt = content_parts(request, self._family) | {"token_ids": request.token_ids}
            for start in range(0, count if sampling.temperature > 0 else 1, _AT_ONCE):
                part, seed = min(_AT_ONCE, count - start), int(rng.integers(2**31))
                params = sampling_settings(self._family, sampling, part, seed)
                jobs.append(_Job(i, prompt | {"sampling_params": params}))
        return jobs

    async def _answer_all(self, jobs: Sequence[_Job], version: str) -> list[Answer]:
        batch = _Batch(jobs, version, deque(range(len(jobs))), {})
        while len(batch.answers) < len(jobs):
            if not (servers := self._used()):
                raise self._none_left()
            share = min(_AT_ONCE, math.ceil(len(batch.waiting) / len(servers)))
            await asyncio.gather(*[self._work(server, batch, share) for server in servers])
        return [batch.answers[i] for i in range(len(jobs))]

    async def _work(self, server: Server, batch: _Batch, at_once: int) -> None:
        """Gives a server jobs until none is waiting. Unfinished jobs of a server that fails wait again."""

        async def take() -> None:
            while batch.waiting:
                i = batch.waiting.popleft()
                try:
                    body, version = batch.jobs[i].body, batch.version
                    batch.answers[i] = await server.complete(body, vocabulary=self._vocabulary, version=version)
                except BaseException:
                    batch.waiting.appendleft(i)
                    raise

        try:
            async with asyncio.TaskGroup() as group:
                for _ in range(at_once):
                    group.create_task(take())
        except* ServerFault as faults:
            self._leave_out(server, faults.exceptions[0])

    # Updates.

    def _hand_over(self, weights: Mapping[str, Tensor]) -> tuple[str, list[str | None]]:
        """Updates the servers. Gives the new version, and the fault of each server (None: in use)."""
        self._given += 1
        version = f"{self._run_id}-{self._given}"
        with self._offered(weights) as give:
            self._run(self._update_all(give, version))
        return version, [server.fault for server in self._servers]

    @contextmanager
    def _offered(self, weights: Mapping[str, Tensor]) -> Iterator[_Give]:
        """A function that updates a server, valid within the context."""
        if (direct := self._direct) is not None:
            dtype: torch.dtype = getattr(torch, self._dtype)
            yield lambda server: direct.deliver(server, weights, dtype)
            return
        with self._written(weights) as (file, digest):
            order = {"path": str(file), "digest": digest}
            yield lambda server: server.again(lambda: server.update(order))

    @contextmanager
    def _written(self, weights: Mapping[str, Tensor]) -> Iterator[tuple[Path, str]]:
        """A file of weights that exists within the context, and its SHA-256."""
        dtype: torch.dtype = getattr(torch, self._dtype)
        size = sum(math.prod(shape) for shape in self._shapes.values()) * dtype.itemsize
        try:
            with private_folder(self._weights_folder or roomy(size)) as folder:
                file = folder / NAME
                yield file, write_file(file, weights, dtype)
        except OSError as error:
            raise EngineError(f"the file of weights for the servers cannot be written: {error}") from error

    async def _update_all(self, give: _Give, version: str) -> None:
        later = [server for server in self._servers if server.fault is not None and server.due > self._given]
        for asked in ([server for server in self._servers if server not in later], later):
            await asyncio.gather(*[self._update(server, give, version) for server in asked])
            if any(server.fault is None for server in self._servers):
                return
        raise self._none_left()

    async def _update(self, server: Server, give: _Give, version: str) -> None:
        try:
            if server.fault is not None and (unlike := self._difference(await server.meet(briefly=True))):
                raise ServerFault(unlike)
            await give(server)
            await server.renew(version)
        except ServerFault as fault:
            if server.fault is not None:
                server.miss(self._given)
            self._leave_out(server, fault)
            return
        if server.fault is not None:
            self._news.append(f"the server {server.url} took the update and is in use again")
        server.use()

    # Servers that fail.

    def _leave_out(self, server: Server, fault: BaseException) -> None:
        if server.fault is None:
            self._news.append(f"the server {server.url} is excluded until it takes a later update: {fault}")
        server.fault = str(fault)

    def _none_left(self) -> EngineError:
        told = "; ".join(f"{server.url}: {server.fault}" for server in self._servers)
        elsewhere = any(server.host not in LOCAL for server in self._servers)
        how = "; those of other machines need --host and an open port" if elsewhere else ""
        return EngineError(f"no server is left. {told}. Start one with `vlmenv serve`{how}")

    async def _close_all(self) -> None:
        await asyncio.gather(*[server.close() for server in self._servers])


async def _named(server: Server, work: Awaitable[T]) -> T:
    """Names the server in an EngineError if a request fails."""
    try:
        return await work
    except ServerFault as fault:
        raise EngineError(f"{server.url}: {fault}") from fault


def content_parts(request: Request, family: Family) -> dict[str, Any]:
    """The images and videos of a conversation, in the body of a request to vLLM's `/inference/v1/generate`."""
    images = [{"type": "image_url", "url": _as_url("image/png", _png(image))} for image in request.images]
    videos = [{"type": "video_url", "url": _as_url("video/x-vlmenv", packed(family, one))} for one in request.videos]
    return {"content_parts": images + videos or None, "return_token_ids": True}


def _png(image: NDArray[np.uint8]) -> bytes:
    """An image as PNG, which is lossless."""
    stream = io.BytesIO()
    Image.fromarray(image).save(stream, "PNG", compress_level=1)
    return stream.getvalue()


def _as_url(kind: str, data: bytes) -> str:
    return f"data:{kind};base64,{base64.b64encode(data).decode()}"
