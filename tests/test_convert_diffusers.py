"""Pipelines of diffusers and single files of Stable Diffusion 1.x: read, reproduced, written back."""

from __future__ import annotations

import copy
import json
import shutil
from pathlib import Path

import pytest
import torch
from published import load, relative
from safetensors.torch import load_file, save_file

from ldm.config import instantiate_from_config, load_config, save_config
from ldm.convert import build, check, convert, export_as, load_model, read_published
from ldm.diffusion import samplers, schedules
from ldm.diffusion.denoiser import call_network
from ldm.diffusion.guidance import cfg
from ldm.errors import UserError
from ldm.interop.checkpoint import read_checkpoint
from ldm.interop.diffusers_config import unet_node, vae_node
from ldm.interop.diffusers_folder import FIRST_STAGE, TEXT, UNET, read_diffusers
from ldm.interop.diffusers_names import renamed, to_convolutions
from ldm.interop.stable_diffusion import read_stable_diffusion
from ldm.interop.text_names import from_open_clip
from ldm.model_folder import write_model_folder

DDCONFIG = {
    "double_z": True, "z_channels": 4, "resolution": 32, "in_channels": 3, "out_ch": 3, "ch": 32, "ch_mult": [1, 2],
    "num_res_blocks": 1, "attn_resolutions": [16], "dropout": 0.0,
}  # fmt: skip
NODE = {
    "target": "ldm.latent_diffusion.LatentDiffusion",
    "params": {
        "linear_start": 0.00085, "linear_end": 0.012, "scale_factor": 0.2, "use_ema": False,
        "unet_config": {"target": "ldm.networks.unet.UNetModel", "params": {
            "image_size": 8, "in_channels": 4, "out_channels": 4, "model_channels": 32, "num_res_blocks": 1,
            "attention_resolutions": [1, 2], "channel_mult": [1, 2], "num_heads": 8, "use_spatial_transformer": True,
            "context_dim": 64,
        }},
        "first_stage_config": {"target": "ldm.autoencoder.autoencoder.AutoencoderKL",
                               "params": {"embed_dim": 4, "ddconfig": DDCONFIG}},
        "cond_stage_config": {"target": "ldm.conditioners.text.TextEmbedder",
                              "params": {"model": "./text_model.json", "mask_padding": False}},
    },
}  # fmt: skip
TOWER = {
    "name": "tiny", "licence": "none", "embed_dim": 64, "quick_gelu": True,
    "text_cfg": {"context_length": 77, "vocab_size": 49408, "width": 64, "heads": 1, "layers": 2, "mlp_ratio": 2.0},
}  # fmt: skip


def changed(**unet) -> dict:
    node = copy.deepcopy(NODE)
    node["params"]["unet_config"]["params"] |= unet
    return node


def write(folder: Path, node: dict = NODE, tower: dict = TOWER) -> Path:
    """A model folder with random weights, whose every layer counts."""
    from ldm.interop.converted import Converted

    text = (node["params"].get("cond_stage_config") or {}).get("target", "").endswith("TextEmbedder")
    files = {"text_model.json": json.dumps(tower)} if text else {}
    shapes = {name: value.shape for name, value in build(Converted(node, {}, files=files)).state_dict().items()}
    rng = torch.Generator().manual_seed(0)
    state = {}
    for name, shape in shapes.items():
        fan = max(1, torch.Size(shape[1:]).numel()) if len(shape) > 1 else 100
        norm = len(shape) == 1 and name.endswith("weight")
        state[name] = torch.randn(shape, generator=rng) * (0.1 if norm else fan**-0.5) + norm
        if name.endswith("blank"):  # the null of a map, always zeros
            state[name].zero_()
    return write_model_folder(folder, node, state, {"mpp": 0.5}, files=files)


@pytest.fixture(scope="module")
def model_folder(tmp_path_factory) -> Path:
    return write(tmp_path_factory.mktemp("ours") / "model")


@pytest.fixture(scope="module")
def pipeline(model_folder, tmp_path_factory) -> Path:
    out = tmp_path_factory.mktemp("theirs") / "pipeline"
    export_as("diffusers", model_folder, out)
    return out


def assert_same_weights(one: Path, other: Path) -> None:
    a, b = load_file(one / "model.safetensors"), load_file(other / "model.safetensors")
    assert a.keys() == b.keys()
    assert all(torch.equal(value, b[name]) for name, value in a.items())


def copied(folder: Path, out: Path) -> Path:
    shutil.copytree(folder, out)
    return out


def edit(path: Path, **changes) -> None:
    path.write_text(json.dumps(json.loads(path.read_text()) | changes))


# --- the published implementation -------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def theirs(oracle, tmp_path_factory):
    folder = tmp_path_factory.mktemp("oracle") / "model"
    convert(oracle / "diffusers_sd1", folder, say=lambda line: None)
    return load_model(folder), load(oracle / "diffusers_sd1" / "io.pt")


def test_networks_of_a_pipeline_are_reproduced(theirs):
    model, io = theirs
    with torch.no_grad():
        assert relative(model.model(io["x"], io["t"], context=io["context"]), io["out"]) < 1e-5
        posterior = model.first_stage_model.encode(io["image"])
        assert relative(torch.cat([posterior.mean, posterior.logvar], 1), io["moments"].clamp(-30, 20)) < 1e-5
        assert relative(model.first_stage_model.decode(io["mean"]), io["dec_mode"]) < 1e-5


