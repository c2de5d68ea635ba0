"""What a job brings along for its model: LoRAs, embeddings and a VAE, out of the catalog.

None of them can fail a job: what cannot be used is skipped, and the job says so.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from functools import lru_cache, partial
from pathlib import Path
from typing import Any, TypeAlias

import torch
from diffusers.loaders.single_file_utils import convert_ldm_vae_checkpoint
from torch import Tensor

from diffusion_api.catalog import compatibility
from diffusion_api.catalog.library import Asset, Library
from diffusion_api.engine.base import Attached
from diffusion_api.engine.denoise import Loaded
from diffusion_api.engine.devices import is_out_of_memory
from diffusion_api.engine.embeddings import read_embedding
from diffusion_api.engine.families.base import read_weights
from diffusion_api.engine.loras import Patches, Step, Weight, steps
from diffusion_api.prompt import parse
from diffusion_api.schema.job import LoraApplied, LoraSkipped, lora_skipped
from diffusion_api.schema.request import OWN_VAE, LoraUse, Sampling

Patch: TypeAlias = Callable[[Patches, Mapping[Weight, Sequence[Step]], Any], None]
"""How patches come into a model: :meth:`Patches.attach`, or that with room made for it."""


class Extras:
    """Gives each job's model what the job asked for, and takes away what others had asked for."""

    def __init__(self, library: Library, patch: Patch = Patches.attach) -> None:
        self._library, self._patch = library, patch

    def attach(self, lane: Loaded, request: Sampling) -> Attached:
        """Have the lane draw with the LoRAs, the VAE and the embeddings of this request, and with no others.

        What is attached stays until another job of this model asks for something else; the same again costs nothing.
        """
        patched = self._patched(lane, request)
        learned = self._learned(lane, f"{request.prompt}\n{request.negative_prompt}")
        return patched.and_then(learned)

    def _patched(self, lane: Loaded, request: Sampling) -> Attached:
        uses = [(use, self._library.find_asset("lora", use.name)) for use in lora_uses(request)]
        vae = self._vae(request)
        key = (*((use, row and (row.path, row.stamp)) for use, row in uses), vae and (vae.path, vae.stamp))
        if lane.patches.label and lane.patches.label[0] == key:
            known: Attached = lane.patches.label[1]
            return known
        fitting = _Fitting(lane.patches, request.model, self._family(request.model))
        for use, row in uses:
            if row:
                fitting.add(use, row)
            else:
                fitting.skip(use.name, f"it {self._library.absence(use.name)}")
        if vae:
            fitting.replace_vae(vae)
        attached = fitting.result()
        self._patch(lane.patches, fitting.steps, (key, attached))
        return attached

    def _vae(self, request: Sampling) -> Asset | None:
        if request.vae == OWN_VAE:
            return None
        if request.vae:
            return self._library.find_asset("vae", request.vae)
        names = (request.model, f"{request.model}.vae")
        return next((row for row in self._library.assets("vae") if row.name in names), None)

    def _family(self, model: str) -> str:
        row = self._library.find(model)
        return row.family if row else ""

    def _learned(self, lane: Loaded, prompts: str) -> Attached:
        prompts = prompts.lower()
        rows = [row for row in self._library.assets("embedding") if row.name.lower() in prompts]
        widths = tuple((part, words.width) for part, words in lane.words.items())
        vectors: dict[Asset, Mapping[str, Tensor]] = {}
        warnings = []
        for row in rows:
            found = _embedding(row.path, row.stamp, widths)
            if isinstance(found, str):
                warnings.append(f"embedding {row.name!r} was skipped: {found}")
            else:
                vectors[row] = found
        lesson = tuple((row.path, row.stamp) for row in vectors)
        for part, words in lane.words.items():
            words.learn(lesson, {row.name: found[part] for row, found in vectors.items()})
        hashes = {row.name: row.network_hash for row in vectors}
        return Attached(warnings=tuple(warnings), hashes={"TI hashes": hashes} if hashes else {})


def lora_uses(request: Sampling) -> tuple[LoraUse, ...]:
    """The LoRAs of a request: those of its own field, then those that its prompt names."""
    named = (network for network in parse(request.prompt).networks if network.kind == "lora")
    return (*request.loras, *(LoraUse(name=n.name, scale=n.unet, text_scale=n.text_encoder) for n in named))


