"""Keys: made, verified, taken away, by one process while another uses them."""

from __future__ import annotations

import json
import re
import stat
import time
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest
from serving import run

from diffusion_api.errors import KeysUnreadable, Misconfigured
from diffusion_api.keys import Keyring
from diffusion_api.schema.caller import Role


def test_a_key_opens_as_what_it_was_made_and_no_other_text_does(tmp_path: Path) -> None:
    keyring = Keyring(tmp_path / "access")
    text = keyring.add("ann", Role.ADMIN)
    caller = keyring.verify(text)
    assert caller is not None
    assert (caller.role, caller.name, caller.id) == (Role.ADMIN, "ann", f"key:{keyring.kept()[0].id}")
    for wrong in (text[:-1], text + "x", text.upper(), text[:14] + "A" * 43, "", "dapi_", text.removeprefix("dapi_")):
        assert keyring.known(wrong) is None
        assert keyring.verify(wrong) is None


def test_a_key_is_kept_as_a_hash_for_this_user_only(tmp_path: Path) -> None:
    keyring = Keyring(tmp_path / "access")
    texts = [keyring.add(name, Role.USER) for name in ("ann", "bob")]
    file = tmp_path / "access" / "keys.json"
    kept = json.loads(file.read_text())
    assert kept["version"] == 1
    assert all(key["hash"].startswith("$argon2id$") for key in kept["keys"])
    assert [text for text in texts if text.split("_", 2)[2] in file.read_text()] == []
    assert stat.S_IMODE(file.stat().st_mode) == 0o600
    assert stat.S_IMODE(file.parent.stat().st_mode) == 0o700


def test_a_key_that_was_right_once_is_known_without_its_hash(tmp_path: Path) -> None:
    keyring = Keyring(tmp_path)
    text = keyring.add("ann", Role.USER)
    assert keyring.known(text) is None
    began = time.process_time()
    first = keyring.verify(text)
    slow = time.process_time() - began
    began = time.process_time()
    assert [keyring.known(text) for _ in range(50)] == [first] * 50
    assert time.process_time() - began < slow


def test_a_key_that_another_process_takes_away_opens_nothing_at_once(tmp_path: Path) -> None:
    ours, theirs = Keyring(tmp_path), Keyring(tmp_path)
    text, other = theirs.add("ann", Role.USER), theirs.add("bob", Role.USER)
    assert ours.verify(text)
    assert ours.verify(other)
    theirs.revoke("ann")
    assert (ours.known(text), ours.verify(text)) == (None, None)
    assert ours.known(other)
    again = theirs.add("ann", Role.USER)
    assert (ours.verify(text), ours.verify(again) is not None) == (None, True)


def test_many_at_once_lose_no_key(tmp_path: Path) -> None:
    with ThreadPoolExecutor(8) as threads:
        list(threads.map(lambda n: Keyring(tmp_path).add(f"caller {n}", Role.USER), range(16)))
    assert len({key.id for key in Keyring(tmp_path).kept()}) == 16


def test_listed_keys_open_and_are_the_same_callers_after_a_restart(tmp_path: Path) -> None:
    one = Keyring(tmp_path, [(Role.USER, "first"), (Role.USER, "second"), (Role.ADMIN, "boss")])
    two = Keyring(tmp_path, [(Role.ADMIN, "boss"), (Role.USER, "second")])
    found = one.known("second")
    assert found is not None
    assert found == two.known("second")
    assert found != one.known("first")
    assert one.has_admin
    assert two.known("first") is None
    assert len(one) == 3


def test_a_file_of_keys_that_cannot_be_read_lets_nobody_in(tmp_path: Path) -> None:
    keyring = Keyring(tmp_path)
    text = keyring.add("ann", Role.USER)
    assert keyring.verify(text)
    for broken in ('{"version": 1, "keys": [', '{"version": 2, "keys": []}'):
        (tmp_path / "keys.json").write_text(broken)
        with pytest.raises(
            KeysUnreadable, match=r"keys.json (cannot be read, so nobody|was written by a newer release)"
        ):
            keyring.known(text)


@pytest.mark.parametrize("name", ["", " ", "a\nb", "x" * 65, "-"[:0] + "<b>"])
def test_a_name_must_be_one(tmp_path: Path, name: str) -> None:
    with pytest.raises(Misconfigured, match="a key's name"):
        Keyring(tmp_path).add(name, Role.USER)


def test_a_name_stands_for_one_key(tmp_path: Path) -> None:
    keyring = Keyring(tmp_path)
    keyring.add("ann", Role.USER)
    with pytest.raises(Misconfigured, match="there is a key named 'ann' already"):
        keyring.add("ann", Role.ADMIN)
    with pytest.raises(Misconfigured, match="the keys are: 'ann'"):
        keyring.revoke("bob")


def test_the_commands_make_list_and_take_away_keys(tmp_path: Path) -> None:
    made = run("keys", "add", "ann", "--admin", "--home", tmp_path, cwd=tmp_path)
    assert re.fullmatch(r"dapi_[0-9a-f]{8}_[\w-]{43}\n", made.stdout), made.stderr
    run("keys", "add", "bob", "--home", tmp_path, cwd=tmp_path)
    listed = run("keys", "list", "--home", tmp_path, cwd=tmp_path).stdout
    assert [(line.split()[1], line.split()[-1]) for line in listed.splitlines()] == [("admin", "ann"), ("user", "bob")]
    assert made.stdout.strip() not in listed
    gone = run("keys", "revoke", listed.split()[0], "--home", tmp_path, cwd=tmp_path)
    assert "'ann'" in gone.stdout
    last = run("keys", "revoke", "bob", "--home", tmp_path, cwd=tmp_path)
    assert "it was the last" in last.stdout
    wrong = run("keys", "revoke", "bob", "--home", tmp_path, cwd=tmp_path)
    assert (wrong.returncode, wrong.stderr) == (
        1,
        "diffusion-api: no key is named 'bob'; the keys are: there is none\n",
    )
