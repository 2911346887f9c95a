"""State dicts of guided-diffusion and His-MMDM: through a model folder, the outputs of the code that made them."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
import yaml
from published import invert, load, relative
from torch import Tensor

from ldm.convert import convert, load_model, read_published
from ldm.diffusion import samplers, schedules
from ldm.diffusion.denoiser import call_network
from ldm.diffusion.guidance import class_log_probability, classifier_guidance, clip, keep_variance, target_gradient
from ldm.errors import UserError
from ldm.interop.guided import unet_shape
from ldm.model_folder import load_network
from ldm.networks.encoder_unet import EncoderUNetModel
from ldm.networks.unet import UNetModel

HIS = {"image_size": 16, "num_heads": 4, "use_new_attention_order": True}


def silent(line: str) -> None:
    pass


def write(folder: Path, state: dict, flags: dict | None) -> tuple[Path, dict[str, Any]]:
    folder.mkdir(exist_ok=True)
    torch.save(state, folder / "model.pt")
    if flags is None:
        return folder / "model.pt", {}
    (folder / "flags.yaml").write_text(yaml.safe_dump(flags))
    return folder / "model.pt", {"config": folder / "flags.yaml"}


def converted(folder: Path, state: dict, flags: dict | None, **options: Any) -> Path:
    source, config = write(folder, state, flags)
    return convert(source, folder / "model", say=silent, **config, **options)


def predicted(model, golden: dict, cond: dict) -> Tensor:
    with torch.no_grad():
        return call_network(model.model, golden["x"], golden["t"], cond)


@pytest.fixture(scope="module")
def his(oracle, tmp_path_factory):
    golden = load(oracle / "hismmdm_unet.pt")
    model = load_model(converted(tmp_path_factory.mktemp("his"), golden["state_dict"], golden["config"]))
    return golden, model, schedules.respaced_sigmas(model.sigmas, "ddim10")


def test_network_and_schedule(his):
    golden, model, sigmas = his
    assert relative(predicted(model, golden, model.condition(class_=golden["y"])), golden["out"]) < 1e-5
    torch.testing.assert_close(1 / (1 + sigmas[:-1].flip(0).double() ** 2), golden["alphas_cumprod"], rtol=1e-6, atol=0)
    assert model.learn_sigma
    assert model.cond_stage_model.dropout == 0  # no null was trained: guidance is 1 by default


@pytest.mark.slow
def test_samples_inversion_and_translation(his):
    golden, model, sigmas = his
    cond, target = model.condition(class_=golden["y"]), model.condition(class_=golden["y_target"])
    denoiser, scale = model.denoiser(), (1 + sigmas[0] ** 2).sqrt()
    with torch.no_grad():
        for name, wrap in (("ddim_sample", clip), ("ddim_sample_noclip", lambda d: d)):
            out = samplers.sample_euler(wrap(denoiser), golden["x_T"] * scale, sigmas, cond)
            assert relative(out, golden[name]) < 1e-4
        assert relative(invert(clip(denoiser), golden["image"], sigmas, cond), golden["ddim_reverse"]) < 1e-4
        assert relative(invert(denoiser, golden["image"], sigmas, cond), golden["ddim_reverse_noclip"]) < 1e-4
        out = samplers.sample_euler(clip(denoiser), golden["ddim_reverse"] * scale, sigmas, target)
        assert relative(out, golden["translated"]) < 1e-4
        run = golden["p_sample_loop"]
        joint = keep_variance(denoiser.with_variance, clip)
        noise = run["noises"]
        out = samplers.sample_ddpm(joint, golden["x_T"] * scale, sigmas, cond, lambda k: noise[k], variance=None)
    assert relative(out, run["out"]) < 1e-4


def omics(given: dict) -> dict[str, Tensor]:
    """What the published network takes, in the order of genes."""
    values = {"class": given["y"]}
    for ours, theirs, what in (("mutation", "genomics", "mutation"), ("expression", "transcriptomics", "exp")):
        value = given[f"{theirs}_{what}"].float()
        values[ours] = torch.empty_like(value).scatter_(1, given[f"{theirs}_genes"], value)
        if f"{theirs}_multiplier" in given:
            values[f"{ours}_multiplier"] = given[f"{theirs}_multiplier"]
    return values


@pytest.mark.parametrize("flags", [True, False])
def test_omics(oracle, tmp_path, flags):
    golden, base = load(oracle / "hismmdm_omics_unet.pt"), load(oracle / "hismmdm_unet.pt")
    state = {**base["state_dict"], **golden["extra_state_dict"]}
    genes = {"mutation_genes": [f"M{i}" for i in range(6)], "expression_genes": [f"E{i}" for i in range(9)]}
    for name, names in genes.items():  # a table of genes, as published, and a plain list
        lines = ["gene,a-01,a-02", *(f"{gene},0,1" for gene in names)] if name.startswith("m") else names
        (tmp_path / f"{name}.csv").write_text("\n".join(lines))
    files = {name: tmp_path / f"{name}.csv" for name in genes}
    told = golden["config"] if flags else HIS  # shapes tell all the rest
    model = load_model(converted(tmp_path / "omics", state, told, classes=list("abcde"), **files))
    cond = model.condition(**{("class_" if key == "class" else key): value for key, value in omics(golden).items()})
    assert relative(predicted(model, golden, cond), golden["out"]) < 1e-5
    described = model.cond_stage_model.describe()
    assert list(described["mutation"].genes) == genes["mutation_genes"]
    assert list(described["expression"].genes) == genes["expression_genes"]
    if not flags:
        source, _ = write(tmp_path / "bare", state, None)
        with pytest.raises(UserError, match="the size of images is not known"):  # heads are those of His-MMDM
            convert(source, tmp_path / "m", say=silent)


@pytest.mark.slow
def test_omics_translation(oracle, tmp_path):
    golden = load(oracle / "more" / "hismmdm_omics_translate.pt")
    model = load_model(converted(tmp_path, golden["state_dict"], golden["config"]))
    conds = {}
    for which in ("source", "target"):
        values = omics(golden[which])
        conds[which] = model.condition(class_=values.pop("class"), **values)
        assert relative(predicted(model, golden, conds[which]), golden[f"out_{which}"]) < 1e-5
    sigmas = schedules.respaced_sigmas(model.sigmas, "ddim10")
    scale, denoiser = (1 + sigmas[0] ** 2).sqrt(), model.denoiser()
    with torch.no_grad():
        assert relative(invert(denoiser, golden["image"], sigmas, conds["source"]), golden["latent"]) < 3e-4
        start = golden["latent"] * scale
        out = samplers.sample_euler(clip(denoiser), start, sigmas, conds["target"])
        assert relative(out, golden["translated"]) < 1e-4
        out = samplers.sample_euler(denoiser, start, sigmas, conds["source"])
        assert relative(out, golden["reconstructed"]) < 1e-4
        classifier = load_classifier(oracle, tmp_path / "classifier")
        likely = class_log_probability(classifier, denoiser.timestep)
        guided = classifier_guidance(clip(denoiser), target_gradient(likely, golden["translated_guided"]["scale"]))
        out = samplers.sample_euler(guided, start, sigmas, conds["target"] | {"target": golden["target"]["y"]})
    assert relative(out, golden["translated_guided"]["out"]) < 1e-4


def load_classifier(oracle: Path, folder: Path) -> torch.nn.Module:
    golden = load(oracle / "more" / "hismmdm_classifier.pt")
    return load_network(converted(folder, golden["state_dict"], golden["config"], classes=list("abcde")))


def test_classifier(oracle, tmp_path):
    golden = load(oracle / "more" / "hismmdm_classifier.pt")
    classifier = load_classifier(oracle, tmp_path)
    x = golden["x"].requires_grad_(True)
    logits = classifier(x, golden["t"])
    assert relative(logits.detach(), golden["logits"]) < 1e-5
    logits.log_softmax(-1)[range(2), golden["y"]].sum().backward()
    assert relative(x.grad, golden["grad"]) < 1e-5
    assert classifier.metadata["classes"] == list("abcde")
    with pytest.raises(UserError, match="no diffusion model; give the folder of a diffusion model"):
        load_model(tmp_path / "model")


def test_flags_of_a_classifier_beside_those_of_its_unet(oracle, tmp_path):
    """A YAML of create_classifier's flags, whose heads are 64 wide; what concerns the UNet is none of its business."""
    state = load(oracle / "more" / "hismmdm_classifier.pt")["state_dict"]
    flags = {
        "image_size": 16, "num_classes": 5, "classifier_width": 32, "classifier_depth": 1,
        "classifier_attention_resolutions": "8", "classifier_use_scale_shift_norm": True,
        "classifier_resblock_updown": True, "classifier_pool": "attention",
        "num_channels": 256, "num_head_channels": 16, "use_new_attention_order": True, "batch_size": 8,
    }  # fmt: skip
    source, options = write(tmp_path, state, flags)
    found = read_published(source, **options)
    assert found.node["params"]["num_head_channels"] == 64
    assert not found.node["params"]["use_new_attention_order"]
    assert "of the flags these concern no network: batch_size" in found.notes
    source, options = write(tmp_path, state, flags | {"classifier_width": 64})
    with pytest.raises(UserError, match="the flags say model_channels 64, the weights are of 32"):
        read_published(source, **options)


