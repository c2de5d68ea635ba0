"""LoRAs: what their tensors do to the weights of a model, and weights that are always put back.

The changed weights are computed once, in float32, and stand in the model until other ones are asked for: a step costs nothing
more, and every layout is applied the same way. The weights as they were are kept in main memory and copied back, bit for bit;
subtracting the change again would not give the same numbers.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping, Sequence
from functools import partial
from typing import Any, TypeAlias

import torch
from torch import Tensor, nn

from diffusion_api.catalog.compatibility import Fit, Layers, layers
from diffusion_api.engine.text import Words

Weight: TypeAlias = tuple[str, str]
"""A part of a model, and the name of a parameter in it."""

Step: TypeAlias = Callable[[Tensor], Tensor]
"""A parameter's new value, float32, from the one that it has by now."""


class Patches:
    """What stands in place of a model's own weights.

    ``parts`` are its networks by the names that diffusers has for them, ``words`` what its text encoders keep of what they
    read, which is forgotten when their weights change.
    """

    def __init__(self, parts: Mapping[str, nn.Module], words: Mapping[str, Words]) -> None:
        self.parts, self._words = dict(parts), words
        self._own: dict[Weight, Tensor] = {}
        self.label: Any = None
        """What who attached the present patches says of them."""

    @property
    def layers(self) -> Layers:
        """The layers that a LoRA may change."""
        return layers({part: _shapes(network) for part, network in self.parts.items() if part != "vae"})

    @property
    def size(self) -> int:
        """Bytes of RAM that the model's own weights take while others stand in their place."""
        return sum(own.nbytes for own in self._own.values())

    def size_with(self, weights: Iterable[Weight]) -> int:
        """What ``size`` is once patches stand in place of these, in bytes."""
        return sum(self._parameter(weight).nbytes for weight in weights)

    def attach(self, steps: Mapping[Weight, Sequence[Step]], label: Any) -> None:
        """Have these patches and no others. When it fails, no weight is changed."""
        self.detach()
        try:
            for weight, changes in steps.items():
                self._patch(weight, changes)
        except BaseException:
            self.detach()
            raise
        self._forget()
        self.label = label

    def detach(self) -> None:
        """Put the model's own weights back."""
        self.label = None
        with torch.no_grad():
            for weight, own in self._own.items():
                self._parameter(weight).copy_(own)
        self._forget()
        self._own = {}

    def _forget(self) -> None:
        """Let go of what text encoders read before these weights changed."""
        for part in {part for part, _ in self._own} & self._words.keys():
            self._words[part].forget()

    def _patch(self, weight: Weight, changes: Sequence[Step]) -> None:
        with torch.no_grad():
            parameter = self._parameter(weight)
            value = parameter.detach().float()
            for change in changes:
                value = change(value)
            self._own[weight] = parameter.detach().to("cpu", copy=True)
            parameter.copy_(value)

    def _parameter(self, weight: Weight) -> Tensor:
        # Written into, not replaced: what moves a model between the card and main memory holds on to these very tensors.
        part, name = weight
        return self.parts[part].get_parameter(name)


def steps(found: Fit, tensors: Mapping[str, Tensor], *, unet: float, text: float) -> dict[Weight, Step]:
    """What a LoRA does to each weight, with its strengths for the denoiser and for the text encoders."""
    changed: dict[Weight, Step] = {}
    for change in found.changes:
        strength = text if change.layer.part.startswith("text_encoder") else unet
        if strength:  # 0 times a number is 0, but not 0 times infinity
            roles = {role: tensors[name] for role, name in change.tensors.items()}
            changed[change.layer.part, change.layer.name] = partial(changed_by, roles, strength)
    return changed


def changed_by(tensors: Mapping[str, Tensor], strength: float, weight: Tensor) -> Tensor:
    """A weight, float32, with one layer of a LoRA applied; tensors by the roles of the catalog.

    LoRA (arXiv:2106.09685), LoHa and LoKr (arXiv:2309.14859), whole differences, and the magnitudes of DoRA (arXiv:2402.09353)
    on any of them. Strength goes from the weight as it is, at 0, to what the LoRA makes of it, at 1, also with DoRA, where
    PEFT would keep the magnitudes at 0.
    """
    roles = {role: tensor.to(weight.device, torch.float32) for role, tensor in tensors.items()}
    difference, rank = _difference(roles)
    if "alpha" in roles and rank:
        difference = difference * (roles["alpha"].item() / rank)
    difference = difference.reshape(weight.shape)
    if "magnitude" in roles:
        difference = _with_magnitude(weight + difference, roles["magnitude"]) - weight
    return weight + strength * difference


def _difference(roles: Mapping[str, Tensor]) -> tuple[Tensor, int]:
    """The difference of the weights, and the rank that alpha is to be divided by; 0 where alpha has no meaning."""
    if "mid" in roles:
        up, mid, down = roles["up"].flatten(1), roles["mid"], roles["down"].flatten(1)
        return torch.einsum("or,rs...,si->oi...", up, mid, down), len(down)
    if "down" in roles:
        return roles["up"].flatten(1) @ roles["down"].flatten(1), len(roles["down"])
    if "hada_w1_a" in roles:
        one, other = (_product(roles, f"hada_w{number}", f"hada_t{number}") for number in (1, 2))
        return one * other, len(roles["hada_w1_b"])
    if "diff" in roles:
        return roles["diff"], 0
    one = roles["lokr_w1"] if "lokr_w1" in roles else _product(roles, "lokr_w1")
    other = roles["lokr_w2"] if "lokr_w2" in roles else _product(roles, "lokr_w2", "lokr_t2")
    inner = roles.get("lokr_w1_b", roles.get("lokr_w2_b"))
    one = one.reshape(*one.shape, *[1] * (other.dim() - one.dim()))
    return torch.kron(one, other.contiguous()), 0 if inner is None else len(inner)


def _product(roles: Mapping[str, Tensor], name: str, core: str = "") -> Tensor:
    """Two factors multiplied, around their Tucker core if there is one."""
    a, b = roles[f"{name}_a"], roles[f"{name}_b"]
    if core in roles:
        return torch.einsum("rs...,ro,si->oi...", roles[core], a, b)
    return (a @ b.flatten(1)).reshape(len(a), *b.shape[1:])


def _with_magnitude(weight: Tensor, magnitude: Tensor) -> Tensor:
    """The weight, its direction kept, with these lengths: of each output (PEFT), or of each input (LyCORIS)."""
    across = [1] * (weight.dim() - 1)
    if magnitude.numel() == len(magnitude) == len(weight):
        lengths: Tensor = torch.linalg.vector_norm(weight.flatten(1), dim=1).reshape(-1, *across)
        return weight * (magnitude.reshape(-1, *across) / lengths)
    lengths = torch.linalg.vector_norm(weight.transpose(0, 1).flatten(1), dim=1).reshape(1, -1, *across[1:])
    return weight * (magnitude.reshape(1, -1, *across[1:]) / lengths)


def _shapes(network: nn.Module) -> dict[str, Sequence[int]]:
    return {name: parameter.shape for name, parameter in network.named_parameters()}