def test_ddim_of_diffusers_is_the_legacy_spacing(theirs):
    model, io = theirs
    assert schedules.table_timesteps(1000, 10, "legacy")[::-1] == io["timesteps"].tolist()
    assert relative(1 / (1 + model.sigmas**2), io["alphas_cumprod"]) < 1e-5
    visited = schedules.table_sigmas(model.sigmas, 10, "legacy")
    guided = cfg(model.denoiser(), {"crossattn": io["uncond"]}, io["cfg_scale"])
    x = io["x_T"] * (1 + visited[0] ** 2).sqrt()
    latents = samplers.sample_euler(guided, x, visited, {"crossattn": io["context"]}) / (1 + visited[-1] ** 2).sqrt()
    assert relative(latents, io["ddim"]) < 1e-4
    assert relative(model.decode(io["ddim"]), io["decoded"]) < 1e-5
    assert relative(model.decode(latents), io["decoded"]) < 1e-4


def test_a_pipeline_without_text_says_so_and_goes_back(oracle, tmp_path):
    source = oracle / "diffusers_sd1"
    assert "no text_encoder" in " ".join(read_diffusers(source, None).notes)
    convert(source, tmp_path / "ours", say=lambda line: None)
    export_as("diffusers", tmp_path / "ours", tmp_path / "theirs")
    for part in ("unet", "vae"):
        file = Path(part, "diffusion_pytorch_model.safetensors")
        a, b = load_file(source / file), load_file(tmp_path / "theirs" / file)
        assert a.keys() == b.keys()
        assert all(torch.equal(a[name], b[name]) for name in a)
        wanted, got = (json.loads((f / part / "config.json").read_text()) for f in (source, tmp_path / "theirs"))
        assert all(value == wanted.get(name, value) for name, value in got.items() if name[0] != "_")
    scheduler = Path("scheduler", "scheduler_config.json")
    wanted, got = (json.loads((f / scheduler).read_text()) for f in (source, tmp_path / "theirs"))
    assert got == {name: value for name, value in wanted.items() if name != "_diffusers_version"}


# --- written for diffusers and read again -------------------------------------------------------------------------


@pytest.mark.slow
def test_ours_to_diffusers_to_ours_is_bitwise_equal(model_folder, pipeline, tmp_path):
    convert(pipeline, tmp_path / "back", say=lambda line: None)
    assert_same_weights(model_folder, tmp_path / "back")
    one, other = load_model(model_folder), load_model(tmp_path / "back")
    text = ["adenocarcinoma of the colon"]
    with torch.no_grad():
        cond = one.condition(text=text)
        assert torch.equal(cond["crossattn"], other.condition(text=text)["crossattn"])
        x, t = torch.randn(1, 4, 8, 8), torch.tensor([500])
        assert torch.equal(
            one.model(x, t, context=cond["crossattn"]), other.model(x, t, context=cond["crossattn"])
        )
        assert torch.equal(one.decode(x), other.decode(x))
    assert torch.equal(one.sigmas, other.sigmas)


@pytest.mark.parametrize(
    "unet",
    [
        {"num_heads": -1, "num_head_channels": 16},
        {"use_scale_shift_norm": True, "num_res_blocks": 2, "transformer_depth": 2},
        {"norm_groups": 16, "channel_mult": [1, 2, 3], "attention_resolutions": [1, 4]},
    ],
)
@pytest.mark.slow
def test_options_of_the_network_go_there_and_back(unet, tmp_path):
    node = changed(**unet)
    node["params"].pop("cond_stage_config")
    node["params"] |= {"parameterization": "v", "beta_schedule": "cosine"}
    folder = write(tmp_path / "ours", node)
    export_as("diffusers", folder, tmp_path / "theirs")
    convert(tmp_path / "theirs", tmp_path / "back", say=lambda line: None)
    assert_same_weights(folder, tmp_path / "back")
    params = load_config([tmp_path / "back" / "config.yaml"])["model"]["params"]
    assert {name: params["unet_config"]["params"][name] for name in unet if unet[name] != -1} == {
        name: value for name, value in unet.items() if value != -1
    }
    assert (params["parameterization"], params["beta_schedule"]) == ("v", "cosine")


@pytest.mark.slow
def test_diffusers_computes_the_same(model_folder, pipeline):
    diffusers = pytest.importorskip("diffusers")
    model = load_model(model_folder)
    unet = diffusers.UNet2DConditionModel.from_pretrained(pipeline / "unet").eval()
    vae = diffusers.AutoencoderKL.from_pretrained(pipeline / "vae").eval()
    scheduler = diffusers.DDIMScheduler.from_pretrained(pipeline / "scheduler")
    x, image, t = torch.randn(2, 4, 8, 8), torch.randn(2, 3, 16, 16), torch.tensor([3, 800])
    context = torch.randn(2, 77, 64)
    with torch.no_grad():
        assert relative(model.model(x, t, context=context), unet(x, t, context).sample) < 1e-5
        assert relative(model.encode(image), vae.encode(image).latent_dist.mean * vae.config.scaling_factor) < 1e-5
        assert relative(model.decode(x), vae.decode(x / vae.config.scaling_factor).sample) < 1e-5
        visited = schedules.table_sigmas(model.sigmas, 10, "legacy")
        start = x * (1 + visited[0] ** 2).sqrt()
        ours = samplers.sample_euler(model.denoiser(), start, visited, {"crossattn": context})
        scheduler.set_timesteps(10)
        for step in scheduler.timesteps:
            x = scheduler.step(unet(x, step, context).sample, step, x).prev_sample
    assert relative(ours / (1 + visited[-1] ** 2).sqrt(), x) < 1e-4


