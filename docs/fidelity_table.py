"""The tables of docs/fidelity.md: what was published, what the shipped recipes do, and why where
the two differ. `python docs/fidelity_table.py` writes them anew.

Ours is read from the recipe, so a table cannot say what the recipe does not do.
"""

from __future__ import annotations

import re
from collections.abc import Callable
from pathlib import Path

from segfleet.pipeline.recipe import RECIPES, Recipe, load_recipe, recipe_names

PAGE = Path(__file__).with_name("fidelity.md")
BEGIN, END = "<!-- tables: docs/fidelity_table.py -->", "<!-- end -->"
Row = tuple[str, str, str, str]  # setting, published, ours as a template, why


def prepare(name: str) -> dict[str, str]:
    """Options of the `segfleet preprocess` line in a recipe's header."""
    words = re.search(r"segfleet preprocess (.*)", (RECIPES / f"{name}.yaml").read_text())[
        1
    ].split()
    found = {
        "size": "native grid",
        "interpolation": "cubic",
        "masks": "linear",
        "normalisation": "as planned",
    }
    for option, count in (("size", 2), ("interpolation", 1), ("masks", 1), ("normalisation", 1)):
        if f"--{option}" in words:
            at = words.index(f"--{option}") + 1
            found[option] = " x ".join(words[at : at + count])
    return found


def number(value: float) -> str:
    return f"{value:g}".replace("e-0", "e-")


def intensity(recipe: Recipe) -> str:
    """Intensity augmentation with its probabilities, as upstream's code writes them."""
    options = recipe.data.augment
    if options is None:
        return "none"
    kinds = ("noise", "blur", "brightness", "contrast", "low_resolution", "gamma", "gamma_inverted")
    drawn = [
        f"{kind.replace('_', ' ')} {getattr(options, kind):g}"
        for kind in kinds
        if getattr(options, kind)
    ]
    return (", ".join(drawn) + ", per channel" * options.per_channel) if drawn else "none"


def facts(name: str, recipe: Recipe) -> dict[str, str]:
    """What templates may name."""
    stages, optimizer, chosen = recipe.stages, recipe.optimizer, recipe.evaluation
    options = recipe.loss.options
    head = {"adam": "Adam", "adamw": "AdamW", "sgd": "SGD"}[optimizer.name]
    if optimizer.name == "sgd":
        head += f", momentum {number(optimizer.momentum)}" + ", Nesterov" * optimizer.nesterov
    decay = f"{number(optimizer.weight_decay)}" if optimizer.weight_decay else "none"
    if optimizer.weight_decay:
        decay += {"all": ", every parameter", "weights": ", weights only"}[optimizer.decay]
    schedules = []
    for stage in stages:
        text = f"{stage.schedule} from {number(stage.lr)}"
        text += f" to {number(stage.floor)}" if stage.floor else ""
        text += f", period {stage.period} epochs" if stage.period else ""
        schedules.append(text.removeprefix("constant from "))
    return prepare(name) | {
        "model": recipe.model.name,
        "optimizer": head,
        "decay": decay,
        "rate": ", then ".join(schedules),
        "epochs": ", then ".join(f"{stage.epochs} epochs" for stage in stages),
        "batch": str(recipe.data.batch),
        "loss": recipe.loss.name
        + "".join(f" {key}={value}" for key, value in sorted(options.items())),
        "heads": ", ".join(number(round(w, 4)) for w in recipe.loss.deep_supervision)
        if not isinstance(recipe.loss.deep_supervision, str)
        else recipe.loss.deep_supervision,
        "clip": number(optimizer.clip) if optimizer.clip else "none",
        "precision": recipe.engine.precision,
        "split": recipe.data.split,
        "every": f"every {chosen.every} epochs" if chosen.every > 1 else "every epoch",
        "checkpoint": "last"
        if chosen.weights == "last"
        else f"best {chosen.select} on the validation cases",
        "mirror": f"{2 ** len(chosen.mirror)} mirrored copies" if chosen.mirror else "none",
        "foreground": f"{recipe.data.foreground:.0%}",
        "intensity": intensity(recipe),
    }


