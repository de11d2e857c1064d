"""How ranks find each other, and no other process gets in.

Rank 0 opens a `TCPStore` on one address (loopback on one machine) and writes that address and a
fresh token into a file that only its user may read. The store itself looks up no name, so
what is kept in it is sealed with the token: others can neither read nor forge it. Connections
between ranks count only once both ends have shown that they know the token.
"""

from __future__ import annotations

import datetime
import hmac
import ipaddress
import json
import os
import secrets
import socket
import time
from pathlib import Path

import torch
import torch.distributed as dist

from segfleet.core.errors import ExitCode

PATIENCE = 300.0  # seconds until the address is there
SLOWEST = 1.0  # seconds between two looks: hundreds of ranks look into one folder
TAG = 32  # bytes of an HMAC-SHA256


class NotOurs(RuntimeError):
    """Something that does not know the token answered or was answered to."""


class JoinFailed(RuntimeError):
    """The ranks did not find each other. No peer has failed yet, so none is waited for."""

    exit_code = ExitCode.FAULT
    joining = True  # what went wrong before it says more


class Seal:
    """Encryption with authentication from the standard library alone: HMAC-SHA256 as the key
    stream of a fresh nonce, then as the tag over name, nonce and text."""

    def __init__(self, token: bytes):
        self._hide = hmac.digest(token, b"hide", "sha256")
        self._sign = hmac.digest(token, b"sign", "sha256")

    def name(self, key: str) -> str:
        return self.tag(b"name", key.encode()).hex()

    def close(self, key: str, value: bytes) -> bytes:
        nonce = secrets.token_bytes(16)
        hidden = self._mixed(nonce, value)
        return nonce + hidden + self.tag(b"value", key.encode(), nonce, hidden)

    def open(self, key: str, sealed: bytes) -> bytes:
        """Raises NotOurs."""
        nonce, hidden, tag = sealed[:16], sealed[16:-TAG], sealed[-TAG:]
        if not hmac.compare_digest(tag, self.tag(b"value", key.encode(), nonce, hidden)):
            raise NotOurs(
                "rendezvous: an entry was not written by a rank of this job: another user of this "
                "machine or network interferes. Run the same command again, and tell whoever runs "
                "the machine."
            )
        return self._mixed(nonce, hidden)

    def tag(self, *parts: bytes) -> bytes:
        message = b"".join(len(part).to_bytes(8, "big") + part for part in parts)
        return hmac.digest(self._sign, message, "sha256")

    def _mixed(self, nonce: bytes, text: bytes) -> bytes:
        blocks = range(-(-len(text) // TAG))
        stream = b"".join(
            hmac.digest(self._hide, nonce + block.to_bytes(8, "big"), "sha256") for block in blocks
        )
        return bytes(a ^ b for a, b in zip(text, stream, strict=False))


class SealedStore(dist.Store):
    """A `dist.Store` whose keys and values only those read and write who have the token. Counters
    stay plain: a server adds them up; who changes one can stop a job, not enter it."""

    def __init__(self, inner: dist.Store, seal: Seal):
        super().__init__()
        self._inner, self._seal = inner, seal

    def set(self, key: str, value: str | bytes) -> None:
        text = value.encode() if isinstance(value, str) else bytes(value)
        self._inner.set(self._seal.name(key), self._seal.close(key, text))

    def get(self, key: str) -> bytes:
        return self._seal.open(key, self._inner.get(self._seal.name(key)))

    def add(self, key: str, amount: int) -> int:
        return self._inner.add(self._seal.name(key), amount)

    def check(self, keys: list[str]) -> bool:
        return self._inner.check([self._seal.name(key) for key in keys])

    def wait(self, keys: list[str], timeout: datetime.timedelta | None = None) -> None:
        names = [self._seal.name(key) for key in keys]
        if timeout is None:
            self._inner.wait(names)
        else:
            self._inner.wait(names, timeout)

    def delete_key(self, key: str) -> bool:
        return self._inner.delete_key(self._seal.name(key))

    def num_keys(self) -> int:
        return self._inner.num_keys()

    def set_timeout(self, timeout: datetime.timedelta) -> None:
        self._inner.set_timeout(timeout)

    def clone(self) -> SealedStore:
        """The same over a connection of its own, for another thread."""
        return SealedStore(self._inner.clone(), self._seal)


def join(path: Path, rank: int, size: int, host: str, timeout: datetime.timedelta) -> SealedStore:
    """The store of the job whose address is, or will be, in the file `path`. `host`: what rank 0
    listens on. Raises TimeoutError, NotOurs."""
    if rank == 0:
        token = secrets.token_bytes(32)
        listener = socket.create_server((host, 0), family=_family(host), backlog=4096)
        address = listener.getsockname()[:2]
        inner = _listening(listener, size, timeout)
        publish(path, {"host": address[0], "port": address[1], "token": token.hex()})
    else:
        record = published(path, rank)
        token = bytes.fromhex(record["token"])
        address = record["host"], record["port"]
        inner = dist.TCPStore(
            *address, size, is_master=False, timeout=timeout, wait_for_workers=False
        )
    choose_interface(address[0])
    return SealedStore(inner, Seal(token))


def _listening(listener: socket.socket, size: int, timeout: datetime.timedelta) -> dist.TCPStore:
    """The store on a socket that is open already, so that no other process gets its port."""

    with listener:
        return dist.TCPStore(
            *listener.getsockname()[:2],
            size,
            is_master=True,
            timeout=timeout,
            wait_for_workers=False,
            master_listen_fd=os.dup(listener.fileno()),
        )


def _family(host: str) -> socket.AddressFamily:
    return socket.getaddrinfo(host, None, type=socket.SOCK_STREAM)[0][0]


def publish(path: Path, record: dict) -> None:
    """For this user alone, whatever the folder's mode."""
    partial = path.with_suffix(".partial")
    partial.unlink(missing_ok=True)
    number = os.open(partial, os.O_WRONLY | os.O_CREAT | os.O_EXCL, 0o600)
    with open(number, "w", encoding="utf-8") as file:
        file.write(json.dumps(record))
    os.replace(partial, path)


def published(path: Path, rank: int) -> dict:
    deadline, pause = time.monotonic() + PATIENCE, 0.02
    while True:
        try:
            status = os.lstat(path)
            break
        except FileNotFoundError:
            if time.monotonic() > deadline:
                raise JoinFailed(
                    f"rank {rank} waited {PATIENCE:.0f} s for rank 0 to publish its address in "
                    f"{path}: did rank 0 start, and does this node see that folder?"
                ) from None
            time.sleep(pause)
            pause = min(SLOWEST, 1.5 * pause)
    if status.st_uid != os.getuid() or status.st_mode & 0o077:
        raise NotOurs(f"rendezvous: {path} is not this user's alone: somebody else put it there")
    return json.loads(path.read_text(encoding="utf-8"))


def own_address_towards(host: str) -> str | None:
    """The address of this machine on the way to `host`; None where there is no way. Nothing is
    sent."""
    try:
        ways = socket.getaddrinfo(host, 9, type=socket.SOCK_DGRAM)
    except OSError:
        return None
    for family, kind, protocol, _, address in ways:
        try:
            with socket.socket(family, kind, protocol) as probe:
                probe.connect(address)
                return probe.getsockname()[0]
        except OSError:
            continue
    return None


def is_loopback(address: str) -> bool:
    return ipaddress.ip_address(address.partition("%")[0]).is_loopback


def choose_interface(address: str) -> None:
    """Let gloo and NCCL talk over the interface on the way to `address`, where rank 0 listens,
    unless the user's variables say which. Gloo itself would take the address of the host's own
    name, which Debian maps to the loopback. Within one machine NCCL needs no word."""
    import psutil

    own = own_address_towards(address)
    for name, addresses in psutil.net_if_addrs().items():
        if any(interface.address.partition("%")[0] == own for interface in addresses):
            os.environ.setdefault("GLOO_SOCKET_IFNAME", name)
            if not is_loopback(own):
                os.environ.setdefault("NCCL_SOCKET_IFNAME", f"={name}")


def prove(group: dist.ProcessGroup | None, rank: int, size: int, store: SealedStore) -> None:
    """Both ends of every connection of `group` show that they know the token. Raises NotOurs."""
    if rank == 0:
        store.set("nonce", secrets.token_bytes(16))
    nonce, seal = store.get("nonce"), store._seal

    def proofs(pairs: list[tuple[int, int]]) -> torch.Tensor:
        tags = (
            seal.tag(b"proof", nonce, f"{sender} to {other}".encode()) for sender, other in pairs
        )
        return torch.frombuffer(bytearray(b"".join(tags)), dtype=torch.uint8)

    given = proofs([(rank, other) for other in range(size)])
    expected = proofs([(other, rank) for other in range(size)])
    received = torch.empty_like(expected)
    dist.all_to_all_single(received, given, group=group)
    wrong = (received != expected).view(size, TAG).any(1).nonzero().flatten().tolist()
    if wrong:
        raise NotOurs(
            f"rendezvous: the connection of rank {rank} to rank {wrong[0]} leads to somebody else: "
            "another user of this machine or network interferes. Run the same command again, and "
            "tell whoever runs the machine."
        )
