"""LoRAs from a Civitai on this machine: how they are found, what comes, and what stays of what fails."""

from __future__ import annotations

import asyncio
import json
import logging
import subprocess
import threading
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import pytest
from fake_civitai import KEY, Civitai, civitai
from fake_models import LORA_KEYS, SD1_KEYS, checkpoint
from serving import command, environment, eventually, run

from diffusion_api import disk, downloads
from diffusion_api.catalog import lora_list
from diffusion_api.catalog.library import Library
from diffusion_api.catalog.lora_list import Listed
from diffusion_api.downloads import Downloads
from diffusion_api.errors import (
    BrokenDownload,
    DiskFull,
    Gated,
    InvalidRequest,
    NotFound,
    ShuttingDown,
    TooLarge,
    Unreachable,
    UrlRefused,
)
from diffusion_api.fetch import Fetcher, origins
from diffusion_api.lora_shop import LoraShop, normalised
from diffusion_api.pull import Puller

SD15 = "runwayml/stable-diffusion-v1-5"


def weights(tmp_path: Path, keys: dict[str, list[int]] = LORA_KEYS, *, padding: int = 10_000) -> bytes:
    """A safetensors file of about 40 kB as bytes."""
    return checkpoint(tmp_path / "made.safetensors", keys | {"padding": [padding]}).read_bytes()


class Shop:
    """An installation with a shop. The seconds that it would have waited are in ``waited``."""

    def __init__(self, home: Path, state: Civitai, *, allowed: str | None = None, **options: Any) -> None:
        self.home, self.civitai = home, state
        self.waited: list[float] = []
        hosts = f"{state.url},{state.large.url},{state.large.cdn}" if allowed is None else allowed
        fetched = Downloads(Fetcher(origins(hosts), public=True, total=60), wait=self._wait)
        self.library = Library(home, home / "stable_diffusion" / "models")
        settings = {"endpoint": state.url, "key": "", "limit": 2**20, "seconds": 60} | options
        self.shop = LoraShop(fetched, Puller(fetched, home, endpoint=state.url), self.library, home, **settings)

    async def _wait(self, seconds: float) -> None:
        self.waited.append(seconds)

    def add(self, wanted: str) -> str:
        return asyncio.run(self.shop.add(wanted))

    def files(self) -> list[str]:
        """What lies in the installation, unfinished things and folders of downloads and all."""
        found = (path for path in self.home.rglob("*") if path.is_file() or path.parent.name == ".pull")
        return sorted(path.relative_to(self.home).as_posix() for path in found)

    def listed(self) -> dict[str, Any]:
        found: dict[str, Any] = json.loads((self.home / "lora_list.json").read_text())
        return found


THERE = [
    "lora_list.json",
    "stable_diffusion/loras/ink_style.pulled.json",
    "stable_diffusion/loras/ink_style.safetensors",
]


@pytest.fixture
def market(tmp_path: Path) -> Iterator[Civitai]:
    """A Civitai with the LoRA 7, ``Ink Style!``."""
    with civitai() as state:
        state.publish(7, "Ink Style!", weights(tmp_path))
        yield state


@pytest.fixture
def shop(tmp_path: Path, market: Civitai) -> Iterator[Shop]:
    made = Shop(tmp_path / "home", market)
    yield made
    made.shop.close()


# What comes


def test_a_lora_is_added_by_its_number(shop: Shop) -> None:
    assert shop.library.assets("lora") == []
    assert shop.add("7").splitlines() == [
        "collecting model 7: Ink Style!",
        "here as ink_style",
        f"base model: {SD15}; trigger words: ink style, drawing; usage rights: Image, Sell",
    ]
    assert shop.files() == THERE
    assert shop.listed() == {
        "ink_style": {
            "model_id": 7,
            "base_model": SD15,
            "lora_path": f"{shop.civitai.url}/api/download/models/70",
            "trigger words": ["ink style", "drawing"],
            "allow_no_mention": True,
            "usage_rights": "Image, Sell",
        }
    }
    (row,) = shop.library.assets("lora")
    assert (row.name, row.trigger_words) == ("ink_style", ("ink style", "drawing"))
    assert row.path.read_bytes() == shop.civitai.files["70"]


