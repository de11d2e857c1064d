"""Tables of names, the other way round: from what a tensor is called here to what its authors call
it, written from their modules' names and not from the tables."""

from __future__ import annotations

import re

import pytest
import torch

from segfleet.models.foreign import translated
from segfleet.models.registry import ModelError, build_model, spec


def renamed(name: str, pairs: list[tuple[str, str]]) -> str:
    """`name` after every replacement whose pattern it holds, in order."""
    for pattern, theirs in pairs:
        name = re.sub(pattern, theirs, name)
    return name


NLIE = [
    (r"^neb\.fuse\.(\d)", lambda m: f"Skip1.hifm{int(m[1]) + 1}"),
    (r"^dec(\d)\.fuse", lambda m: f"hifm{10 - int(m[1])}"),
    (r"\.channel\.(\d)\.", lambda m: f".mlp_{'xgd'[int(m[1])]}.1."),
    (r"\.spatial\.(\d)\.first", lambda m: f".conv{'xgd'[int(m[1])]}"),
    (
        r"\.spatial\.(\d)\.scales\.(\d)",
        lambda m: f".conv{'xgd'[int(m[1])]}{2 * int(m[2]) + 3}",
    ),
    (r"\.spatial\.(\d)\.mix", lambda m: f".conv{'xgd'[int(m[1])]}_"),
    (r"^neb\.gather\.0\.(\d)", lambda m: f"Skip1.Down1{int(m[1]) + 1}"),
    (r"^neb\.gather\.1", "Skip1.Down2"),
    (r"^neb\.gather\.3", "Skip1.Up4"),
    (r"^neb\.gather\.4\.(\d)", lambda m: f"Skip1.Up5{int(m[1]) + 1}"),
    (r"^neb\.send\.0\.(\d)", lambda m: f"Skip1.Up1{int(m[1]) + 1}"),
    (r"^neb\.send\.1", "Skip1.Up2"),
    (r"^neb\.send\.3", "Skip1.Down4"),
    (r"^neb\.send\.4\.(\d)", lambda m: f"Skip1.Down5{int(m[1]) + 1}"),
    (r"^(Skip1\.(Up|Down)\d+)\.resize", r"\1.\2"),
    (r"^(Skip1\.(?:Up|Down)\d+)\.norm", r"\1.conv.0"),
    (r"^(Skip1\.(?:Up|Down)\d+)\.wide", r"\1.conv.2"),
    (r"^dec(\d)\.up", lambda m: f"up{10 - int(m[1])}"),
    (r"^dec(\d)\.block", lambda m: f"conv{10 - int(m[1])}"),
    (r"^enc5", "conv51"),
    (r"^enc(\d)", r"conv\1"),
    (r"^(conv[1289])\.", r"\1.conv."),
    (r"^(conv(?:3|4|51|6|7))\.conv\.", r"\1.conv1."),
    (r"^(conv(?:3|4|51|6|7))\.point\.", r"\1.conv."),
    (r"\.chain\.kernels\.(\d)\.kernel", r".CDC.convs.\1.conv"),
    (r"\.chain\.kernels\.(\d)\.offset", r".CDC.convs.\1.p_conv"),
    (r"\.gate\.", ".CA."),
    (r"^head", "final"),
]
REC = [
    (r"^d(\d)\.block", r"Up_conv\1"),
    (r"^e(\d)", r"Conv\1"),
    (r"^d(\d)\.up\.", r"Up\1.up."),
    (r"^d(\d)\.calibrate\.deep", r"Att\1.W_g"),
    (r"^d(\d)\.calibrate\.skip", r"Att\1.W_x"),
    (r"^d(\d)\.calibrate\.gate\.1", r"Att\1.psi.0"),
    (r"^d(\d)\.calibrate\.gate\.2", r"Att\1.psi.1"),
    (r"attention\.gates\.0", "EM_block.3.ChannelGateH.spatial"),
    (r"attention\.gates\.1", "EM_block.3.ChannelGateW.spatial"),
    (r"attention\.gates\.2", "EM_block.3.SpatialGate.spatial"),
    (r"(spatial)\.norm", r"\1.bn"),
    (r"\.first\.", ".conv1."),
    (r"\.second\.", ".EM_block."),
    (r"^head", "Conv"),
]
REC_EM = [
    *REC,
    (r"EM_block\.3", "conv.6"),
    (r"EM_block\.([01])", lambda m: f"conv.{int(m[1]) + 3}"),
    (r"conv1\.([01])", r"conv.\1"),
]
ASC = [
    (r"^encoder(\d)", r"encoder.eb\1"),
    (r"\.ipcb\.", ".ipc."),
    (r"\.pmb\.mixer", ".pm.mamba"),
    (r"\.pmb\.linear", ".pm.proj"),
    (r"\.pmb\.tail\.0", ".pm.pro1"),
    (r"\.pmb\.tail\.1", ".pm.dwconv"),
    (r"\.pmb\.tail\.3", ".pm.pro2"),
    (r"\.pmb\.norm", ".pm.norm"),
    (r"\.dcb\.enter", ".dc.pro"),
    (r"\.dcb\.offset", ".dc.deform.offset"),
    (r"\.dcb\.deform", ".dc.deform.deform"),
    (r"\.dcb\.leave", ".dc.deform.balance"),
    (r"^decoder(\d)", lambda m: f"decoder.cnsd.{int(m[1]) - 1}"),
    (r"\.msfa\.branches\.(\d)\.([01])\.", lambda m: f".msfa.cfe{int(m[1]) + 1}.extract.{m[2]}."),
    (
        r"\.msfa\.branches\.(\d)\.([34])\.",
        lambda m: f".msfa.cfe{int(m[1]) + 1}.integrate.{int(m[2]) - 3}.",
    ),
    (r"\.msfa\.fuse\.", ".msfa.extract."),
    (r"\.dfb\.scales\.(\d)", lambda m: f".sf.attention.0.AP{int(m[1]) + 1}"),
    (r"\.dfb\.gate", ".sf.attention.0.weight"),
    (r"\.dfb\.enter", ".sf.attention.0.norm1"),
    (r"\.dfb\.join", ".sf.attention.0.norm2"),
    (r"\.sab\.mean\.(\d)", lambda m: f".sf.attention.1.ave.{int(m[1]) + 1}"),
    (r"\.sab\.peak\.(\d)", lambda m: f".sf.attention.1.max.{int(m[1]) + 1}"),
    (r"\.sab\.gate", ".sf.attention.1.conv"),
    (r"\.cab\.gate", ".sf.attention.2.conv"),
    (r"^connect(\d)\.conv", lambda m: f"decoder.fac.{int(m[1]) - 1}.pro.1"),
    (r"^connect(\d)\.norm", lambda m: f"decoder.fac.{int(m[1]) - 1}.pro.2"),
    (r"^head(\d)", r"final.ph\1.pro.0"),
]
LITE_SKELETON = [
    (r"^(down\d)\.1\.", r"\1.maxpool_conv.1."),
    (r"^(up\d)\.block\.", r"\1.conv."),
    (r"^outc", "outc.conv"),
]
STAGE = r"^(inc|down\d\.maxpool_conv\.1|up\d\.conv)\."
LITE_LIGHT = [
    (rf"{STAGE}0\.", r"\1.double_conv.0.depthwise."),
    (rf"{STAGE}1\.", r"\1.double_conv.0.pointwise."),
    (rf"{STAGE}2\.", r"\1.double_conv.1."),
    (rf"{STAGE}4\.", r"\1.double_conv.3.depthwise."),
    (rf"{STAGE}5\.", r"\1.double_conv.3.pointwise."),
    (rf"{STAGE}6\.", r"\1.double_conv.4."),
]
SPATIAL = [
    (r"^inc\.9\.", "spatial_attention1."),
    (r"^down(\d)\.maxpool_conv\.1\.9\.", lambda m: f"spatial_attention{int(m[1]) + 1}."),
]
SQUEEZE = [(rf"{STAGE}8\.gate", r"\1.se.fc"), (rf"{STAGE}double_conv", r"\1.conv.double_conv")]
LITE = {
    "standard": [*LITE_SKELETON, (rf"{STAGE}(\d)\.", r"\1.double_conv.\2.")],
    "se": [
        *LITE_SKELETON,
        (rf"{STAGE}6\.gate", r"\1.se.fc"),
        (rf"{STAGE}(\d)\.", r"\1.double_conv.double_conv.\2."),
    ],
    "depthwise": [*LITE_SKELETON, *LITE_LIGHT],
    "se_depthwise": [*LITE_SKELETON, *LITE_LIGHT, *SQUEEZE],
    "se_depthwise_r32": [*LITE_SKELETON, *LITE_LIGHT, *SQUEEZE],
    "spatial": [*LITE_SKELETON, *SPATIAL, *LITE_LIGHT, *SQUEEZE],
    "ultralight": [
        *LITE_SKELETON,
        (rf"{STAGE}0\.", r"\1.conv1_depthwise."),
        (rf"{STAGE}1\.", r"\1.conv1_pointwise."),
        (rf"{STAGE}2\.", r"\1.bn1."),
        (rf"{STAGE}4\.", r"\1.conv2_depthwise."),
        (rf"{STAGE}5\.", r"\1.conv2_pointwise."),
        (rf"{STAGE}6\.", r"\1.bn2."),
    ],
}
# PyTorch's layers inside MONAI's Convolution; norms and linear layers are bare
RESIDUAL = [
    (r"\.convs\.0\.", ".conv1.conv."),
    (r"\.convs\.1\.", ".norm1."),
    (r"\.convs\.3\.", ".conv2.conv."),
    (r"\.convs\.4\.", ".norm2."),
    (r"\.shortcut\.0\.", ".conv3.conv."),
    (r"\.shortcut\.1\.", ".norm3."),
]