PER_STEP = "the rate falls a little with every step, and at the end of each epoch is the same"
CACHED = "upstream caches what it drew, for all epochs: a defect, not a method"
ANGLE = "one angle per run is a defect, not a method"
NATIVE = "both are printed: scores at the stored size, and at the size of the original image"
LEAK = "upstream shuffles anew for each part, so its parts overlap; ours has its sizes, disjoint"
ASC_SPLIT = {
    "asc_seg_busi": ("518 / 129, also the test set, seed 42, overlapping", LEAK),
    "asc_seg_isic2017": ("official 2000 / 150 / 600", ""),
    "asc_seg_isic2018": ("1815 / 259 / 520, seed 42, overlapping", LEAK),
    "asc_seg_kvasir": ("880 / 120, also the test set, overlapping", LEAK),
    "asc_seg_ph2": ("160 / 20 / 20, seed 42, overlapping", LEAK),
}


def rotation(*, cached: bool) -> list[Row]:
    """What ASC-Seg's and VM-UNet's code augments by."""
    drawn = "one angle per run, " + ("drawn once" if cached else "drawn for every sample")
    return [
        ("augmentation", f"rotation p 0.5, flips p 0.5 each; {drawn}",
         "rotation p 0.5, flips p 0.5 each; drawn for every sample", CACHED if cached else ANGLE),
        ("turned pixels", "the original's, nearest", "the stored grid's, linear",
         "a store is resized once, what is turned afterwards is interpolated"),
    ]  # fmt: skip


def asc_seg(name: str) -> list[Row]:
    split, why = ASC_SPLIT[name]
    return [
        ("initialisation", "PyTorch's, Mamba's own", "PyTorch's, Mamba's own", ""),
        ("normalisation", "minmax255", "{normalisation}", ""),
        ("size", "256 x 256", "{size}", ""),
        ("interpolation", "bilinear", "{interpolation}", ""),
        ("masks", "bilinear, soft in the loss, cut at 0.5 in scores", "{masks}, cut at 0.5",
         "labels are whole numbers here; the cut is where upstream's scores have it"),
        ("split", split, "{split}", why or "the same 2000 and 150; the 600 by data.split=official-test"),
        *rotation(cached=name != "asc_seg_ph2"),
        ("intensity", "none", "{intensity}", ""),
        ("loss", "bce_dice bce_weight=0.5 dice_weight=0.5 smooth=1.0", "{loss}", ""),
        ("deep supervision", "1, 1, 1, 1", "{heads}", ""),
        ("optimizer", "AdamW", "{optimizer}", ""),
        ("weight decay", "0.01, every parameter", "{decay}", ""),
        ("rate", "cosine from 0.001 to 1e-5, period 50 epochs, per epoch", "{rate}, per step", PER_STEP),
        ("length", "300 epochs", "{epochs}", ""),
        ("batch", "8", "{batch}", ""),
        ("precision", "fp32", "{precision}", ""),
        ("validation", "every epoch", "{every}", ""),
        ("checkpoint", "best iou_pooled on the validation cases", "{checkpoint}", ""),
        ("score", "pooled over all pixels at 256 x 256", "pooled_at_stored_size, and per image at native size", NATIVE),
    ]  # fmt: skip


