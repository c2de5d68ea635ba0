"""What a job is said to need of memory, against what its layers hold when they compute."""

from __future__ import annotations

import json
import struct
import weakref
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from asking import request
from diffusers.models.autoencoders.autoencoder_kl import AutoencoderKL
from diffusers.models.unets.unet_2d_condition import UNet2DConditionModel
from full_size import UNETS, VAE
from ldm_layout import write_checkpoint
from torch.overrides import TorchFunctionMode
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_iter

from diffusion_api.catalog.footprint import footprint
from diffusion_api.catalog.library import Library, Model
from diffusion_api.engine.estimate import Load, Measures, Placement, chosen, estimate
from diffusion_api.engine.plan import plan
from diffusion_api.engine.thrift import set_tiling
from diffusion_api.errors import OutOfMemory
from diffusion_api.schema.report import Room
from diffusion_api.settings import DATA

GIB = 2**30
SHAPES = DATA / "models" / "shapes"


class Held(TorchDispatchMode):
    """Within, counts the bytes of all new tensors that live at the same time; shapes suffice for that."""

    def __init__(self) -> None:
        super().__init__()
        self._live: dict[int, int] = {}
        self._now = 0
        self.peak = 0

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        made = func(*args, **kwargs or {})
        for tensor in tree_iter(made):
            if isinstance(tensor, torch.Tensor):
                storage = tensor.untyped_storage()
                key = storage._cdata
                if key not in self._live:
                    self._live[key] = storage.nbytes()
                    self._now += self._live[key]
                    weakref.finalize(storage, self._freed, key)
        self.peak = max(self.peak, self._now)
        return made

    def _freed(self, key: int) -> None:
        self._now -= self._live.pop(key)


class Fused(TorchFunctionMode):
    """Within, attention holds no table of all pairs, as on every device that is meant here."""

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if func is torch.nn.functional.scaled_dot_product_attention:
            return torch.empty_like(args[0])
        return func(*args, **kwargs or {})


def held(work: Callable[[], object]) -> int:
    counting = Held()
    with torch.inference_mode(), Fused(), counting:
        work()
    return counting.peak


def on_meta(kind: Any, config: dict[str, Any]) -> Any:
    with torch.device("meta"):
        return kind(**config).half().eval()


def written(path: Path, network: torch.nn.Module) -> None:
    """A file with that network's names and shapes, and a hole in place of its weights."""
    header, end = {}, 0
    for name, tensor in network.state_dict().items():
        header[name] = {"dtype": "F16", "shape": list(tensor.shape), "data_offsets": [end, end + 2 * tensor.numel()]}
        end += 2 * tensor.numel()
    text = json.dumps(header).encode()
    path.parent.mkdir(parents=True)
    with path.open("wb") as file:
        file.write(struct.pack("<Q", len(text)) + text)
        file.truncate(8 + len(text) + end)


def model(path: Path, family: str = "sd1") -> Model:
    return Model(name=path.name, path=path, shown_path=path.name, family=family, native_size=512)


@pytest.fixture(scope="module")
def networks() -> dict[str, Any]:
    kinds = {name: (UNet2DConditionModel, config) for name, config in UNETS.items()} | {"vae": (AutoencoderKL, VAE)}
    return {name: on_meta(kind, config) for name, (kind, config) in kinds.items()}


@pytest.fixture(scope="module")
def models(networks: dict[str, Any], tmp_path_factory: pytest.TempPathFactory) -> dict[str, Model]:
    """Folders with the names and shapes of the real models, and of text encoders as large as the real ones."""
    found = {}
    for name, texts in (("sd15", (123,)), ("sdxl", (123, 695))):
        folder = tmp_path_factory.mktemp(name)
        written(folder / "unet" / "diffusion_pytorch_model.safetensors", networks[name])
        written(folder / "vae" / "diffusion_pytorch_model.safetensors", networks["vae"])
        for number, millions in enumerate(texts, start=1):
            part = "text_encoder" if number == 1 else f"text_encoder_{number}"
            with torch.device("meta"):
                written(folder / part / "model.safetensors", torch.nn.Embedding(millions, 1_000_000))
        found[name] = model(folder, name)
    return found


def load(of: Model, **asked: Any) -> Load:
    return Load(footprint(of), plan(request(**asked)))


def test_weights_are_counted_without_reading_them(models: dict[str, Model]) -> None:
    assert {part: round(n / 1e6) for part, n in footprint(models["sdxl"]).parts.items()} == {
        **{"unet": 2567, "vae": 84, "text_encoder": 123, "text_encoder_2": 695}
    }


def test_a_single_file_has_the_footprint_of_its_folder(tmp_path: Path) -> None:
    single = tmp_path / "single.safetensors"
    write_checkpoint(SHAPES, DATA / "clip" / "vocab.json", single)
    one, other = footprint(model(SHAPES)), footprint(model(single))
    assert (one.latent, one.pixel) == (other.latent, other.pixel) == (26 * 64, 6 * 16)
    for part in ("unet", "vae"):
        assert one.parts[part] == pytest.approx(other.parts[part], rel=0.01)


