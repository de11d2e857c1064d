"""ISIC 2018, task 1, lesions in dermoscopy. As ISIC 2017 with other folder names.

Source: specification `datasets_2d`, section 7.
"""

from __future__ import annotations

from segfleet.preprocess.readers.base import Facts
from segfleet.preprocess.readers.isic2017 import Reader as Isic2017


class Reader(Isic2017):
    about = "ISIC 2018, task 1: skin lesions in dermoscopy."
    layout = (
        "ISIC2018_Task1-2_Training_Input/ISIC_N.jpg with "
        "ISIC2018_Task1_Training_GroundTruth/ISIC_N_segmentation.png; "
        "likewise Validation and Test"
    )
    facts = Facts(
        dims="2D",
        modality="dermoscopy",
        download="https://challenge.isic-archive.com/data/#2018",
        licence="CC BY-NC 4.0",
        complete=3694,
        counts="2594 training, 100 validation, 1000 test (masks of the last two were released "
        "later); holds most of ISIC 2017",
    )
    held_out = 808 / 2694
    parts = {
        "training": ("ISIC2018_Task1-2_Training_Input", "ISIC2018_Task1_Training_GroundTruth"),
        "validation": (
            "ISIC2018_Task1-2_Validation_Input",
            "ISIC2018_Task1_Validation_GroundTruth",
        ),
        "test": ("ISIC2018_Task1-2_Test_Input", "ISIC2018_Task1_Test_GroundTruth"),
    }
