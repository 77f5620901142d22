"""Cards, and the time that a kernel takes on them by the roofline model (Williams et al. 2009).

A kernel takes the longest of: its operations at the rate that such kernels reach, its bytes at the bandwidth that they
reach, and the least time between two kernels of a stream. The rates are published ones; the shares of them that kernels
reach are assumptions, stated here.
"""

from __future__ import annotations

from dataclasses import dataclass
from enum import StrEnum
from typing import Final


class Kind(StrEnum):
    """Kinds of kernels."""

    PRODUCT = "matrix products"
    HEAD = "matrix products of the head"
    ATTENTION = "attention, forward"
    ATTENTION_BACKWARD = "attention, backward"
    FUSED = "elementwise, fused"
    HEAD_ELEMENTWISE = "elementwise of the head"
    CAST = "casts of weights and of their gradients"
    ELEMENTWISE = "elementwise and copies"


@dataclass(frozen=True)
class Card:
    """A card's rates.

    Attributes:
        name: Its name.
        half: Operations per second of dense matrix products in bfloat16, published.
        single: The same in float32 without tensor cores, published.
        bandwidth: Bytes per second of its memory, published.
        processors: Number of its streaming multiprocessors, published.
        product_share: Share of `half` and `single` that large matrix products reach.
        bandwidth_share: Share of `bandwidth` that elementwise kernels reach.
        attention: Operations per second that flash attention reaches forward.
        attention_backward: The same backward, with all processors at work.
        least: Seconds that the smallest kernel takes of a stream.
    """

    name: str
    half: float
    single: float
    bandwidth: float
    processors: int
    product_share: float
    bandwidth_share: float
    attention: float
    attention_backward: float
    least: float


H100: Final = Card(
    name="H100 SXM 80 GB",
    half=989.4e12,  # NVIDIA H100 datasheet, dense
    single=67e12,  # the same
    bandwidth=3.35e12,  # the same
    processors=132,  # NVIDIA H100 architecture whitepaper
    product_share=0.65,
    bandwidth_share=0.8,
    attention=380e12,  # FlashAttention-2, which PyTorch has, on an H100: arXiv 2407.08608, figure 5
    attention_backward=300e12,  # the same, figure 6
    least=4e-6,
)
CARDS: Final = {"h100": H100}
HOST_CALL: Final = 20e-6
"""Seconds in which the host starts an operator, with the model's own Python code.

Measured on one core of an EPYC server without a card, under autocast: a step of a model as deep as Qwen2.5-VL-3B and of
width 64 takes 32 to 46 ms for 2,433 operators, and with adapters 54 to 80 ms for 4,629. To start a kernel takes more.
"""


@dataclass(frozen=True)
class Kernel:
    """What a call of an operator does on the card.

    Attributes:
        kind: Its kind.
        bytes: Bytes that it reads and writes.
        operations: Its floating-point operations, a multiplication and an addition as two.
        blocks: Number of thread blocks, if these may be fewer than the card's processors.
        launches: Number of kernels that PyTorch starts for it.
        half: True if it computes in half precision.
        place: The place in the code that calls it.
        operator: PyTorch's operator.
        replayed: True if the host does not start it, but a graph that it is part of.
    """

    kind: Kind
    bytes: float
    operations: float = 0.0
    blocks: int | None = None
    launches: int = 1
    half: bool = True
    place: str = ""
    operator: str = ""
    replayed: bool = False

    def seconds(self, card: Card) -> float:
        """Its time on a card."""
        busy = 1.0 if self.blocks is None else min(1.0, self.blocks / card.processors)
        moving = self.bytes / (card.bandwidth * card.bandwidth_share)
        return max(self.operations / (self._rate(card) * busy), moving, card.least * self.launches)

    def _rate(self, card: Card) -> float:
        if self.kind is Kind.ATTENTION:
            return card.attention
        if self.kind is Kind.ATTENTION_BACKWARD:
            return card.attention_backward
        return (card.half if self.half else card.single) * card.product_share


def attention_operations(heads: int, size: int, pairs: float) -> float:
    """Operations of attention forward: two products for each pair of a query and a key that it sees."""
    return 4.0 * heads * size * pairs


def utilization(forward: float, times: int, seconds: float, card: Card) -> float:
    """Model FLOPs utilisation (arXiv 2204.02311, appendix B); what is recomputed does not count.

    Args:
        forward: Operations of the forward pass.
        times: How many times as many forward and backward take: 3, or 2 where the weights of most products are frozen.
        seconds: Time of both.
        card: The card.
    """
    return times * forward / (seconds * card.half)