def test_a_lora_is_added_by_words_and_the_first_hit_is_taken(shop: Shop, tmp_path: Path) -> None:
    shop.civitai.publish(8, "Ink Style, the second", weights(tmp_path, padding=9))
    assert shop.add("ink style").splitlines()[:3] == [
        "searchterm ink style lead to 2 models",
        "collecting the first one: Ink Style!",
        "here as ink_style",
    ]
    (path, _), *_ = shop.civitai.heard
    assert path == "/api/v1/models?query=ink%20style&nsfw=false&types=LORA&types=LoCon&types=DoRA"
    assert shop.files() == THERE


@pytest.mark.parametrize("again", ["7", "ink_style"])
def test_what_is_here_is_not_asked_for_again(shop: Shop, again: str) -> None:
    shop.add("7")
    heard = len(shop.civitai.heard)
    assert shop.add(again) == ""
    assert len(shop.civitai.heard) == heard


def test_words_that_lead_to_a_lora_that_is_here_say_its_name_and_fetch_nothing(shop: Shop) -> None:
    shop.add("7")
    ranges = len(shop.civitai.large.ranges())
    assert "here as ink_style" in shop.add("ink").splitlines()
    assert len(shop.civitai.large.ranges()) == ranges


def test_a_listed_lora_whose_file_is_gone_is_fetched_again(shop: Shop) -> None:
    shop.add("7")
    (shop.home / THERE[2]).unlink()
    assert "here as ink_style" in shop.add("7").splitlines()
    assert shop.files() == THERE


def test_a_file_whose_process_died_before_it_was_listed_is_not_fetched_again(shop: Shop) -> None:
    path = shop.home / "stable_diffusion" / "loras" / "ink_style.safetensors"
    path.parent.mkdir(parents=True)
    path.write_bytes(shop.civitai.files["70"])
    assert "here as ink_style" in shop.add("7").splitlines()
    assert shop.civitai.large.ranges() == []
    assert shop.listed()["ink_style"]["model_id"] == 7


def test_a_lora_in_a_folder_of_its_own_counts_as_here(shop: Shop, tmp_path: Path) -> None:
    folder = shop.home / "stable_diffusion" / "loras" / "ink_style"
    folder.mkdir(parents=True)
    (folder / "lora.safetensors").write_bytes(weights(tmp_path))
    lora_list.put(shop.home / "lora_list.json", "ink_style", Listed(model_id=7), print)
    assert shop.add("7") == ""


@pytest.mark.parametrize(
    ("title", "name"),
    [
        ("Pixel Art XL", "pixel_art_xl"),
        ("Détail \u2013 Tweaker (v2.0)", "detail__tweaker_v20"),
        ("../../etc/passwd", "etcpasswd"),
        ("C:\\x\0.safetensors", "cxsafetensors"),
        ("\n..", ""),
        ("日本語", ""),
        ("a" * 300, "a" * 80),
    ],
)
def test_a_title_becomes_a_name_that_leads_nowhere(title: str, name: str) -> None:
    assert normalised(title) == name


def test_a_title_without_a_letter_of_ascii_is_called_by_its_number(shop: Shop, tmp_path: Path) -> None:
    shop.civitai.publish(9, "墨 / ../..", weights(tmp_path, padding=3))
    assert "here as lora_9" in shop.add("9").splitlines()


def test_two_of_one_title_both_come(shop: Shop, tmp_path: Path) -> None:
    shop.civitai.publish(8, "Ink style", weights(tmp_path, padding=3))
    shop.add("7")
    assert "here as ink_style_8" in shop.add("8").splitlines()
    assert {name: entry["model_id"] for name, entry in shop.listed().items()} == {"ink_style": 7, "ink_style_8": 8}


def test_a_file_of_my_own_with_that_name_stays(shop: Shop, tmp_path: Path) -> None:
    mine = checkpoint(shop.home / "stable_diffusion" / "loras" / "ink_style.safetensors", LORA_KEYS)
    before = mine.read_bytes()
    assert "here as ink_style_7" in shop.add("7").splitlines()
    assert mine.read_bytes() == before


@pytest.mark.parametrize(
    ("told", "shown"),
    [(["Image"], "Image"), ("Sell", "Sell"), ("{Image,RentCivit}", "Image, RentCivit"), ([], "None"), (None, "None")],
)
def test_what_may_be_sold_is_shown_in_civitais_words(shop: Shop, told: object, shown: str) -> None:
    shop.civitai.models[7]["allowCommercialUse"] = told
    shop.add("7")
    assert shop.listed()["ink_style"]["usage_rights"] == shown