@pytest.mark.parametrize("pool", ["adaptive", "spatial", "spatial_v2"])
def test_other_pools_of_classifiers(tmp_path, pool):
    params = {
        "image_size": 16, "in_channels": 3, "model_channels": 32, "out_channels": 7, "num_res_blocks": 1,
        "attention_resolutions": [2], "channel_mult": [1, 2], "num_head_channels": 32, "pool": pool,
    }  # fmt: skip
    torch.manual_seed(0)
    net = EncoderUNetModel(**params).eval()
    classifier = load_network(converted(tmp_path, net.state_dict(), params))
    x, t = torch.randn(2, 3, 16, 16), torch.tensor([3, 800])
    with torch.no_grad():
        torch.testing.assert_close(classifier(x, t), net(x, t))
    wrong = {**params, "pool": "attention"}
    with pytest.raises(UserError, match=f"the flags say pool attention, the classifier's weights are of pool {pool}"):
        converted(tmp_path, net.state_dict(), wrong)


@pytest.mark.slow
def test_classifier_guidance(oracle, tmp_path):
    golden = load(oracle / "more" / "hismmdm_guided.pt")
    model = load_model(converted(tmp_path / "unet", golden["state_dict"], golden["config"]))
    classifier = load_classifier(oracle, tmp_path / "classifier")
    denoiser, sigmas = model.denoiser(), schedules.respaced_sigmas(model.sigmas, "ddim10")
    likely, scale = class_log_probability(classifier, denoiser.timestep), (1 + sigmas[0] ** 2).sqrt()

    def guided(strength: float, wrap=clip):
        return classifier_guidance(wrap(denoiser), target_gradient(likely, strength))

    cond, target = (model.condition(class_=y) | {"target": y} for y in (golden["y"], golden["y_target"]))
    assert relative(predicted(model, golden, cond), golden["out"]) < 1e-5
    start = golden["x_T"] * scale
    with torch.no_grad():
        for name in ("guided_scale_1_clip", "guided_scale_1_noclip", "guided_scale_8_clip", "guided_scale_8_noclip"):
            wrap = clip if name.endswith("_clip") else lambda d: d
            out = samplers.sample_euler(guided(golden[name]["scale"], wrap), start, sigmas, cond)
            assert relative(out, golden[name]["out"]) < 1e-4, name
        assert relative(samplers.sample_euler(guided(0.0), start, sigmas, cond), golden["unguided"]) < 1e-4
        run = golden["guided_eta_0.7"]
        noisy = samplers.sample_ddim(guided(run["scale"]), start, sigmas, cond, lambda k: run["noises"][k], eta=0.7)
        assert relative(noisy, run["out"]) < 1e-4
        run = golden["translate"]
        assert relative(invert(guided(0.0, lambda d: d), golden["image"], sigmas, cond), run["latent"]) < 3e-4
        out = samplers.sample_euler(guided(run["scale"]), run["latent"] * scale, sigmas, target)
        assert relative(out, run["out"]) < 1e-4
        towards = target_gradient(likely, 8.0)
        joint = keep_variance(denoiser.with_variance, lambda d: classifier_guidance(clip(d), towards))
        noisiest = sigmas[0].expand(2)
        x0, variance = joint(start, noisiest, cond)
        assert torch.equal(x0, guided(8.0)(start, noisiest, cond))
        cond.pop("target")
        assert torch.equal(variance, denoiser.with_variance(start, noisiest, cond)[1])


