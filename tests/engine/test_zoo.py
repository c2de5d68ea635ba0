"""The file zoo: each checkpoint draws, or is refused with the exact reason, and then no other suffers."""

from __future__ import annotations

import re
import subprocess
import sys
from collections import Counter
from collections.abc import Iterator
from pathlib import Path

import lora_zoo
import numpy as np
import pytest
import zoo
from asking import Draw, finished, from_picture, request
from ldm_layout import write_checkpoint
from PIL import Image
from safetensors.torch import save
from serving import ROOT, environment

from diffusion_api.catalog.library import OWN_FOLDERS, Library
from diffusion_api.engine.executor import Executor
from diffusion_api.errors import UnknownModel
from diffusion_api.schema.request import Mask
from diffusion_api.settings import DATA

QUICK: dict[str, object] = dict(steps=2, width=64, height=64, sampler="euler")


@pytest.fixture(scope="module")
def home(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A home with the whole zoo among its models."""
    models = tmp_path_factory.mktemp("zoo") / "models"
    models.mkdir()
    for name, animal in zoo.DRAWS.items():
        animal.write(models / f"{name}.safetensors")
    whole = (models / "sd15.safetensors").read_bytes()
    for name, (change, _) in zoo.REFUSED.items():
        (models / f"{name}.safetensors").write_bytes(change(whole))
    return models.parent


@pytest.fixture(scope="module")
def library(home: Path) -> Library:
    return Library(home, home / "models", None)


@pytest.fixture(scope="module")
def keeper(library: Library) -> Iterator[Executor]:
    """An engine with the zoo."""
    lower = Image.new("L", (64, 64))
    lower.paste(255, (0, 32, 64, 64))
    pictures = {"grey": Image.new("RGB", (64, 64), (128, 128, 128)), "lower half": lower}
    engine = Executor(library, device="cpu", tokenizer=DATA / "clip", picture=pictures.__getitem__)
    engine.start()
    engine.wait()
    yield engine
    engine.close()


@pytest.mark.parametrize("family", zoo.KEYS)
def test_the_zoo_has_every_key_of_the_published_checkpoints(family: str) -> None:
    prefixes = zoo.KEYS[family]
    found = Counter(next((p for p in prefixes if name.startswith(p)), "") for name in zoo.checkpoint(family))
    assert {prefix: found[prefix] for prefix in prefixes} == prefixes


@pytest.mark.parametrize("name", zoo.DRAWS)
def test_each_checkpoint_draws_a_picture(keeper: Executor, library: Library, name: str) -> None:
    animal = zoo.DRAWS[name]
    result = finished(keeper, request(model=name, negative_prompt="green", **QUICK))
    assert library.resolve(name).family == animal.family
    assert result.images[0].shape == (64, 64, 3)
    assert not result.warnings
    assert keeper._weights
    levels = keeper._weights._held[name].lane.levels
    assert levels.prediction == animal.prediction
    assert (levels.highest > 1000) is animal.zero_terminal_snr


def test_an_inpainting_model_draws_from_pictures_with_a_mask_and_without(keeper: Executor) -> None:
    fields = QUICK | {"model": "sd15-inpainting", "strength": 0.9}
    whole, part = (
        finished(keeper, from_picture("a circle", "grey", mask=mask, **fields)).images[0]
        for mask in (None, Mask(image="lower half", blur=0, fill="original"))
    )
    assert (part[:32] == 128).all()
    assert not np.array_equal(whole[32:], part[32:])


def test_what_a_file_holds_beside_the_model_changes_nothing(keeper: Executor) -> None:
    plain, *others = (
        finished(keeper, request(model=name, **QUICK)).images[0] for name in ("sd15", "sd15-ema", "sd15-old-names")
    )
    assert all(np.array_equal(plain, other) for other in others)


@pytest.mark.parametrize("name", zoo.REFUSED)
def test_each_file_that_is_no_model_is_refused_with_the_reason(library: Library, home: Path, name: str) -> None:
    whole = (home / "models" / "sd15.safetensors").stat().st_size
    reason = zoo.said(zoo.REFUSED[name][1], "models", name, whole)
    with pytest.raises(UnknownModel, match=f"^model '{name}' cannot be used: {re.escape(reason)}; one of ") as caught:
        library.resolve(name)
    assert str(home) not in str(caught.value)
    assert name not in [model.name for model in library.models()]


@pytest.mark.parametrize("folder", zoo.OTHERS)
def test_a_damaged_file_of_any_kind_is_told_in_the_same_words(tmp_path: Path, folder: str) -> None:
    whole = save(dict(zoo.OTHERS[folder]()))
    place = tmp_path / "stable_diffusion" / folder
    place.mkdir(parents=True)
    (place / "whole.safetensors").write_bytes(whole)
    for name, (change, _) in zoo.DAMAGED.items():
        (place / f"{name}.safetensors").write_bytes(change(whole))
    library = Library(tmp_path, tmp_path / "models")
    assert [row.name for row in library.assets(OWN_FOLDERS[folder])] == ["whole"]
    assert sorted(library.complaints()) == sorted(
        f"{name}.safetensors is not listed: {zoo.said(reason, folder, name, len(whole))}"
        for name, (_, reason) in zoo.DAMAGED.items()
    )


def test_all_checkpoints_together_are_told_apart(home: Path) -> None:
    assert {model.name for model in Library(home, home / "models").models()} == zoo.DRAWS.keys()


def test_the_page_of_models_counts_the_zoo() -> None:
    page = " ".join((ROOT / "docs" / "models.md").read_text("utf-8").split())
    for count in (
        f"{len(zoo.DRAWS)} checkpoints that draw and {len(zoo.REFUSED)} files that cannot",
        f"{len(lora_zoo.LAYOUTS)} layouts of LoRAs",
        f"{len(lora_zoo.WITH_TEXT_ENCODERS)} of them with both text encoders",
        f"{len(zoo.EMBEDDINGS)} formats of embeddings",
        f"{len(zoo.UPSCALERS)} ESRGAN files",
        f"{len(zoo.VAES)} layouts of VAEs",
        f"{len(zoo.DAMAGED)} kinds of damage",
    ):
        assert count in page


OFFLINE = """
import sys
from pathlib import Path
from diffusion_api.catalog.library import Library
from diffusion_api.engine.executor import Executor
from diffusion_api.settings import DATA
from asking import finished, request
home = Path(sys.argv[1])
engine = Executor(Library(home, home / "models", None), device="cpu", tokenizer=DATA / "clip")
engine.start()
finished(engine, request(model="xl", steps=1, width=64, height=64))
sys.stdout.buffer.write(finished(engine, request(model="single", steps=4)).images[0].tobytes())
engine.close()
"""


def test_single_files_draw_with_no_network_at_all(tmp_path: Path, draw: Draw) -> None:
    models = tmp_path / "models"
    models.mkdir()
    write_checkpoint(DATA / "models" / "shapes", DATA / "clip" / "vocab.json", models / "single.safetensors")
    zoo.DRAWS["sdxl"].write(models / "xl.safetensors")
    alone = ["unshare", "--user", "--map-root-user", "--net", sys.executable, "-c", OFFLINE, str(tmp_path)]
    paths = {"PYTHONPATH": f"{ROOT}:{ROOT / 'tests'}"}
    done = subprocess.run(alone, capture_output=True, timeout=300, env=environment() | paths, check=False)
    if b"unshare" in done.stderr:
        pytest.skip("this machine does not let a test cut off its network: " + done.stderr.decode())
    assert done.returncode == 0, done.stderr.decode()
    picture = np.frombuffer(done.stdout, np.uint8).reshape(128, 128, 3)
    assert np.array_equal(picture, draw(steps=4))