def vm_unet(name: str) -> list[Row]:
    sizes = "1500 / 650" if name.endswith("2017") else "1886 / 808"
    kept = {
        "initialisation",
        "normalisation",
        "split",
        "loss",
        "deep supervision",
        "batch",
        "checkpoint",
        "augmentation",
        "turned pixels",
    }
    rows = {row[0]: row for row in asc_seg("asc_seg_isic2017") if row[0] not in kept}
    return [
        ("initialisation", "narrow normal, VMamba-S from ImageNet in encoder and decoder", "narrow normal",
         "no weights are shipped; model.weights=FILE model.strict=encoder puts them in both"),
        ("normalisation", "data set's mean and deviation, then minmax255", "{normalisation}",
         "the same numbers: mean and deviation cancel in the range"),
        ("split", f"7:3, {sizes}, names published as folders", "{split}",
         "the same sizes; the authors' names are not in the data set"),
        ("loss", "bce_dice smooth=1.0", "{loss}", ""),
        ("batch", "32", "{batch}", ""),
        ("checkpoint", "best loss on the validation cases", "{checkpoint}", ""),
        *rotation(cached=False),
        *rows.values(),
    ]  # fmt: skip


def unext(name: str) -> list[Row]:
    own, nlie = name == "unext_busi_512", name.startswith("nlie")
    rows: list[Row] = [
        ("initialisation", "PyTorch's; random offset biases" if nlie else "narrow linear layers, He by fan-out in token stages",
         "PyTorch's; random offset biases" if nlie else "narrow linear layers, He by fan-out in token stages", ""),
        ("normalisation", "imagenet, then over 255 again, BGR", "{normalisation}", "once, on RGB: a defect upstream, which the first batch norm undoes"),
        ("size", "512 x 512" if own else "256 x 256", "{size}", ""),
        ("interpolation", "bilinear", "{interpolation}", ""),
        ("masks", "nearest", "{masks}", ""),
        ("split", "80/20, seed 41, names in directory order" if own else "80/20, seeds 2981, 6142, 1187",
         "{split}", "sorted names; order of a directory is nobody's" if own else "the first of the three; the others by data.split"),
        ("augmentation", "quarter turns p 0.5, flips p 0.5", "quarter turns drawn from four, flips p 0.5 per axis", "the same set of pictures, every one as likely"),
        ("intensity", "none", "{intensity}", ""),
        ("loss", "bce_dice bce_weight=0.5 dice_weight=1.0 pool_channels=True smooth=1e-05", "{loss}", ""),
        ("optimizer", "Adam", "{optimizer}", ""),
        ("weight decay", "0.0001, every parameter", "{decay}", ""),
        ("rate", "cosine from 0.0001 to 1e-5, per epoch", "{rate}, per step", PER_STEP),
        ("length", "500 epochs" if own else "400 epochs", "{epochs}", ""),
        ("batch", "8", "{batch}", ""),
        ("precision", "fp32", "{precision}", ""),
        ("validation", "every epoch", "{every}", ""),
        ("checkpoint", "best IoU of batches on the scored cases", "{checkpoint}", "pooled over the set instead of batches, so that it does not depend on their order"),
        ("score", "IoU pooled over batches, Dice = 2 IoU / (1 + IoU)", "pooled_per_batch, and per image at native size", NATIVE),
    ]  # fmt: skip
    if nlie:
        rows.append(
            (
                "set-up",
                "none published",
                "UNeXt's, as U-KAN's family runs it",
                "upstream names it as its framework",
            )
        )
    return rows