# --- the architecture from shapes and flags --------------------------------------------------------------------------


ADM = {  # the published models of ImageNet with 1000 classes (arXiv:2105.05233, table 3), millions of parameters
    64: (296, {"model_channels": 192, "num_res_blocks": 3, "num_head_channels": 64, "channel_mult": [1, 2, 3, 4],
               "attention_resolutions": [2, 4, 8]}),
    128: (422, {"model_channels": 256, "num_res_blocks": 2, "num_heads": 4, "channel_mult": [1, 1, 2, 3, 4],
                "attention_resolutions": [4, 8, 16]}),
    256: (554, {"model_channels": 256, "num_res_blocks": 2, "num_head_channels": 64,
                "channel_mult": [1, 1, 2, 2, 4, 4], "attention_resolutions": [8, 16, 32]}),
    512: (559, {"model_channels": 256, "num_res_blocks": 2, "num_head_channels": 64, "stem_channels": 128,
                "channel_mult": [0.5, 1, 1, 2, 2, 4, 4], "attention_resolutions": [16, 32, 64]}),
}  # fmt: skip


@pytest.mark.parametrize("size", ADM)
def test_shapes_tell_the_published_architectures(size):
    millions, params = ADM[size]
    common = {"in_channels": 3, "out_channels": 6, "use_scale_shift_norm": True, "resblock_updown": True}
    with torch.device("meta"):
        net = UNetModel(**params, **common, num_classes=1000)
    assert round(sum(p.numel() for p in net.parameters()) / 1e6) == millions
    heads = ("num_heads", "num_head_channels")
    assert unet_shape(net.state_dict()) == {k: v for k, v in params.items() if k not in heads} | common