@pytest.mark.parametrize(
    ("base", "name"),
    [
        ("SD 2.0", "stabilityai/stable-diffusion-2"),
        ("SD 2.1", "stabilityai/stable-diffusion-2-1"),
        ("SDXL 1.0", "stabilityai/stable-diffusion-xl-base-1.0"),
        ("Flux.1 D", "black-forest-labs/FLUX.1-dev"),
    ],
)
def test_base_models_have_the_names_of_the_hub(shop: Shop, base: str, name: str) -> None:
    shop.civitai.models[7]["modelVersions"][0]["baseModel"] = base
    shop.add("7")
    assert shop.listed()["ink_style"]["base_model"] == name


# What is refused before a file comes


@pytest.mark.parametrize(
    ("change", "reason"),
    [
        ({"baseModel": "Pony"}, "Its base model is 'Pony'; known: SD 1.5, SD 2.0, SD 2.1, SDXL 1.0, Flux.1 D"),
        ({"type": "Checkpoint"}, "It is no LoRA, but of type 'Checkpoint'"),
        ({"name": "file.pt"}, "It has no .safetensors file, and nothing else is fetched"),
        ({"modelVersions": []}, "Its base model is ''"),
    ],
)
def test_what_is_of_no_use_is_told_in_the_originals_words_and_nothing_is_kept(
    shop: Shop, tmp_path: Path, change: dict[str, Any], reason: str
) -> None:
    shop.civitai.publish(8, "Wrong\n One", weights(tmp_path), **change)
    with pytest.raises(InvalidRequest) as caught:
        shop.add("8")
    assert str(caught.value).startswith(f"something did go wrong with model Wrong One! {reason}")
    assert shop.civitai.large.ranges() == []
    assert shop.files() == []


def test_what_civitai_does_not_have_is_told(shop: Shop) -> None:
    with pytest.raises(NotFound, match="Civitai has no model 404"):
        shop.add("404")
    with pytest.raises(NotFound, match=r"searchterm ../../x lead to 0 models"):
        shop.add("../../x")
    with pytest.raises(NotFound, match="Civitai has no model 9999"):
        shop.add("9" * 400)
    for wanted in ("", "9" * 5000, "x" * 5000):
        with pytest.raises(InvalidRequest, match=f"name has {len(wanted)} characters; it may have 1 to 500"):
            shop.add(wanted)
    assert shop.files() == []


@pytest.mark.parametrize("fault", ["text:[]", "text:{", 'text:{"id": 7}', 'text:{"items": 5}'])
def test_an_answer_that_makes_no_sense_is_told(shop: Shop, fault: str) -> None:
    shop.civitai.faults = [fault] * 2
    for wanted in ("7", "ink"):
        with pytest.raises(BrokenDownload, match=r"what Civitai says of .* cannot be understood"):
            shop.add(wanted)


def test_a_web_page_in_place_of_an_answer_is_told(shop: Shop) -> None:
    shop.civitai.faults = ["html"]
    with pytest.raises(BrokenDownload, match="what Civitai says of model 7 is a web page"):
        shop.add("7")


# What is cut, slow or wrong


def test_a_cut_download_goes_on_where_it_was_cut(shop: Shop) -> None:
    shop.civitai.large.faults = ["cut:1000"]
    shop.add("7")
    assert shop.civitai.large.ranges() == ["", "bytes=1000-"]
    assert shop.files() == THERE


def test_what_failed_leaves_what_another_try_goes_on_with_and_nothing_else(shop: Shop, market: Civitai) -> None:
    market.large.faults = ["cut:1000", *["cut:0"] * downloads.TRIES]
    with pytest.raises(Unreachable, match="asked again later, it goes on from there"):
        shop.add("7")
    assert [name.rpartition("/")[2] for name in shop.files() if "safetensors" in name] == [
        "download.safetensors.part",
        "download.safetensors.part.etag",
    ]
    assert shop.library.lora_list() == {}
    market.large.faults, market.large.heard = [], []
    other = Shop(shop.home, market)
    other.add("7")
    assert market.large.ranges() == ["bytes=1000-"]
    assert other.files() == THERE


@pytest.mark.parametrize(
    ("fault", "reason"),
    [
        ("wrong", r"has the SHA-256 [0-9a-f]{64} and should have [0-9a-f]{64}; what came was removed"),
        ("html", "is a web page and no file; does one have to sign in there"),
    ],
)
def test_a_broken_download_leaves_nothing_behind(shop: Shop, fault: str, reason: str) -> None:
    shop.civitai.large.faults = [fault]
    with pytest.raises(BrokenDownload, match=reason):
        shop.add("7")
    assert shop.files() == []
    shop.add("7")
    assert shop.files() == THERE


