"""What a power cut leaves of a folder: only what was synced, played back from recorded calls.

While `Recorder` is active every `os.fsync` is noted: of a file its bytes then, of a folder its
entries then. `survivors` are the folders that a file system may leave if the power goes at any of
those moments. Two extremes are built: one that keeps nothing that was not synced, and one that
writes every rename and name at once and loses only bytes that were not synced (the order of ext4
without delayed allocation's safety net, and of XFS). The idea is ALICE's (Pillai et al., OSDI
2014), with the product's own calls.
"""

from __future__ import annotations

import os
import stat
from collections.abc import Iterator
from pathlib import Path

Tree = dict[str, bytes]


class Recorder:
    def __init__(self, root: Path):
        self.root, self.moments = Path(root), []
        self.bytes: dict[int, bytes] = {}  # inode -> as synced
        self.entries: dict[int, dict[str, tuple[int, bool]]] = {}  # folder -> name -> inode, folder
        self.held: list[int] = []  # inodes that are open are not given to other files

    def __enter__(self) -> Recorder:
        self.fsync, self.replace = os.fsync, os.replace
        for folder in (self.root, *self.root.rglob("*")):  # what was there is on disk
            self._note(os.open(folder, os.O_RDONLY))
        os.fsync, os.replace = self._fsync, self._replace
        return self

    def __exit__(self, *_) -> None:
        os.fsync, os.replace = self.fsync, self.replace
        self._moment()
        for number in self.held:
            os.close(number)

    def _fsync(self, number: int) -> None:
        number = number if isinstance(number, int) else number.fileno()
        self._moment()  # the cut comes before the call ends
        self.fsync(number)
        if self.root in Path(os.readlink(f"/proc/self/fd/{number}")).parents or self._is_root(
            number
        ):
            self._note(os.open(f"/proc/self/fd/{number}", os.O_RDONLY))
        self._moment()

    def _replace(self, *words, **more) -> None:
        self.replace(*words, **more)
        self._moment()

    def _is_root(self, number: int) -> bool:
        return os.path.samestat(os.fstat(number), os.stat(self.root))

    def _note(self, number: int) -> None:
        self.held.append(number)
        facts = os.fstat(number)
        if stat.S_ISDIR(facts.st_mode):
            with os.scandir(number) as found:
                self.entries[facts.st_ino] = {
                    one.name: (one.inode(), one.is_dir(follow_symlinks=False)) for one in found
                }
        else:
            with open(f"/proc/self/fd/{number}", "rb") as file:
                self.bytes[facts.st_ino] = file.read()

    def _moment(self) -> None:
        self.moments.append((self._synced(self.root.stat().st_ino, ""), self._named()))

    def _synced(self, folder: int, where: str) -> Tree:
        tree: Tree = {}
        for name, (inode, is_folder) in self.entries.get(folder, {}).items():
            if is_folder:
                tree[f"{where}{name}/"] = b""
                tree |= self._synced(inode, f"{where}{name}/")
            else:
                tree[where + name] = self.bytes.get(inode, b"")
        return tree

    def _named(self) -> Tree:
        """All names as they are now; of files that were not synced half of the bytes."""
        tree: Tree = {}
        for path in sorted(self.root.rglob("*")):
            name = str(path.relative_to(self.root))
            if path.is_dir():
                tree[name + "/"] = b""
            else:
                inode = path.stat().st_ino
                data = path.read_bytes()
                tree[name] = data if self.bytes.get(inode) == data else data[: len(data) // 2]
        return tree

    def survivors(self, place: Path) -> Iterator[Path]:
        """Every folder that a cut may leave, each once."""
        seen = []
        for trees in self.moments:
            for tree in trees:
                if tree in seen:
                    continue
                seen.append(tree)
                left = place / str(len(seen))
                left.mkdir(parents=True)
                for name, data in tree.items():
                    if name.endswith("/"):
                        (left / name).mkdir(parents=True, exist_ok=True)
                    else:
                        (left / name).parent.mkdir(parents=True, exist_ok=True)
                        (left / name).write_bytes(data)
                yield left
