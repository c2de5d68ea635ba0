"""Any pipeline of diffusers: a model of a family without a lane of its own paints each picture whole, in diffusers' own loop.

Only classes of diffusers and transformers are made, from files that are there, and no code that comes with a model is run.
"""

from __future__ import annotations

import inspect
import json
import logging
import math
import re
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, field, replace
from functools import cached_property, wraps
from pathlib import Path
from typing import Any, Self

import diffusers
import torch
import transformers
from diffusers import FlowMatchEulerDiscreteScheduler, GGUFQuantizationConfig, ModularPipeline
from diffusers.hooks.layerwise_casting import apply_layerwise_casting_hook
from diffusers.pipelines.auto_pipeline import AUTO_TEXT2IMAGE_PIPELINES_MAPPING, _get_task_class
from torch import Tensor, nn

from diffusion_api.catalog import samplers
from diffusion_api.catalog.detect import WITHIN, index_of, safetensors_header, weight_files
from diffusion_api.engine.denoise import Painted
from diffusion_api.engine.devices import Device
from diffusion_api.engine.families.base import complete, read_parts
from diffusion_api.engine.fitting import Tensors
from diffusion_api.engine.loras import Patches
from diffusion_api.engine.plan import Pass
from diffusion_api.engine.text import Words
from diffusion_api.errors import InvalidRequest
from diffusion_api.prompt import parse
from diffusion_api.schema.request import Sampling

logging.getLogger("diffusers.modular_pipelines").setLevel(logging.CRITICAL)  # which logs each error that it raises

LIBRARIES = {"diffusers": diffusers, "transformers": transformers}

OWN_NAME = "diffusion_pytorch_model"
"""How files in diffusers' own layout begin; those of other names may be in the layout that the model was published in."""

FLOAT8 = {"F8_E4M3": torch.float8_e4m3fn, "F8_E5M2": torch.float8_e5m2}
"""As safetensors names them. Layers that are stored so wait so, and are computed with in the device's dtype."""

SCALES = ("scale_weight", "weight_scale", "scaled_fp8")
"""What fp8 files of ComfyUI's kind call the numbers that their weights are to be multiplied by."""

OPTIONS = ("eta", "guidance_rescale")
"""Fields of a request that some pipelines take by the same name."""

UNUSED = (
    *("variation_strength", "seed_resize_width", "s_churn", "s_tmin", "s_tmax", "s_noise"),
    *("discard_next_to_last_sigma", "sigma_min", "sigma_max", "rho", "emphasis", "tiling", "preview_every"),
)
"""Fields of a request that no pipeline takes."""