def e2mi_seg(variant: str) -> list[tuple[str, object]]:
    acdc = variant == "acdc"
    last, projection = (3, "E") if acdc else (2, "EF" if variant == "brats" else "E")
    attention = "epa_block" if variant == "brats" else "cs_block"
    encoder = "e2mis_encoder" if acdc else "unetr_pp_encoder"
    return [
        (r"^mfga(\d)\.up\.", r"mfgam\1.transp_conv.conv."),
        (r"^mfga(\d)\.guess\.", r"mfgam\1.maskout.conv.conv."),
        (r"^mfga(\d)\.group_norm", r"mfgam\1.layernorm"),
        (r"^mfga(\d)\.convs\.(\d)", lambda m: f"mfgam{m[1]}.dilation_conv{int(m[2]) + 1}"),
        (r"^mfga(\d)\.mix\.0", r"mfgam\1.layernorm1"),
        (r"^mfga(\d)\.mix\.1", r"mfgam\1.conv.conv"),
        (r"\.local\.0\.", ".conv31.conv."),
        (r"\.local\.1\.", ".norm31."),
        (r"\.local\.3\." if acdc else r"\.local\.2\.", ".conv32.conv."),
        (r"\.local\.4\.", ".norm32."),
        (rf"\.refine\.{last}\.", ".conv8.1."),
        (r"\.refine\.0\.", ".conv51."),
        (r"\.refine\.1\.", ".conv52."),
        *RESIDUAL,
        (r"\.attention\.", f".{attention}."),
        (r"channel_scale", "temperature1"),
        (r"spatial_scale", "temperature2"),
        (r"key_projection" + (r"\.weight" if variant == "brats" else ""), projection),
        (r"value_projection", "F"),
        (r"merge\.0", "out_proj"),
        (r"merge\.1", "out_proj2"),
        (r"\.scale$", ".gamma"),
        (r"\.position$", ".pos_embed"),
        (r"^(enc\d\.\d|dec[123]\.blocks\.\d)\.out\.", r"\1.conv9.conv."),
        (r"^enc(\d)\.(\d)", lambda m: f"{encoder}.stages.{int(m[1]) - 1}.{m[2]}"),
        (
            r"^dec([123])\.blocks\.(\d)",
            lambda m: f"decoder{int(m[1]) + 2}.decoder_block.0.{m[2]}",
        ),
        (r"^dec0\.blocks", "decoder2.decoder_block.0"),
        (r"^dec(\d)\.up\.", lambda m: f"decoder{int(m[1]) + 2}.transp_conv.conv."),
        (r"^full", "encoder"),
        (r"^stem\.0\.", f"{encoder}.downsample_layers.0.0.conv."),
        (r"^stem\.1", f"{encoder}.downsample_layers.0.1"),
        (r"^down(\d)\.0\.", lambda m: f"{encoder}.downsample_layers.{int(m[1]) - 1}.0.conv."),
        (r"^down(\d)\.1", lambda m: f"{encoder}.downsample_layers.{int(m[1]) - 1}.1"),
        (r"^head(\d)", lambda m: f"out{int(m[1]) + 1}.conv.conv"),
    ]