@pytest.mark.parametrize(("name", "width"), [("sd15", 64), ("sd15", 1024), ("sdxl", 512)])
def test_a_model_evaluation_holds_what_was_estimated(
    networks: dict[str, Any], models: dict[str, Model], name: str, width: int
) -> None:
    unet = networks[name]
    latents = torch.empty((2, 4, 512 // 8, width // 8), dtype=torch.float16, device="meta")
    hidden = torch.empty((2, 77, unet.config.cross_attention_dim), dtype=torch.float16, device="meta")
    added = {
        "text_embeds": torch.empty((2, 1280), dtype=torch.float16, device="meta"),
        "time_ids": torch.empty((2, 6), dtype=torch.float16, device="meta"),
    }
    time = torch.empty((), device="meta")
    measured = held(lambda: unet(latents, time, hidden, added_cond_kwargs=added, return_dict=False))
    demand = load(models[name], width=width, height=512)
    only = replace(demand, footprint=replace(demand.footprint, pixel=0))
    assert only.need(Measures(), 2).activations == pytest.approx(measured, rel=0.05)


def test_decoding_holds_what_was_estimated_whole_and_in_tiles(
    networks: dict[str, Any], models: dict[str, Model]
) -> None:
    vae = networks["vae"]
    demand = load(models["sd15"], width=1024, height=512)
    only = replace(demand, footprint=replace(demand.footprint, latent=0))
    latents = torch.empty((1, 4, 64, 128), dtype=torch.float16, device="meta")
    whole = held(lambda: vae.decode(latents, return_dict=False))
    assert only.need(Measures(), 2).activations == pytest.approx(whole, rel=0.05)
    set_tiling({"vae": vae}, True)
    tiled = held(lambda: vae.decode(latents, return_dict=False))
    assert only.need(Measures(tiling=True), 2).activations == pytest.approx(tiled, rel=0.1)


@pytest.mark.parametrize("side", [64, 512, 1024, 1536, 2048])
@pytest.mark.parametrize("room", [Room(3 * GIB, None, 4), Room(GIB, 2 * GIB, 2)], ids=["cpu", "card"])
def test_every_size_up_to_the_limit_is_accepted_with_the_shipped_model(side: int, room: Room) -> None:
    for width, height in ((side, side), (2048, side), (side, 2048)):
        estimate(model(SHAPES), request(width=width, height=height), room)


@pytest.mark.parametrize(
    ("name", "side", "card", "measures"),
    [
        ("sd15", 512, 4, ()),
        ("sd15", 1024, 4, ("VAE tiling",)),
        ("sd15", 512, 2.5, ("model offload",)),
        ("sd15", 512, 2, ("group offload",)),
        ("sdxl", 1024, 12, ()),
        ("sdxl", 1024, 8, ("VAE tiling",)),
        ("sdxl", 1024, 6, ("model offload",)),
        ("sdxl", 1024, 4, ("group offload",)),
        ("sdxl", 2048, 4, ("VAE tiling", "group offload")),
    ],
)
def test_cards_of_all_sizes_get_by(
    models: dict[str, Model], name: str, side: int, card: float, measures: tuple[str, ...]
) -> None:
    room = Room(int((card - 0.5) * GIB), 16 * GIB, 2)
    found = chosen(load(models[name], width=side, height=side), room)
    assert found
    assert found.names == measures


def test_without_memory_of_its_own_a_device_moves_nothing(models: dict[str, Model]) -> None:
    demand = load(models["sd15"], width=512, height=512)
    assert chosen(demand, Room(6 * GIB, None, 4)) == Measures()
    assert chosen(demand, Room(3 * GIB, None, 4)) is None


def test_a_model_that_ram_cannot_hold_is_not_moved_through_it(models: dict[str, Model]) -> None:
    demand = load(models["sdxl"], width=1024, height=1024)
    assert chosen(demand, Room(6 * GIB, 4 * GIB, 2)) is None
    assert chosen(demand, Room(16 * GIB, 4 * GIB, 2)) == Measures()


def test_what_cannot_fit_is_refused_with_the_size_that_would(models: dict[str, Model]) -> None:
    room = Room(GIB, 16 * GIB, 2)
    with pytest.raises(OutOfMemory) as caught:
        estimate(models["sd15"], request(width=4096, height=2048), room)
    text = str(caught.value)
    assert text.startswith("4096x2048 pixels with model ")
    assert "even with VAE tiling, attention slicing, one conditioning at a time, model offload, group offload" in text
    width, height = map(int, text.rsplit(": ", 1)[1].removesuffix(" would fit").split("x"))
    assert 1 < width * height < 4096 * 2048
    assert estimate(models["sd15"], request(width=width, height=height), room).measures.placement is Placement.PIECES
    with pytest.raises(OutOfMemory, match="ask for a smaller model"):
        estimate(models["sdxl"], request(width=1024, height=1024), Room(GIB, None, 4))


def test_the_library_lists_models_whose_footprint_can_be_read(tmp_path: Path) -> None:
    (shipped,) = (row for row in Library(tmp_path, tmp_path, DATA / "models").models() if row.name == "shapes")
    found = footprint(shipped)
    assert set(found.parts) == {"text_encoder", "unet", "vae"}
