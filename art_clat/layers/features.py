"""Look at the features of layers in a forward pass, and end the pass after the last one needed."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import ExitStack, contextmanager, suppress
from dataclasses import replace

import torch
from torch import nn

from art_clat.layers.discovery import PROBE_SIZES
from art_clat.layers.layer import Layer, Site
from art_clat.layers.weight_uses import PRODUCTS, WeightUses, tensors_in


class _LastFeatureSeen(Exception):
    """Ends a forward pass from within."""


@contextmanager
def tap(sites: Sequence[Site], show: Callable[[Site, torch.Tensor], None], *, stop: bool = False) -> Iterator[None]:
    """
    Pass the tensors at some sites to a function during the forward pass in this context.

    The function sees a tensor before a later in-place operation can overwrite it. If it keeps the tensor, it must copy
    it.

    :param sites: Where to look.
    :param show: Called once for every call of a site, with the site and the tensor in the order of
           :meth:`.Site.by_sample`.
    :param stop: End the forward pass, and with it the context, once everything has been seen.
    :raises RuntimeError: If a module has more calls, or fewer tensors, than when the layers were found.
    """
    seen = dict.fromkeys(sites, 0)
    left = sum(site.calls for site in sites)

    def see(site: Site, value: object) -> None:
        nonlocal left
        found = list(tensors_in(value))
        if len(found) <= site.index or seen[site] == site.calls:
            what = "more calls" if seen[site] == site.calls else "fewer tensors"
            raise RuntimeError(
                f"{type(site.module).__name__} had {what} in this pass than when the layers were found. CLAT needs a "
                "network that runs the same modules in every forward pass."
            )
        show(site, site.by_sample(found[site.index], seen[site]))
        seen[site] += 1
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


def tell_samples_apart(
    layers: Sequence[Layer], forward: Callable[[torch.Tensor], torch.Tensor], x: torch.Tensor
) -> list[Layer]:
    """
    Find out which entries along a layer's batch dimension belong to which sample, if a sample has several.

    In a batch of equal samples the first one is exchanged; the entries that change are that sample's.

    :param layers: The layers.
    :param forward: The network; it must treat every sample independently of the others.
    :param x: One input, shape (1, *input_shape).
    :return: The layers, with ``interleaved`` set at their sites.
    """
    sites = {site for layer in layers for site in (layer.output, layer.input) if site and max(site.rows) > 1}
    if not sites:
        return list(layers)
    nb_samples = PROBE_SIZES[0]
    equal = x.expand(nb_samples, *x.shape[1:])
    other = torch.linspace(0, 1, x.numel(), device=x.device, dtype=x.dtype).view_as(x)
    seen: list[dict[Site, list[torch.Tensor]]] = []
    for batch in (equal, torch.cat([other, equal[1:]])):
        seen.append({site: [] for site in sites})
        with torch.no_grad(), tap(list(sites), lambda site, feature: seen[-1][site].append(feature.clone())):
            forward(batch)

    def is_interleaved(site: Site) -> bool:
        together = apart = 0.0  # how much the first sample's entries change in either order
        for before, after, rows in zip(seen[0][site], seen[1][site], site.rows, strict=True):
            if rows > 1:
                changes = (after.double() - before.double()).abs().flatten(2).sum(dim=2).flatten()
                together += float(changes[:rows].sum())
                apart += float(changes[::nb_samples].sum())
        return apart > together

    exchanged = {site: replace(site, interleaved=True) for site in sites if is_interleaved(site)}
    return [
        replace(
            layer,
            output=exchanged.get(layer.output, layer.output),
            input=layer.input and exchanged.get(layer.input, layer.input),
        )
        for layer in layers
    ]


class Features:
    """
    The features of a batch at some layers, and the distance of another forward pass from them.

    :param layers: The layers.
    :param inputs: Also look at the tensor that enters each layer.
    :param lengths: Also measure the lengths of the clean features, which :meth:`relative_distance` needs.
    """

    #: Whether `stop` has an effect; set it to `False` to measure what stopping early saves.
    stops_early = True

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
        """Keep the features of the forward pass in this context, ``F_i(x)``; `stop` ends it after the last layer."""
        self._kept = {site: [] for site in self._sites}

        def keep(site: Site, feature: torch.Tensor) -> None:
            self._kept[site].append(feature.clone())

        with tap(self._sites, keep, stop=stop and self.stops_early):
            yield

    @contextmanager
    def compare(self, *, stop: bool = False, forget: bool = False) -> Iterator[None]:
        """
        Measure how far the features of the forward pass in this context are from the kept ones.

        :param stop: End the forward pass after the last layer.
        :param forget: Drop every kept feature once it has been compared, so that the pass can use its memory.
        """
        self._begin()

        def compare(site: Site, feature: torch.Tensor) -> None:
            kept, call = self._kept[site], len(self._distances[site])
            clean = kept.pop(0) if forget else kept[call]
            self._compare(site, clean.float(), feature.float())

        with tap(self._sites, compare, stop=stop and self.stops_early):
            yield

    @contextmanager
    def compare_halves(self, *, stop: bool = False) -> Iterator[None]:
        """Measure how far the second half of a batch is from the first, in one forward pass with nothing kept."""
        self._begin()

        def compare(site: Site, feature: torch.Tensor) -> None:
            self._compare(site, *feature.float().chunk(2))

        with tap(self._sites, compare, stop=stop and self.stops_early):
            yield

    @property
    def nb_kept(self) -> int:
        """Number of features that are kept at the moment."""
        return sum(map(len, self._kept.values()))

    def distance(self, layer: Layer) -> torch.Tensor:
        """Return ``‖F_i(x+δ) − F_i(x)‖_2`` of every sample, shape (batch,), float32."""
        return _joined(self._distances[layer.output])

    def relative_distance(self, layer: Layer) -> torch.Tensor:
        """
        Return ``‖F_i(x+δ) − F_i(x)‖_2 / ‖F_i(x)‖_2`` of every sample, shape (batch,), float32.

        It is 0 if the feature itself is 0. Needs `lengths`.
        """
        return self._relative(layer.output)

    def input_distance(self, layer: Layer, *, relative: bool = False) -> torch.Tensor:
        """
        Return the distance, or relative distance, of the tensor that enters a layer, shape (batch,), float32.

        It is zero for a layer that takes no tensor with a batch. Needs `inputs`.
        """
        if layer.input is None:
            return torch.zeros_like(self.distance(layer))
        return self._relative(layer.input) if relative else _joined(self._distances[layer.input])

    def total_distance(self) -> torch.Tensor:
        """Return ``Σ_i ‖F_i(x+δ) − F_i(x)‖_2`` over all layers (the term inside eq. 5), shape (batch,), float32."""
        return torch.stack([self.distance(layer) for layer in self.layers]).sum(dim=0)

    def total_relative_distance(self) -> torch.Tensor:
        """Return the relative distance summed over all layers, shape (batch,), float32."""
        return torch.stack([self.relative_distance(layer) for layer in self.layers]).sum(dim=0)

    def _begin(self) -> None:
        self._distances = {site: [] for site in self._sites}
        self._clean_lengths = {site: [] for site in self._sites}

    def _compare(self, site: Site, clean: torch.Tensor, perturbed: torch.Tensor) -> None:
        self._distances[site].append(_lengths(perturbed - clean))
        if self._wants_lengths:
            self._clean_lengths[site].append(_lengths(clean))

    def _relative(self, site: Site) -> torch.Tensor:
        length = _joined(self._clean_lengths[site])
        zero = length == 0
        return (_joined(self._distances[site]) / length.masked_fill(zero, 1)).masked_fill(zero, 0)


def _joined(lengths: Sequence[torch.Tensor]) -> torch.Tensor:
    """Join the lengths of a layer's several runs into one length a sample."""
    return lengths[0] if len(lengths) == 1 else torch.linalg.vector_norm(torch.stack(list(lengths)), dim=0)


def _lengths(x: torch.Tensor) -> torch.Tensor:
    """Return the Euclidean length of every sample, whatever the memory format."""
    lengths: torch.Tensor = torch.linalg.vector_norm(x, dim=tuple(range(1, x.ndim)))
    return lengths
