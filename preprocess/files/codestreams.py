"""How large a packed picture inside another file (a tile of TIFF, a frame of DICOM) says that it
is. Its decoder asks for the memory that its own header speaks of, whatever the file around it
says."""

from __future__ import annotations

import io
from pathlib import Path

from segfleet.preprocess.files.faults import damaged

HEAD = 2**16  # bytes of one in which its header stands
BLOCK = 64  # pixels to which codecs pad
FRAMES = (*range(0xC0, 0xC4), *range(0xC5, 0xC8), *range(0xC9, 0xCC), *range(0xCD, 0xD0), 0xF7)


def check_own_size(data: bytes, width: int, height: int, what: str, path: Path) -> None:
    """Raises ImageError where a picture says that it is larger than its place, but for padding."""
    own = own_size(data[:HEAD])
    if own[0] > width + BLOCK or own[1] > height + BLOCK:
        reason = f"{what} of {own[0]}x{own[1]} pixels where {width}x{height} belong"
        raise damaged(path, reason)


def check_boxes(data: bytes, path: Path) -> None:
    """Raises ImageError where a box of a JPEG 2000 file says that it has no length: pydicom, which
    steps from box to box, would never end."""
    at = 12
    while data[4:8] == b"jP  " and at < len(data) and data[at + 4 : at + 8] != b"jp2c":
        length = int.from_bytes(data[at : at + 4])
        if length == 0:
            raise damaged(path, "a JPEG 2000 frame with a box without length")
        at += length


def own_size(head: bytes) -> tuple[int, int]:
    """(width, height) that a picture's own header says; zeros where it cannot be known, which the
    decoder then reports. JPEG and JPEG-LS are looked through as decoders do, which pass over
    rubbish."""
    if head[:2] == b"\xff\xd8":
        return _of_jpeg(head)
    from PIL import Image

    try:
        with Image.open(io.BytesIO(head)) as own:
            return own.size
    except Exception:
        return 0, 0


def _of_jpeg(head: bytes) -> tuple[int, int]:
    at = 2
    while (at := head.find(b"\xff", at)) >= 0 and at + 9 <= len(head):
        mark = head[at + 1]
        if mark in FRAMES:
            height, width = (int.from_bytes(head[at + n : at + n + 2]) for n in (5, 7))
            return width, height
        bare = mark in (0, 1, 0xFF) or 0xD0 <= mark <= 0xD9
        at += 1 if bare else 2 + int.from_bytes(head[at + 2 : at + 4])
    return 0, 0
