"""What the documentation shows of answers: one of each, as a service with a few models would give it."""

from __future__ import annotations

from typing import Any

from diffusion_api.dialects._base import error_body

JOB = "242d6f93-ea2d-4d5e-b820-0b61468558be"
LINK = f"/image/{JOB}.0.1735776000.5d1c8a2e0f3b47698c1d2e3f4a5b6c7d8e9f0a1b2c3d4e5f60718293a4b5c6d7"
PICTURE = (
    "iVBORw0KGgoAAAANSUhEUgAAAEAAAABAAQAAAACCEkxzAAAAcklEQVR42s3QsQ3CMBSE4c/PSKRkBDYhbO4RGCEjuIwQiilMCgsKyvzV6e6e9H"
    "Qcj3P9iNuGjCWlIkjMvdJaJZiYiP00uHAiuBJjNJNGp5MpSOU7+kdkzNx/dwptdBY2gsprjFZWgicPgtZ/29cY9jkAb7FqFwcNkzldAAAAAElF"
    "TkSuQmCC"
)
"""A white disc on black, 64 pixels."""
DOT = "data:image/gif;base64,R0lGODlhAQABAIAAAAAAAP///ywAAAAAAQABAAACAUwAOw=="
"""One pixel."""

INFOTEXT = (
    "a large red circle on a blue background\n"
    "Negative prompt: blurry\n"
    "Steps: 20, Sampler: DPM++ 2M, Schedule type: Karras, CFG scale: 7, Seed: 42, Size: 512x512, "
    "Model: stable-diffusion-v1-5, RNG: NV, Version: DiffusionAPI v0.1.0"
)

TXT2IMG: list[dict[str, Any]] = [
    {"prompt": "a large red circle on a blue background"},
    {
        "prompt": "a small green star on a black background on the left",
        "negative_prompt": "blurry",
        "steps": 20,
        "cfg_scale": 5,
        "width": 256,
        "height": 256,
        "model": "shapes",
        "sampler_name": "DPM++ 2M Karras",
        "fileType": "png",
        "seed": 42,
    },
]
IMG2IMG: list[dict[str, Any]] = [
    {"prompt": "a large blue circle on a red background", "image": PICTURE},
    {
        "prompt": "a small green star on a black background",
        "image": f"data:image/png;base64,{PICTURE}",
        "mask": PICTURE,
        "denoising_strength": 0.9,
        "mask_blur": 8,
        "mask_fill": "latent noise",
        "steps": 20,
        "fileType": "png",
        "seed": 42,
    },
]
UPSCALE: list[dict[str, Any]] = [{"image": PICTURE}, {"image": PICTURE, "upscaler": "Nearest", "scale": 4}]

ERROR = error_body("cfg_scale is 500: Input should be less than or equal to 100")
NOT_READY = error_body("the queue is paused") | {"ready": False, "loading": False, "reasons": ["the queue is paused"]}

SUBMITTED = {
    "job_id": JOB,
    "status": "queued",
    "seed": 42,
    "warnings": ["width 510 was rounded to 512, a multiple of 8"],
}
PASS = {
    "phase": "generation", "width": 512, "height": 512, "sampler": "dpmpp_2m", "steps": 20, "evaluations": 20,
}  # fmt: skip
NEED = {
    "weights": {"unet": 1719041928, "text_encoder": 246121248, "vae": 167306012},
    "activations": 734003200,
    "peak": 2866472388,
    "budget": 8589934592,
    "ram": 0,
    "ram_budget": 17179869184,
    "measures": [],
}
DRY_RUN = {
    "status": "success",
    "dry_run": True,
    "seed": 42,
    "model": "stable-diffusion-v1-5",
    "family": "sd1",
    "passes": [PASS],
    "evaluations": 20,
    "seconds": 2.4,
    "memory": NEED,
    "warnings": [],
}
UPSCALE_DRY_RUN = {
    "status": "success", "dry_run": True, "upscaler": "Lanczos", "width": 1024, "height": 1024, "seconds": 0.2,
    "warnings": [],
}  # fmt: skip

RUNNING = {
    "status": "success",
    "job_id": JOB,
    "progress": 45.5,
    "current_phase": "initial generation",
    "state": "processing",
    "error": None,
    "eta_seconds": 3.1,
}
DONE = {
    "status": "success",
    "job_id": JOB,
    "progress": 100,
    "current_phase": "done",
    "state": "done",
    "error": None,
    "payload": TXT2IMG[1],
    "image": PICTURE,
    "image_url": LINK,
    "output_path": f"outputs/{JOB}.png",
    "width": 256,
    "height": 256,
    "file_type": "png",
    "jpeg_quality": None,
    "generation_time_sec": 3.36,
    "memory_before_mb": 538.34,
    "memory_after_mb": 920.11,
    "seed": 42,
}
CANCELLED = {
    "status": "success",
    "job_id": JOB,
    "progress": 20,
    "current_phase": "error",
    "state": "error",
    "error": "cancelled",
    "detail": "cancelled",
    "cancelled": True,
}
POLLED = {
    "job_id": JOB, "status": "completed", "progress": 1.0, "phase": "done", "output": f"outputs/{JOB}.png", "detail": None,
}  # fmt: skip
JOBS = {
    "status": "success",
    "jobs": [
        {
            "job_id": JOB,
            "kind": "txt2img",
            "state": "done",
            "cancelled": False,
            "progress": 100,
            "current_phase": "done",
            "error": None,
            "position": None,
            "model": "shapes",
            "prompt": "a small green star on a black background on the left",
            "width": 256,
            "height": 256,
            "steps": 20,
            "seed": 42,
            "n": 1,
            "priority": 0,
            "created": 1735689600.25,
            "started": 1735689600.5,
            "finished": 1735689603.86,
            "generation_time_sec": 3.36,
            "pictures": 1,
        }
    ],
    "next": f"1735689600.25-{JOB}",
}
INFO = {
    "status": "success",
    "info": INFOTEXT,
    "items": {"Software": "a scanner"},
    "parameters": {
        "prompt": "a large red circle on a blue background",
        "negative_prompt": "blurry",
        "Steps": 20,
        "Sampler": "DPM++ 2M",
        "Schedule type": "Karras",
        "CFG scale": 7,
        "Seed": 42,
        "Size": "512x512",
        "Model": "stable-diffusion-v1-5",
        "RNG": "NV",
        "Version": "DiffusionAPI v0.1.0",
    },
    "format": "png",
    "width": 512,
    "height": 512,
}

