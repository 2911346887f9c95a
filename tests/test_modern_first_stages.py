"""First stages of 2024 and later: 16 channels, no quant convolutions, latents that are shifted as well as scaled."""

from __future__ import annotations

import shutil
from pathlib import Path

import pytest
import torch
from published import load, relative
from safetensors.torch import load_file, save_file

from ldm.autoencoder.autoencoder import AutoencoderKL
from ldm.autoencoder.latent import LatentScale
from ldm.config import instantiate_from_config
from ldm.convert import convert, read_published
from ldm.errors import UserError
from ldm.interop.first_stages import read_autoencoder
from ldm.model_folder import load_first_stage, read_model_folder

SCALES = {
    "sd3_vae": {"scale_factor": 1.5305, "shift_factor": 0.0609},
    "flux_vae": {"scale_factor": 0.3611, "shift_factor": 0.1159},
}


@pytest.fixture(params=SCALES)
def published(request, shared) -> Path:
    return shared("oracle") / "third" / request.param


def model_of(first_stage: dict, **params):
    unet = {"in_channels": 16, "out_channels": 16, "image_size": 8, "hidden_size": 16, "depth": 1, "num_heads": 2}
    return instantiate_from_config({
        "target": "ldm.latent_diffusion.LatentDiffusion",
        "params": {
            "unet_config": {"target": "ldm.networks.dit.DiT", "params": unet}, "first_stage_config": first_stage,
            "use_ema": False, **params,
        },
    }).eval()  # fmt: skip


def test_the_folder_of_diffusers_becomes_a_first_stage_that_knows_its_shift(published, tmp_path):
    golden = load(published / "io.pt")
    convert(published, tmp_path / "vae")
    stage, (node, about) = load_first_stage(str(tmp_path / "vae")), read_model_folder(tmp_path / "vae")
    assert {name: about[name] for name in ("scale_factor", "shift_factor")} == SCALES[published.name]
    with torch.no_grad():
        posterior = stage.encode(golden["image"])
        assert relative(posterior.mean, golden["mean"]) < 1e-5
        assert relative(posterior.logvar, golden["logvar"]) < 1e-5
        assert relative(stage.decode(golden["z_sample"]), golden["dec_sample"]) < 1e-5
        assert relative(stage.decode(golden["mean"]), golden["dec_mode"]) < 1e-5
    model = model_of(node, **SCALES[published.name])
    model.first_stage_model.load_state_dict(stage.state_dict())
    scaled = model.latent_scale.apply(golden["z_sample"])
    assert relative(scaled, golden["z_scaled"]) < 1e-5
    with torch.no_grad():
        assert relative(model.decode(golden["z_scaled"]), golden["dec_sample"]) < 1e-5
        assert relative(model.encode(golden["image"]), LatentScale(**_named(published)).apply(golden["mean"])) < 1e-5


def _named(published: Path) -> dict[str, float]:
    return {name.removesuffix("_factor"): value for name, value in SCALES[published.name].items()}


def single_file(folder: Path, out: Path, prefix: str = "") -> Path:
    """The autoencoder of a folder as one file by its original names."""
    state = {prefix + name: value.contiguous() for name, value in read_published(folder).state.items()}
    save_file(state, out)
    return out


@pytest.mark.parametrize("prefix", ["", "first_stage_model."])
def test_a_single_file_by_the_original_names_is_the_same(prefix, published, tmp_path):
    golden = load(published / "io.pt")
    source = single_file(published, tmp_path / "ae.safetensors", prefix)
    if prefix:
        save_file(load_file(source) | {"model.diffusion_model.joint_blocks.0.weight": torch.ones(1)}, source)
    lines: list[str] = []
    convert(source, tmp_path / "vae", config=published / "config.json", say=lines.append)
    assert any("groups of normalisation, as the config says" in line for line in lines)
    assert any("not of the autoencoder" in line for line in lines) == bool(prefix)
    stage, (_, about) = load_first_stage(str(tmp_path / "vae")), read_model_folder(tmp_path / "vae")
    assert {name: about[name] for name in ("scale_factor", "shift_factor")} == SCALES[published.name]
    with torch.no_grad():
        assert relative(stage.encode(golden["image"]).mean, golden["mean"]) < 1e-5
        assert relative(stage.decode(golden["z_sample"]), golden["dec_sample"]) < 1e-5


def test_a_single_file_says_what_it_does_not(published, tmp_path):
    source = single_file(published, tmp_path / "mine.safetensors")
    with pytest.raises(UserError, match="in groups of a number that no tensor tells"):
        read_published(source)
    (tmp_path / "groups.yaml").write_text(f"norm_num_groups: {4 if published.name == 'sd3_vae' else 8}")
    assert "scale_factor" not in read_published(source, config=tmp_path / "groups.yaml").metadata