PRIMUS = [
    (r"^position$", "eva.pos_embed"),
    (r"^norm\.", "eva.norm."),
    (r"^blocks", "eva.blocks"),
    (r"\.scale([12])$", r".gamma_\1"),
    (r"attention\.(query|key|value)", lambda m: f"attn.{m[1][0]}_proj"),
    (r"attention\.norm", "attn.norm"),
    (r"attention\.out", "attn.proj"),
    (r"mlp\.gate", "mlp.fc1_g"),
    (r"mlp\.value", "mlp.fc1_x"),
    (r"mlp\.out", "mlp.fc2"),
    (r"^embed\.(weight|bias)", r"down_projection.proj.\1"),
    (r"^embed\.stem\.", "down_projection.stem.blocks.0."),
    (r"^embed\.halve\.(\d)\.", r"down_projection.stages.\1.blocks.0."),
    (r"^embed\.project", "down_projection.final_proj"),
    (r"^embed\.shortcuts", "down_projection.proj_to_tokens"),
    (r"^embed\.scales", "down_projection.scale_proj_to_tokens"),
    (r"(blocks\.0\.conv[12])\.0\.", r"\1.conv."),
    (r"(blocks\.0\.conv[12])\.1\.", r"\1.norm."),
    # without a stride the convolution is the shortcut's first layer, with one its second
    (r"(stem\.blocks\.0)\.shortcut\.0\.", r"\1.skip.0.conv."),
    (r"(stem\.blocks\.0)\.shortcut\.1\.", r"\1.skip.0.norm."),
    (r"(stages\.\d\.blocks\.0)\.shortcut\.1\.", r"\1.skip.1.conv."),
    (r"(stages\.\d\.blocks\.0)\.shortcut\.2\.", r"\1.skip.1.norm."),
    (r"^decoder", "up_projection.decode"),
]
NAMES = {
    **dict.fromkeys((f"nlie_unet_{size}" for size in "tsbl"), NLIE),
    "rec_unet": REC,
    "rec_unet_em": REC_EM,
    "asc_seg": ASC,
    **{f"unet_lite_{kind}": pairs for kind, pairs in LITE.items()},
    **{f"e2mi_seg_{kind}": e2mi_seg(kind) for kind in ("acdc", "brats", "mcl")},
    **dict.fromkeys(("primus_m", "primus_v3_s", "primus_v3_m"), PRIMUS),
}
SAMPLES = {  # names as the authors' files have them, by hand
    "nlie_unet_b": {
        "Skip1.hifm2.convd_.bias": "neb.fuse.1.spatial.2.mix.bias",
        "conv51.CDC.convs.6.p_conv.weight": "enc5.chain.kernels.6.offset.weight",
        "hifm6.mlp_g.1.weight": "dec4.fuse.channel.1.weight",
        "conv8.conv.4.running_var": "dec2.block.4.running_var",
    },
    "rec_unet": {
        "Up_conv5.EM_block.3.ChannelGateW.spatial.bn.bias": (
            "d5.block.attention.gates.1.norm.bias"
        )
    },
    "rec_unet_em": {"Conv2.conv.4.weight": "e2.second.1.weight"},
    "asc_seg": {
        "encoder.eb4.pm.mamba.A_log": "encoder4.pmb.mixer.A_log",
        "decoder.cnsd.0.sf.attention.1.max.5.bias": "decoder1.sab.peak.4.bias",
        "final.ph2.pro.0.weight": "head2.weight",
    },
    "unet_lite_spatial": {
        "spatial_attention3.conv.weight": "down2.1.9.conv.weight",
        "up2.conv.conv.double_conv.3.pointwise.weight": "up2.block.5.weight",
    },
    "unet_lite_se": {"inc.double_conv.double_conv.3.weight": "inc.3.weight"},
    "e2mi_seg_acdc": {
        "e2mis_encoder.stages.2.1.cs_block.F.weight": "enc3.1.attention.value_projection.weight",
        "decoder5.decoder_block.0.2.conv52.conv1.conv.weight": (
            "dec3.blocks.2.refine.1.convs.0.weight"
        ),
        "encoder.conv3.conv.weight": "full.shortcut.0.weight",
    },
    "primus_v3_m": {"eva.blocks.15.mlp.fc1_g.bias": "blocks.15.mlp.gate.bias"},
}  # fmt: skip


