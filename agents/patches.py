"""Embedding an image's patches as the matrix product that it is."""

from __future__ import annotations

from torch import Tensor, nn


class PatchProjection(nn.Conv3d):
    """A convolution whose input is one patch of its kernel's size at a time, which it meets in a single place.

    As a convolution that is several times slower than as a matrix product, forwards and backwards.
    """

    def forward(self, input: Tensor) -> Tensor:
        """Embeddings [N, E, 1, 1, 1] of patches [N, C, T, H, W]; of anything larger, what a convolution gives."""
        if input.shape[2:] != self.weight.shape[2:]:
            return super().forward(input)
        embedded = nn.functional.linear(input.flatten(1), self.weight.flatten(1), self.bias)
        return embedded[..., None, None, None]


def multiply_patches(tower: nn.Module) -> None:
    """Lets a vision tower embed patches by matrix products; its weights keep their names and shapes."""
    for module in tower.modules():
        if type(module) is nn.Conv3d and module.groups == 1 and not any(module.padding) and set(module.dilation) == {1}:
            module.__class__ = PatchProjection