@pytest.mark.parametrize(
    "options",
    [
        {"channel_mult": [1], "attention_resolutions": [1], "resblock_updown": False},
        {"channel_mult": [1, 2], "attention_resolutions": [], "resblock_updown": False, "out_channels": 3},
        {"channel_mult": [1, 1, 2], "attention_resolutions": [2, 4], "num_res_blocks": 2},
        {"channel_mult": [1, 2], "attention_resolutions": [2], "use_scale_shift_norm": False},
        {"channel_mult": [2, 2], "attention_resolutions": [1], "stem_channels": 64},
    ],
)
def test_shapes_tell_other_architectures(options):
    params = {
        "in_channels": 3, "out_channels": 6, "model_channels": 32, "num_res_blocks": 1, "use_scale_shift_norm": True,
        "resblock_updown": True,
    } | options  # fmt: skip
    with torch.device("meta"):
        net = UNetModel(**params, num_heads=2)
    assert unet_shape(net.state_dict()) == params


@pytest.mark.parametrize(
    ("flags", "message"),
    [
        (None, "does not say all of its architecture: give --config"),
        (HIS | {"num_channels": 64}, "the flags say num_channels 64, the weights are of 32"),
        (HIS | {"num_res_blocks": 2}, "the flags say num_res_blocks 2"),
        (HIS | {"channel_mult": "1,2"}, "the flags say channel_mult"),
        (HIS | {"attention_resolutions": "16"}, "the flags say attention_resolutions"),
        (HIS | {"use_scale_shift_norm": False}, "the flags say use_scale_shift_norm False"),
        (HIS | {"resblock_updown": False}, "the flags say resblock_updown False"),
        (HIS | {"learn_sigma": False}, "the flags say learn_sigma False, the network has 6 outputs"),
        (HIS | {"class_cond": True, "num_classes": 19}, "the flags say num_classes 19, the weights are of 5"),
        (HIS | {"noise_schedule": "sigmoid"}, "noise_schedule is one of linear, cosine"),
        (HIS | {"rescale_timesteps": True, "diffusion_steps": 4000}, "rescale_timesteps with 4000 steps"),
        (HIS | {"class_mapping": "a:0,b:9"}, "class_mapping names class 9, the model has 5"),
        (HIS | {"image_size": "16px"}, "image_size is a whole number; got '16px'"),
        (HIS | {"conv_resample": False}, "conv_resample false"),
        ({"num_haeds": 4}, "none of create_model's flags; did you mean 'num_heads'"),
    ],
)
def test_flags_that_do_not_fit_are_errors(oracle, tmp_path, flags, message):
    source, options = write(tmp_path, load(oracle / "hismmdm_unet.pt")["state_dict"], flags)
    with pytest.raises(UserError, match=message):
        convert(source, tmp_path / "model", say=silent, **options)