@pytest.mark.slow
def test_stable_diffusion_of_full_size_has_our_names_and_shapes():
    """The networks of Stable Diffusion 1.4's pipeline, from its published settings."""
    diffusers = pytest.importorskip("diffusers")
    levels = {"block_out_channels": [128, 256, 512, 512], "layers_per_block": 2}
    levels |= {"down_block_types": ["DownEncoderBlock2D"] * 4, "up_block_types": ["UpDecoderBlock2D"] * 4}
    with torch.device("meta"):
        unet = diffusers.UNet2DConditionModel(sample_size=64, cross_attention_dim=768, attention_head_dim=8)
        vae = diffusers.AutoencoderKL(sample_size=512, **levels)
        for module, read, count in ((unet, unet_node, 859_520_964), (vae, vae_node, 83_653_863)):
            node, names, *_ = read(dict(module.config), "config.json", notes := [])
            assert not notes
            given = to_convolutions(renamed(module.state_dict(), names, ""))
            wanted = instantiate_from_config(node).state_dict()
            assert {n: v.shape for n, v in given.items()} == {n: v.shape for n, v in wanted.items()}
            assert sum(value.numel() for value in wanted.values()) == count


@pytest.mark.slow
def test_the_whole_pipeline_samples_equally(model_folder, pipeline):
    diffusers = pytest.importorskip("diffusers")
    pytest.importorskip("transformers")
    pipe = diffusers.StableDiffusionPipeline.from_pretrained(pipeline)
    pipe.set_progress_bar_config(disable=True)
    model, texts = load_model(model_folder), ["Colon adenocarcinoma, well-differentiated; H&E", "normal  mucosa\n40x"]
    x = torch.randn(1, 4, 8, 8).expand(2, -1, -1, -1)
    theirs = pipe(
        texts, latents=x, num_inference_steps=10, guidance_scale=3.0, height=16, width=16, output_type="pt"
    ).images
    visited = schedules.table_sigmas(model.sigmas, 10, "legacy")
    guided = cfg(model.denoiser(), model.null_condition(), 3.0)
    with torch.no_grad():
        latents = samplers.sample_euler(guided, x * (1 + visited[0] ** 2).sqrt(), visited, model.condition(text=texts))
        ours = (model.decode(latents / (1 + visited[-1] ** 2).sqrt()) / 2 + 0.5).clamp(0, 1)
    assert relative(ours, theirs) < 1e-4
    assert relative(ours[:1], ours[1:]) > 1e-2


def test_padding_of_captions_goes_there_and_back(model_folder, tmp_path):
    folder = copied(model_folder, tmp_path / "ours")
    config = load_config([folder / "config.yaml"])
    config["model"]["params"]["cond_stage_config"]["params"] |= {"pad": "zero", "mask_padding": True}
    save_config(config, folder / "config.yaml")
    export_as("diffusers", folder, tmp_path / "theirs")
    text = read_diffusers(tmp_path / "theirs", None).node["params"]["cond_stage_config"]
    assert text == config["model"]["params"]["cond_stage_config"]


def test_half_precision_is_written(model_folder, tmp_path):
    export_as("diffusers", model_folder, tmp_path / "pipeline", half=True)
    export_as("compvis", model_folder, tmp_path / "checkpoint", half=True)
    for part in ("unet", "vae", "text_encoder"):
        (file,) = (tmp_path / "pipeline" / part).glob("*.safetensors")
        assert {value.dtype for value in load_file(file).values()} == {torch.float16}
    state = torch.load(tmp_path / "checkpoint" / "model.ckpt", weights_only=True)["state_dict"]
    assert state[f"{UNET}out.2.bias"].dtype == torch.float16
    assert state["betas"].dtype == torch.float32
    assert state[f"{TEXT}transformer.text_model.embeddings.position_ids"].dtype == torch.int64


# --- forms in which such folders come -----------------------------------------------------------------------------


@pytest.mark.slow
def test_sharded_pickled_half_and_old_names(pipeline, tmp_path):
    """Every way of storing the same tensors gives the same model."""
    plain = read_diffusers(pipeline, None)
    folder = copied(pipeline, tmp_path / "pipeline")
    unet, vae = folder / "unet" / "diffusion_pytorch_model.safetensors", folder / "vae"
    state = load_file(unet)
    names = sorted(state)
    parts = {f"diffusion_pytorch_model-0000{i}-of-00002.safetensors": names[i - 1 :: 2] for i in (1, 2)}
    for file, held in parts.items():
        save_file({name: state[name] for name in held}, unet.with_name(file))
    unet.unlink()
    index = {"metadata": {}, "weight_map": {name: file for file, held in parts.items() for name in held}}
    unet.with_name(unet.name + ".index.json").write_text(json.dumps(index))
    old = {".to_q.": ".query.", ".to_k.": ".key.", ".to_v.": ".value.", ".to_out.0.": ".proj_attn."}
    state = load_file(vae / unet.name)
    for new, former in old.items():
        state = {name.replace(new, former): value for name, value in state.items()}
    (vae / unet.name).unlink()
    torch.save(state, vae / "diffusion_pytorch_model.bin")
    text = folder / "text_encoder" / "model.safetensors"  # transformers 5 leaves text_model. out
    save_file({name.removeprefix("text_model."): value for name, value in load_file(text).items()}, text)
    found = read_diffusers(folder, None)
    assert found.node == plain.node
    assert found.state.keys() == plain.state.keys()
    assert all(torch.equal(value, plain.state[name]) for name, value in found.state.items())

    unet.with_name(next(iter(parts))).unlink()
    with pytest.raises(UserError, match=r"names diffusion_pytorch_model-00001-of-00002\.safetensors, which is not in"):
        read_diffusers(folder, None)
    unet.with_name(unet.name + ".index.json").unlink()
    half = {name: value.half() for name, value in load_file(pipeline / "unet" / unet.name).items()}
    save_file(half, unet.with_name("diffusion_pytorch_model.fp16.safetensors"))
    found = read_diffusers(folder, None)
    assert any("diffusion_pytorch_model.fp16.safetensors" in note for note in found.notes)
    convert(folder, tmp_path / "half", say=lambda line: None)
    model = load_model(tmp_path / "half").model.diffusion_model
    assert torch.equal(model.out[2].weight, half["conv_out.weight"].float())


