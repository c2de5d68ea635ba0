"""The files under the model folders, as facts. A scan reads directory entries and headers, never weights."""

from __future__ import annotations

import logging
import re
import threading
import time
import zipfile
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path, PurePosixPath
from typing import Literal, TypeVar

from diffusion_api import disk
from diffusion_api.catalog import checkers, detect, lora_list, pickles
from diffusion_api.catalog.checkers import CheckerFiles
from diffusion_api.catalog.hashes import Hashes
from diffusion_api.catalog.kinds import family_of, kind_of
from diffusion_api.catalog.labels import LABELS, Profile, label, loose, read_profiles, repository
from diffusion_api.catalog.layouts import Entry, Kind, Place, places, search
from diffusion_api.catalog.pipelines import recommended
from diffusion_api.catalog.told import Told, read_told
from diffusion_api.errors import InvalidRequest, UnknownModel

log = logging.getLogger(__name__)

PREFERRED_DEFAULT = "stable-diffusion-v1-5"
SHIPPED_DEFAULT = "shapes"
FRESH = 2.0
"""Seconds for which a scan is believed."""

LONG_SCAN = 20
"""A scan is believed for so many times as long as it took, on top."""

PLAIN_NAMES = ("lora", "pytorch_lora_weights", "adapter_model", "learned_embeds", "diffusion_pytorch_model", "model")
"""Names that programs give to any file of its kind: such a file is called after its folder."""

OWN_FOLDERS: dict[str, Kind] = {
    "models": "model",
    "loras": "lora",
    "upscalers": "upscaler",
    "vae": "vae",
    "embeddings": "embedding",
}

REPOSITORY = re.compile(r"(models--\w[\w.]*(-[\w.]+)*--|\w[\w.-]*/)(?P<name>\w[\w.-]*)")
"""A model of the hub as org/name, or as the hub's cache writes that."""

SAFETY_CHECKER = "safety_checker"
"""The folder of the one for all models."""

CODE = (
    "{} files can run code when loaded; convert it to .safetensors, or allow them, as data "
    "(DIFFUSION_API_ALLOW_PICKLE_MODELS=true)"
)


@dataclass(frozen=True, kw_only=True)
class Asset:
    """A file of weights; a folder only if it is a model. ``family`` is the one that it was made for, where that can be
    told; ``shown_path`` is for callers; ``stamp`` changes with the files, whose ``bytes`` are counted together.
    ``told`` is what the file says of itself, of a LoRA, and ``listed`` what ``lora_list.json`` says of it.
    """

    kind: Kind
    name: str
    path: Path
    shown_path: str
    family: str | None
    stamp: int = 0
    bytes: int = 0
    told: Told = field(default_factory=Told)
    listed: lora_list.Listed | None = None
    hashes: Hashes = field(default_factory=Hashes, repr=False, compare=False)

    @property
    def pickled(self) -> bool:
        """True for a format that can hold code: it is read as data only."""
        return self.path.is_file() and self.path.suffix.lower() != ".safetensors"

    @property
    def trigger_words(self) -> tuple[str, ...]:
        """The words that call a LoRA: those that its maker published, else those in its file."""
        return (self.listed.trigger_words if self.listed else ()) or self.told.trigger_words

    def hash_soon(self) -> None:
        """Have the hashes made on another thread, for one that may not wait."""
        if self.path.is_file():
            (self.hashes.tensors if self.kind == "lora" and not self.pickled else self.hashes.whole)(self.path)

    @property
    def hash(self) -> str | None:
        """The first 10 hex digits of the file's SHA-256, as A1111 shows it; None for a folder, and for a file that cannot be
        read any more. Waits for it to be made.
        """
        try:
            return self.hashes.whole(self.path).result()[:10] if self.path.is_file() else None
        except OSError:
            return None

    @property
    def network_hash(self) -> str:
        """The 12 hex digits by which A1111 knows a LoRA or an embedding again. Waits for them to be made.

        Of a LoRA it is what the trainer wrote into the file; else the hash of its tensors without the header, so that a file
        that is described anew is known again.
        """
        if self.kind != "lora" or self.pickled:
            return self.hashes.whole(self.path).result()[:12]
        return (self.told.hash or self.hashes.tensors(self.path).result())[:12]

    def known_hashes(self) -> tuple[str | None, str | None]:
        """``hash`` and ``network_hash`` as far as they are known: nothing is read for them."""
        made = self.hashes.known(self.path)
        network = made.whole if self.kind != "lora" or self.pickled else self.told.hash or made.tensors
        return made.whole and made.whole[:10], network and network[:12]