def unet_lite(name: str) -> list[Row]:
    busi = name.endswith("busi")
    return [
        ("initialisation", "PyTorch's", "PyTorch's", ""),
        ("normalisation", "0 to 1", "0 to 1", ""),
        ("size", "256 x 256", "{size}", ""),
        ("interpolation", "bilinear", "{interpolation}", ""),
        ("masks", "nearest", "{masks}", ""),
        ("target", "first mask of an image" if busi else "the mask", "union of its masks" if busi else "the mask",
         "17 images have several lesions" if busi else ""),
        ("split", "70/15/15, seed 42, directory order" if busi else "70/15/15, 1815 / 389 / 390, not published", "{split}", "sorted names, scikit-learn's drawing"),
        ("augmentation", "flips, quarter turns, brightness, contrast, blur, noise, elastic, shift-scale-rotate" if busi else "unknown",
         "the same kinds with our ranges, no noise" if busi else "none", "our noise is for standardised images" if busi else "the older loader has none"),
        ("loss", "bce_dice pool=batch smooth=1.0", "{loss}", ""),
        ("optimizer", "Adam", "{optimizer}", ""),
        ("weight decay", "none", "{decay}", ""),
        ("rate", "0.0002, warm restarts that never move" if busi else "0.0001, halved when the loss stalls for 5 epochs", "{rate}",
         "what upstream's scheduler does: it is stepped with the loss for an epoch" if busi else "no plateau schedule here; 25 epochs leave room for few halvings"),
        ("length", "75 epochs" if busi else "25 epochs", "{epochs}", ""),
        ("batch", "8" if busi else "unknown", "{batch}", "" if busi else "not documented"),
        ("clip", "2" if busi else "1.5", "{clip}", ""),
        ("precision", "fp32", "{precision}", ""),
        ("validation", "every epoch", "{every}", ""),
        ("checkpoint", "best Dice pooled over batches on the validation cases", "{checkpoint}", "mean of images, which no batch size changes"),
        ("score", "Dice pooled over batches, plain mean", "pooled_per_batch_unweighted, and per image at native size", NATIVE),
    ]  # fmt: skip


def e2mi_seg(name: str) -> list[Row]:
    variant = name.rpartition("_")[2]
    weight, batch = {"acdc": ("1.45", "4"), "brats": ("1.45", "2"), "mcl": ("2.0", "4")}[variant]
    split, why = {
        "acdc": ("80 / 20 patients, the 20 of nnFormer", "the same"),
        "brats": (
            "387 / 73, 24 unused",
            "the lists are not in the data set; fold 0 of 5 by patient",
        ),
        "mcl": ("116 / 30 patients", "the data are private; fold 0 of 5 of your own"),
    }[variant]
    return [
        ("revision", "2025-01, last of two", "2025-01", "which one made the paper's numbers cannot be told; model.options.revision=2024-08 is the other"),
        ("initialisation", "encoder's linear layers normal 0.02, all else PyTorch's", "encoder's linear layers normal 0.02, all else PyTorch's", ""),
        ("last skip", "before the block's last convolution" if variant == "mcl" else "after the block's last convolution",
         "after the block's last convolution",
         "before it only in the last file of this variant, which does not parse; model.options.early_skip=true has it" if variant == "mcl" else ""),
        ("spatial attention", "tokens and channels scrambled", "in order", "a defect; model.options.legacy_scramble=true has it"),
        ("split", split, "{split}", why),
        ("intensity", "noise 0.1, blur 0.2, brightness 0.15, contrast 0.15, low resolution 0.25, gamma 0.3, gamma inverted 0.1, per channel", "{intensity}", ""),
        ("loss", f"ss ss_weight={weight}", "{loss}", ""),
        ("deep supervision", "0.5714, 0.2857, 0.1429", "{heads}", ""),
        ("optimizer", "SGD, momentum 0.99, Nesterov", "{optimizer}", ""),
        ("momentum", "0.95 if Dice is 0 at epoch 100", "0.99 always", "a rescue that hides a failed run"),
        ("weight decay", "3e-5, every parameter", "{decay}", ""),
        ("rate", "poly from 0.001, per epoch", "{rate}, per step", PER_STEP),
        ("length", "1000 epochs", "{epochs}", ""),
        ("batch", batch, "{batch}", ""),
        ("clip", "12", "{clip}", ""),
        ("precision", "fp32", "{precision}", "half the memory; engine.precision=fp32 is upstream's"),
        ("forced foreground", "33%", "{foreground}", ""),
        ("mirroring at test time", "8 mirrored copies", "{mirror}", ""),
        ("checkpoint", "last", "{checkpoint}", ""),
        ("score", "HD95 in voxels, 0 for empty masks", "HD95 in mm, empty masks counted apart", "upstream's rewards misses"),
    ]  # fmt: skip