def test_linear_projections_are_the_same_network(pipeline, tmp_path):
    folder = copied(pipeline, tmp_path / "pipeline")
    file = folder / "unet" / "diffusion_pytorch_model.safetensors"
    state = {n: v.flatten(1) if "proj_in.w" in n or "proj_out.w" in n else v for n, v in load_file(file).items()}
    save_file(state, file)
    edit(folder / "unet" / "config.json", use_linear_projection=True)
    a, b = read_diffusers(pipeline, None).state, read_diffusers(folder, None).state
    assert all(torch.equal(value, b[name]) for name, value in a.items())


@pytest.mark.parametrize("kind", ["model folder", "pipeline"])
@pytest.mark.slow
def test_a_network_alone_over_a_base(kind, model_folder, pipeline, tmp_path):
    """As MINIM publishes: a fine-tuned UNet, the rest from Stable Diffusion."""
    tuned = copied(pipeline / "unet", tmp_path / "checkpoint-5000" / "unet")
    file = tuned / "diffusion_pytorch_model.safetensors"
    state = load_file(file)
    state["conv_out.bias"] += 1
    save_file(state, file)
    base = model_folder if kind == "model folder" else pipeline
    whole = load_file(model_folder / "model.safetensors")
    for source in (tuned, tuned.parent, file):
        found = read_published(source, base=base)
        check(found, source)
        differ = [name for name, value in whole.items() if not torch.equal(value, found.state[name])]
        assert differ == [f"{UNET}out.2.bias"]
    with pytest.raises(UserError, match=r"has no vae and no scheduler; name the model folder.*--base"):
        read_published(tuned)


def test_an_average_is_preferred(pipeline, tmp_path):
    for part in ("unet", "unet_ema"):
        copied(pipeline / "unet", tmp_path / "run" / part)
    file = tmp_path / "run" / "unet_ema" / "diffusion_pytorch_model.safetensors"
    state = load_file(file)
    state["conv_out.bias"] += 1
    save_file(state, file)
    edit(file.with_name("config.json"), decay=0.9999, optimization_step=7)
    average = read_published(tmp_path / "run", base=pipeline)
    raw = read_published(tmp_path / "run", base=pipeline, raw_weights=True)
    assert not torch.equal(average.state[f"{UNET}out.2.bias"], raw.state[f"{UNET}out.2.bias"])
    assert set(average.unused) == {"unet/"}
    assert set(raw.unused) == {"unet_ema/"}


def test_a_first_stage_alone(pipeline, model_folder, tmp_path):
    convert(pipeline / "vae", tmp_path / "vae", say=lambda line: None)
    node, state = load_config([tmp_path / "vae" / "config.yaml"]), load_file(tmp_path / "vae" / "model.safetensors")
    instantiate_from_config(node["model"]).load_state_dict(state)
    own = load_file(model_folder / "model.safetensors")
    assert all(torch.equal(value, own[FIRST_STAGE + name]) for name, value in state.items())
    assert node["metadata"]["scale_factor"] == 0.2


@pytest.mark.parametrize(
    ("file", "changes", "message"),
    [
        ("unet/config.json", {"class_embed_type": "timestep"}, "class_embed_type is 'timestep'; supported is None"),
        ("unet/config.json", {"down_block_types": ["AttnDownBlock2D", "DownBlock2D"]}, "AttnDownBlock2D are not"),
        ("unet/config.json", {"block_out_channels": [32, 48]}, r"\[32, 48\] are not multiples"),
        ("unet/config.json", {"in_channels": 9}, "takes 9 and gives 4 channels"),
        ("unet/config.json", {"_class_name": "UNet2DModel"}, ""),
        ("vae/config.json", {"use_quant_conv": False}, "one of use_quant_conv and use_post_quant_conv"),
        ("vae/config.json", {"latents_mean": [0.1] * 4}, "latents_mean and latents_std go together"),
        ("vae/config.json", {"up_block_types": ["UpDecoderBlock2D"] * 2}, "do not mirror"),
        ("text_encoder/config.json", {"model_type": "t5"}, "of a 't5' model"),
        ("scheduler/scheduler_config.json", {"rescale_betas_zero_snr": True}, "rescale_betas_zero_snr"),
        ("scheduler/scheduler_config.json", {"prediction_type": "flow"}, "prediction_type 'flow'"),
        ("scheduler/scheduler_config.json", {"_class_name": "FlowMatchEulerDiscreteScheduler"}, "FlowMatch"),
        ("model_index.json", {"unet": ["diffusers", "UNet2DModel"]}, "unet is a UNet2DModel"),
        ("model_index.json", {"text_encoder_2": ["transformers", "CLIPTextModel"]}, "text_encoder_2"),
    ],
)
def test_what_is_not_supported_is_named(file, changes, message, pipeline, tmp_path):
    folder = copied(pipeline, tmp_path / "pipeline")
    edit(folder / file, **changes)
    if not message:  # the name of a network within a pipeline is that of model_index.json
        read_diffusers(folder, None)
        return
    with pytest.raises(UserError, match=message):
        read_diffusers(folder, None)