@pytest.mark.parametrize(
    ("content", "reason"),
    [(b"PK\3\4 a pickle, renamed", "is no safetensors file"), (None, "ink_style.safetensors holds no lora")],
)
def test_what_is_no_lora_leaves_nothing_behind(shop: Shop, tmp_path: Path, content: bytes | None, reason: str) -> None:
    shop.civitai.publish(7, "Ink Style!", content or weights(tmp_path, SD1_KEYS))
    with pytest.raises(BrokenDownload, match=reason):
        shop.add("7")
    assert shop.files() == []


def test_a_lora_that_is_too_large_is_not_fetched(tmp_path: Path, market: Civitai) -> None:
    small = Shop(tmp_path / "home", market, limit=1000)
    with pytest.raises(TooLarge, match=r"Ink Style! has 39.\d KiB or more; at most 1000 bytes are fetched"):
        small.add("7")
    assert small.files() == []


def test_a_lora_that_grows_too_large_without_having_said_so_is_given_up(tmp_path: Path, market: Civitai) -> None:
    market.large.faults = ["no-length"]
    small = Shop(tmp_path / "home", market, limit=30_000)
    with pytest.raises(TooLarge, match=r"Ink Style! has .* or more; at most 29.3 KiB are fetched"):
        small.add("7")
    assert small.files() == []


