"""Fields of bodies that mean nothing here, and what their sender may have meant."""

from __future__ import annotations

from collections.abc import Iterator

from pydantic import BaseModel

from diffusion_api.dialects.native.bodies import MAX_UNKNOWN, Img2ImgBody, JobBody, Txt2ImgBody, UpscaleBody
from diffusion_api.errors import InvalidRequest
from diffusion_api.nearest import LONGEST_NAME, hint

THEIRS = {
    "n": "batch_size, n_iter, batch_count, num_images, num_images_per_prompt, num_outputs, samples",
    "steps": "num_inference_steps, num_steps, sampling_steps, sample_steps",
    "cfg_scale": "guidance_scale, guidance, cfg",
    "negative_prompt": "negative, uc",
    "sampler_name": "sampler, sampler_index, sampling_method, sample_method",
    "scheduler_type": "scheduler, schedule, schedule_type",
    "model": "checkpoint, model_id, model_name, sd_model_checkpoint",
    "fileType": "format, image_format, output_format, samples_format",
    "jpeg_quality": "output_quality, compression",
    "loras": "lora",
    "refiner_checkpoint": "refiner, refiner_model",
    "webhook": "callback, callback_url, webhook_url",
    "upscaler": "upscale_model",
    "hires.enabled": "enable_hr, hires_fix, highres_fix",
    "hires.scale": "hr_scale",
    "hires.width": "hr_resize_x",
    "hires.height": "hr_resize_y",
    "hires.upscaler": "hr_upscaler",
    "hires.steps": "hr_second_pass_steps",
    "hires.denoising_strength": "denoising_strength, strength, image_strength, hires.strength, hires.denoise",
    "hires.sampler_name": "hr_sampler_name",
    "hires.scheduler_type": "hr_scheduler",
    "hires.model": "hr_checkpoint_name",
    "hires.prompt": "hr_prompt",
    "hires.negative_prompt": "hr_negative_prompt",
    "loras.scale": "loras.weight, loras.strength, loras.multiplier",
}
"""What other programs call our fields: A1111, diffusers, hosted services."""

OTHERS: dict[str, type[JobBody]] = {"/txt2img": Txt2ImgBody, "/img2img": Img2ImgBody, "/upscale": UpscaleBody}

_OURS = {other: ours for ours, others in THEIRS.items() for other in others.split(", ")}


def unknown_fields(body: JobBody) -> list[str]:
    """What to tell the caller of fields that mean nothing here. Raises InvalidRequest when that would be a book."""
    found = list(_unknown(body))
    if len(found) > MAX_UNKNOWN:
        raise InvalidRequest(f"the body has {len(found)} fields that are not known; at most {MAX_UNKNOWN} are ignored")
    warnings = []
    for name, known in found:
        ours = _OURS.get(name.lower(), "")
        elsewhere = [route for route, other in OTHERS.items() if name in other.model_fields]
        if not ours and elsewhere:
            warnings.append(f"{name!r} is a field of {' and '.join(elsewhere)}, and was ignored here")
            continue
        meant = f"; did you mean {ours!r}?" if ours.split(".")[0] in type(body).model_fields else hint(name, known)
        shown = name if len(name) <= LONGEST_NAME else name[:LONGEST_NAME] + "..."
        warnings.append(f"unknown field {shown!r} was ignored{meant}")
    return warnings


def _unknown(body: BaseModel, path: str = "") -> Iterator[tuple[str, list[str]]]:
    """Each field that is not known, also in the objects of a body, with those that are known beside it."""
    known = [f"{path}{name}" for name in type(body).model_fields]
    for name in body.model_extra or {}:
        yield f"{path}{name}", known
    for name in type(body).model_fields:
        value = getattr(body, name)
        for part in value if isinstance(value, list) else [value]:
            if isinstance(part, BaseModel):
                yield from _unknown(part, f"{path}{name}.")