@dataclass(frozen=True)
class Generic:
    """A loaded pipeline; satisfies :class:`diffusion_api.engine.denoise.Painter`."""

    pipeline: Any
    words: Mapping[str, Words] = field(default_factory=dict)

    @classmethod
    def from_folder(cls, folder: Path, device: Device) -> Self:
        """From a diffusers folder. Raises anything at all when the folder is broken."""
        index = json.loads(index_of(folder).read_text())
        kind = _painting(_kind("diffusers", index["_class_name"]))
        # What is in half precision elsewhere is in bfloat16 here: the large transformers overflow in float16.
        precise = replace(device, dtype=torch.bfloat16) if device.dtype is torch.float16 else device
        named = {name: told for name, told in index.items() if not name.startswith("_")}
        parts = {name: cls.part(folder / name, told, precise) for name, told in named.items()}
        # Weights may wait in RAM while they are not needed: where they lie is not where the pipeline computes.
        placed = type(kind.__name__, (kind,), {"_execution_device": device.place})
        if issubclass(kind, ModularPipeline):
            pipeline = placed(pretrained_model_name_or_path=str(folder), local_files_only=True)
            pipeline.update_components(**{name: parts[name] for name in pipeline.component_names if name in parts})
        else:
            taken = inspect.signature(kind.__init__).parameters
            pipeline = placed(**{name: part for name, part in parts.items() if name in taken})
        pipeline.set_progress_bar_config(disable=True)
        return cls(pipeline)

    @staticmethod
    def part(folder: Path, told: Any, device: Device) -> Any:
        """One entry of an index: a part of the pipeline, or a plain value. Raises anything at all when the part is broken."""
        if not isinstance(told, list):
            return told
        library, name = told[:2]
        if name is None:
            return None
        kind = _kind(WITHIN.get(str(library), str(library)), name)
        if issubclass(kind, diffusers.ModelMixin):
            return _network(kind, folder, device)
        if issubclass(kind, transformers.PreTrainedModel):
            return _encoder(kind, folder, device)
        return kind.from_pretrained(folder, local_files_only=True)

    @property
    def name(self) -> str:
        """The pipeline's class."""
        return type(self.pipeline).__name__

    @cached_property
    def patches(self) -> Patches:
        """What stands in place of the model's own weights."""
        parts = self.pipeline.components.items()
        return Patches({name: part for name, part in parts if isinstance(part, nn.Module)}, self.words)

    def paint(self, stage: Pass, stepped: Callable[[float], bool]) -> Painted | None:
        """The picture of a pass. ``stepped`` is told after each step how much is done, and whether that is to be all.

        None when it is, and the pipeline cannot show what it has by then. Raises InvalidRequest when the pipeline does.
        """
        call = _Call(self.pipeline, stage)
        try:
            with watched(self.pipeline, stepped) as watch:
                found = _images(self.pipeline, call.arguments)
        except Enough:
            return None
        except ValueError as error:
            raise InvalidRequest(f"{self.name} cannot do that: {error}") from error
        height, width = found.shape[-2:]
        if (width, height) != (stage.width, stage.height):
            call.warnings.append(f"the picture is {width}x{height}: {self.name} makes no {stage.width}x{stage.height}")
            call.infotext["Size"] = f"{width}x{height}"
        return Painted(
            values=found.float() * 2 - 1,
            broken_off=math.ceil(watch.broken_off * stage.steps) if watch.broken_off else None,
            warnings=tuple(call.warnings),
            infotext=call.infotext,
        )


class _Call:
    """What a pipeline is called with: of a request, whatever its family takes; and what is to be said of the rest."""

    def __init__(self, pipeline: Any, stage: Pass) -> None:
        self._pipeline, self._stage, self._request = pipeline, stage, stage.request
        self._takes = _taken(pipeline)
        self._name = type(pipeline).__name__
        self.warnings: list[str] = []
        self.infotext = {"RNG": "CPU"}
        self.arguments: dict[str, Any] = {
            "prompt": _plain(stage.prompt),
            "num_inference_steps": stage.steps,
            "generator": torch.Generator().manual_seed(stage.seed),
            "output_type": "pt",
        }
        sizes = {"width": stage.width, "height": stage.height}
        self.arguments |= {name: side for name, side in sizes.items() if name in self._takes}
        self._guide()
        self._sample()
        self._skip_layers()
        for name in OPTIONS + UNUSED:
            self._option(name)

    def _guide(self) -> None:
        scale, negative = self._stage.guidance_scale, self._stage.negative_prompt
        if guider := self._pipeline.components.get("guider"):
            guider.guidance_scale = scale
            (guider.enable if scale > 1 else guider.disable)()  # some families have theirs off to begin with
            self.arguments["negative_prompt"] = negative
            return
        own = self._takes.get("guidance_scale")
        if "true_cfg_scale" in self._takes and (own is None or own.default is None):
            # Guidance by two evaluations, which these pipelines only do where there is a negative prompt.
            self.arguments |= {"true_cfg_scale": scale, "negative_prompt": negative or " "}
            return
        if own is None:
            self._warn("guidance_scale", scale)
        else:
            self.arguments["guidance_scale"] = scale
            if scale != 1 and self._distilled:
                self.warnings.append(f"guidance_scale {scale:g} changes nothing: the model was distilled to do without")
        if negative:
            if "negative_prompt" in self._takes and "true_cfg_scale" not in self._takes:
                self.arguments["negative_prompt"] = negative
            else:
                self.warnings.append(f"the negative prompt is not used: {self._name} has none with this guidance")

    @property
    def _distilled(self) -> bool:
        """Whether the model looks at no guidance_scale: FLUX.1 schnell and its like, FLUX.2 klein as distilled."""
        network = self._pipeline.components.get("transformer")
        embeds = getattr(network.config, "guidance_embeds", None) if network else None
        if "true_cfg_scale" in self._takes:
            return embeds is False
        return bool(getattr(self._pipeline.config, "is_distilled", False))

    def _sample(self) -> None:
        scheduler = self._pipeline.scheduler
        if isinstance(scheduler, FlowMatchEulerDiscreteScheduler):
            self.infotext |= {"Sampler": "Euler", "Schedule type": "Simple"}
        if self._stage.sampler != "euler":
            asked = samplers.sampler(self._stage.sampler).label
            self.warnings.append(f"sampler {asked} is not used: the model has its own, {type(scheduler).__name__}")

    def _skip_layers(self) -> None:
        if self._request.clip_skip > 1:
            if "clip_skip" in self._takes:
                self.arguments["clip_skip"] = self._request.clip_skip - 1  # diffusers counts those that are left out
            else:
                self._warn("clip_skip", self._request.clip_skip)

    def _option(self, name: str) -> None:
        value = getattr(self._request, name)
        if value != Sampling.model_fields[name].default:
            if name in OPTIONS and name in self._takes:
                self.arguments[name] = value
            else:
                self._warn(name, value)

    def _warn(self, name: str, value: object) -> None:
        self.warnings.append(f"{name} {value} is not used: {self._name} has no such option")


