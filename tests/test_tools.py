"""The tools under the names that they had in the original: files in ``scripts/``, some of them also at the root."""

from __future__ import annotations

import re
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import inside
import pytest
from fake_models import SD1_KEYS, checkpoint, diffusers_folder
from PIL import Image
from serving import PATIENCE, ROOT, Program, environment, serving

from diffusion_api import images
from diffusion_api.settings import DATA

INK, XL_INK = (DATA / "loras" / f"{name}.safetensors" for name in ("shapes-ink", "shapes-xl-ink"))


def tool(name: str, *arguments: object, cwd: Path = ROOT, **settings: object) -> subprocess.CompletedProcess[str]:
    """Run a file at the root as a user would: ``python name …``."""
    return inside.run(*arguments, cwd=cwd, file=ROOT / name, **settings)


def test_the_labels_are_listed_in_order(tmp_path: Path) -> None:
    done = tool("list_models.py", home=tmp_path)
    rows = re.findall(r"^(.{20}) -> (\S+)(.*)$", done.stdout, re.MULTILINE)
    assert ("PlantMilk (HempII)  ", "models--misri--plantMilkModelSuite_hempII", "") in rows
    assert ("Shapes (demo)       ", "shapes", " (installed)") in rows
    assert len(rows) == 8
    assert [label for label, _, _ in rows] == sorted((label for label, _, _ in rows), key=str.lower)


def test_models_and_loras_are_listed_with_their_files(tmp_path: Path) -> None:
    own = tmp_path / "stable_diffusion"
    checkpoint(own / "models" / "dream.safetensors", SD1_KEYS)
    (own / "loras").mkdir()
    (own / "loras" / "ink.safetensors").write_bytes(INK.read_bytes())
    shown = tool("list_available_models_loras.py", home=tmp_path).stdout
    assert "MODELS (4 found)" in shown
    assert "  1. dream\n     Name: dream\n     Path: stable_diffusion/models/dream.safetensors\n" in shown
    assert "     File: stable_diffusion/loras/ink.safetensors\n     Type: .safetensors\n" in shown
    assert "Models: 4\nLoRAs: 3\nCombinations: 4 x 3 = 12\n" in shown


def test_nothing_to_list_is_said(tmp_path: Path) -> None:
    shown = tool("list_available_models_loras.py", home=tmp_path, shipped_models=False).stdout
    assert "MODELS (0 found)" in shown
    assert "No combinations" in shown


REPORT = """\
================================================================================
COMPREHENSIVE LoRA COMPATIBILITY REPORT
================================================================================
Generated: 2024-01-15 14:30:25
Total Tests: 6
Compatible: 2
Incompatible: 4
Success Rate: 33.3%

SUMMARY BY MODEL:
----------------------------------------
Shapes (demo): 1/2 (50.0%)
shapes-xl: 1/2 (50.0%)
shapes-xl-refiner: 0/2 (0.0%)

MODEL: Shapes (demo)
============================================================
✓ COMPATIBLE LoRAs:
  • shapes-ink

✗ INCOMPATIBLE LoRAs:
  • shapes-xl-ink
    Reason: LoRA 'shapes-xl-ink' appears to be designed for SDXL models, but you're using a standard SD model. \
Try using an SDXL base model.
    Error: down_blocks.1.attentions.0.transformer_blocks.0.attn2.to_k.weight is 64x192 there and 64x128 in the ...

MODEL: shapes-xl
============================================================
✓ COMPATIBLE LoRAs:
  • shapes-xl-ink

✗ INCOMPATIBLE LoRAs:
  • shapes-ink
    Reason: LoRA 'shapes-ink' appears to be designed for SD 1.5 models, but you're using an SDXL model. Try \
using a standard SD base model.
    Error: down_blocks.1.attentions.0.transformer_blocks.0.attn2.to_k.weight is 64x128 there and 64x192 in the ...

MODEL: shapes-xl-refiner
============================================================
✓ No compatible LoRAs found

✗ INCOMPATIBLE LoRAs:
  • shapes-ink
    Reason: LoRA 'shapes-ink' appears to be designed for SD 1.5 models, but you're using an SDXL model. Try \
using a standard SD base model.
    Error: down_blocks.2.attentions.0.transformer_blocks.0.attn1.to_k.weight is 128x128 there and 64x64 in the ...
  • shapes-xl-ink
    Reason: LoRA 'shapes-xl-ink' may not be compatible with 'shapes-xl-refiner'. Check if the LoRA was trained \
for the same model architecture.
    Error: down_blocks.1.attentions.0.transformer_blocks.0.attn2.to_k.weight is 64x192 there and 64x128 in the ...
"""