def theirs_of(network: str, model: torch.nn.Module) -> dict[str, tuple[str, torch.Tensor]]:
    """Their name -> (ours, tensor as their file holds it)."""
    found = {}
    for name, value in model.state_dict().items():
        their = renamed(name, NAMES[network])
        turned = network == "e2mi_seg_brats" and their.endswith(".EF")
        assert their not in found, their
        found[their] = (name, value.mT if turned else value)
    return found


@pytest.mark.parametrize("network", NAMES)
def test_a_table_is_total_in_both_directions(network):
    chosen = spec(network)
    with torch.device("meta"):
        model = build_model(network, in_channels=3, num_classes=2, options={})
    ours, pairs = model.state_dict(), theirs_of(network, model)
    theirs = {f"module.{name}": value for name, (_, value) in pairs.items()}
    copies = {"e2mi_seg_mcl": "F", "primus_m": "mask_token", "primus_v3_m": "mask_token"}
    if network == "e2mi_seg_mcl":
        theirs |= {re.sub(r"\.E\.", ".F.", n): v for n, v in theirs.items() if ".E." in n}
    elif network in copies:
        theirs |= {"module.mask_token": torch.zeros(1, 1, 8)}
    found = translated(theirs, model, chosen, where="file")
    assert found.keys() == ours.keys()
    assert all(found[name].shape == ours[name].shape for name in ours)
    for their, (our, value) in pairs.items():
        assert found[our] is value or found[our].shape == value.mT.shape, their
    for their, our in SAMPLES.get(network, {}).items():
        assert pairs[their][0] == our
    with pytest.raises(ModelError, match="left over: nobody.knows"):
        translated(theirs | {"module.nobody.knows": torch.zeros(1)}, model, chosen, where="file")
    gone = next(name for name in theirs if name.endswith("weight"))
    with pytest.raises(ModelError, match="missing: "):
        translated({n: v for n, v in theirs.items() if n != gone}, model, chosen, where="file")


