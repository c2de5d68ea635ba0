"""The wheel works where there is nothing but its dependencies."""

from __future__ import annotations

import importlib.util
import os
import subprocess
import sys
import sysconfig
import venv
import zipfile
from pathlib import Path

import pytest
from PIL import Image

ROOT = Path(__file__).parents[1]

pytestmark = pytest.mark.skipif(
    importlib.util.find_spec("hatchling") is None or importlib.util.find_spec("pip") is None,
    reason="the build back end (hatchling) or pip is not installed; `make setup` installs both",
)


def run(*command: str | Path, cwd: Path) -> str:
    """What a program prints; it must succeed, and nothing of this checkout reaches it through the environment."""
    private = ("PYTHON", "DIFFUSION_API_", "VIRTUAL_ENV")
    environment = {name: value for name, value in os.environ.items() if not name.startswith(private)}
    done = subprocess.run(command, cwd=cwd, env=environment, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stdout + done.stderr
    return done.stdout


@pytest.fixture(scope="module")
def wheel(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("wheel")
    run(sys.executable, "-m", "hatchling", "build", "-t", "wheel", "-d", folder, cwd=ROOT)
    (built,) = folder.glob("*.whl")
    return built


@pytest.fixture(scope="module")
def installed(wheel: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The bin folder of a new environment with the wheel in it.

    Its dependencies are those of the running environment, lent through a path file. Path files of the lender (an
    editable install of this checkout) are not followed, so the package itself can only come from the wheel.
    """
    home = tmp_path_factory.mktemp("environment")
    venv.create(home, with_pip=False, symlinks=True)
    variables = {"base": str(home), "platbase": str(home)}
    site_packages = Path(sysconfig.get_path("purelib", "venv", variables))
    lenders = dict.fromkeys((sysconfig.get_path("purelib"), sysconfig.get_path("platlib")))
    (site_packages / "dependencies.pth").write_text("\n".join(lenders) + "\n")
    scripts = Path(sysconfig.get_path("scripts", "venv", variables))
    python = str(scripts / "python")
    run(sys.executable, "-m", "pip", "--python", python, "install", "--no-deps", "--no-index", wheel, cwd=home)
    return scripts


def test_the_wheel_holds_the_package_with_its_data_and_nothing_else(wheel: Path) -> None:
    with zipfile.ZipFile(wheel) as archive:
        names = {name for name in archive.namelist() if ".dist-info/" not in name}
    files = (path for path in (ROOT / "diffusion_api").rglob("*") if path.is_file() and path.suffix != ".pyc")
    assert names == {path.relative_to(ROOT).as_posix() for path in files}
    assert any(name.startswith("diffusion_api/data/models/") for name in names)
    assert "diffusion_api/data/loras/shapes-ink.safetensors" in names


@pytest.mark.timeout(900)
def test_the_wheel_makes_a_picture_from_an_empty_folder(installed: Path, tmp_path: Path) -> None:
    found = run(installed / "python", "-c", "import diffusion_api; print(diffusion_api.__file__)", cwd=tmp_path)
    assert Path(found.strip()).is_relative_to(installed.parent)

    printed = run(installed / "diffusion-api", "demo", cwd=tmp_path)
    (picture,) = (tmp_path / "outputs").rglob("*.png")
    assert str(picture) in printed
    with Image.open(picture) as image:
        assert image.info["parameters"].splitlines()[0] == "a large red circle on a blue background"
        assert image.info["parameters"] in printed