def test_the_report_on_all_pairs_has_the_form_of_the_original(tmp_path: Path) -> None:
    done = tool("test_lora_compatibility.py", cwd=tmp_path)
    assert done.returncode == 0, done.stderr
    written = (tmp_path / "lora_compatibility_report.txt").read_text("utf-8")
    assert re.sub(r"(?<=Generated: )[\d-]{10} [\d:]{8}", "2024-01-15 14:30:25", written) == REPORT
    assert written in done.stdout
    assert [file.name for file in tmp_path.iterdir()] == ["lora_compatibility_report.txt"]


def test_the_report_goes_where_the_user_wants(tmp_path: Path) -> None:
    named = tmp_path / "reports" / "mine.txt"
    done = tool("test_lora_compatibility.py", "--output", named, "--skip-existing", home=tmp_path)
    assert "SUMMARY BY MODEL" in named.read_text("utf-8")
    assert f"The report is in {named}." in done.stdout
    (tmp_path / "file").touch()
    refused = tool("test_lora_compatibility.py", "--output", tmp_path / "file" / "x.txt", home=tmp_path)
    assert refused.returncode == 1
    assert refused.stderr.startswith("diffusion-api: the report cannot be written to ")


@pytest.mark.parametrize(("lora", "status"), [(INK, 0), (XL_INK, 1), ("shapes-ink", 0)], ids=["fits", "no", "by name"])
def test_one_lora_is_tested_with_one_model(tmp_path: Path, lora: Path | str, status: int) -> None:
    done = tool("test_lora_compatibility.py", "--model", "shapes (DEMO)", "--lora", lora, cwd=tmp_path)
    assert done.returncode == status, done.stderr
    assert "Total Tests: 1\n" in done.stdout
    assert list(tmp_path.iterdir()) == []


def test_the_loras_of_a_folder_are_tested_whatever_they_are(tmp_path: Path) -> None:
    folder = tmp_path / "loras"
    folder.mkdir()
    (folder / "good.safetensors").write_bytes(INK.read_bytes())
    (folder / "page.safetensors").write_text("<html>")
    (folder / "old.pt").write_bytes(b"\x80\x02.")
    (folder / "notes.txt").write_text("none of them")
    shown = tool("test_lora_compatibility.py", "--model", "shapes", "--lora-dir", folder, home=tmp_path).stdout
    assert "Shapes (demo): 1/3 (33.3%)" in shown
    assert "  • page\n    Reason: LoRA 'page' cannot be read: take a .safetensors file.\n    Error: " in shown


@pytest.mark.parametrize(
    ("arguments", "reason"),
    [
        ((), "no LoRAs found in stable_diffusion/loras"),
        (("--model", "gone"), "model 'gone' is not installed; one of dream"),
        (("--lora", "gone.safetensors"), "LoRA 'gone.safetensors' is no file"),
    ],
)
def test_what_cannot_be_tested_is_said_in_one_line(tmp_path: Path, arguments: tuple[str, ...], reason: str) -> None:
    checkpoint(tmp_path / "stable_diffusion" / "models" / "dream.safetensors", SD1_KEYS)
    done = tool("test_lora_compatibility.py", *arguments, home=tmp_path, shipped_models=False)
    assert (done.returncode, done.stdout) == (1, "")
    assert len(done.stderr.splitlines()) == 1
    assert reason in done.stderr


def test_no_model_is_said(tmp_path: Path) -> None:
    done = tool("test_lora_compatibility.py", home=tmp_path, shipped_models=False)
    assert (done.returncode, done.stderr) == (
        1,
        "diffusion-api: no models found: put one into stable_diffusion/models\n",
    )


def test_a_pair_takes_milliseconds(tmp_path: Path) -> None:
    """Forty pairs with the model read once; the bound is wide, as the machine may be busy."""
    folder = tmp_path / "loras"
    folder.mkdir()
    for number in range(40):
        (folder / f"{number}.safetensors").write_bytes(INK.read_bytes())
    shown = tool("test_lora_compatibility.py", "--model", "shapes", "--lora-dir", folder, home=tmp_path).stdout
    told = re.search(r"40 pairs were judged from their files in ([\d.]+) ms", shown)
    assert told
    assert float(told[1]) / 40 < 50


