"""Tables of names: total in both directions, against other people's networks and files."""

from __future__ import annotations

import json
import math

import pytest
import torch
from torch import nn

from segfleet.models.foreign import Table, families, table_of, translated
from segfleet.models.registry import ModelError, build_model, spec


def nnunet_of(kind: str, dims: int) -> nn.Module:
    """A network of dynamic-network-architectures, whose names nnU-Net's checkpoints carry."""
    unet = pytest.importorskip("dynamic_network_architectures.architectures.unet")
    conv, norm = (nn.Conv2d, nn.InstanceNorm2d) if dims == 2 else (nn.Conv3d, nn.InstanceNorm3d)
    common = {
        "features_per_stage": (8, 16, 24), "conv_op": conv, "kernel_sizes": 3,
        "strides": (1, 2, 2), "num_classes": 3, "conv_bias": True, "norm_op": norm,
        "norm_op_kwargs": {"eps": 1e-5, "affine": True}, "nonlin": nn.LeakyReLU,
        "nonlin_kwargs": {"inplace": True}, "deep_supervision": True,
    }  # fmt: skip
    if kind == "plain":
        return unet.PlainConvUNet(
            2, 3, n_conv_per_stage=[2, 2, 3], n_conv_per_stage_decoder=[2, 1], **common
        )
    return unet.ResidualEncoderUNet(
        2, 3, n_blocks_per_stage=[1, 3, 2], n_conv_per_stage_decoder=[1, 1], **common
    )


@pytest.mark.parametrize("dims", [2, 3])
@pytest.mark.parametrize("kind", ["plain", "resenc"])
def test_nnunet_s_networks_compute_the_same_here(kind, dims):
    torch.manual_seed(0)
    theirs = nnunet_of(kind, dims).train()
    for parameter in theirs.parameters():
        nn.init.normal_(parameter, std=0.1)
    options = {"features": [8, 16, 24], "strides": [1, 2, 2], "kernels": [3, 3, 3]}
    options |= (
        {"conv_per_stage": [2, 2, 3], "conv_per_decoder": [2, 1]}
        if kind == "plain"
        else {"blocks_per_stage": [1, 3, 2]}
    )
    name = f"{'plain' if kind == 'plain' else 'resenc'}_unet_{dims}d"
    ours = build_model(name, in_channels=2, num_classes=3, options=options).train()
    # as a file has it: every layer twice, and around all names what a wrapper adds
    state = {f"module.{key}": value for key, value in theirs.state_dict().items()}
    found = translated(state, ours, spec(name), where="here")
    assert found.keys() == ours.state_dict().keys()
    ours.load_state_dict(found)
    x = torch.randn(2, 2, *(16,) * dims)
    for a, b in zip(ours(x), theirs(x), strict=True):
        torch.testing.assert_close(a, b, rtol=1e-4, atol=1e-5)


def test_an_encoder_comes_alone_and_only_whole():
    """As nnssl's (OpenMind's) ResEnc checkpoints are used: the decoder is somebody else's."""
    theirs = nnunet_of("resenc", 3).state_dict()
    options = {"features": [8, 16, 24], "strides": [1, 2, 2], "blocks_per_stage": [1, 3, 2]}
    ours = build_model("resenc_unet_3d", in_channels=2, num_classes=5, options=options)
    found = translated(theirs, ours, spec("resenc_unet_3d"), strict="encoder", where="file")
    assert {name.split(".")[0] for name in found} == {"encoder", "stem"}
    assert found.keys() == {k for k in ours.state_dict() if k.startswith(("encoder", "stem"))}
    with pytest.raises(ModelError, match=r"other shape: heads.0.weight \(3, 16.*instead of \(5,"):
        translated(theirs, ours, spec("resenc_unet_3d"), where="file")
    del theirs["encoder.stages.1.blocks.0.conv1.conv.weight"]
    with pytest.raises(ModelError, match=r"file does not fit resenc_unet_3d: missing: encoder.1.0"):
        translated(theirs, ours, spec("resenc_unet_3d"), strict="encoder", where="file")


