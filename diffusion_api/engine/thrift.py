"""What is done to a loaded model so that it needs less memory: weights that wait in RAM, tiles, slices."""

from __future__ import annotations

import itertools
from collections.abc import Callable, Iterable, Iterator
from typing import Any

import torch
from diffusers.models.autoencoders.vae import AutoencoderMixin
from torch import Tensor, nn
from torch.overrides import TorchFunctionMode
from torch.utils._pytree import tree_map

from diffusion_api.engine.denoise import Loaded
from diffusion_api.engine.estimate import PIECES, TILE, Placement

Networks = dict[str, nn.Module]

QUERIES = 1024
"""Rows of an attention that are computed at a time when it is sliced."""

LATENT = 8
"""Pixels of a latent pixel's side."""


def networks(model: Loaded) -> Networks:
    """The networks of a model, by the names that diffusers has for them."""
    return model.patches.parts


def size(module: nn.Module) -> int:
    """Bytes of its weights."""
    return sum(tensor.nbytes for tensor in _tensors(module))


def set_tiling(found: Networks, tiling: bool) -> None:
    """Have pictures larger than a tile decoded in tiles, or whole."""
    for network in found.values():
        if isinstance(network, AutoencoderMixin):
            network.tile_sample_min_size, network.tile_latent_min_size = TILE, TILE // LATENT
            (network.enable_tiling if tiling else network.disable_tiling)()


class SlicedAttention(TorchFunctionMode):
    """Within, attention is computed for some queries at a time: each query's result depends on no other query."""

    def __torch_function__(
        self, func: Callable[..., Any], types: Any, args: tuple[Any, ...] = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        """Any function of torch; one of them in slices."""
        options = kwargs or {}
        if func is not nn.functional.scaled_dot_product_attention or len(args) < 3 or options.get("is_causal"):
            return func(*args, **options)
        query, rest = args[0], args[1:]
        mask = rest[2] if len(rest) > 2 else options.get("attn_mask")
        if query.shape[-2] <= QUERIES or (mask is not None and mask.shape[-2] != 1):
            return func(*args, **options)
        return torch.cat([func(part, *rest, **options) for part in query.split(QUERIES, dim=-2)], dim=-2)


class Placed:
    """The networks of one model, and how much of them is on the device.

    In parts or pieces, every weight stays in RAM; what is about to compute gets a copy on the device, and only that. Inputs
    follow the weights.
    """

    def __init__(self, found: Networks, place: torch.device, host: torch.device) -> None:
        self._networks, self._place, self._host = found, place, host
        self._hooks: list[Any] = []
        self._aboard: _Cargo | None = None
        self.size = sum(map(size, found.values()))
        """Bytes of all weights."""

    def put(self, placement: Placement | None) -> None:
        """Have that much of it on the device at a time; None: nothing."""
        self._release()
        whole = placement is Placement.WHOLE
        for network in self._networks.values():
            network.to(self._place if whole else self._host)
        if placement is Placement.PARTS:
            for network in self._networks.values():
                self._carry_when_needed(network)
        elif placement is Placement.PIECES:
            for network in self._networks.values():
                self._carry_in_pieces(network, size(network) // PIECES)

    def land(self) -> None:
        """Let go of the copy on the device."""
        if self._aboard:
            self._aboard.land()
            self._aboard = None

    def _release(self) -> None:
        self.land()
        for hook in self._hooks:
            hook.remove()
        self._hooks = []

    def _carry_when_needed(self, network: nn.Module) -> None:
        """Bring the network when it, or one of the layers that are called without it, computes; until another does."""
        cargo = _Cargo(lambda: _tensors(network), self._place)

        def before(module: nn.Module, args: Any, kwargs: Any) -> Any:
            if self._aboard is not cargo:
                self.land()
                cargo.bring()
                self._aboard = cargo
            return self._following(args, kwargs)

        for module in (network, *network.children()):
            self._hooks.append(module.register_forward_pre_hook(before, with_kwargs=True))

    def _carry_in_pieces(self, module: nn.Module, most: int) -> None:
        """Bring each of its pieces while that computes. Layers too large for a piece are taken apart."""
        small = size(module) <= most or not any(module.children())
        cargo = _Cargo((lambda: _tensors(module)) if small else (lambda: _own(module)), self._place)

        def before(_: nn.Module, args: Any, kwargs: Any) -> Any:
            cargo.bring()
            return self._following(args, kwargs)

        self._hooks.append(module.register_forward_pre_hook(before, with_kwargs=True))
        self._hooks.append(module.register_forward_hook(lambda *_: cargo.land(), always_call=True))
        if not small:
            for child in module.children():
                self._carry_in_pieces(child, most)

    def _following(self, args: Any, kwargs: Any) -> Any:
        return tree_map(lambda value: value.to(self._place) if isinstance(value, Tensor) else value, (args, kwargs))


class _Cargo:
    """Weights that are copied to the device when they are needed, and whose copy is let go of afterwards."""

    def __init__(self, tensors: Callable[[], Iterable[Tensor]], place: torch.device) -> None:
        self._tensors, self._place = tensors, place
        self._waiting: list[tuple[Tensor, Tensor]] = []

    def bring(self) -> None:
        """Copy them to the device; all of them, or none if they do not fit."""
        copies = [(tensor, tensor.data.to(self._place, copy=True)) for tensor in self._tensors()]
        self._waiting = [(tensor, tensor.data) for tensor, _ in copies]
        for tensor, copy in copies:
            tensor.data = copy

    def land(self) -> None:
        """Have them in RAM only, in the dtype that they have by now."""
        for tensor, at_home in self._waiting:
            tensor.data = at_home.to(tensor.dtype)
        self._waiting = []


def _tensors(module: nn.Module) -> Iterator[Tensor]:
    return itertools.chain(module.parameters(), module.buffers())


def _own(module: nn.Module) -> Iterator[Tensor]:
    """The tensors that belong to the module itself and to none of its layers."""
    return itertools.chain(module.parameters(recurse=False), module.buffers(recurse=False))