def test_heads_on_the_way_up(oracle, tmp_path):
    flags = HIS | {"num_heads": "4", "num_heads_upsample": 2}
    model = load_model(converted(tmp_path, load(oracle / "hismmdm_unet.pt")["state_dict"], flags))
    network = model.model.diffusion_model
    for blocks, heads in ((network.input_blocks, 4), (network.middle_block, 4), (network.output_blocks, 2)):
        assert {layer.num_heads for layer in blocks.modules() if hasattr(layer, "num_heads")} == {heads}
    with pytest.raises(UserError, match="3 attention heads do not divide"):
        converted(tmp_path, load(oracle / "hismmdm_unet.pt")["state_dict"], HIS | {"num_heads_upsample": 3})


def test_names_come_from_flags_or_options(oracle, tmp_path):
    state = load(oracle / "hismmdm_unet.pt")["state_dict"]
    model = load_model(converted(tmp_path / "a", state, HIS | {"class_mapping": "LUAD:1,LUSC:0,OV:3"}))
    assert model.cond_stage_model.classes == ("LUSC", "LUAD", "2", "OV", "4")
    model = load_model(converted(tmp_path / "b", state, HIS | {"noise_schedule": "cosine"}, classes=list("abcde")))
    assert model.cond_stage_model.classes == tuple("abcde")
    betas = schedules.make_betas("cosine", 1000)
    assert relative(model.sigmas, schedules.sigmas_from_alphas_cumprod((1 - betas).cumprod(0)).float()) < 1e-6
    with pytest.raises(UserError, match="5 class embeddings; give 5 names, got 2"):
        converted(tmp_path / "c", state, HIS, classes=["a", "b"])
    with pytest.raises(UserError, match="has no mutation genes; leave --mutation-genes out"):
        converted(tmp_path / "d", state, HIS, mutation_genes="genes.txt")
    state.pop("input_blocks.1.0.in_layers.0.bias")
    with pytest.raises(UserError, match=r"1 weights are missing .first: model\.diffusion_model\.input_blocks\.1\.0"):
        converted(tmp_path / "e", state, HIS)
