"""Taps on layers: see their features in a forward pass, and stop it after the last one needed."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import ExitStack, contextmanager, suppress

import torch
from torch import nn

from art_clat.layers import Layer, Site
from art_clat.uses import PRODUCTS, WeightUses, tensors_in


class _LastFeatureSeen(Exception):
    """Ends a forward pass from within."""


@contextmanager
def tap(sites: Sequence[Site], show: Callable[[Site, torch.Tensor], None], *, stop: bool = False) -> Iterator[None]:
    """
    Show the tensors at some sites to a function in the forward pass that runs in this context.

    The function sees a tensor at the moment it is there: an in-place activation that overwrites it later does no harm
    to what was computed from it, but a function that keeps it must copy it.

    :param sites: Where to look: at the outputs or inputs of layers.
    :param show: Called with the site and the tensor, batch first; once for every call.
    :param stop: End the forward pass, and with it the context, once everything has been seen.
    """
    left = sum(site.calls for site in sites)

    def see(site: Site, value: object) -> None:
        nonlocal left
        found = list(tensors_in(value))
        if len(found) <= site.index:
            raise RuntimeError(f"{type(site.module).__name__} had fewer tensors in this pass than in the one before.")
        show(site, found[site.index].movedim(site.batch_dim, 0))
        left -= 1
        if stop and left == 0:
            raise _LastFeatureSeen

    def hook_of(site: Site) -> Callable[[nn.Module, object, object, object], None]:
        return lambda module, args, kwargs, output: see(site, output)

    def pre_hook_of(site: Site) -> Callable[[nn.Module, object, object], None]:
        return lambda module, args, kwargs: see(site, (args, kwargs))

    def used(name: str, parameters: list[nn.Parameter], data: torch.Tensor | None, output: object) -> None:
        if name in PRODUCTS and data is not None:
            for site in sites:
                if site.weight is not None and any(site.weight is parameter for parameter in parameters):
                    see(site, data if site.enters else output)

    weights = [site.weight for site in sites if site.weight is not None]
    with ExitStack() as stack:
        for site in sites:
            if site.weight is not None:
                continue
            if site.enters:
                handle = site.module.register_forward_pre_hook(pre_hook_of(site), with_kwargs=True)
            else:
                handle = site.module.register_forward_hook(hook_of(site), with_kwargs=True)
            stack.callback(handle.remove)
        if weights:
            stack.enter_context(WeightUses(weights, used))
        with suppress(_LastFeatureSeen):
            yield


class Features:
    """
    The features of a batch at some layers, and how far another forward pass is from them.

    :param layers: The layers.
    :param inputs: Look also at what enters each layer.
    :param lengths: Measure also how long the features themselves are, see :meth:`relative_distance`.
    """

    def __init__(self, layers: Sequence[Layer], *, inputs: bool = False, lengths: bool = False) -> None:
        self.layers = list(layers)
        self._sites = [layer.output for layer in layers]
        if inputs:
            self._sites += [layer.input for layer in layers if layer.input is not None]
        self._wants_lengths = lengths
        self._kept: dict[Site, list[torch.Tensor]] = {}
        self._distances: dict[Site, list[torch.Tensor]] = {}
        self._clean_lengths: dict[Site, list[torch.Tensor]] = {}

    @contextmanager
    def keep(self, *, stop: bool = False) -> Iterator[None]:
        """
        Keep the features of the forward pass in this context: ``F_i(x)``.

        :param stop: End the forward pass after the last layer.
        """
        self._kept = {site: [] for site in self._sites}

        def keep(site: Site, feature: torch.Tensor) -> None:
            self._kept[site].append(feature.clone())

        with tap(self._sites, keep, stop=stop):
            yield

    @contextmanager
    def compare(self, *, stop: bool = False, forget: bool = False) -> Iterator[None]:
        """
        Measure the forward pass in this context against the kept features; `distance` has the result.

        :param stop: End the forward pass after the last layer.
        :param forget: Let go of every kept feature as soon as it has been compared, for the pass to use its memory.
        """
        self._begin()

        def compare(site: Site, feature: torch.Tensor) -> None:
            kept, call = self._kept[site], len(self._distances[site])
            clean = kept.pop(0) if forget else kept[call]
            self._compare(site, clean.float(), feature.float())

        with tap(self._sites, compare, stop=stop):
            yield

    @contextmanager
    def compare_halves(self, *, stop: bool = False) -> Iterator[None]:
        """
        Measure the second half of a batch against the first in one forward pass, with nothing kept.

        :param stop: End the forward pass after the last layer.
        """
        self._begin()

        def compare(site: Site, feature: torch.Tensor) -> None:
            self._compare(site, *feature.float().chunk(2))

        with tap(self._sites, compare, stop=stop):
            yield

    def distance(self, layer: Layer, batch_size: int) -> torch.Tensor:
        """
        Give ``‖F_i(x+δ) − F_i(x)‖_2`` of every sample.

        :param layer: One of the layers.
        :param batch_size: Number of samples; a feature may have a multiple of it as its first dimension (windows).
        :return: Shape (`batch_size`,), float32.
        """
        return _joined(self._distances[layer.output], batch_size)

    def relative_distance(self, layer: Layer, batch_size: int) -> torch.Tensor:
        """
        Give ``‖F_i(x+δ) − F_i(x)‖_2 / ‖F_i(x)‖_2`` of every sample; 0 where the feature itself is 0.

        :param layer: One of the layers; the features must have been made with `lengths`, as for all that is relative.
        :param batch_size: Number of samples.
        :return: Shape (`batch_size`,), float32.
        """
        return self._relative(layer.output, batch_size)

    def input_distance(self, layer: Layer, batch_size: int, *, relative: bool = False) -> torch.Tensor:
        """
        Give the distance of what enters a layer, sample by sample, as :meth:`distance` does of what leaves it.

        :param layer: One of the layers; the features must have been made with `inputs`.
        :param batch_size: Number of samples.
        :param relative: As :meth:`relative_distance` does.
        :return: Shape (`batch_size`,), float32; zeros for a layer that takes no tensor with a batch.
        """
        if layer.input is None:
            return torch.zeros_like(self.distance(layer, batch_size))
        return (
            self._relative(layer.input, batch_size) if relative else _joined(self._distances[layer.input], batch_size)
        )

    def total_distance(self, batch_size: int) -> torch.Tensor:
        """
        Give the summed distance of all layers, ``Σ_i ‖F_i(x+δ) − F_i(x)‖_2`` (the term inside eq. 5).

        :param batch_size: Number of samples.
        :return: Shape (`batch_size`,), float32.
        """
        return torch.stack([self.distance(layer, batch_size) for layer in self.layers]).sum(dim=0)

    def total_relative_distance(self, batch_size: int) -> torch.Tensor:
        """
        Give the summed relative distance of all layers.

        :param batch_size: Number of samples.
        :return: Shape (`batch_size`,), float32.
        """
        return torch.stack([self.relative_distance(layer, batch_size) for layer in self.layers]).sum(dim=0)

    def _begin(self) -> None:
        self._distances = {site: [] for site in self._sites}
        self._clean_lengths = {site: [] for site in self._sites}

    def _compare(self, site: Site, clean: torch.Tensor, perturbed: torch.Tensor) -> None:
        self._distances[site].append(_lengths(perturbed - clean))
        if self._wants_lengths:
            self._clean_lengths[site].append(_lengths(clean))

    def _relative(self, site: Site, batch_size: int) -> torch.Tensor:
        length = _joined(self._clean_lengths[site], batch_size)
        zero = length == 0
        return (_joined(self._distances[site], batch_size) / length.masked_fill(zero, 1)).masked_fill(zero, 0)


def _joined(lengths: Sequence[torch.Tensor], batch_size: int) -> torch.Tensor:
    """Give one length a sample where a layer ran several times, or has several rows a sample."""
    parts = torch.cat([part.reshape(batch_size, -1) for part in lengths], dim=1)
    return parts[:, 0] if parts.shape[1] == 1 else torch.linalg.vector_norm(parts, dim=1)


def _lengths(x: torch.Tensor) -> torch.Tensor:
    """Give the Euclidean length of every sample, in whatever order its elements are stored."""
    lengths: torch.Tensor = torch.linalg.vector_norm(x, dim=tuple(range(1, x.ndim)))
    return lengths