@dataclass(frozen=True, kw_only=True)
class Model(Asset):
    """An installed model. ``native_size`` is the side in pixels that it was trained at; ``inpaints`` says that it was made to
    change parts of pictures, and not to begin with words alone.
    """

    kind: Kind = "model"
    family: str
    native_size: int
    inpaints: bool = False
    shipped: bool = False
    profile: Profile = field(default_factory=Profile)

    @property
    def label(self) -> str:
        """The friendly name."""
        return self.profile.label or label(self.name)

    @property
    def default_size(self) -> tuple[int, int]:
        """Width and height in pixels of requests that name none."""
        return self.profile.size or (self.native_size, self.native_size)

    @property
    def shown_size(self) -> str:
        """``default_size`` for people."""
        width, height = self.default_size
        return f"{width} px" if width == height else f"{width}x{height} px"

    @property
    def whole(self) -> bool:
        """Whether a pipeline of its own draws each picture, in one pass."""
        return detect.is_pipeline(self.family)

    @property
    def tells(self) -> bool:
        """Whether it tells of pictures as well. Such a model was made for pictures of its native size and of no other."""
        return self.family == detect.UNIDIFFUSER

    @property
    def multiple(self) -> int:
        """What width and height are multiples of, in pixels: transformers see patches of two by two latent pixels."""
        return 16 if self.whole else 8

    @property
    def single_file(self) -> bool:
        """True for a checkpoint file, False for a diffusers folder."""
        return self.path.is_file()

    @property
    def type(self) -> Literal["standard", "sdxl"]:
        """``sdxl`` or ``standard``, the two words of the original API."""
        return "sdxl" if self.family in ("sdxl", "sdxl-refiner") else "standard"

    @property
    def refines(self) -> bool:
        """Whether it only draws the end of pictures that another model began."""
        return self.family == "sdxl-refiner"


Row = TypeVar("Row", bound=Asset)