def _taken(pipeline: Any) -> Mapping[str, Any]:
    """What a pipeline can be called with, by name, with a ``default`` each."""
    if isinstance(pipeline, ModularPipeline):
        return {taken.name: taken for taken in pipeline.blocks.inputs}
    return inspect.signature(type(pipeline).__call__).parameters


def _images(pipeline: Any, arguments: dict[str, Any]) -> Tensor:
    """The pictures, (1, 3, height, width), 0 to 1."""
    if isinstance(pipeline, ModularPipeline):
        found: Tensor = pipeline(**arguments, output="images")
    else:
        found = pipeline(**arguments).images
    return found


def _plain(prompt: str) -> str:
    """A prompt without the networks that it names; all else is for the model to read."""
    return str(replace(parse(prompt), networks=()))


class Enough(Exception):
    """Unwinds a pipeline that cannot be told to end with what it has."""


@dataclass
class _Watch:
    """How much was done when the pipeline was told to end, None if it never was."""

    broken_off: float | None = None


@contextmanager
def watched(pipeline: Any, stepped: Callable[[float], bool]) -> Iterator[_Watch]:
    """Within, each step of the pipeline's scheduler is told of, which every pipeline has, also one without callbacks.

    A pipeline that is to end gets the present guess of the clean latents in place of noisy ones, and decodes them.
    """
    scheduler, watch, done = pipeline.scheduler, _Watch(), 0
    own = scheduler.step

    @wraps(own)  # with its signature, which pipelines look at
    def step(*args: Any, **options: Any) -> Any:
        nonlocal done
        result = own(*args, **options)
        done += 1
        share = min(done / len(scheduler.timesteps), 1.0)
        if watch.broken_off is None and stepped(share):
            if not hasattr(type(pipeline), "interrupt"):
                raise Enough
            watch.broken_off = share
            pipeline._interrupt = True
            told = inspect.signature(own).bind(*args, **options).arguments
            return (_guess(scheduler, result, told["model_output"], told["sample"]),)
        return result

    scheduler.step = step
    try:
        yield watch
    finally:
        del scheduler.step


def _guess(scheduler: Any, result: Any, prediction: Tensor, sample: Tensor) -> Tensor:
    """What the clean latents look like after a step; the noisy ones where the scheduler does not tell."""
    if isinstance(scheduler, FlowMatchEulerDiscreteScheduler):
        sigma = float(scheduler.sigmas[scheduler.step_index - 1])
        return (sample.float() - sigma * prediction.float()).to(sample.dtype)
    guess: Tensor = result[1] if len(result) > 1 else result[0]
    return guess


