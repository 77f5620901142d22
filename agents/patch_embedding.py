"""Patch embedding as a matrix product."""

from __future__ import annotations

from torch import Tensor, nn


class PatchProjection(nn.Conv3d):
    """A convolution over single patches of the kernel's size, computed as a matrix product.

    The convolution itself is several times slower, forward and backward.
    """

    def forward(self, input: Tensor) -> Tensor:
        """Embeds patches [N, C, T, H, W] as [N, E, 1, 1, 1]. Larger inputs are convolved."""
        if input.shape[2:] != self.weight.shape[2:]:
            return super().forward(input)
        embedded = nn.functional.linear(input.flatten(1), self.weight.flatten(1), self.bias)
        return embedded[..., None, None, None]


def embed_patches_by_matmul(tower: nn.Module) -> None:
    """Makes a vision tower embed patches by matrix products. Weights keep their names and shapes."""
    for module in tower.modules():
        if type(module) is nn.Conv3d and module.groups == 1 and not any(module.padding) and set(module.dilation) == {1}:
            module.__class__ = PatchProjection
