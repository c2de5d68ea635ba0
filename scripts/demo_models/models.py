"""The demo models as a table: what each is built of, trained on and published as."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field

NOISE_SCHEDULE = dict(beta_start=0.00085, beta_end=0.012, beta_schedule="scaled_linear", num_train_timesteps=1000)


@dataclass(frozen=True)
class Text:
    """A CLIP text encoder and its tokenizer.

    ``key`` is its name in a checkpoint. Of a ``penultimate`` encoder the UNet sees the hidden states before the last layer
    and the final norm, as in SDXL; of a ``projected`` one also the pooled, projected embedding.
    """

    folder: str
    tokenizer: str
    key: str
    width: int
    layers: int
    hidden_act: str
    padding: str = "<|endoftext|>"
    penultimate: bool = True
    projected: bool = False

    @property
    def kind(self) -> str:
        """Its class in transformers."""
        return "CLIPTextModelWithProjection" if self.projected else "CLIPTextModel"


@dataclass(frozen=True)
class DemoModel:
    """A row of the table.

    ``timesteps`` is how many it learns, from 0. ``blank`` of the empty captions become zeros after encoding.
    ``texts_of`` names the model whose trained text encoders it takes as they are.
    """

    name: str
    checkpoint: str
    steps: int
    unet: Mapping[str, object]
    texts: tuple[Text, ...]
    scheduler: Mapping[str, object]
    index: Mapping[str, object]
    scaling_factor: float
    force_upcast: bool = False
    timesteps: int = 1000
    blank: float = 0.0
    texts_of: str | None = None
    time_ids: tuple[str, ...] = field(default=())


SHAPES_TEXT = Text("text_encoder", "tokenizer", "text", 128, 2, "quick_gelu", penultimate=False)
XL_TEXT = Text("text_encoder", "tokenizer", "text", 64, 3, "quick_gelu")
XL_TEXT_2 = Text("text_encoder_2", "tokenizer_2", "text_2", 128, 3, "gelu", padding="!", projected=True)

TIME_ID_WIDTH = 32
ANY_UNET = dict(in_channels=4, out_channels=4, layers_per_block=1)
ANY_XL_UNET = dict(
    **ANY_UNET, sample_size=16, norm_num_groups=8, use_linear_projection=True,
    addition_embed_type="text_time", addition_time_embed_dim=TIME_ID_WIDTH,
)  # fmt: skip
XL_SCHEDULER = {
    "_class_name": "EulerDiscreteScheduler", **NOISE_SCHEDULE, "prediction_type": "epsilon", "clip_sample": False,
    "interpolation_type": "linear", "sample_max_value": 1.0, "set_alpha_to_one": False, "skip_prk_steps": True,
    "steps_offset": 1, "timestep_spacing": "leading", "trained_betas": None, "use_karras_sigmas": False,
}  # fmt: skip
NO_IMAGE_ENCODER = {"feature_extractor": [None, None], "image_encoder": [None, None]}

MODELS = (
    DemoModel(
        name="shapes", checkpoint="unet.pt", steps=8000, scaling_factor=0.18215, force_upcast=True, texts=(SHAPES_TEXT,),
        unet=dict(
            **ANY_UNET, sample_size=32, cross_attention_dim=128, attention_head_dim=8, norm_num_groups=16,
            block_out_channels=[64, 64, 128, 128],
            down_block_types=["CrossAttnDownBlock2D"] * 3 + ["DownBlock2D"],
            up_block_types=["UpBlock2D"] + ["CrossAttnUpBlock2D"] * 3,
        ),
        scheduler={
            "_class_name": "PNDMScheduler", **NOISE_SCHEDULE, "prediction_type": "epsilon", "set_alpha_to_one": False,
            "skip_prk_steps": True, "steps_offset": 1, "clip_sample": False, "trained_betas": None,
        },
        index={
            "_class_name": "StableDiffusionPipeline", **NO_IMAGE_ENCODER,
            "requires_safety_checker": False, "safety_checker": [None, None],
        },
    ),
    DemoModel(
        name="shapes-xl", checkpoint="unet-xl.pt", steps=20000, scaling_factor=0.13025, texts=(XL_TEXT, XL_TEXT_2),
        time_ids=("original", "crop", "target"), blank=0.7,
        unet=dict(
            **ANY_XL_UNET, block_out_channels=[48, 64, 96], attention_head_dim=[3, 4, 6],
            transformer_layers_per_block=[1, 1, 2], cross_attention_dim=XL_TEXT.width + XL_TEXT_2.width,
            projection_class_embeddings_input_dim=XL_TEXT_2.width + 6 * TIME_ID_WIDTH,
            down_block_types=["DownBlock2D"] + ["CrossAttnDownBlock2D"] * 2,
            up_block_types=["CrossAttnUpBlock2D"] * 2 + ["UpBlock2D"],
        ),
        scheduler=XL_SCHEDULER,
        index={
            "_class_name": "StableDiffusionXLPipeline", **NO_IMAGE_ENCODER,
            "add_watermarker": None, "force_zeros_for_empty_prompt": True,
        },
    ),
    DemoModel(
        name="shapes-xl-refiner", checkpoint="unet-xl-refiner.pt", steps=2000, scaling_factor=0.13025, texts=(XL_TEXT_2,),
        time_ids=("original", "crop", "score"), timesteps=350, texts_of="shapes-xl",
        unet=dict(
            **ANY_XL_UNET, block_out_channels=[32, 64, 64, 64], attention_head_dim=[2, 4, 4, 4],
            transformer_layers_per_block=1, cross_attention_dim=XL_TEXT_2.width,
            projection_class_embeddings_input_dim=XL_TEXT_2.width + 5 * TIME_ID_WIDTH,
            down_block_types=["DownBlock2D"] + ["CrossAttnDownBlock2D"] * 2 + ["DownBlock2D"],
            up_block_types=["UpBlock2D"] + ["CrossAttnUpBlock2D"] * 2 + ["UpBlock2D"],
        ),
        scheduler=XL_SCHEDULER,
        index={
            "_class_name": "StableDiffusionXLImg2ImgPipeline", **NO_IMAGE_ENCODER,
            "add_watermarker": None, "force_zeros_for_empty_prompt": False, "requires_aesthetics_score": True,
            "text_encoder": [None, None], "tokenizer": [None, None],
        },
    ),
)  # fmt: skip
