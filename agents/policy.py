"""The distribution over completions: prompts are computed once per group, answers token by token."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn
from transformers import DynamicCache, PreTrainedModel

from vlmenv.agents.base import LogProbs
from vlmenv.agents.families.base import join_images
from vlmenv.core.errors import ModelError
from vlmenv.core.rollout import Prompt, Rollout


@dataclass(slots=True)
class Prefix:
    """P prompts, all but their last token, run through the model."""

    cache: DynamicCache
    """keys and values, [P, heads, T - 1, head size] per layer"""
    mask: Tensor
    """[P, T - 1], 1 at prompt tokens, 0 where padded"""
    last: Tensor
    """[P], each prompt's last token"""
    position: Tensor
    """[P], the position of that token"""

    def expand(self, index: Tensor) -> None:
        """Gives each of N completions the prefix of its prompt, `index` [N]. Gradients add up."""
        self.cache.batch_select_indices(index)
        self.mask, self.last, self.position = self.mask[index], self.last[index], self.position[index]


class ValueHead(nn.Linear):
    """Reads the expected return off final hidden states, in float32 under any precision.

    It starts at zero, so that at first neither values nor their gradient disturb a trained model.

    Args:
        hidden_size: H.
        detach: Whether the values' loss trains the head alone, and not the model beneath it.
        device: Where the weights go.
    """

    def __init__(self, hidden_size: int, *, detach: bool, device: torch.device) -> None:
        super().__init__(hidden_size, 1, device=device, dtype=torch.float32)
        self.detach = detach
        for parameter in self.parameters():
            nn.init.zeros_(parameter)

    def forward(self, input: Tensor) -> Tensor:
        """Values [...] of hidden states [..., H]."""
        with torch.autocast(input.device.type, enabled=False):
            return super().forward((input.detach() if self.detach else input).float())[..., 0]


