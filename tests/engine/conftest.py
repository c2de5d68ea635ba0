"""One engine with the shipped model, shared by all tests here."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import pytest
from asking import Draw, finished, request
from PIL.Image import Image

from diffusion_api.catalog.library import Library
from diffusion_api.engine.executor import Executor
from diffusion_api.settings import DATA


@pytest.fixture(scope="session")
def models_dir(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The user's models of the shared engine; tests may add files."""
    return tmp_path_factory.mktemp("home") / "models"


@pytest.fixture(scope="session")
def pictures() -> dict[str, Image]:
    """The pictures that jobs of the shared engine may bring along; tests may add some."""
    return {}


@pytest.fixture(scope="session")
def executor(models_dir: Path, pictures: dict[str, Image]) -> Iterator[Executor]:
    models_dir.mkdir()
    library = Library(models_dir.parent, models_dir, DATA / "models")
    engine = Executor(library, device="cpu", tokenizer=DATA / "clip", picture=pictures.__getitem__)
    engine.start()
    engine.wait()
    yield engine
    engine.close()


@pytest.fixture
def draw(executor: Executor) -> Draw:
    """``draw(prompt, steps=…)`` → the picture."""
    return lambda *prompt, **changes: finished(executor, request(*prompt, **changes)).images[0]