@pytest.mark.parametrize(("name", "scale"), [("ae", 0.3611), ("flux-vae", 0.3611), ("sd3_vae", 1.5305), ("mine", None)])
def test_the_scale_of_a_published_file_is_told_by_its_name(name, scale, tmp_path):
    with torch.device("meta"):
        stage = instantiate_from_config({"target": "ldm.autoencoder.autoencoder.AutoencoderKL", "params": {
            "embed_dim": 16, "quant_conv": False, "ddconfig": {
                "double_z": True, "z_channels": 16, "resolution": 256, "in_channels": 3, "out_ch": 3, "ch": 128,
                "ch_mult": [1, 2, 4, 4], "num_res_blocks": 2, "attn_resolutions": [], "dropout": 0.0,
            },
        }})  # fmt: skip
    assert sum(value.numel() for value in stage.state_dict().values()) == 83_819_683  # SD3's and FLUX's
    found = read_autoencoder(tmp_path / f"{name}.safetensors", stage.state_dict())
    assert found.metadata.get("scale_factor") == scale
    assert any("scale" in note for note in found.notes)
    with torch.device("meta"):
        assert instantiate_from_config(found.node).state_dict().keys() == found.state.keys()


def test_it_goes_back_to_diffusers_as_it_came(published, tmp_path):
    diffusers = pytest.importorskip("diffusers")
    from ldm.interop.export_diffusers import to_diffusers

    golden = load(published / "io.pt")
    convert(published, tmp_path / "vae")
    notes = to_diffusers(tmp_path / "vae", tmp_path / "back")
    back = diffusers.AutoencoderKL.from_pretrained(tmp_path / "back").eval()
    assert (back.config.scaling_factor, back.config.shift_factor) == tuple(SCALES[published.name].values())
    assert any("scaling_factor" in note for note in notes)
    with torch.no_grad():
        assert relative(back.encode(golden["image"]).latent_dist.mean, golden["mean"]) < 1e-5
        assert relative(back.decode(golden["z_sample"]).sample, golden["dec_sample"]) < 1e-5


def test_statistics_of_each_channel(shared, tmp_path):
    """latents_mean and latents_std of diffusers, and the normalisation that REPA-E learns (arXiv:2504.10483)."""
    import json

    folder = tmp_path / "vae"
    shutil.copytree(shared("oracle") / "third" / "sd3_vae", folder)
    config = json.loads((folder / "config.json").read_text())
    mean, std = [0.1 * i for i in range(16)], [1 + 0.1 * i for i in range(16)]
    config |= {"shift_factor": None, "scaling_factor": 0.5, "latents_mean": mean, "latents_std": std}
    (folder / "config.json").write_text(json.dumps(config))
    about = read_published(folder).metadata
    z = torch.randn(2, 16, 4, 4)
    want = (z - torch.tensor(mean)[:, None, None]) / torch.tensor(std)[:, None, None] * 0.5
    scale = LatentScale(about["scale_factor"], about["shift_factor"])
    torch.testing.assert_close(scale.apply(z), want)
    torch.testing.assert_close(scale.undo(want), z)

    golden = load(shared("oracle") / "third" / "repae_sit.pt")["latents"]
    scale = LatentScale(golden["latents_scale"].tolist(), golden["latents_bias"].tolist())
    assert relative(scale.apply(golden["z"]), golden["normalized_by_stats"]) < 1e-5
    assert relative(scale.undo(golden["normalized_by_stats"]), golden["denormalized"]) < 1e-5


def test_other_numbers_of_channels_are_refused():
    pixels = {"target": "ldm.autoencoder.autoencoder.IdentityFirstStage", "params": {"channels": 16}}
    assert model_of(pixels, scale_factor=[1.0] * 16).scale_factor == (1.0,) * 16
    with pytest.raises(UserError, match=r"shift_factor is one number, or 16, one of each channel; got 3"):
        model_of(pixels, shift_factor=[0.0] * 3)
    with pytest.raises(UserError, match=r"scale_factor is one number; got 16"):
        model_of(pixels, scale_factor=[1.0] * 16, scale_by_std=True)
    dd = {"z_channels": 16, "resolution": 32, "in_channels": 3, "out_ch": 3, "ch": 32, "ch_mult": [1, 1],
          "num_res_blocks": 1, "attn_resolutions": [], "dropout": 0.0}  # fmt: skip
    with pytest.raises(UserError, match=r"without quant_conv embed_dim is z_channels"):
        AutoencoderKL(dd, embed_dim=4, quant_conv=False)
