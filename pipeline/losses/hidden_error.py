"""The loss of a masked autoencoder: the squared error of what was hidden."""

from __future__ import annotations

from torch import Tensor


def hidden_error(output: Tensor, target: Tensor) -> Tensor:
    """output (B, C, *S); target (B, C + 1, *S): image and mask (1 hidden) -> scalar.

    The mean over the hidden voxels of each patch, then over the patches: ranks and micro-batches
    that have equal shares of a batch make its mean.
    """
    image, mask = target[:, :-1], target[:, -1:]
    axes = tuple(range(1, target.ndim))
    error = ((output.float() - image).square() * mask).sum(axes)
    return (error / (mask.sum(axes) * image.shape[1])).mean()