class Library:
    """What is installed: in the home, in the folders that the operator named beside it, and in the package.

    Of two files of one kind and name the first keeps the name: the home's before the others', nearer before deeper.
    """

    def __init__(
        self,
        home: Path,
        models_dir: Path,
        shipped: Path | None = None,
        default: str | None = None,
        *,
        models_from: Sequence[Path] = (),
        pickle_models: bool = False,
    ) -> None:
        self._home, self._models_dir, self._shipped, self._default = home, models_dir, shipped, default
        self._roots = _shown_as(models_from)
        self._pickle_models = pickle_models
        self._hashes = Hashes(home / "stable_diffusion" / ".hashes.json")
        self._lock = threading.Lock()
        self._scanned, self._took = float("-inf"), 0.0
        self._seen: tuple[int, ...] = ()
        self._rows: dict[Kind, dict[str, Asset]] = {}
        self._recognised: dict[tuple[Path, Kind | None], tuple[int, _Facts | detect.Unrecognised | None]] = {}
        self._refused: dict[str, str] = {}
        self._listed: dict[str, lora_list.Listed] = {}
        self._complaints: list[str] = []
        self._told: set[str] = set()

    def models(self) -> list[Model]:
        """Installed models that can run, by name."""
        return [row for row in self._of("model") if isinstance(row, Model)]

    def assets(self, kind: Kind) -> list[Asset]:
        """Installed files of that kind, by name."""
        return self._of(kind)

    def find_asset(self, kind: Kind, name: str) -> Asset | None:
        """The file of that kind with that name, as callers write it: see :meth:`find`."""
        return _find(self.assets(kind), name)

    def lora_list(self) -> dict[str, lora_list.Listed]:
        """What is known of each LoRA by name: those of ``lora_list.json``, be their files here or not, and the other files."""
        rows = self.assets("lora")
        others = {
            row.name: lora_list.Listed.of_file(row.shown_path, row.family, row.trigger_words)
            for row in rows
            if row.listed is None
        }
        return self._listed | others

    def checker(self, model: str | None = None) -> CheckerFiles | None:
        """The safety checker for pictures of that model: its own, else that of the installation. The disk is looked at."""
        row = self.find(model) if model else None
        own = checkers.beside_model(row.path, row.shown_path) if row else None
        return own or checkers.alone(
            self._home / "stable_diffusion" / SAFETY_CHECKER, f"stable_diffusion/{SAFETY_CHECKER}"
        )

    def styles_files(self) -> list[Path]:
        """The files of styles that A1111 would read: the home's before the others'."""
        roots = (self._home, self._home / "stable_diffusion", *(root for root, _ in self._roots))
        return [file for root in roots if (file := root / "styles.csv").is_file()]

    def find(self, name: str) -> Model | None:
        """The model with that name, file name, path within its folder, repository of the hub, or label.

        Case, ``-`` and ``_`` do not matter for names and labels, an exact name goes first.
        """
        models = self.models()
        wanted = loose(name)
        labelled = (m for m in models if wanted in map(loose, (m.label, *m.profile.aliases)))
        return _find(models, name) or next(labelled, None)

    def labels(self) -> list[tuple[str, str]]:
        """Names of models with the labels that callers may write in their place, by label: those of the original API, and
        those of installed models.
        """
        found = {(name, text) for name, text in LABELS.items()}
        for model in self.models():
            found |= {(model.name, text) for text in (model.label, *model.profile.aliases) if text != model.name}
        return sorted(found, key=lambda row: row[1].lower())

    def resolve(self, name: str | None) -> Model:
        """The model that a request means; None means the default one. Raises UnknownModel with the choices."""
        if name is None:
            return self.default()
        model = self.find(name)
        if model is None:
            fetched = f"; the operator can fetch it: diffusion-api pull {found}" if (found := repository(name)) else ""
            raise UnknownModel(f"model {name!r} {self.absence(name)}; {self._choices()}{fetched}", field="model")
        return model

    def absence(self, name: str) -> str:
        """Why no file has that name, as the end of a sentence."""
        reason = self._refused.get(name)
        return f"cannot be used: {reason}" if reason else "is not installed"

    def complaints(self) -> list[str]:
        """What is wrong with files and folders at the moment, a line each."""
        self._of("model")
        return list(self._complaints)

    def default(self) -> Model:
        """The configured model; else stable-diffusion-v1-5 if installed; else the user's only one that begins with words
        alone; without any of those, the shipped one that goes first.

        Raises InvalidRequest when the caller has to choose.
        """
        if self._default:
            return self.resolve(self._default)
        if model := self.find(PREFERRED_DEFAULT):
            return model
        models = [m for m in self.models() if not m.refines and not m.inpaints]
        own = [m for m in models if not m.shipped]
        candidates = own or [m for m in models if m.name == SHIPPED_DEFAULT] or models
        if len(candidates) == 1:
            return candidates[0]
        why = "no model was named and there is no default"
        raise InvalidRequest(f"{why}; {self._choices()}; the operator can set one: DIFFUSION_API_MODEL", field="model")

    def _choices(self) -> str:
        names = [m.name for m in self.models()]
        return f"one of {', '.join(names)}" if names else "no model is installed: put one into stable_diffusion/models"

    def _of(self, kind: Kind) -> list[Asset]:
        with self._lock:
            started, changed = time.monotonic(), self._changed()
            if started - self._scanned > FRESH + LONG_SCAN * self._took or changed != self._seen:
                self._rows, self._seen = self._scan(), changed
                self._scanned = time.monotonic()
                self._took = self._scanned - started
            return sorted(self._rows.get(kind, {}).values(), key=lambda row: row.name.lower())

    def _changed(self) -> tuple[int, ...]:
        """Something that is another once a file came into the home's own folders: such a one is found at once, by the
        process that runs the jobs, too.
        """
        own = self._home / "stable_diffusion"
        paths = (lora_list.place(self._home), *(own / name for name in OWN_FOLDERS))
        return tuple(_modified(path) for path in paths)

    def _scan(self) -> dict[Kind, dict[str, Asset]]:
        rows: dict[Kind, dict[str, Asset]] = {}
        self._refused, self._complaints = {}, []
        for entry in search(self._places(), self._tell):
            if row := self._row(entry):
                self._add(row, entry, rows.setdefault(row.kind, {}))
        for entry in search(self._shipped_places(), self._tell):
            row = self._row(entry, shipped=True)
            if row and row.name not in rows.setdefault(row.kind, {}):
                rows[row.kind][row.name] = row
        profiles = read_profiles(self._home / "stable_diffusion" / "models.toml", self._complain)
        for name, row in rows.get("model", {}).items():
            if isinstance(row, Model) and (profile := profiles.get(loose(name))):
                rows["model"][name] = replace(row, profile=profile.over(row.profile))
        self._listed = lora_list.read(lora_list.place(self._home), self._complain)
        loras = rows.get("lora", {})
        for name in loras.keys() & self._listed.keys():
            loras[name] = replace(loras[name], listed=self._listed[name])
        return rows

    def _places(self) -> Iterable[Place]:
        """Where to search; asked anew for each scan, since folders come and go."""
        home, own = self._home, self._home / "stable_diffusion"
        yield Place(self._models_dir, _shown(self._models_dir, home), "model")
        for name, kind in OWN_FOLDERS.items():
            yield Place(own / name, f"stable_diffusion/{name}", kind)
        yield Place(home / "models", "models", "model")
        yield Place(home / "loras", "loras", "lora")
        for root, shown in self._roots:
            if root.exists():
                yield from places(root, shown, self._tell)
            else:
                self._complain(f"{shown} (models_from) is not there")

    def _shipped_places(self) -> Iterable[Place]:
        """The package's models, and the LoRAs beside them."""
        if self._shipped:
            yield Place(self._shipped, "shipped", "model")
            yield Place(self._shipped.with_name("loras"), "shipped/loras", "lora")
            yield Place(self._shipped.with_name("upscalers"), "shipped/upscalers", "upscaler")

    def _row(self, entry: Entry, *, shipped: bool = False) -> Asset | None:
        """What an entry is; None, and told where it should be something, when it can be of no use."""
        try:
            stamp, size = _stamp(entry.path)
            facts = self._facts(entry, stamp)
        except (detect.Unrecognised, OSError) as error:
            self._tell(str(entry.relative), str(error))
            return None
        if facts is None:
            return None
        asset = Asset(
            kind=facts.kind,
            name=_name(entry),
            path=entry.path,
            shown_path=entry.shown,
            family=facts.family,
            stamp=stamp,
            bytes=size,
            told=facts.told,
            hashes=self._hashes,
        )
        if facts.kind != "model" or facts.family is None:
            return asset
        profile = recommended(entry.path, facts.family) if detect.is_pipeline(facts.family) else Profile()
        return Model(
            **vars(asset), native_size=facts.native_size, inpaints=facts.inpaints, shipped=shipped, profile=profile
        )

    def _facts(self, entry: Entry, stamp: int) -> _Facts | None:
        """What the files say, read again only when they have changed. Raises Unrecognised."""
        key = (entry.path, entry.kind)
        known = self._recognised.get(key)
        if known is None or known[0] != stamp:
            try:
                known = (stamp, _recognise(entry.path, entry.kind))
            except detect.Unrecognised as error:
                known = (stamp, error)
            self._recognised[key] = known
        facts = known[1]
        if entry.path.suffix.lower() in pickles.SUFFIXES and not self._pickle_models:
            broken = isinstance(facts, detect.Unrecognised) and entry.kind == "model"
            if broken or (isinstance(facts, _Facts) and facts.kind == "model"):
                raise detect.Unrecognised(CODE.format(entry.path.suffix))
        if isinstance(facts, detect.Unrecognised):
            raise facts
        return facts

    def _add(self, row: Asset, entry: Entry, rows: dict[str, Asset]) -> None:
        """Put a row under the first of its names that is free."""
        suffix = row.path.suffix if row.path.is_file() else ""
        relative = str(entry.relative).removesuffix(suffix)
        for name in (row.name, relative, entry.shown.removesuffix(suffix), entry.shown):
            other = rows.get(name)
            if other is None:
                rows[name] = replace(row, name=name)
                if name != row.name:
                    first = rows[row.name].shown_path
                    self._log_once(f"{entry.shown} is listed as {name!r}, since {row.name!r} is {first}")
                return
            if other.path.resolve() == row.path.resolve():
                return

    def _tell(self, name: str, reason: str) -> None:
        path = PurePosixPath(name)
        self._refused |= {path.name: reason, path.stem: reason}
        self._complain(f"{name} is not listed: {reason}")

    def _complain(self, message: str) -> None:
        self._complaints.append(message)
        self._log_once(message)

    def _log_once(self, message: str) -> None:
        if message not in self._told:
            self._told.add(message)
            log.warning("%s", message)