def _kind(library: str, name: str) -> Any:
    """A class of one of the two libraries. Raises ValueError when it has none of that name."""
    module = LIBRARIES.get(library)
    kind = getattr(module, name, None) if module else None
    if not isinstance(kind, type):
        version = f" {module.__version__}" if module else ""
        raise ValueError(f"its index names {library}.{name}, which is no class of {library}{version}")
    return kind


def _painting(kind: Any) -> Any:
    """The pipeline that makes pictures of words with the parts of this one. Raises ValueError when there is none."""
    if issubclass(kind, ModularPipeline):
        return kind
    kind = _get_task_class(AUTO_TEXT2IMAGE_PIPELINES_MAPPING, kind.__name__, throw_error_if_not_exist=False) or kind
    takes = inspect.signature(kind.__call__).parameters
    if "num_frames" in takes:
        raise ValueError(f"{kind.__name__} makes videos, and no pictures")
    if "prompt" not in takes:
        raise ValueError(f"{kind.__name__} makes no pictures of words")
    return kind


def _network(kind: Any, folder: Path, device: Device) -> Any:
    """A network of diffusers: in its own layout, or as a single file of another name beside its config."""
    if packed := sorted(folder.glob("*.gguf")):
        quantized = GGUFQuantizationConfig(compute_dtype=device.dtype)
        return _single(kind, str(packed[0]), folder, device, quantization_config=quantized).to(device.home)
    files = weight_files(folder)
    stored = {tensor.dtype for path in files for tensor in _header(path).values()}
    if files[0].name.startswith(OWN_NAME):
        _, _, variant = files[0].stem.partition(".")
        model, found = kind.from_pretrained(
            folder, variant=variant.partition("-")[0] or None, dtype=device.dtype, use_safetensors=True,
            local_files_only=True, disable_mmap=True, output_loading_info=True,
        )  # fmt: skip
        complete(kind, found["missing_keys"])
    else:
        model = _single(kind, read_parts(folder), folder, device)
    if eighths := next((dtype for name, dtype in FLOAT8.items() if name in stored), None):
        _keep_small(model, eighths, device.dtype)
    return model.to(device.home).eval()


def _keep_small(model: Any, small: torch.dtype, computed: torch.dtype) -> None:
    """Have the layers whose weights lose nothing by it wait in eight bits; each is computed with in the other dtype."""
    others = model._skip_layerwise_casting_patterns or ()
    for name, layer in model.named_modules():
        plain = isinstance(layer, nn.Linear | nn.Conv2d) and not any(re.search(pattern, name) for pattern in others)
        if plain and all(torch.equal(weight.to(small).to(weight.dtype), weight) for weight in layer.parameters()):
            apply_layerwise_casting_hook(layer, small, computed, non_blocking=False)


def _header(path: Path) -> Mapping[str, Any]:
    """What a file holds, before it is read. Raises Unrecognised, and ValueError for what diffusers would read wrongly."""
    found = safetensors_header(path)
    if scaled := next((name for name in found if name.endswith(SCALES)), None):
        raise ValueError(f"{path.name} has scales beside its weights ({scaled}), which diffusers does not read")
    return found


def _single(kind: Any, weights: str | Tensors, folder: Path, device: Device, **options: Any) -> Any:
    """A network from the tensors or the path of a single file, in the layout of diffusers or of its publisher."""
    if not hasattr(kind, "from_single_file"):
        raise ValueError(
            f"its {folder.name}/ holds no {OWN_NAME}.safetensors, and diffusers reads {kind.__name__} from no other"
        )
    model = kind.from_single_file(weights, config=str(folder), dtype=device.dtype, local_files_only=True, **options)
    complete(kind, [name for name, tensor in model.named_parameters() if tensor.is_meta])
    return model


def _encoder(kind: Any, folder: Path, device: Device) -> Any:
    """A network of transformers."""
    model, found = kind.from_pretrained(
        None, config=kind.config_class.from_pretrained(folder, local_files_only=True), state_dict=read_parts(folder),
        dtype=device.dtype, local_files_only=True, output_loading_info=True,
    )  # fmt: skip
    complete(kind, found["missing_keys"])
    return model.to(device.home).eval()
