"""A teacher on a server: vLLM's log-probabilities of the student's completions, as the end of a prompt.

The server is one that `vlmenv serve` started, whose model is never updated.
"""

from __future__ import annotations

import asyncio
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any, Final

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from vlmenv.agents.engines.access import server_token
from vlmenv.agents.engines.background import BackgroundLoop
from vlmenv.agents.engines.base import Request
from vlmenv.agents.engines.checks import check_prompt
from vlmenv.agents.engines.remote import RetryPolicy, Server
from vlmenv.agents.engines.replies import Served, ServerFault
from vlmenv.agents.engines.server import content_parts
from vlmenv.agents.engines.settings import vocabulary_digest
from vlmenv.agents.families import Family
from vlmenv.core.errors import ConfigError, EngineError
from vlmenv.core.rollout import Observation, Prompt, Rollout

_AT_ONCE: Final = 64
"""Maximum number of requests at a time."""
Encode = Callable[[Sequence[Observation]], tuple[list[Prompt], NDArray[np.int64]]]


class ServerTeacher:
    """A frozen model on a server of `vlmenv serve`, which scores completions of one turn.

    Its log-probabilities are of temperature 1, and of the whole vocabulary: tokens that are never sampled, such as
    those of images, keep their small part, which a teacher in memory gives to the others.

    Args:
        url: Address, as http://HOST:PORT, https://HOST:PORT or unix:PATH.
        family: The student's model and processor.
        encode: Encodes observations as the student does; see `VLMAgent.encode`.
        retry_policy: Time limits and retries.
        ca: File of the authorities that sign the certificate of an https server. Default: those that the system trusts.

    Raises:
        ConfigError: The address is invalid, there is no token, or the tokenizers differ.
        EngineError: The server does not answer, or is not one of `vlmenv serve`.
    """

    def __init__(
        self,
        url: str,
        family: Family,
        encode: Encode,
        *,
        retry_policy: RetryPolicy | None = None,
        ca: Path | None = None,
    ) -> None:
        self._server = Server(url, server_token(), retry_policy or RetryPolicy(), ca)
        self._encode, self._family = encode, family
        self._loop = BackgroundLoop()
        try:
            served: Served = self._run(self._server.meet())
            self._max_videos = served.max_videos
            if served.vocabulary != vocabulary_digest(family):
                raise ConfigError(
                    f"the teacher {url} has another tokenizer than the model. Serve a teacher of the same family"
                )
        except BaseException:
            self.close()
            raise

    def logprobs(self, rollout: Rollout, observations: Sequence[Observation]) -> Tensor:
        """The teacher's log-probabilities of completions.

        Args:
            rollout: N completions of one turn, of at most L tokens.
            observations: What they answer.

        Returns:
            float32 [N, L], on the CPU; 0 after a completion's end.

        Raises:
            ConfigError: An observation has videos, and the server takes none.
            EngineError: The server fails, or encodes a prompt differently from the student.
        """
        if self._max_videos == 0 and any(one.get("videos") for one in observations):
            raise ConfigError("the teacher's server takes no videos of its model: name the model instead")
        prompts, index = self._encode(observations)
        shown = {int(prompt): one for prompt, one in zip(index, observations, strict=True)}
        requests = [Request(prompt, shown[i]["images"], shown[i].get("videos", ())) for i, prompt in enumerate(prompts)]
        tokens = [one.token_ids for one in rollout.completions]
        found = self._run(self._scored([requests[i] for i in index], tokens))
        result = np.zeros((len(found), max(map(len, tokens))), np.float32)
        for row, values in zip(result, found, strict=True):
            row[: len(values)] = values
        return torch.from_numpy(result)

    def close(self) -> None:
        """Closes the connections."""
        self._loop.run(self._server.close())
        self._loop.close()

    def _run(self, work: Any) -> Any:
        try:
            return self._loop.run(work)
        except ServerFault as fault:
            raise EngineError(f"the teacher {self._server.url}: {fault}") from fault

    async def _scored(
        self, requests: Sequence[Request], tokens: Sequence[NDArray[np.int64]]
    ) -> list[NDArray[np.float32]]:
        room = asyncio.Semaphore(_AT_ONCE)

        async def score(request: Request, answer: NDArray[np.int64]) -> NDArray[np.float32]:
            body = content_parts(request, self._family) | {"token_ids": [*request.token_ids, *answer.tolist()]}
            async with room:
                prompt_ids, logprobs = await self._server.score(body, count=len(answer))
            check_prompt(request, prompt_ids[: -len(answer)])
            return logprobs

        return await asyncio.gather(*[score(*one) for one in zip(requests, tokens, strict=True)])