def test_a_picture_proves_that_a_lora_works(tmp_path: Path) -> None:
    done = subprocess.run(
        [sys.executable, ROOT / "test_lora_compatibility.py", "--render", "--device", "cpu"],
        cwd=tmp_path, env=environment(), capture_output=True, text=True, timeout=2 * PATIENCE, check=False,
    )  # fmt: skip
    assert done.returncode == 0, done.stderr
    told = re.search(
        r"  • shapes-ink\n    Picture: (\S+) \(differs by ([\d.]+)% from the one without it\)", done.stdout
    )
    assert told
    with Image.open(tmp_path / told[1]) as pair:
        width, height = pair.size
        without, with_it = (pair.crop((x, 0, x + width // 2, height)) for x in (0, width // 2))
    ink = [sum(sum(pixel) < 150 for pixel in side.get_flattened_data()) for side in (without, with_it)]
    assert ink[1] > 500 > 10 * ink[0]  # the line of black ink that this LoRA draws
    assert float(told[2]) > 1


TOOLS = [
    *("list_models.py", "list_available_models_loras.py", "test_lora_compatibility.py"),
    *("example_usage.py", "example_metadata_usage.py", "example_img2img_refiner.py", "test_img2img_refiner.py"),
]


@pytest.fixture(scope="module")
def server(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Program]:
    """A service with the stub engine and two small models."""
    home = tmp_path_factory.mktemp("examples")
    models = home / "stable_diffusion" / "models"
    diffusers_folder(models / "models--mirroring--pastel-mix", sample_size=8)
    diffusers_folder(models / "stable-diffusion-v1-5", sample_size=8)
    with serving(home) as program:
        yield program


def test_the_example_draws_with_each_model_by_its_label(server: Program, tmp_path: Path) -> None:
    done = tool("example_usage.py", cwd=tmp_path, url=server.url)
    assert done.returncode == 0, done.stderr
    assert "  Pastel Mix -> models--mirroring--pastel-mix\n" in done.stdout
    assert "\nPastel Mix: a beautiful landscape" in done.stdout
    assert len(list((tmp_path / "pictures").glob("*.jpg"))) == 2


def test_the_example_of_the_metadata_shows_what_it_wrote(tmp_path: Path) -> None:
    done = tool("example_metadata_usage.py", cwd=tmp_path)
    assert done.returncode == 0, done.stderr
    shown = done.stdout
    for name in ("with_metadata.png", "with_more.jpg"):
        written = images.read_infotext((tmp_path / "pictures" / name).read_bytes())
        assert written
        assert written in shown
    assert "  Seed = 123456789\n" in shown
    assert 'LoRAs: "anime_style:0.8, detail_enhancer:0.6"' in shown
    assert "Project: spring" in shown
    assert "'clip_skip': 2" in shown
    assert "not understood: nothing" in shown


def test_the_example_of_the_refiner_runs_and_shows_what_the_service_warns_of(server: Program, tmp_path: Path) -> None:
    done = tool("example_img2img_refiner.py", "--refiner", "pastel mix", cwd=tmp_path, url=server.url)
    assert done.returncode == 0, done.stderr
    assert done.stdout.count("  warning: refiner_checkpoint is ignored") == 2
    assert len(list((tmp_path / "pictures").glob("*.png"))) == 2


@pytest.mark.parametrize(
    ("arguments", "status", "told"),
    [((), 0, "SKIP refiner: "), (("--refiner", "pastel mix"), 1, "FAIL refiner: refiner_checkpoint is ignored")],
)
def test_a_refiner_is_tried(
    server: Program, tmp_path: Path, arguments: tuple[str, ...], status: int, told: str
) -> None:
    Image.new("RGB", (64, 64), "red").save(tmp_path / "in.png")
    done = tool("test_img2img_refiner.py", "--image", "in.png", *arguments, cwd=tmp_path, url=server.url)
    assert done.returncode == status, done.stderr
    assert done.stdout.startswith("PASS img2img: a picture of ")
    assert told in done.stdout


@pytest.mark.parametrize("name", TOOLS)
def test_a_tool_is_a_command_and_lies_where_the_document_has_it(tmp_path: Path, name: str) -> None:
    command = Path(name).stem.replace("_", "-")
    assert (ROOT / name).resolve() == ROOT / "scripts" / name
    described = tool(name, "--help").stdout
    assert f"Usage: diffusion-api {command}" in described
    assert described == inside.run(command, "--help", cwd=tmp_path).stdout


def test_pytest_takes_no_tool_for_a_test() -> None:
    done = subprocess.run(
        [sys.executable, "-m", "pytest", "--collect-only", "-q", "--ignore=tests", "."],
        cwd=ROOT, capture_output=True, text=True, check=False,
    )  # fmt: skip
    assert done.returncode == 5, done.stdout  # nothing was collected