def backwards(network: str, ours: list[str]) -> dict[str, str]:
    """Their name -> ours for the published network, written from its layout, not from the table."""
    if network == "unext":
        return unext_names(ours)
    found = {}
    for name in ours:
        new = name.replace(".mixer.", ".self_attention.")
        parts = new.split(".")
        if parts[0] == "embed":
            new = f"patch_embed.{parts[1].replace('conv', 'proj')}.{parts[2]}"
        elif parts[0].startswith("encoder"):
            stage, place = int(parts[0][-1]), int(parts[1])
            rest = ".".join(parts[2:])
            if place == 2:
                rest = rest.replace("linear", "reduction")
                new = f"layers.{stage}.downsample.{rest}"
            else:
                rest = rest if "self_attention" in rest else rest.replace("norm.", "ln_1.")
                new = f"layers.{stage}.blocks.{place}.{rest}"
        elif parts[0].startswith("decoder"):
            stage, place = int(parts[0][-1]), int(parts[1]) - (parts[0] != "decoder0")
            rest = ".".join(parts[2:])
            if place == -1:
                new = f"layers_up.{stage}.upsample.{rest.replace('linear', 'expand')}"
            else:
                rest = rest if "self_attention" in rest else rest.replace("norm.", "ln_1.")
                new = f"layers_up.{stage}.blocks.{place}.{rest}"
        elif parts[0] == "expand":
            new = new.replace("expand.linear", "final_up.expand").replace(
                "expand.norm", "final_up.norm"
            )
        else:
            new = new.replace("head", "final_conv")
        found[f"vmunet.{new}"] = name
    return found


def unext_names(ours: list[str]) -> dict[str, str]:
    levels = {
        "enc4": ("patch_embed3", "block1", "norm3"),
        "enc5": ("patch_embed4", "block2", "norm4"),
    }
    deep = {"dec5": ("1", "dblock1", "dnorm3"), "dec4": ("2", "dblock2", "dnorm4")}
    shallow = {"dec3": "3", "dec2": "4", "dec1": "5"}
    layers = {
        "first": "mlp.fc1",
        "second": "mlp.fc2",
        "depthwise": "mlp.dwconv.dwconv",
        "norm": "norm2",
    }
    found = {}
    for name in ours:
        stage, *rest = name.split(".")
        leaf = rest[-1]
        if stage in ("enc1", "enc2", "enc3"):
            theirs = f"{'encoder' if rest[0] == '0' else 'ebn'}{stage[-1]}.{leaf}"
        elif stage in levels:
            embed, block, norm = levels[stage]
            theirs = {"0": f"{embed}.proj", "1": f"{embed}.norm", "3": norm}.get(rest[0])
            theirs = f"{theirs or f'{block}.0.{layers[rest[1]]}'}.{leaf}"
        elif stage in deep and rest[0] == "tokens":
            _, block, norm = deep[stage]
            theirs = f"{norm if rest[1] == '1' else f'{block}.0.{layers[rest[2]]}'}.{leaf}"
        elif stage == "head":
            theirs = f"final.{leaf}"
        else:
            number = deep[stage][0] if stage in deep else shallow[stage]
            theirs = f"{'decoder' if rest[0] == 'conv' else 'dbn'}{number}.{leaf}"
        found[theirs] = name
    return found


@pytest.mark.parametrize("network", ["vm_unet", "unext"])
def test_a_table_is_total_in_both_directions(network):
    chosen = spec(network)
    with torch.device("meta"):
        model = chosen.build(in_channels=3, num_classes=1)
    ours = model.state_dict()
    pairs = backwards(network, list(ours))
    assert len(pairs) == len(ours)
    theirs = {their: ours[our] for their, our in pairs.items()}
    found = translated(theirs, model, chosen, where="file")
    assert {name: value.shape for name, value in found.items()} == {
        name: value.shape for name, value in ours.items()
    }
    assert all(found[our] is ours[our] for our in ours)
    wrapper = "vmunet." if network == "vm_unet" else ""
    counted = {f"{wrapper}total_ops": torch.zeros(1), f"{wrapper}a.b.total_params": torch.zeros(1)}
    assert translated(theirs | counted, model, chosen, where="file").keys() == ours.keys()
    with pytest.raises(ModelError, match="left over: nobody.knows"):
        translated(theirs | {f"{wrapper}nobody.knows": torch.zeros(1)}, model, chosen, where="file")
    del theirs[next(name for name in theirs if name.endswith("weight"))]
    with pytest.raises(ModelError, match="missing: "):
        translated(theirs, model, chosen, where="file")


def vmamba(depths: tuple[int, ...], width: int) -> dict[str, torch.Tensor]:
    """A first-generation VMamba: its names and shapes, every value from its own draw."""
    shapes: dict[str, tuple[int, ...]] = {
        "patch_embed.proj.weight": (width, 3, 4, 4), "patch_embed.proj.bias": (width,),
        "patch_embed.norm.weight": (width,), "patch_embed.norm.bias": (width,),
        "norm.weight": (8 * width,), "norm.bias": (8 * width,),
        "head.weight": (1000, 8 * width), "head.bias": (1000,),
    }  # fmt: skip
    for stage, depth in enumerate(depths):
        c = width * 2**stage
        d, rank = 2 * c, math.ceil(c / 16)
        block = {
            "ln_1.weight": (c,), "ln_1.bias": (c,), "in_proj.weight": (2 * d, c),
            "conv2d.weight": (d, 1, 3, 3), "conv2d.bias": (d,), "x_proj_weight": (4, rank + 32, d),
            "dt_projs_weight": (4, d, rank), "dt_projs_bias": (4, d), "A_logs": (4 * d, 16),
            "Ds": (4 * d,), "out_norm.weight": (d,), "out_norm.bias": (d,),
            "out_proj.weight": (c, d),
        }  # fmt: skip
        for number in range(depth):
            for leaf, shape in block.items():
                inside = leaf if leaf.startswith("ln_1") else f"self_attention.{leaf}"
                shapes[f"layers.{stage}.blocks.{number}.{inside}"] = shape
        if stage < 3:
            shapes[f"layers.{stage}.downsample.norm.weight"] = (4 * c,)
            shapes[f"layers.{stage}.downsample.norm.bias"] = (4 * c,)
            shapes[f"layers.{stage}.downsample.reduction.weight"] = (2 * c, 4 * c)
    return {name: torch.randn(shape) for name, shape in shapes.items()}