def test_missing_files_and_tensors_are_named(pipeline, tmp_path):
    folder = copied(pipeline, tmp_path / "pipeline")
    file = folder / "unet" / "diffusion_pytorch_model.safetensors"
    state = load_file(file)
    save_file(state | {"conv_up.weight": torch.zeros(1)}, file)
    with pytest.raises(UserError, match=r"holds conv_up\.weight, which a model of its config does not have"):
        read_published(folder)
    save_file({name: value for name, value in state.items() if name != "conv_out.bias"}, file)
    with pytest.raises(UserError, match=r"out\.2\.bias"):
        convert(folder, tmp_path / "out")
    save_file(state | {"conv_out.bias": torch.zeros(5)}, file)
    with pytest.raises(UserError, match=r"out\.2\.bias.*\(5,\)"):
        convert(folder, tmp_path / "out")
    file.unlink()
    with pytest.raises(UserError, match=r"unet has no weights"):
        read_published(folder)
    shutil.rmtree(folder / "text_encoder")
    with pytest.raises(UserError, match=r"has no text_encoder/, which its model_index\.json names"):
        read_published(folder)
    assert not (tmp_path / "out").exists()


class Malicious:
    def __init__(self, path: Path):
        self.path = path

    def __reduce__(self):
        return Path.write_text, (self.path, "written")


def test_damaged_and_malicious_weights_are_refused(pipeline, tmp_path):
    folder, written = copied(pipeline, tmp_path / "pipeline"), tmp_path / "written"
    file = folder / "vae" / "diffusion_pytorch_model.safetensors"
    file.write_bytes(file.read_bytes()[:-100])
    with pytest.raises(UserError, match="truncated or damaged"):
        read_published(folder)
    state = load_file(pipeline / "vae" / file.name)
    file.unlink()
    torch.save({**state, "extra": Malicious(written)}, file.with_suffix(".bin"))
    check(read_published(folder), folder)
    torch.save(Malicious(written), file.with_suffix(".bin"))
    with pytest.raises(UserError, match="holds"):
        read_published(folder)
    assert not written.exists()


def test_another_base_is_refused(model_folder, pipeline, tmp_path):
    tuned = copied(pipeline / "unet", tmp_path / "unet")
    other = changed(context_dim=32)
    other["params"].pop("cond_stage_config")
    with pytest.raises(UserError, match="context_dim 64, the base's UNet has 32"):
        read_published(tuned, base=write(tmp_path / "base", other))
    with pytest.raises(UserError, match="neither a model folder"):
        read_published(tuned, base=tmp_path / "nothing")


# --- single files ---------------------------------------------------------------------------------------------------


def single(model_folder: Path) -> dict[str, torch.Tensor]:
    """The weights of the tiny model by the names of Stable Diffusion 1.x."""
    state = load_file(model_folder / "model.safetensors")
    tower = {name.removeprefix(f"{TEXT}tower."): value for name, value in state.items() if name.startswith(TEXT)}
    network = {name: value for name, value in state.items() if not name.startswith(TEXT)}
    text = {f"{TEXT}transformer.{name}": value.clone() for name, value in from_open_clip(tower).items()}
    text[f"{TEXT}transformer.text_model.embeddings.position_ids"] = torch.arange(77)[None]
    return network | text


@pytest.mark.parametrize("form", ["averaged .ckpt", "bare .safetensors"])
@pytest.mark.slow
def test_a_single_file_is_known_by_its_shapes(form, model_folder, tmp_path):
    state, wanted = single(model_folder), load_file(model_folder / "model.safetensors")
    if form == "averaged .ckpt":
        average = {f"model_ema.{n[6:].replace('.', '')}": v + 1 for n, v in state.items() if n.startswith(UNET)}
        betas = schedules.make_betas("linear", 1000, 0.00085, 0.012).float()
        state |= {**average, "model_ema.decay": torch.tensor(0.9), "model_ema.num_updates": torch.tensor(3)}
        state |= {"betas": betas, "alphas_cumprod": (1 - betas).cumprod(0)}
        source = tmp_path / "sd.ckpt"
        torch.save({"state_dict": state, "global_step": 3}, source)
    else:
        source = tmp_path / "sd.safetensors"
        save_file(state, source)
    found = read_published(source)
    check(found, source)
    params, own = found.node["params"], NODE["params"]
    left = ("image_size", "transformer_depth", "use_scale_shift_norm")
    assert own["unet_config"]["params"].items() <= {**params["unet_config"]["params"], "image_size": 8}.items()
    assert set(params["unet_config"]["params"]) <= {*own["unet_config"]["params"], *left}
    for name, value in wanted.items():
        offset = form == "averaged .ckpt" and name.startswith(UNET)
        assert torch.equal(found.state[name], value + 1 if offset else value), name
    assert len(found.state) == len(wanted)
    raw = read_published(source, raw_weights=True)
    assert torch.equal(raw.state[f"{UNET}out.2.bias"], wanted[f"{UNET}out.2.bias"])
    out = convert(source, tmp_path / "out", say=lambda line: None)
    text = ["mucinous carcinoma"]
    assert torch.equal(
        load_model(out).condition(text=text)["crossattn"], load_model(model_folder).condition(text=text)["crossattn"]
    )