def rec_unet(name: str) -> list[Row]:
    lits = "lits" in name
    return [
        ("network", "EM variant for the liver" if name.endswith("liver") else "rec_unet", "{model}", "its name here" if name.endswith("liver") else ""),
        ("initialisation", "not documented", "PyTorch's", "what the network's parts start from by themselves"),
        ("split", "70/30 of slices, unseeded" if lits else "70/30 of slices, seed 39", "{split}", "by patient: slices of one patient on both sides leak"),
        ("slices", "of the annotated range, the outermost lost", "of the annotated range, all", "a defect of the script"),
        ("augmentation", "none", "none", ""),
        ("loss", "bce_dice bce_weight=1.0 dice_weight=1.0 smooth=1e-05" if lits else "bce_dice bce_weight=0.5 channels=[1] dice_weight=1.0 smooth=1e-05", "{loss}", ""),
        ("optimizer", "Adam", "{optimizer}", ""),
        ("weight decay", "none", "{decay}", ""),
        ("rate", "0.0003, then 0.0001" if lits else "0.0003", "{rate}", ""),
        ("length", "100 epochs, then 20 epochs" if lits else "200 epochs", "{epochs}", ""),
        ("second stage", "from the lowest loss of the first" if lits else "none", "from the last weights of the first" if lits else "none",
         "a stage starts where the one before it ended" if lits else ""),
        ("batch", "4", "{batch}", ""),
        ("early stop", "50 epochs without a lower loss", "none", "the best checkpoint is the same, unless it comes later"),
        ("precision", "fp32", "{precision}", "half the memory; engine.precision=fp32 is upstream's"),
        ("validation", "every epoch", "{every}", ""),
        ("checkpoint", "best loss on the validation cases", "{checkpoint}", ""),
        ("score", "mean over slices, empty and right counts 1", "per_slice, per_volume, per_patient, pooled", "all are printed"),
    ]  # fmt: skip


FAMILIES: dict[str, Callable[[str], list[Row]]] = {
    "asc_seg": asc_seg,
    "vm_unet": vm_unet,
    "nlie_unet": unext,
    "unext": unext,
    "unet_lite": unet_lite,
    "e2mi_seg": e2mi_seg,
    "rec_unet": rec_unet,
}


def published() -> list[str]:
    """Shipped recipes that claim a publication."""
    return [
        name
        for name in recipe_names()
        if re.search(r"^# paper ", (RECIPES / f"{name}.yaml").read_text(), re.MULTILINE)
    ]


def rows(name: str) -> list[Row]:
    """(setting, published, ours, why) of a recipe."""
    family = next(family for family in FAMILIES if name.startswith(family))
    known = facts(name, load_recipe(name))
    return [
        (setting, theirs, ours.format(**known), why)
        for setting, theirs, ours, why in FAMILIES[family](name)
    ]


def tables() -> str:
    parts = []
    for name in published():
        lines = [("setting", "published", "ours", "why"), ("---",) * 4]
        for setting, theirs, ours, why in rows(name):
            lines.append((setting, theirs, "the same" if ours == theirs else ours, why))
        body = "\n".join("| " + " | ".join(cells) + " |" for cells in lines)
        parts.append(f"### `{name}`\n\n{body}\n")
    return "\n".join(parts)


def with_tables(page: str, made: str) -> str:
    """The page with `made` between its two marks."""
    head, _, rest = page.partition(BEGIN)
    _, end, tail = rest.partition(END)
    assert end, f"{PAGE.name} has lost its marks {BEGIN} and {END}"
    return f"{head}{BEGIN}\n\n{made}\n{END}{tail}"


if __name__ == "__main__":
    PAGE.write_text(with_tables(PAGE.read_text(encoding="utf-8"), tables()), encoding="utf-8")