@pytest.mark.parametrize("depths", [(2, 2, 2, 2), (2, 2, 5, 2)])
def test_a_vmamba_starts_the_encoder_and_mirrored_the_decoder(depths):
    """As the authors do with VMamba-S, whose third stage is deeper: the blocks that there are, in
    the encoder and in the decoder's stage of equal width."""
    chosen = spec("vm_unet")
    model = chosen.build(in_channels=3, num_classes=1, width=8)
    theirs = vmamba(depths, 8)
    found = translated(theirs, model, chosen, strict="encoder", where="vmamba_small.pth")
    ours = model.state_dict()
    encoder = {name for name in ours if name.startswith(("embed", "encoder"))}
    blocks = [("decoder0.0", 3, 0), ("decoder0.1", 3, 1), ("decoder1.1", 2, 0),
              ("decoder1.2", 2, 1),
              ("decoder2.1", 1, 0), ("decoder2.2", 1, 1), ("decoder3.1", 0, 0)]  # fmt: skip
    for where, stage, number in blocks:
        for leaf, name in (("norm.bias", "ln_1.bias"), ("mixer.Ds", "self_attention.Ds")):
            value = theirs[f"layers.{stage}.blocks.{number}.{name}"]
            assert found[f"{where}.{leaf}"] is value is found[f"encoder{stage}.{number}.{leaf}"]
    assert found["encoder2.2.norm.weight"] is theirs["layers.2.downsample.norm.weight"]
    mirrored = {name for name in ours if name.startswith(tuple(f"{b[0]}." for b in blocks))}
    assert found.keys() == encoder | mirrored
    with pytest.raises(ModelError, match="vmamba_small.pth does not fit vm_unet: missing: decoder"):
        translated(theirs, model, chosen, where="vmamba_small.pth")


def test_a_trained_vm_unet_gives_its_encoder_alone_and_a_deeper_one_its_blocks():
    chosen = spec("vm_unet")
    with torch.device("meta"):
        model = chosen.build(in_channels=3, num_classes=1)
        deeper = chosen.build(in_channels=3, num_classes=1, depths=(2, 2, 5, 2))
    ours = model.state_dict()
    theirs = {their: ours[our] for their, our in backwards("vm_unet", list(ours)).items()}
    found = translated(theirs, model, chosen, strict="encoder", where="file")
    assert {name.split(".")[0].rstrip("0123") for name in found} == {"embed", "encoder"}
    last = "vmunet.layers.2.blocks.4.ln_1.weight"
    with pytest.raises(ModelError, match="left over: layers.2.blocks.4.ln_1.weight"):
        translated(theirs | {last: torch.empty(384)}, model, chosen, where="file")
    whole = deeper.state_dict()
    pairs = backwards("vm_unet", [name for name in whole if not name.startswith("encoder2.")])
    for name in whole.keys() - set(pairs.values()):
        _, number, rest = name.split(".", 2)
        if number == "5":
            pairs[f"vmunet.layers.2.downsample.{rest.replace('linear', 'reduction')}"] = name
        else:
            rest = rest if rest.startswith("mixer") else rest.replace("norm", "ln_1")
            rest = rest.replace("mixer", "self_attention")
            pairs[f"vmunet.layers.2.blocks.{number}.{rest}"] = name
    found = translated({n: whole[ours] for n, ours in pairs.items()}, deeper, chosen, where="file")
    assert found.keys() == whole.keys() and all(found[name] is whole[name] for name in whole)