@dataclass(frozen=True)
class _Facts:
    """What a file says of itself."""

    kind: Kind
    family: str | None
    native_size: int = 0
    inpaints: bool = False
    told: Told = field(default_factory=Told)


def _recognise(path: Path, kind: Kind | None) -> _Facts | None:
    """What a file or folder is: by its tensors, else as ``kind`` has it; None for what nobody expects here.

    Raises Unrecognised.
    """
    if path.is_dir():
        return _Facts("model", *detect.folder_family(path), detect.inpaints(path))
    if path.suffix.lower() in pickles.SUFFIXES and not zipfile.is_zipfile(path):
        return _recognise_old(path, kind)
    tensors = detect.contents(path)
    found = kind_of(tensors) or kind
    if found == "model":
        return _Facts("model", *detect.file_family(path), detect.inpaints(path))
    told = read_told(path) if found == "lora" else Told()
    return _Facts(found, family_of(found, tensors), told=told) if found else None


def _recognise_old(path: Path, kind: Kind | None) -> _Facts | None:
    """Pickles of before PyTorch 1.6 are not looked into: their folder tells, or the name that programs give to any LoRA."""
    if path.stem.lower() in ("lora", "pytorch_lora_weights", "adapter_model"):
        return _Facts("lora", None)
    if path.stem.lower().endswith(".vae"):
        return _Facts("vae", None)
    if kind == "model" and path.suffix.lower() == ".ckpt":
        raise detect.Unrecognised(
            "it is no file of torch.save, or one of before PyTorch 1.6; convert it to .safetensors"
        )
    return _Facts(kind, None) if kind and kind != "model" else None