class _Fitting:
    """Collects what files do to a model's weights, and what is to be said about it."""

    def __init__(self, patches: Patches, model: str, family: str) -> None:
        self._patches, self._model, self._family = patches, model, family
        self._layers: compatibility.Layers | None = None
        self.steps: dict[Weight, list[Step]] = {}
        self._applied: list[LoraApplied] = []
        self._skipped: list[LoraSkipped] = []
        self._warnings: list[str] = []
        self._hashes: dict[str, str] = {}
        self._vae: dict[str, str] = {}

    def result(self) -> Attached:
        """What became of all that was added."""
        hashes = {"Lora hashes": self._hashes} if self._hashes else {}
        told = tuple(dict.fromkeys(self._warnings))
        return Attached(tuple(self._applied), tuple(self._skipped), told, hashes, self._vae)

    def add(self, use: LoraUse, row: Asset) -> None:
        """One more LoRA, after those before it."""
        try:
            tensors = _tensors(read_weights(row.path))
        except Exception as error:  # torch, safetensors and the unpickler raise anything for a file that is damaged
            if is_out_of_memory(error):
                raise
            self.skip(use.name, f"{row.path.name} cannot be read: {_reason(error)}")
            return
        if self._layers is None:
            self._layers = self._patches.layers
        found = compatibility.fit({name: tensor.shape for name, tensor in tensors.items()}, self._layers)
        if not found.applies:
            why = compatibility.reason(found)
            said = compatibility.advice(use.name, self._model, made_for=row.family, family=self._family)
            self._skipped.append(LoraSkipped(name=use.name, reason=why))
            self._warnings.append(f"{said} It was skipped: {why}.")
            return
        if not all(bool(torch.isfinite(tensor).all()) for tensor in tensors.values()):
            self.skip(use.name, "it holds numbers that are not finite (NaN)")
            return
        if found.unknown:
            self._warnings.append(
                f"LoRA {use.name!r} was applied in part: {len(found.unknown)} of its {len(tensors)} tensors belong to no "
                f"layer of model {self._model!r}, {found.unknown[0]!r} for one"
            )
        for weight, step in steps(found, tensors, unet=use.scale, text=use.on_text).items():
            self.steps.setdefault(weight, []).append(step)
        self._applied.append(LoraApplied(name=row.name, scale=use.scale, text_scale=use.on_text))
        self._hashes[row.name.replace(":", "").replace(",", "")] = row.network_hash

    def replace_vae(self, row: Asset) -> None:
        """The VAE of that file in place of the model's own."""
        network = self._patches.parts.get("vae")
        try:
            tensors = _vae_tensors(row.path, network)
        except Exception as error:  # as above
            if is_out_of_memory(error):
                raise
            self._warnings.append(f"VAE {row.name!r} was skipped: {_reason(error)}")
            return
        for name, tensor in tensors.items():
            self.steps["vae", name] = [partial(_instead, tensor)]
        self._vae = {"VAE hash": row.hash or "", "VAE": row.path.name}

    def skip(self, name: str, reason: str) -> None:
        """A LoRA that is left out."""
        self._skipped.append(LoraSkipped(name=name, reason=reason))
        self._warnings.append(lora_skipped(name, reason))


def _instead(tensor: Tensor, own: Tensor) -> Tensor:
    return tensor.to(own.device, torch.float32)


def _tensors(content: object) -> dict[str, Tensor]:
    """The tensors of a file by name, also where they stand one level down. Raises ValueError when there are none."""
    if isinstance(content, Mapping):
        inner = content.get("state_dict", content)
        found = {str(name): value for name, value in inner.items() if isinstance(value, Tensor)}
        if found:
            return found
    raise ValueError("it holds no tensors")


def _vae_tensors(path: Path, network: Any) -> dict[str, Tensor]:
    """The weights of a VAE by the names of this network, all of them. Raises ValueError when it is another kind."""
    if network is None:
        raise ValueError("the model has no VAE that could be replaced")
    tensors = _tensors(read_weights(path))
    if not any(".up_blocks." in name for name in tensors):
        tensors = convert_ldm_vae_checkpoint(tensors, network.config)
    network._fix_state_dict_keys_on_load(tensors)  # names that attention had until diffusers 0.15
    for name, own in network.named_parameters():
        if name not in tensors:
            raise ValueError(f"it lacks {name}")
        if tensors[name].shape != own.shape:
            theirs, ours = ("x".join(map(str, shape)) for shape in (tensors[name].shape, own.shape))
            raise ValueError(f"its {name} is {theirs}, and {ours} in the model")
    return {name: tensors[name] for name, _ in network.named_parameters()}


@lru_cache(maxsize=64)
def _embedding(path: Path, stamp: int, widths: tuple[tuple[str, int], ...]) -> Mapping[str, Tensor] | str:
    """The vectors of an embedding, or why it cannot be used."""
    if not widths:
        return "the model takes none"
    try:
        return read_embedding(path, dict(widths))
    except Exception as error:  # as for LoRAs
        return _reason(error)


def _reason(error: Exception) -> str:
    """One line for callers, with no path of the host."""
    if isinstance(error, ValueError):
        return str(error)
    if isinstance(error, OSError):
        return error.strerror or "it cannot be read"
    return "it is damaged, or holds more than tensors"