def test_an_encoder_of_one_channel_serves_several():
    """An image whose channels are alike is answered as by the network of one channel."""
    theirs = nnunet_of("resenc", 3)
    one = {
        name: value[:, :1] if value.ndim == 5 and value.shape[1] == 2 else value
        for name, value in theirs.state_dict().items()
    }
    options = {"features": [8, 16, 24], "strides": [1, 2, 2], "blocks_per_stage": [1, 3, 2]}
    chosen = spec("resenc_unet_3d")
    ours = build_model("resenc_unet_3d", in_channels=4, num_classes=3, options=options)
    found = translated(one, ours, chosen, strict="encoder", where="file")
    given, kernel = one["encoder.stem.convs.0.conv.weight"], found["stem.0.weight"]
    assert kernel.shape == (8, 4, 3, 3, 3)
    torch.testing.assert_close(kernel, given.expand_as(kernel) / 4)
    with pytest.raises(
        ModelError, match=r"other shape: stem.0.weight \(8, 1, 3, 3, 3\) instead of"
    ):
        translated(one, ours, chosen, where="file")


def test_the_names_of_openmind_s_resenc_l():
    """Released checkpoints hold 956 names, 448 of them the encoder's, which are there again in the
    decoder, and as many numbers as the preset has."""
    unet = pytest.importorskip("dynamic_network_architectures.architectures.unet")
    with torch.device("meta"):
        theirs = unet.ResidualEncoderUNet(
            1, 6, [32, 64, 128, 256, 320, 320], nn.Conv3d, 3, [1, 2, 2, 2, 2, 2],
            [1, 3, 4, 6, 6, 6], 1, [1] * 5, True, nn.InstanceNorm3d, {"eps": 1e-5, "affine": True},
            nonlin=nn.LeakyReLU,
        ).state_dict()  # fmt: skip
        ours = build_model("resenc_unet_3d", in_channels=1, num_classes=2)
        single = build_model("resenc_unet_3d", in_channels=1, num_classes=1)
    assert len(theirs) == 956 and sum(name.startswith("encoder.") for name in theirs) == 448
    chosen = spec("resenc_unet_3d")
    found = translated(theirs, ours, chosen, strict="encoder", where="checkpoint_final.pth")
    assert found.keys() == {k for k in ours.state_dict() if k.startswith(("encoder", "stem"))}
    contrastive = {name: value for name, value in theirs.items() if name.startswith("encoder.")}
    contrastive["projector.net.0.weight"] = torch.empty(8, 8)
    assert found.keys() == translated(contrastive, ours, chosen, strict="encoder").keys()
    assert translated(theirs, single, chosen).keys() == single.state_dict().keys()


def test_order_and_file(tmp_path):
    chosen = spec("rec_unet")
    model = chosen.build(in_channels=3, num_classes=2, **chosen.reduced)
    ours = model.state_dict()
    other = {f"x{i}": value for i, value in enumerate(ours.values())}
    counters = [f"x{i}" for i, name in enumerate(ours) if name.endswith("num_batches_tracked")]
    found = translated(
        {k: v for k, v in other.items() if k not in counters}, model, chosen, mapping="order"
    )
    assert all(found[name] is ours[name] for name in found)
    assert len(found) == len(ours) - len(counters)
    pairs = tmp_path / "names.json"
    pairs.write_text(json.dumps(dict(zip(other, ours, strict=True)) | {"more": ""}))
    found = translated(
        other | {"more": torch.zeros(3)}, model, chosen, mapping=str(pairs), where="f"
    )
    assert all(found[name] is ours[name] for name in ours)
    with pytest.raises(ModelError, match="tensor 0 is x1 .* there and e1.first.0.weight"):
        translated({k: v for k, v in other.items() if k != "x0"}, model, chosen, mapping="order")
    pairs.write_text(json.dumps(dict.fromkeys(other, "e1.first.0.weight")))
    with pytest.raises(ModelError, match="two tensors become e1.first.0.weight"):
        translated(other, model, chosen, mapping=str(pairs))
    pairs.write_text("[]")
    with pytest.raises(ModelError, match="no JSON object of names"):
        translated(other, model, chosen, mapping=str(pairs))


def test_weights_of_another_network_are_refused_whole():
    unext, lite = spec("unext"), spec("unet_lite_standard")
    there = unext.build(in_channels=3, num_classes=1, **unext.reduced).state_dict()
    here = lite.build(in_channels=3, num_classes=1, **lite.reduced)
    before = {name: value.clone() for name, value in here.state_dict().items()}
    with pytest.raises(
        ModelError, match="does not fit unet_lite_standard: missing: inc.*left over"
    ):
        translated(there, here, lite, where="unext.pth")
    assert all(torch.equal(value, before[name]) for name, value in here.state_dict().items())


def test_every_table_names_registered_networks():
    for family in families():
        module = __import__(f"segfleet.models.foreign.{family}", fromlist=["NETWORKS"])
        for network in module.NETWORKS:
            chosen = spec(network)
            with torch.device("meta"):
                model = chosen.build(
                    in_channels=chosen.in_channels, num_classes=chosen.num_classes, **chosen.reduced
                )
            assert isinstance(table_of(network, model), Table)