def _find(rows: Sequence[Row], name: str) -> Row | None:
    """The row with that name, exactly if there is one, else loosely.

    A repository of the hub also means the file or folder that has its name alone, without that of its owner.
    """
    for row in rows:
        if name in (row.name, row.path.name):
            return row
    below = "/" + name
    for row in rows:
        path = "/" + row.shown_path
        if path.endswith(below) or path.removesuffix(row.path.suffix).endswith(below):
            return row
    repository = REPOSITORY.fullmatch(name)
    for wanted in (_owned(name), *([loose(repository["name"])] if repository else [])):
        for row in rows:
            if wanted in (_owned(row.name), loose(row.name)):
                return row
    return None


def _owned(name: str) -> str:
    """A repository of the hub loosely, whichever way it is written: org/name, models--org--name, org__name."""
    return loose(re.sub(r"(?<=\w)/(?=\w)", "--", name.removeprefix("models--")))


def _name(entry: Entry) -> str:
    """What a file is called: by its own name, or its folder's where its own says nothing."""
    path = PurePosixPath(entry.shown)
    if entry.path.is_dir():
        return path.name
    return path.parent.name if path.stem in PLAIN_NAMES and len(entry.relative.parts) > 1 else path.stem


def _shown_as(roots: Iterable[Path]) -> list[tuple[Path, str]]:
    """Each root with the name under which callers see it: its own, with a number where that is taken."""
    found: dict[str, Path] = {}
    for root in roots:
        name = root.resolve().name
        number = 2
        while name in found:
            name, number = f"{root.resolve().name}-{number}", number + 1
        found[name] = root
    return [(root, name) for name, root in found.items()]


def _shown(folder: Path, home: Path) -> str:
    return folder.relative_to(home).as_posix()


def _modified(path: Path) -> int:
    """When something came to a folder or went from it; 0 without one."""
    try:
        return disk.modified(path)
    except OSError:
        return 0


def _stamp(path: Path) -> tuple[int, int]:
    """Another number whenever a file of the model is another one, and how many bytes they have."""
    files = [path, *sorted(path.glob("*")), *sorted(path.glob("*/*"))] if path.is_dir() else [path]
    found = [file.stat() for file in files if file.exists()]
    return hash(tuple((file.st_mtime_ns, file.st_size) for file in found)), sum(file.st_size for file in found)