@pytest.mark.slow
def test_stable_diffusion_2_in_a_single_file_with_its_yaml(tmp_path):
    """Its own text tower, of which the last block is left out, linear projections, heads of one width, velocity."""
    node = changed(num_heads=-1, num_head_channels=16)
    text = node["params"]["cond_stage_config"]["params"]
    text |= {"layer": "penultimate", "pad": "zero"}
    node["params"] |= {"parameterization": "v"}
    folder = write(tmp_path / "ours", node, {**TOWER, "quick_gelu": False})
    state = {}
    for name, value in load_file(folder / "model.safetensors").items():
        linear = name.endswith(("proj_in.weight", "proj_out.weight")) and "transformer" not in name and UNET in name
        state[name.replace(".tower.", ".model.")] = value.flatten(1) if linear else value
    tower = f"{TEXT}model.transformer.resblocks."
    last = {name.replace(f"{tower}0.", f"{tower}1."): v for name, v in state.items() if name.startswith(f"{tower}0.")}
    rest = {f"{TEXT}model.logit_scale": torch.ones(()), f"{TEXT}model.text_projection": torch.ones(64, 64)}
    torch.save({"state_dict": {**state, **last, **rest}}, tmp_path / "sd2.ckpt")
    with pytest.raises(UserError, match="does not say whether it predicts noise or velocity"):
        read_published(tmp_path / "sd2.ckpt")
    export_as("compvis", write(tmp_path / "like it", changed()), tmp_path / "theirs")
    project = load_config([tmp_path / "theirs" / "config.yaml"])
    params = project["model"]["params"]
    params["parameterization"] = "v"
    params["unet_config"]["params"] |= {"num_head_channels": 16, "use_linear_in_transformer": True, "legacy": False}
    params["cond_stage_config"] = {
        "target": "ldm.modules.encoders.modules.FrozenOpenCLIPEmbedder",
        "params": {"freeze": True, "layer": "penultimate"},
    }
    save_config(project, tmp_path / "v2-inference-v.yaml")
    convert(tmp_path / "sd2.ckpt", tmp_path / "back", config=tmp_path / "v2-inference-v.yaml", say=lambda line: None)
    assert_same_weights(folder, tmp_path / "back")
    one, other = load_model(folder), load_model(tmp_path / "back")
    given = {"text": "villous adenoma"}
    assert torch.equal(one.condition(**given)["crossattn"], other.condition(**given)["crossattn"])
    assert other.parameterization == "v"


@pytest.mark.parametrize("begins", [UNET, "diffusion_model.", ""])
@pytest.mark.slow
def test_a_single_file_of_a_network_alone(begins, model_folder, tmp_path):
    whole = load_file(model_folder / "model.safetensors")
    state = {begins + n.removeprefix(UNET): v for n, v in whole.items() if n.startswith(UNET)}
    state[f"{begins}out.2.bias"] = state[f"{begins}out.2.bias"] + 1
    save_file(state, tmp_path / "unet.safetensors")
    with pytest.raises(UserError, match="--base"):
        read_published(tmp_path / "unet.safetensors")
    found = read_published(tmp_path / "unet.safetensors", base=model_folder)
    check(found, tmp_path)
    assert [name for name, v in whole.items() if not torch.equal(v, found.state[name])] == [f"{UNET}out.2.bias"]
    for name, value, message in (
        (f"{UNET}control", torch.zeros(1), "1 are not of this model"),
        (f"{FIRST_STAGE}quant_conv.weight", torch.zeros(1), "more than a network"),
        ("betas", torch.linspace(1e-4, 2e-2, 1000), "noise schedule"),
    ):
        save_file({**state, name: value}, tmp_path / "unet.safetensors")
        with pytest.raises(UserError, match=message):
            check(read_published(tmp_path / "unet.safetensors", base=model_folder), tmp_path)


def test_what_a_single_file_may_not_be(model_folder, tmp_path):
    state, path = single(model_folder), tmp_path / "sd.ckpt"
    with pytest.raises(UserError, match=r"Stable Diffusion 2, and does not say .*v2-inference\.yaml"):
        read_stable_diffusion(path, state | {"cond_stage_model.model.transformer.resblocks.0.x": torch.zeros(1)})
    with pytest.raises(UserError, match="Stable Diffusion XL"):
        read_stable_diffusion(path, state | {"conditioner.embedders.0.x": torch.zeros(1)})
    with pytest.raises(UserError, match=r"1 tensors.*no place.*control\.weight"):
        read_stable_diffusion(path, state | {"control.weight": torch.zeros(1)})
    with pytest.raises(UserError, match=r"noise schedule.*betas"):
        check(read_stable_diffusion(path, state | {"betas": torch.linspace(1e-4, 2e-2, 1000)}), path)
    state.pop(f"{UNET}out.2.bias")
    with pytest.raises(UserError, match=r"out\.2\.bias"):
        check(read_stable_diffusion(path, state), path)


@pytest.mark.slow
def test_the_published_size_of_stable_diffusion_1():
    """859.52 M, 83.65 M and 123.06 M parameters: read off the shapes of a file's tensors, and built from that."""
    from ldm.conditioners.text_towers import ClipTower

    params = load_config(["configs/latent-diffusion/minim_text.yaml"])["model"]["params"]
    stage = load_config(["configs/autoencoder/kl-f8.yaml"])["model"]["params"]["first_stage"]
    text = {"context_length": 77, "vocab_size": 49408, "width": 768, "heads": 12, "layers": 12}
    with torch.device("meta"):
        unet, vae = instantiate_from_config(params["unet_config"]), instantiate_from_config(stage)
        tower = ClipTower({"embed_dim": 768, "quick_gelu": True, "text_cfg": text})
    state = {UNET + name: value for name, value in unet.state_dict().items()}
    state |= {FIRST_STAGE + name: value for name, value in vae.state_dict().items()}
    state |= {f"{TEXT}transformer.{name}": value for name, value in from_open_clip(tower.state_dict()).items()}
    found = read_stable_diffusion(Path("sd-v1-4.ckpt"), {"state_dict": state})
    check(found, "sd-v1-4.ckpt")
    parts = (UNET, FIRST_STAGE, TEXT)
    counts = [sum(v.numel() for n, v in found.state.items() if n.startswith(part)) for part in parts]
    assert counts == [859_520_964, 83_653_863, 123_060_480]
    assert found.node["params"]["unet_config"]["params"]["num_heads"] == 8


