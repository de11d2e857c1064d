"""Ranks find each other on one address, and whoever does not know the token neither reads nor
writes what they say."""

from __future__ import annotations

import os
import stat

import pytest
import torch.distributed as dist

from segfleet.core.errors import InputError
from segfleet.pipeline.launch import rendezvous
from segfleet.pipeline.ranks import error_as_json, error_from_json
from segfleet.pipeline.stop import Interrupted


def talk(ranks) -> dict:
    """What ranks say to each other, and where they listen."""
    import psutil

    own = {"rank": ranks.rank, "dice": 0.1 + 0.2, "text": "ü" * ranks.rank, "none": None}
    open_to = [
        connection.laddr.ip
        for connection in psutil.Process().net_connections("inet")
        if connection.status == psutil.CONN_LISTEN
    ]
    return {
        "gathered": ranks.gather(own),
        "shared": [ranks.share(own), ranks.share(None), ranks.share([])],
        "listens": open_to,
    }


def forge(ranks) -> str:
    """Rank 1 proves itself with another token."""
    import torch.distributed as dist

    class Stranger:
        _seal = rendezvous.Seal(bytes([ranks.rank]) * 32)

        def get(self, key):
            return b"nonce"

        def set(self, key, value):
            pass

    try:
        rendezvous.prove(dist.group.WORLD, ranks.rank, ranks.size, Stranger())
    except rendezvous.NotOurs as error:
        return str(error)
    return "let in"


def test_ranks_talk_in_json_and_listen_on_loopback_alone(run_in_ranks):
    told = run_in_ranks("test_rendezvous.py:talk", 3)
    for facts in told:
        assert [own["rank"] for own in facts["gathered"]] == [0, 1, 2]
        assert facts["gathered"][2] == {"rank": 2, "dice": 0.1 + 0.2, "text": "üü", "none": None}
        assert facts["shared"] == [facts["gathered"][0], None, []]
        assert facts["listens"] and set(facts["listens"]) == {"127.0.0.1"}


def test_a_rank_with_another_token_does_not_count(run_in_ranks):
    first, second = run_in_ranks("test_rendezvous.py:forge", 2)
    assert "connection of rank 0 to rank 1 leads to somebody else" in first
    assert "connection of rank 1 to rank 0 leads to somebody else" in second


@pytest.fixture
def store(tmp_path):
    from segfleet.pipeline.ranks import TIMEOUT

    return rendezvous.join(tmp_path / "address", 0, 2, "127.0.0.1", TIMEOUT)


def test_the_address_is_for_its_user_alone(store, tmp_path):
    before = os.umask(0)
    try:
        rendezvous.publish(tmp_path / "other", {"host": "127.0.0.1", "port": 1, "token": "00"})
    finally:
        os.umask(before)
    for name in ("address", "other"):
        assert stat.S_IMODE(os.stat(tmp_path / name).st_mode) == 0o600
    os.chmod(tmp_path / "other", 0o644)
    with pytest.raises(rendezvous.NotOurs, match="not this user's alone"):
        rendezvous.published(tmp_path / "other", 1)


def test_a_stranger_reads_nothing_and_writes_nothing(store):
    """One who speaks the store's protocol, for its port is open to every user of the machine."""
    store.set("gloo address of rank 1", b"10.0.0.7:4711")
    plain = dist.TCPStore("127.0.0.1", store._inner.port, is_master=False)
    names = plain.list_keys()
    everything = b"".join(plain.get(name) for name in names) + "".join(names).encode()
    assert b"4711" not in everything and b"gloo" not in everything
    assert store.get("gloo address of rank 1") == b"10.0.0.7:4711"
    name = store._seal.name("gloo address of rank 1")
    other = store._seal.name("another")
    store.set("another", b"10.0.0.8:4711")
    plain.set(name, plain.get(other))  # what a rank did write, in another place
    with pytest.raises(rendezvous.NotOurs, match="another user"):
        store.get("gloo address of rank 1")
    plain.set(name, b"10.0.0.9:4711")
    with pytest.raises(rendezvous.NotOurs, match="another user"):
        store.get("gloo address of rank 1")


@pytest.mark.parametrize("size", [0, 1, 31, 32, 33, 1000])
def test_what_is_sealed_opens_with_the_same_token_alone(size):
    seal, text = rendezvous.Seal(b"a" * 32), os.urandom(size)
    assert seal.open("key", seal.close("key", text)) == text
    assert seal.close("key", text) != seal.close("key", text)
    for wrong, key in ((rendezvous.Seal(b"b" * 32), "key"), (seal, "kez")):
        with pytest.raises(rendezvous.NotOurs):
            wrong.open(key, seal.close("key", text))


@pytest.mark.parametrize(
    "error",
    [InputError("x: wrong"), Interrupted("stopped"), FloatingPointError("nan"), KeyError("k")],
)
def test_an_error_reaches_other_ranks_as_what_it_was(error):
    import json

    facts = json.loads(json.dumps(error_as_json(error)))
    found = error_from_json(facts)
    if isinstance(error, KeyError):
        assert type(found) is RuntimeError and "KeyError: 'k'" in str(found)
    else:
        assert type(found) is type(error) and str(found) == str(error)
    assert error_as_json(None) is None and error_from_json(None) is None
