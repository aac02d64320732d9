"""Random transforms of training images: of any library one image at a time, and crops and flips of a batch."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, replace

import torch

from art_clat.models.checks import ROUNDING
from art_clat.utils.batch import Batch
from art_clat.utils.checks import check_whole
from art_clat.utils.randomness import drawn_by_image, reseed


@dataclass(frozen=True)
class CropAndFlip:
    """
    A random crop with padding and a random horizontal flip, for the trainer's ``augmentation=``.

    The trainer moves all images of a batch at once, on the network's device. Where each image moves follows from the
    seed, the epoch and the image's index in the data set. Unlike a transform of another library, it can say where each
    pixel went, which reused perturbations need.

    :param padding: Zeros on each side before the crop to the image's own size, in pixels; at least 0.
    :param flip: Mirror half of the images, left to right.
    :raises ValueError: If `padding` is no whole number of at least 0.
    """

    padding: int = 4
    flip: bool = True

    def __post_init__(self) -> None:
        check_whole(self.padding, 0, argument="padding")

    def __call__(self, image: torch.Tensor) -> torch.Tensor:
        """
        Move one image by numbers of torch's global generator.

        :param image: Shape (channels, height, width).
        :return: The same shape.
        """
        return self.moves(torch.randint(2**31, (1,)), *image.shape[-2:]).apply(image[None].cpu())[0].to(image.device)

    def moves(self, indices: torch.Tensor, height: int, width: int, *counters: int) -> Moves:
        """
        Draw where images move.

        :param indices: The images' indices in the data set, shape (n,).
        :param height: Height of the images.
        :param width: Width of the images.
        :param counters: Whole numbers that the moves follow from besides, such as seed and epoch.
        :return: One move an image, on the device of `indices`.
        """
        down, right, mirrored = drawn_by_image(indices, 3, *counters).unbind(1)
        places = 2 * self.padding + 1
        rows = (down % places)[:, None] + torch.arange(height, device=indices.device)
        columns = torch.arange(width, device=indices.device).expand(len(indices), width)
        if self.flip:
            columns = torch.where((mirrored % 2 == 1)[:, None], columns.flip(1), columns)
        return Moves(rows, (right % places)[:, None] + columns, self.padding)


@dataclass(frozen=True)
class Moves:
    """
    Where the pixels of moved images come from.

    :param rows: For each image and row, the row of the padded image, shape (n, height).
    :param columns: For each image and column, the column of the padded image, shape (n, width).
    :param padding: Pixels on each side.
    """

    rows: torch.Tensor
    columns: torch.Tensor
    padding: int

    def apply(self, images: torch.Tensor) -> torch.Tensor:
        """Move images, or what belongs to their pixels, shape (n, channels, height, width); what comes in is zero."""
        padded = _pad(images, self.padding)
        rows, columns = self._places(padded)
        return padded.gather(2, rows).gather(3, columns)

    def undo(self, moved: torch.Tensor, before: torch.Tensor) -> torch.Tensor:
        """
        Move back what belongs to the pixels.

        :param moved: Values in the moved images, shape (n, channels, height, width).
        :param before: Values in the images; the pixels that the crop has left out keep them.
        :return: Values in the images.
        """
        padded = _pad(before, self.padding)
        rows, columns = self._places(padded)
        padded.scatter_(2, rows, padded.gather(2, rows).scatter(3, columns, moved))
        height, width = before.shape[2:]
        return padded[:, :, self.padding : self.padding + height, self.padding : self.padding + width]

    def _places(self, padded: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        """Return rows and columns as indices of the padded images."""
        n, channels, _, width = padded.shape
        rows = self.rows[:, None, :, None].expand(n, channels, -1, width)
        columns = self.columns[:, None, None, :].expand(n, channels, self.rows.shape[1], -1)
        return rows, columns


def _pad(images: torch.Tensor, padding: int) -> torch.Tensor:
    """Return a copy with zeros on each side."""
    return torch.nn.functional.pad(images, (padding,) * 4) if padding else images.clone()


def augment(
    augmentation: Callable[[torch.Tensor], torch.Tensor], batch: Batch, seed: int, epoch: int, number: int
) -> Batch:
    """
    Augment the images of a batch, shape (batch, channels, height, width), independently of one another.

    What happens to an image follows from the seed, the epoch and its index; in the batches of a generator, which have
    no indices, from the number of the batch and its place in it.

    torchvision's transforms draw random numbers once for all images they get together. So each image is passed to them
    alone, after the global random generators were seeded.
    """
    places = torch.arange(batch.part.total)[batch.part.mine]
    counters, indices = ((seed, epoch, number), places) if batch.index is None else ((seed, epoch), batch.index)
    if isinstance(augmentation, CropAndFlip):
        on_device = indices.to(batch.x.device, non_blocking=True)
        return replace(batch, x=augmentation.moves(on_device, *batch.x.shape[-2:], *counters).apply(batch.x))
    images = []
    for index, image in zip(indices.tolist(), batch.x, strict=True):
        reseed(image.device, *counters, index)
        changed = augmentation(image)
        if changed.shape != image.shape or changed.dtype != image.dtype:
            raise ValueError(
                f"`augmentation` makes {changed.dtype} images of shape {tuple(changed.shape)}; it must keep their type "
                f"{image.dtype} and shape {tuple(image.shape)}."
            )
        images.append(changed)
    return replace(batch, x=torch.stack(images))


def check_augmented(x: torch.Tensor, clip_values: tuple[torch.Tensor, ...] | None, number: int) -> None:
    """
    Refuse augmented images that leave the range of valid inputs, in which the attack stays.

    On a GPU, where a look makes the processor wait, only the first batch of an epoch is looked at.
    """
    if clip_values is None or (number > 0 and x.device.type != "cpu"):
        return
    low, high = clip_values
    tolerance = ROUNDING * (high - low)
    if ((x < low - tolerance) | (x > high + tolerance)).any():
        raise ValueError(
            f"`augmentation` makes images in [{x.min():.6g}, {x.max():.6g}], outside the classifier's clip_values "
            f"[{low.min():.6g}, {high.max():.6g}], in which the attack stays. Put a normalisation into the network, or "
            "into `preprocessing=` of the classifier, and a clamp at the end of other transforms."
        )