# --- written for CompVis' code --------------------------------------------------------------------------------------

MAP = {"target": "ldm.conditioners.rescaler.SpatialRescaler", "params": {"in_channels": 5, "stages": 2, "key": "seg"}}
FREE = {"target": MAP["target"], "params": {"in_channels": 3, "stages": 0}}
CLASS = {"target": "ldm.conditioners.class_token.ClassEmbedder", "params": {"classes": ["a", "b"], "dim": 64}}
CONDITIONS = {
    "text": NODE["params"]["cond_stage_config"],
    "class": CLASS,
    "label": {"target": CLASS["target"], "params": {"classes": ["a", "b"], "dim": 128, "acts": "vector"}},
    "grid": {"target": "ldm.conditioners.grid.GridEmbedder", "params": {
        "embed_dim": 6, "context_dim": 64, "magnifications": ["a", "b"], "hidden": 16, "depth": 1, "heads": 2, "mlp": 8,
    }},
    "regions": {"target": "ldm.conditioners.ssl.SSLEmbedder", "params": {"embed_dim": 6, "region_embed_dim": 5}},
    "map": {**MAP, "params": {**MAP["params"], "out_channels": 3}},
    "map as it is": FREE,
    "hybrid": {"target": "ldm.conditioners.compose.ConditionerSet", "params": {
        "conditioners": {"class": CLASS, "map": FREE},
    }},
    "features": {"target": "ldm.conditioners.ssl.PatchEmbedder", "params": {"embed_dim": 6, "context_dim": 64}},
    "none": None,
}
VQ = {
    "target": "ldm.autoencoder.autoencoder.VQModel",
    "params": {"embed_dim": 4, "n_embed": 16, "ddconfig": {**DDCONFIG, "double_z": False}},
}


GIVEN = {
    "text": [{"text": "polyp"}], "class": [{"class": "b"}], "label": [{"class": "a"}, {"class": "b"}],
    "features": [{"features": torch.ones(6)}], "regions": [{"ssl": torch.ones(6), "region": torch.ones(5)}],
    "grid": [{"ssl": torch.rand(6, 2, 2), "magnification": "b"}], "map": [{"seg": torch.rand(5, 32, 32)}],
    "map as it is": [{"map": torch.rand(3, 8, 8)}], "hybrid": [{"class": "a", "map": torch.rand(3, 8, 8)}],
}  # fmt: skip


@pytest.mark.parametrize("condition", CONDITIONS)
@pytest.mark.slow
def test_ours_to_compvis_to_ours_is_bitwise_equal(condition, tmp_path):
    plain = {"use_spatial_transformer": False, "context_dim": None}
    of_kind = {"none": plain, "label": plain | {"num_heads_upsample": 4}, "regions": {"context_dim": 512}}
    of_kind |= dict.fromkeys(("map", "map as it is"), plain | {"in_channels": 7}) | {"hybrid": {"in_channels": 7}}
    node = changed(**of_kind.get(condition, {}))
    node["params"]["cond_stage_config"] = CONDITIONS[condition]
    if condition in ("none", "class"):
        node["params"]["first_stage_config"] = VQ
    if CONDITIONS[condition] is None:
        node["params"].pop("cond_stage_config")
    folder = write(tmp_path / "ours", node)
    if condition == "label":  # no null was trained, as in every published model of labels within the UNet
        state = load_file(folder / "model.safetensors")
        state[f"{TEXT}embedding.weight"][-1] = 0
        save_file(state, folder / "model.safetensors")
    assert export_as("compvis", folder, tmp_path / "theirs")
    classes = {"classes": ["a", "b"]} if condition in ("class", "label", "grid", "hybrid") else {}
    convert(tmp_path / "theirs" / "model.ckpt", tmp_path / "back", say=lambda line: None, **classes)
    assert_same_weights(folder, tmp_path / "back")
    one, other = load_model(folder), load_model(tmp_path / "back")
    assert one.cond_stage_model is None or one.cond_stage_model.keys == other.cond_stage_model.keys
    x, t = torch.randn(1, 4, 8, 8), torch.tensor([500])
    with torch.no_grad():
        assert torch.equal(*(call_network(m.model, x, t, m.null_condition()) for m in (one, other)))
        for given in GIVEN.get(condition, ()):
            a, b = one.condition(**given), other.condition(**given)
            assert a.keys() == b.keys()
            assert all(torch.equal(a[part], b[part]) for part in a)
    assert torch.equal(one.sigmas, other.sigmas)
    assert one.scale_factor == other.scale_factor