MODELS = {
    "status": "success",
    "models": [
        {
            "name": "models--Meina--MeinaMix_V11",
            "label": "MeinaMix V11",
            "type": "standard",
            "path": "stable_diffusion/models/models--Meina--MeinaMix_V11",
            "family": "sd1",
            "pickled": False,
        }
    ],
}
LABELS = {
    "status": "success",
    "models": [{"name": "models--Meina--MeinaMix_V11", "label": "MeinaMix V11", "installed": True}],
    "message": "a label may stand for the name of its model; case, - and _ do not matter",
}
LORAS = {
    "status": "success",
    "loras": [
        {
            "name": "my-lora",
            "scale": 1.0,
            "path": "stable_diffusion/loras/my-lora.safetensors",
            "family": "sd1",
            "trigger_words": ["ink drawing"],
            "hash": "5d1c8a2e0f3b",
            "autov2": "9f86d08188",
            "pickled": False,
        }
    ],
}
UPSCALERS = {
    "status": "success",
    "upscalers": [
        {
            "name": "Latent",
            "path": "internal",
            "type": "internal",
            "description": "enlarges the latents, bilinear",
            "size_mb": 0,
            "pickled": False,
        },
        {
            "name": "ESRGAN_4x",
            "path": "stable_diffusion/upscalers/ESRGAN_4x.pth",
            "type": "external",
            "description": "a model of its own",
            "size_mb": 63.8,
            "pickled": True,
        },
    ],
}
SAMPLING_METHODS = {
    "status": "success",
    "sampling_methods": ["Euler", "Euler a", "DPM++ 2M", "DPM++ 2M Karras", "UniPC"],
    "scheduler_types": ["default", "karras", "exponential", "ddim", "pndm"],
}
CAPABILITIES = {
    "status": "success",
    "model": {
        "name": "stable-diffusion-v1-5",
        "label": "stable-diffusion-v1-5",
        "type": "standard",
        "family": "sd1",
        "native_size": 512,
        "width": 512,
        "height": 512,
        "multiple": 8,
    },
    "features": ["txt2img", "img2img", "inpaint", "hires"],
    "safety": {"policy": "off", "checker": False},
    "limits": {"max_steps": 150, "max_pixels": 4194304, "max_batch": 16},
    "parameters": {
        "/txt2img": {
            "steps": {
                "type": ["integer"],
                "minimum": 1,
                "maximum": 150,
                "multiple": None,
                "choices": None,
                "default": 30,
                "description": "at most the operator's limit; 30 when left out",
                "fields": None,
            }
        }
    },
    "sampling_methods": ["Euler", "Euler a", "DPM++ 2M"],
    "scheduler_types": ["default", "karras"],
    "file_types": ["jpg", "png", "webp", "avif", "gif"],
    "upscalers": ["Latent", "Lanczos"],
    "vaes": ["Automatic", "None"],
    "loras": ["my-lora"],
}

HEALTH = {
    "status": "healthy",
    "timestamp": 1703123456.789,
    "version": "0.1.0",
    "system": {
        "cpu_count": 8,
        "memory_total_gb": 16.0,
        "memory_available_gb": 8.5,
        "memory_percent": 47.0,
        "disk_usage_percent": 65.0,
    },
    "gpu": {
        "cuda_available": True,
        "cuda_version": "11.8",
        "gpu_count": 1,
        "current_device": 0,
        "device_name": "NVIDIA GeForce RTX 3080",
        "memory_allocated_gb": 2.1,
        "memory_reserved_gb": 3.5,
    },
    "workers": [
        {
            "state": "idle",
            "device_name": "NVIDIA GeForce RTX 3080",
            "jobs": 0,
            "seconds_since_event": 0.4,
            "restarts": 0,
            "memory_budget_gb": 8.0,
            "models_in_memory": [{"name": "stable-diffusion-v1-5", "where": "device", "mb": 2033.7}],
        }
    ],
    "models": {"count": 5, "directory": "stable_diffusion/models"},
    "loras": {"count": 12, "directory": "stable_diffusion/loras"},
    "queue": {"active_jobs": 0, "paused": False, "directory": "queue"},
    "outputs": {"available": True, "free_space_gb": 45.2, "directory": "outputs"},
    "disk": {"outputs": {"bytes": 1048576, "files": 12}},
}