class Policy(nn.Module):
    """The distribution over completions: sampling from it, and the log-probabilities under it.

    A group's image and prompt run through the model once; its completions continue from the cached
    keys and values. That is exact, in value and in gradient (compare Prefix Grouper, arXiv 2506.05433).
    """

    def __init__(self, model: PreTrainedModel, banned_tokens: np.ndarray) -> None:
        super().__init__()
        self.model = model
        self.value_head: ValueHead | None = None
        self.register_buffer("banned", torch.from_numpy(banned_tokens).to(model.device), persistent=False)

    def forward(self, rollout: Rollout) -> LogProbs:
        """Log-probabilities and entropies of the completions of a rollout, and values where there is a head."""
        temperature = rollout.temperature or 1.0
        hidden, targets, mask = self.hidden_states(rollout)
        logprobs = torch.log_softmax(self.logits(hidden[mask]) / temperature, dim=-1)
        chosen = logprobs.gather(-1, targets[mask][:, None])[:, 0]
        with torch.no_grad():
            entropy = -(logprobs.exp() * logprobs.clamp(min=torch.finfo(logprobs.dtype).min)).sum(-1)
        blank = torch.zeros(mask.shape, dtype=chosen.dtype, device=mask.device)
        values = None if self.value_head is None else blank.masked_scatter(mask, self.value_head(hidden[mask]))
        return LogProbs(blank.masked_scatter(mask, chosen), blank.masked_scatter(mask, entropy), mask, values)

    def hidden_states(self, rollout: Rollout) -> tuple[Tensor, Tensor, Tensor]:
        """Final hidden states that predict the tokens of the completions.

        Returns:
            Hidden states [N, L, H], the tokens that they predict [N, L], and the mask of real tokens [N, L].
        """
        prefix = self.prefill(rollout.prompts)
        prefix.expand(torch.from_numpy(rollout.prompt_index).to(prefix.mask.device))
        targets = _pad([completion.token_ids for completion in rollout.completions]).to(prefix.mask.device)
        lengths = torch.tensor([len(completion.token_ids) for completion in rollout.completions])
        mask = (torch.arange(targets.shape[1]) < lengths[:, None]).to(targets.device)
        inputs = torch.cat([prefix.last[:, None], targets[:, :-1]], dim=1)
        attention = torch.cat([prefix.mask, mask.long()], dim=1)
        return self._continue(prefix, inputs, attention, start=0), targets, mask

    def logits(self, hidden: Tensor) -> Tensor:
        """Logits of hidden states [..., H] over the vocabulary, in float32, banned tokens at -inf."""
        head = self.model.get_output_embeddings()
        assert head is not None
        logits: Tensor = head(hidden).float()
        return logits.index_fill(-1, self.get_buffer("banned"), -torch.inf)

    def prefill(self, prompts: list[Prompt]) -> Prefix:
        """Runs prompts through the model, all but their last token, padded on the right."""
        device = self.model.device
        lengths = torch.tensor([len(prompt.input_ids) - 1 for prompt in prompts])
        mask = (torch.arange(int(lengths.max())) < lengths[:, None]).long().to(device)
        positions = [_pad([prompt.position_ids[axis, :-1] for prompt in prompts]) for axis in range(3)]
        output = self.model.model(
            input_ids=_pad([prompt.input_ids[:-1] for prompt in prompts]).to(device),
            attention_mask=mask,
            position_ids=torch.stack(positions).to(device),
            use_cache=True,
            **join_images(prompts, device),
        )
        _tie(output.past_key_values, output.last_hidden_state)
        last = torch.tensor([int(prompt.input_ids[-1]) for prompt in prompts], device=device)
        position = torch.tensor([int(prompt.position_ids[0, -1]) for prompt in prompts], device=device)
        return Prefix(output.past_key_values, mask, last, position)

    def sample(
        self,
        prompts: list[Prompt],
        index: np.ndarray,
        temperature: float,
        max_new_tokens: int,
        end_tokens: tuple[int, ...],
        generator: torch.Generator,
    ) -> tuple[np.ndarray, np.ndarray]:
        """Samples a completion for each entry of `index` [N], until all have ended or are full.

        Returns:
            Tokens and their log-probabilities, [N, L] each; what follows a row's end token is void.

        Raises:
            ModelError: The model's logits are not finite.
        """
        prefix = self.prefill(prompts)
        prefix.expand(torch.from_numpy(index).to(prefix.mask.device))
        ends = torch.tensor(end_tokens, device=prefix.mask.device)
        token, attention = prefix.last, prefix.mask
        done = torch.zeros_like(token, dtype=torch.bool)
        tokens, logprobs = [], []
        for step in range(max_new_tokens):
            attention = torch.cat([attention, torch.ones_like(token)[:, None]], dim=1)
            hidden = self._continue(prefix, token[:, None], attention, start=step)
            token, logprob = _draw(self.logits(hidden[:, 0]), temperature, generator)
            tokens.append(token)
            logprobs.append(logprob)
            done |= torch.isin(token, ends)
            if done.all():
                break
        return torch.stack(tokens, dim=1).cpu().numpy(), torch.stack(logprobs, dim=1).cpu().numpy()

    def _continue(self, prefix: Prefix, tokens: Tensor, attention: Tensor, start: int) -> Tensor:
        """Hidden states [N, L, H] of tokens [N, L], the first of which is `start` places after the prefix."""
        offsets = torch.arange(start, start + tokens.shape[1], device=tokens.device)
        positions = prefix.position[:, None] + offsets
        output = self.model.model(
            input_ids=tokens,
            attention_mask=attention,
            position_ids=positions.expand(3, *positions.shape),
            past_key_values=prefix.cache,
            use_cache=True,
        )
        hidden: Tensor = output.last_hidden_state
        return hidden


def _tie(cache: DynamicCache, hidden: Tensor) -> None:
    """Lets gradients of a cache reach final hidden states [P, T, H] too, as zeros.

    Of the last block, only keys and values are used. But FSDP gathers a block's weights for the backward pass
    when a gradient reaches the block's output.
    """
    if hidden.requires_grad:
        layer: Any = cache.layers[-1]
        layer.values = layer.values + 0 * hidden[:, None, :1, :1]


def _draw(logits: Tensor, temperature: float, generator: torch.Generator) -> tuple[Tensor, Tensor]:
    """Draws a token from each row of logits [N, V]; also its log-probability [N]."""
    logprobs = torch.log_softmax(logits / (temperature or 1.0), dim=-1)
    if logprobs[:, 0].isnan().any():  # then all of the row are; on a GPU, drawing from it would end the process
        raise ModelError("the model's logits are not finite: its weights are not, or they overflow at this precision")
    if temperature == 0:
        token = logprobs.argmax(dim=-1)
    else:
        token = torch.multinomial(logprobs.exp(), 1, generator=generator)[:, 0]
    return token, logprobs.gather(-1, token[:, None])[:, 0]


def _pad(rows: list[np.ndarray]) -> Tensor:
    """Stacks rows of unequal length, with zeros on the right."""
    return nn.utils.rnn.pad_sequence([torch.from_numpy(row) for row in rows], batch_first=True)