@pytest.mark.parametrize("parameterization", ["eps", "x0", "v"])
@pytest.mark.slow
def test_what_the_network_predicts_goes_there_and_back(parameterization, tmp_path):
    node = changed()
    node["params"] |= {"parameterization": parameterization, "beta_schedule": "cosine"}
    folder = write(tmp_path / "ours", node)
    notes = export_as("compvis", folder, tmp_path / "theirs")
    assert any("Stable Diffusion 2" in note for note in notes) == (parameterization == "v")
    assert load_config([tmp_path / "theirs" / "config.yaml"])["model"]["params"]["parameterization"] == parameterization
    convert(tmp_path / "theirs", tmp_path / "back", say=lambda line: None)
    assert_same_weights(folder, tmp_path / "back")
    one, other = load_model(folder), load_model(tmp_path / "back")
    assert other.parameterization == parameterization
    assert torch.equal(one.sigmas, other.sigmas)


@pytest.mark.parametrize("kind", ["KL", "VQ"])
def test_a_first_stage_goes_there_and_back(kind, tmp_path):
    node = NODE["params"]["first_stage_config"] if kind == "KL" else VQ
    folder = write(tmp_path / "ours", node)
    export_as("compvis", folder, tmp_path / "theirs")
    target = load_config([tmp_path / "theirs" / "config.yaml"])["model"]["target"]
    assert target == f"ldm.models.autoencoder.{'AutoencoderKL' if kind == 'KL' else 'VQModel'}"
    convert(tmp_path / "theirs", tmp_path / "back", say=lambda line: None)
    assert_same_weights(folder, tmp_path / "back")
    if kind == "VQ":
        with pytest.raises(UserError, match="first stages of the kind VQModel"):
            export_as("diffusers", folder, tmp_path / "vae")
        return
    export_as("diffusers", folder, tmp_path / "vae")
    convert(tmp_path / "vae", tmp_path / "again", say=lambda line: None)
    assert_same_weights(folder, tmp_path / "again")


def test_the_checkpoint_has_the_buffers_that_compvis_code_has(oracle, model_folder, tmp_path):
    """Names, types and values of the schedule's buffers, compared with a published checkpoint of another schedule."""
    published = read_checkpoint(oracle / "ldm_ckpt_lid_vq" / "model.ckpt")["state_dict"]
    node = changed()
    node["params"] |= {"linear_start": 0.0015, "linear_end": 0.0195}
    export_as("compvis", write(tmp_path / "ours", node), tmp_path / "theirs")
    content = torch.load(tmp_path / "theirs" / "model.ckpt", weights_only=True)
    buffers = {name: value for name, value in published.items() if "." not in name}
    own = {name: value for name, value in content["state_dict"].items() if "." not in name}
    assert own.keys() == buffers.keys()
    for name, value in buffers.items():
        assert own[name].dtype == value.dtype
        torch.testing.assert_close(own[name], value, rtol=1e-5, atol=1e-6)


def test_the_project_names_the_classes_of_compvis(model_folder, tmp_path):
    export_as("compvis", model_folder, tmp_path / "theirs")
    model = load_config([tmp_path / "theirs" / "config.yaml"])["model"]
    params = model["params"]
    assert model["target"] == "ldm.models.diffusion.ddpm.LatentDiffusion"
    assert params["unet_config"]["target"] == "ldm.modules.diffusionmodules.openaimodel.UNetModel"
    assert params["first_stage_config"]["target"] == "ldm.models.autoencoder.AutoencoderKL"
    assert params["cond_stage_config"]["target"] == "ldm.modules.encoders.modules.FrozenCLIPEmbedder"
    assert params["scale_factor"] == 0.2
    assert {"norm_groups"}.isdisjoint(params["unet_config"]["params"])


# --- what has no counterpart ------------------------------------------------------------------------------------------

SCORE = {"target": "ldm.conditioners.score.ScoreEmbedder", "params": {}}
OMICS = {"target": "ldm.conditioners.omics.OmicsEmbedder", "params": {}}
PIXELS = {"target": "ldm.autoencoder.autoencoder.IdentityFirstStage", "params": {}}


@pytest.mark.parametrize(
    ("form", "change", "message"),
    [
        ("diffusers", lambda p: p.update(cond_stage_config=OMICS), "the condition OmicsEmbedder"),
        ("compvis", lambda p: p.update(cond_stage_config=SCORE), "the condition ScoreEmbedder"),
        ("diffusers", lambda p: p.update(first_stage_config=VQ), "first stages of the kind VQModel"),
        ("diffusers", lambda p: p.update(parameterization="edm", first_stage_config=PIXELS), "clipping of EDM's"),
        ("compvis", lambda p: p.update(parameterization="edm"), "parameterization 'edm'"),
        ("diffusers", lambda p: p.update(beta_schedule="sqrt"), "beta_schedule 'sqrt'"),
        ("diffusers", lambda p: p["unet_config"]["params"].update(resblock_updown=True), "resblock_updown True"),
        ("compvis", lambda p: p["unet_config"]["params"].update(norm_groups=16), "16 groups"),
        ("compvis", lambda p: p["cond_stage_config"]["params"].update(context_dim=8), "projection after the text"),
    ],
)
def test_what_another_form_lacks_is_named(form, change, message, model_folder, tmp_path):
    folder = copied(model_folder, tmp_path / "ours")
    config = load_config([folder / "config.yaml"])
    change(config["model"]["params"])
    save_config(config, folder / "config.yaml")
    with pytest.raises(UserError, match=message):
        export_as(form, folder, tmp_path / "theirs")
    assert not (tmp_path / "theirs").exists()


def test_nothing_of_the_users_is_overwritten(model_folder, tmp_path):
    (tmp_path / "mine").mkdir()
    (tmp_path / "mine" / "notes.txt").write_text("mine")
    for form in ("diffusers", "compvis"):
        with pytest.raises(UserError, match="holds something else"):
            export_as(form, model_folder, tmp_path / "mine")
