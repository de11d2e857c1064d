"""CVC-ClinicDB, polyps in colonoscopy: numbered frames of 29 sequences.

Source: specification `datasets_2d`, section 2. Frames of one sequence look alike, so a sequence
counts as a patient. Which frame is of which sequence says the `metadata.csv` of some copies;
without one, the table of the data set's page (recalled, not checked against files).
"""

from __future__ import annotations

from bisect import bisect_left
from functools import cached_property
from pathlib import Path

from segfleet.preprocess.readers.base import CaseRef, Facts, read_table, tables
from segfleet.preprocess.readers.pairs import PairReader, paired, pictures

LAST_FRAMES = (
    25,
    50,
    67,
    78,
    103,
    126,
    151,
    177,
    199,
    205,
    227,
    252,
    277,
    297,
    317,
    342,
    363,
    383,
    408,
    428,
    447,
    466,
    478,
    503,
    528,
)
LAST_FRAMES += (546, 571, 591, 612)  # of every sequence


class Reader(PairReader):
    about = "CVC-ClinicDB: polyps in colonoscopy, grouped by sequence."
    layout = (
        "CVC-ClinicDB/Original/N.tif and 'CVC-ClinicDB/Ground Truth/N.tif' (or the PNG folders of "
        "copies)"
    )
    facts = Facts(
        dims="2D",
        modality="colonoscopy",
        download="https://polyp.grand-challenge.org/CVCClinicDB/",
        licence="research, with citation",
        complete=612,
        counts="612 frames of 29 sequences, 384x288, a polyp in each",
    )
    structure = "polyp"

    def lies_in(self, folder: Path) -> bool:
        return any(pictures(folder / "Original"))

    @cached_property
    def sequences(self) -> dict[str, str]:
        """Frame -> sequence, from a CSV with such columns."""
        for folder in (self.folder, self.folder.parent):
            for path in tables(folder) if folder.is_relative_to(self.root) else ():
                columns, rows = read_table(path)
                frame = next((name for name in columns if "frame" in name.lower()), None)
                sequence = next((name for name in columns if "sequence" in name.lower()), None)
                if frame and sequence:
                    return {row[frame].strip(): row[sequence].strip() for row in rows}
        return {}

    def sequence(self, frame: str) -> str:
        number = self.sequences.get(frame)
        if (
            number is None
            and not self.sequences
            and frame.isdecimal()
            and 1 <= int(frame) <= LAST_FRAMES[-1]
        ):
            number = str(bisect_left(LAST_FRAMES, int(frame)) + 1)
        return f"sequence{number}" if number else ""

    def cases(self) -> list[CaseRef]:
        images, masks = (self.folder / name for name in ("Original", "Ground Truth"))
        return paired(
            pictures(images),
            pictures(masks),
            f"{images}/{{}}.tif",
            f"{masks}/{{}}.tif",
            group=self.sequence,
        )