def test_a_matrix_that_is_the_other_way_round_is_turned():
    chosen = spec("e2mi_seg_brats")
    model = build_model("e2mi_seg_brats", in_channels=4, num_classes=4, options=chosen.reduced)
    theirs = {name: value for name, (_, value) in theirs_of("e2mi_seg_brats", model).items()}
    found = translated(theirs, model, chosen, where="file")
    assert all(torch.equal(found[name], value) for name, value in model.state_dict().items())
    given = theirs["unetr_pp_encoder.stages.0.0.epa_block.EF"]
    assert given.shape == (512, 8)  # tokens first, as the authors multiply


@pytest.mark.parametrize("variant", ["acdc", "mcl"])
def test_weights_of_the_other_design_of_e2mi_seg_are_refused(variant):
    """Every shape fits, but the network would compute something else: the attention's name
    tells."""
    network = f"e2mi_seg_{variant}"
    chosen, found = spec(network), {}
    with torch.device("meta"):
        for revision in ("2025-01", "2024-08"):
            found[revision] = build_model(
                network, in_channels=1, num_classes=2,
                options=chosen.reduced | {"revision": revision},
            )  # fmt: skip
    newer = {n: value for n, (_, value) in theirs_of(network, found["2025-01"]).items()}
    older = {n.replace("cs_block", "epa_block"): value for n, value in newer.items()}
    for theirs, fits, other in (
        (newer, found["2025-01"], found["2024-08"]),
        (older, found["2024-08"], found["2025-01"]),
    ):
        assert translated(theirs, fits, chosen).keys() == fits.state_dict().keys()
        with pytest.raises(ModelError, match=r"does not fit .* left over: .*(cs|epa)_block"):
            translated(theirs, other, chosen, where="file")


def test_a_contrastive_primus_lies_one_level_deeper():
    """Methods of nnssl that have the network as their encoder, beside a projection head."""
    chosen = spec("primus_m")
    with torch.device("meta"):
        model = build_model("primus_m", in_channels=1, num_classes=2)
    theirs = {f"encoder.{n}": value for n, (_, value) in theirs_of("primus_m", model).items()}
    theirs |= {"projector.0.weight": torch.empty(8, 8), "encoder.eva.rope.freqs": torch.empty(3)}
    found = translated(theirs, model, chosen, strict="encoder", where="file")
    assert found.keys() == {n for n in model.state_dict() if n.startswith(chosen.encoder)}