def test_a_lora_that_does_not_fit_on_the_disk_is_not_fetched(shop: Shop, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(disk, "free", lambda folder: 20_000)
    with pytest.raises(DiskFull, match=r"Ink Style! needs 39.\d KiB more, and 0 bytes are free; make room"):
        shop.add("7")
    assert shop.files() == []


def test_a_busy_civitai_is_asked_again_when_it_says(shop: Shop) -> None:
    shop.civitai.faults, shop.civitai.large.faults = ["status:429"], ["status:503"]
    shop.add("7")
    assert shop.waited == [3, 7]
    assert shop.files() == THERE


def test_a_civitai_that_wants_to_be_left_alone_for_long_is_told(shop: Shop) -> None:
    shop.civitai.faults, shop.civitai.retry_after = ["status:429"], "3600"
    with pytest.raises(Unreachable, match="answered 429 and wants to be left alone for 3600 s"):
        shop.add("7")
    assert shop.waited == []


# Who may, and where to


def test_the_key_goes_to_civitai_in_a_header_and_to_no_other_host(
    tmp_path: Path, market: Civitai, caplog: pytest.LogCaptureFixture
) -> None:
    caplog.set_level(logging.DEBUG)
    market.signed_in = True
    shop = Shop(tmp_path / "home", market, key=KEY)
    shop.add("7")
    assert {headers.get("authorization") for _, headers in market.heard} == {f"Bearer {KEY}"}
    assert {headers.get("authorization") for path, headers in market.large.heard} == {None}
    told = "".join(path for path, _ in market.heard) + "".join(
        (shop.home / name).read_text() for name in shop.files() if name.endswith(".json")
    )
    assert KEY not in told + caplog.text


def test_the_key_does_not_go_to_a_host_that_an_answer_names(tmp_path: Path, market: Civitai) -> None:
    market.publish(8, "Elsewhere", weights(tmp_path), downloadUrl=f"{market.large.url}/x/y/resolve/main/z.safetensors")
    with pytest.raises(Gated):
        Shop(tmp_path / "home", market, key=KEY).add("8")
    assert [headers.get("authorization") for _, headers in market.large.heard] == [None]


def test_a_lora_for_those_who_sign_in_says_what_to_do(shop: Shop) -> None:
    shop.civitai.signed_in = True
    with pytest.raises(
        Gated, match="Civitai gives Ink Style! to those only who sign in: set CIVIT_KEY to a key of yours"
    ):
        shop.add("7")
    with pytest.raises(Gated, match="your CIVIT_KEY does not open it"):
        Shop(shop.home, shop.civitai, key="other").add("7")
    assert shop.files() == []


@pytest.mark.parametrize(
    "leads_to", ["http://10.1.2.3/x", "http://169.254.169.254/latest", "http://localhost:1/x", "file:///x"]
)
def test_a_redirect_leads_to_no_host_that_is_not_allowed(shop: Shop, leads_to: str) -> None:
    shop.civitai.elsewhere = leads_to
    with pytest.raises(UrlRefused, match=r"Ink Style! leads to .*; allowed: "):
        shop.add("7")
    assert shop.files() == []


def test_a_file_at_a_private_address_is_not_fetched(shop: Shop, tmp_path: Path) -> None:
    shop.civitai.publish(8, "Inside", weights(tmp_path), downloadUrl="http://192.168.1.1/x.safetensors")
    with pytest.raises(UrlRefused, match=r"Inside leads to http://192.168.1.1:80; allowed: "):
        shop.add("8")
    assert shop.files() == []


# Several at a time, and for long


def test_two_who_want_the_same_make_one_download(shop: Shop) -> None:
    async def both() -> list[str]:
        return await asyncio.gather(*(shop.shop.add(wanted) for wanted in ("7", "ink style", "7")))

    first, second, third = asyncio.run(both())
    assert first == third
    assert first.splitlines()[1:] == second.splitlines()[2:]
    assert shop.civitai.large.ranges() == [""]
    assert shop.files() == THERE


def test_two_different_ones_come_beside_each_other(shop: Shop, tmp_path: Path) -> None:
    shop.civitai.publish(8, "Other", weights(tmp_path, padding=9))

    async def both() -> list[str]:
        return await asyncio.gather(*map(shop.shop.add, "78"))

    asyncio.run(both())
    assert set(shop.listed()) == {"ink_style", "other"}


def test_who_hangs_up_leaves_the_download_running(shop: Shop) -> None:
    async def hang_up() -> None:
        waiting = asyncio.create_task(shop.shop.add("7"))
        await asyncio.to_thread(eventually, shop.civitai.large.ranges, "the download")
        waiting.cancel()
        await asyncio.wait([waiting])

    shop.civitai.large.faults = ["slow:60"]
    asyncio.run(hang_up())
    shop.civitai.large.stopped.set()
    eventually(lambda: shop.files() == THERE, "the LoRA that nobody waits for")
    assert shop.civitai.large.ranges() == [""]


def test_a_download_that_takes_too_long_ends_and_goes_on_later(tmp_path: Path, market: Civitai) -> None:
    market.large.faults = ["slow:30"]
    hasty = Shop(tmp_path / "home", market, seconds=0.7)
    with pytest.raises(Unreachable, match=r"Ink Style! did not come within 0.7 s; asked again, it goes on from there"):
        hasty.add("7")
    market.large.heard.clear()
    Shop(tmp_path / "home", market).add("7")
    assert market.large.ranges() == [f"bytes={len(market.files['70']) // 2}-"]


def test_a_service_that_stops_lets_nobody_wait_and_keeps_what_came(tmp_path: Path, market: Civitai) -> None:
    market.large.faults = ["slow:30"]
    before = threading.active_count()
    shop = Shop(tmp_path / "home", market)

    async def closed() -> None:
        waiting = asyncio.create_task(shop.shop.add("7"))
        await asyncio.to_thread(eventually, market.large.ranges, "the download")
        shop.shop.close()
        with pytest.raises(ShuttingDown, match="asked again later, the download goes on"):
            await waiting

    asyncio.run(closed())
    with pytest.raises(ShuttingDown):
        shop.add("7")
    market.large.stopped.set()
    eventually(lambda: threading.active_count() <= before, "the end of its thread")


# The list


def test_what_people_write_into_the_list_stays_as_it_is(shop: Shop) -> None:
    mine = {"model_id": -1, "lora_path": "there", "trigger words": ["x"], "note": "mine"}
    odd = {"by_hand": mine, "odd": {"model_id": "seven"}, "odder": 5}
    path = shop.home / "lora_list.json"
    path.parent.mkdir()
    path.write_text(json.dumps(odd))
    shop.add("7")
    assert {name: entry for name, entry in shop.listed().items() if name != "ink_style"} == odd
    found = shop.library.lora_list()
    assert set(found) == {"by_hand", "ink_style"}
    assert found["by_hand"].dump() == mine | {"base_model": None, "allow_no_mention": False, "usage_rights": "unknown"}
    assert shop.library.complaints() == [
        "lora_list.json: 'odd' is not used: model_id is 'seven': Input should be a valid integer, unable to parse string "
        "as an integer",
        "lora_list.json: 'odder' is not used: it is 5: Input should be a valid dictionary or instance of Listed",
    ]


@pytest.mark.parametrize(
    ("broken", "reason"),
    [
        (b'{"a": ', "it is no JSON: EOF while parsing a value"),
        (b"\xff\xfe", "it is no JSON: expected value"),
        (b'{"a": {"note": NaN}}', "it is no JSON: expected value"),
        (b'{"a": {"note": "\\ud800"}}', "it is no JSON: unexpected end of hex escape"),
        (b"[]", "it is no JSON object with a name for each LoRA"),
        (b"[" * 100_000, "it is no JSON: recursion limit exceeded"),
    ],
)
def test_a_broken_list_is_told_and_kept_aside(
    shop: Shop, broken: bytes, reason: str, caplog: pytest.LogCaptureFixture
) -> None:
    path = shop.home / "lora_list.json"
    path.parent.mkdir()
    path.write_bytes(broken)
    assert shop.library.lora_list() == {}
    (complaint,) = shop.library.complaints()
    assert complaint.startswith(f"lora_list.json is not used: {reason}")
    assert path.read_bytes() == broken
    shop.add("7")
    assert set(shop.listed()) == {"ink_style"}
    assert path.with_name("lora_list.json.broken-1").read_bytes() == broken
    assert any("it is kept as lora_list.json.broken-1, and a new one was begun" in each for each in caplog.messages)


def test_a_list_of_an_editor_that_marks_its_files_is_read(tmp_path: Path) -> None:
    path = tmp_path / "lora_list.json"
    path.write_text('{"ink": {"trigger words": ["\u58a8"]}}', "utf-8-sig")
    lora_list.put(path, "other", Listed(model_id=3), print)
    assert {name: each.trigger_words for name, each in lora_list.read(path, print).items()} == {
        "ink": ("\u58a8",),
        "other": (),
    }
    assert "\u58a8" in path.read_text("utf-8")


def test_a_list_that_is_a_folder_is_told(shop: Shop) -> None:
    (shop.home / "lora_list.json").mkdir(parents=True)
    assert shop.library.lora_list() == {}
    assert shop.library.complaints() == ["lora_list.json is not used: not a regular file"]


def test_those_who_write_at_once_lose_nothing(tmp_path: Path) -> None:
    path = tmp_path / "lora_list.json"
    with ThreadPoolExecutor(8) as pool:
        list(pool.map(lambda n: lora_list.put(path, f"lora{n}", Listed(model_id=n), print), range(40)))
    assert {entry.model_id for entry in lora_list.read(path, print).values()} == set(range(40))
    assert [path.name for path in tmp_path.iterdir()] == ["lora_list.json"]


def test_a_file_that_is_not_listed_appears_without_rights(shop: Shop) -> None:
    folder = shop.home / "stable_diffusion" / "loras"
    checkpoint(folder / "mine.safetensors", LORA_KEYS, {"modelspec.trigger_phrase": "mine style"})
    assert {name: listed.dump() for name, listed in shop.library.lora_list().items()} == {
        "mine": {
            "model_id": -1,
            "base_model": SD15,
            "lora_path": "stable_diffusion/loras/mine.safetensors",
            "trigger words": ["mine style"],
            "allow_no_mention": False,
            "usage_rights": "unknown",
        }
    }


# A process that dies, and the command


def test_a_process_that_is_killed_in_the_middle_leaves_what_the_next_one_goes_on_with(
    tmp_path: Path, market: Civitai
) -> None:
    market.large.faults = ["slow:60"]
    home = tmp_path / "home"
    settings = {"civitai_url": market.url, "pull_hosts": market.large.cdn, "civit_key": KEY}
    process = subprocess.Popen(
        command("pull", "civitai:7", "--home", home),
        cwd=tmp_path,
        env=environment(**settings),
        stdout=subprocess.DEVNULL,
    )
    eventually(lambda: any(part.stat().st_size for part in home.rglob("*.part")), "the first bytes")
    process.kill()
    process.wait()
    assert not (home / "lora_list.json").exists()
    assert not [*home.rglob("loras/*")]
    market.large.heard.clear()
    done = run("pull", "civitai:7", "--home", home, cwd=tmp_path, **settings)
    assert done.returncode == 0, done.stderr
    assert [wanted[:6] for wanted in market.large.ranges()] == ["bytes="]
    first, licence, _, *last = done.stdout.splitlines()
    assert (first, licence) == (f"{market.url}/models/7: 1 files, size not known yet", "Licence: Image, Sell")
    assert last == [
        "Fetched: stable_diffusion/loras/ink_style.safetensors (lora)",
        "Use it with <lora:ink_style:1>; its trigger words: ink style, drawing",
    ]
    assert Shop(home, market).files() == THERE
