"""`histoldm translate`, specifications, edits and maps of features, on tiny real models."""

from __future__ import annotations

import csv
import json
import pickle
import shutil

import numpy as np
import pytest
import tifffile
import torch
import yaml
from PIL import Image
from typer.testing import CliRunner

from data_prep.train_feature_map import main as train_feature_map
from ldm.cli import app
from ldm.conditioners.compose import ConditionerSet
from ldm.config import instantiate_from_config
from ldm.data.cohort import write_store
from ldm.data.store_writers import ArrayWriter
from ldm.encoders.feature_map import Transport, fit_transport, load_transport, save_transport
from ldm.errors import UserError
from ldm.images.marks import read_mark
from ldm.images.write import save_bigtiff, save_ome_zarr
from ldm.model_folder import write_model_folder
from ldm.requests.edits import edited, parse_edits
from ldm.requests.spec import load_spec, plan_of_flags, read_pairs, read_spec

GENES = {"mutation_genes": ["TP53", "EGFR"], "expression_genes": ["MKI67", "PTEN", "ESR1"]}
CONDITIONERS = {
    "class": {
        "target": "ldm.conditioners.class_token.ClassEmbedder",
        "params": {"classes": ["COAD", "LUAD", "BRCA"], "dim": 128, "acts": "vector"},
    },
    "omics": {"target": "ldm.conditioners.omics.OmicsEmbedder", "params": {"dim": 128, **GENES}},
    "ssl": {"target": "ldm.conditioners.ssl.PatchEmbedder", "params": {"embed_dim": 6, "context_dim": 16}},
}


def pixel_node(channels: int = 3, cond: dict | None = None, **unet) -> dict:
    return {
        "target": "ldm.latent_diffusion.LatentDiffusion",
        "params": {
            "unet_config": {"target": "ldm.networks.unet.UNetModel", "params": {
                "image_size": 16, "in_channels": channels, "out_channels": channels, "model_channels": 32,
                "num_res_blocks": 1, "attention_resolutions": [], "channel_mult": [1], "num_heads": 2, **unet}},
            "first_stage_config": {
                "target": "ldm.autoencoder.autoencoder.IdentityFirstStage", "params": {"channels": channels}},
            "cond_stage_config": cond, "use_ema": False,
        },
    }  # fmt: skip


def write_model(folder, node: dict, metadata: dict):
    torch.manual_seed(0)
    model = instantiate_from_config(node)
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            parameter.add_(torch.randn_like(parameter) * 0.03)
            parameter.mul_(40.0 if name.startswith("cond_stage") else 1.0)  # conditions that show in an untrained model
    return write_model_folder(folder, node, model.state_dict(), metadata)


@pytest.fixture(scope="module")
def world(tmp_path_factory):
    """A pixel model of classes, genes and features; three images, one of them larger."""
    folder = tmp_path_factory.mktemp("world")
    cond = {"target": "ldm.conditioners.compose.ConditionerSet", "params": {"conditioners": CONDITIONERS}}
    node = pixel_node(cond=cond, context_dim=16, use_spatial_transformer=True, attention_resolutions=[1])
    write_model(folder / "model", node, {"mpp": 0.5})
    rng = np.random.default_rng(0)
    (folder / "images").mkdir()
    for name, size in (("COAD__a.png", (16, 16)), ("COAD__b.png", (16, 16)), ("LUAD__large.png", (20, 24))):
        Image.fromarray(rng.integers(0, 255, (*size, 3), dtype=np.uint8)).save(folder / "images" / name)
    return folder


def run(*args):
    return CliRunner().invoke(app, ["translate", *(str(arg) for arg in args)], catch_exceptions=False)


def refused(*args) -> str:
    with pytest.raises(UserError) as caught:
        run(*args)
    return str(caught.value)


def test_another_scale_is_told(world, tmp_path):
    pixels = np.random.default_rng(0).integers(0, 255, (16, 16, 3), dtype=np.uint8)
    given = ["--model", world / "model", "--source", "class=COAD", "--target", "class=LUAD", "--steps", 2]
    for mpp, told in ((0.5, False), (1.0, True)):
        path = save_bigtiff(tmp_path / f"{mpp}.tif", pixels, mpp, {})
        output = run(*given, "--images", path, "--out", tmp_path / str(mpp)).output
        note = f"note: 1.0.tif has 1 um/px, and {world / 'model'} was trained at 0.5 um/px"
        assert (note in output) == told


@pytest.mark.slow
def test_a_folder_to_several_targets_resumes_and_says_what_it_is(world, tmp_path):
    given = ["--model", world / "model", "--images", world / "images", "--class-of-name", "--target", "class=LUAD",
             "--target", "two: class=BRCA; mutation=TP53:1", "--steps", 3, "--save-intermediates", 2,
             "--batch-size", 1, "--out", tmp_path]  # fmt: skip
    run(*given)
    rows = list(csv.DictReader((tmp_path / "translations.csv").open()))
    assert [row["file"] for row in rows][:3] == ["COAD__a__LUAD.png", "COAD__a__two.png", "COAD__b__LUAD.png"]
    large = Image.open(tmp_path / "LUAD__large__two.png")
    assert large.size == (24, 20)
    about = json.loads(large.text["SYNTHETIC"])
    assert about["model"] == "model"
    assert about["source_condition"] == "class=LUAD"
    assert about["condition"] == "class=BRCA mutation=TP53:1"
    assert about["seed"] == 0
    assert len(list((tmp_path / "intermediates").glob("COAD__a__LUAD__step*.png"))) == 2
    sheet = Image.open(tmp_path / "sheets" / "COAD__a.png")
    assert "SYNTHETIC" in sheet.text
    before = list(tmp_path.glob("*.png"))
    times = {path: path.stat().st_mtime_ns for path in before}
    lost = tmp_path / "COAD__b__two.png"
    was = lost.read_bytes()
    lost.unlink()
    done = run(*given)
    assert "wrote 1 images" in done.stdout
    assert "; 5 were there already from an earlier run and stay" in done.stdout
    assert {path for path in before if path.stat().st_mtime_ns != times[path]} == {lost}
    assert lost.read_bytes() == was
    steps = {path: path.read_bytes() for path in (tmp_path / "intermediates").glob("COAD__b__two__*.png")}
    assert len(steps) == 2
    for path in steps:
        path.unlink()
    assert "wrote 1 images" in run(*given).stdout  # an image is whole with its intermediates
    assert {path: path.read_bytes() for path in steps} == steps
    assert lost.read_bytes() == was
    assert "was made otherwise (seed)" in refused(*given, "--seed", 1)


def test_images_are_the_same_whichever_are_there_already(world, tmp_path):
    given = ["--model", world / "model", "--images", world / "images", "--class-of-name", "--target", "class=LUAD",
             "--steps", 3, "--batch-size", 2, "--out"]  # fmt: skip
    run(*given, tmp_path / "whole")
    made = {path.name: path.read_bytes() for path in sorted((tmp_path / "whole").glob("*.png"))}
    for lost in made:
        shutil.copytree(tmp_path / "whole", tmp_path / lost)
        (tmp_path / lost / lost).unlink()
        run(*given, tmp_path / lost)
        assert (tmp_path / lost / lost).read_bytes() == made[lost]
    shutil.copytree(tmp_path / "whole", tmp_path / "most")
    for name in list(made)[1:]:
        (tmp_path / "most" / name).unlink()
    run(*given, tmp_path / "most")
    assert {name: (tmp_path / "most" / name).read_bytes() for name in made} == made


def test_edits_keep_the_image_and_write_maps(world, tmp_path):
    run("--model", world / "model", "--images", world / "images" / "COAD__a.png", "--source", "expression=MKI67:0.2",
        "--edit", "expression=MKI67:0.2:1:3", "--steps", 8, "--strength", 0.5, "--exact",
        "--out", tmp_path)  # fmt: skip
    source = np.asarray(Image.open(world / "images" / "COAD__a.png")).astype(float)
    apart = []
    for text in ("0.2", "0.6", "1"):
        name = f"COAD__a__MKI67-{text}.png"
        apart.append(np.abs(np.asarray(Image.open(tmp_path / name)) - source).mean())
        assert Image.open(tmp_path / "differences" / name).size == (16, 16)
    assert apart[0] < 2  # the source's own value: the image
    assert min(apart[1:]) > 10


@pytest.mark.slow
def test_size_mpp_and_form_of_large_images_stay(world, tmp_path):
    rng = np.random.default_rng(1)
    image = rng.integers(0, 255, (40, 36, 3), dtype=np.uint8)
    save_bigtiff(tmp_path / "in.tif", image, 0.5, {}, quality=95)
    save_ome_zarr(tmp_path / "in2.ome.zarr", image, 0.25, {})
    common = ["--model", world / "model", "--target", "class=LUAD", "--steps", 2, "--out", tmp_path / "out"]
    run(*common, "--images", tmp_path / "in.tif", "--region", "4,8,20,24")
    run(*common, "--images", tmp_path / "in2.ome.zarr")
    with tifffile.TiffFile(tmp_path / "out" / "in__LUAD.tif") as file:
        assert file.pages[0].shape == (24, 20, 3)
        top, bottom = file.pages[0].tags["XResolution"].value
        assert 1e4 / (top / bottom) == pytest.approx(0.5)
    assert read_mark(tmp_path / "out" / "in__LUAD.tif")["region"] == "4,8,20,24"
    about = read_mark(tmp_path / "out" / "in2__LUAD.ome.zarr")
    assert about["mpp"] == 0.25
    assert "; 1 were there already" in run(*common, "--images", tmp_path / "in2.ome.zarr").stdout


def test_super_resolution_matches_its_input(world, tmp_path):
    small = np.random.default_rng(2).integers(90, 160, (8, 8, 3), dtype=np.uint8)
    Image.fromarray(small).save(tmp_path / "small.png")
    run("--model", world / "model", "--images", tmp_path / "small.png", "--target", "class=LUAD", "--enlarge", 2,
        "--strength", 0.5, "--steps", 4, "--out", tmp_path / "out")  # fmt: skip
    made = np.asarray(Image.open(tmp_path / "out" / "small__LUAD.png")).astype(float)
    assert made.shape == (16, 16, 3)
    shrunk = made.reshape(8, 2, 8, 2, 3).mean((1, 3))
    inside = ((made > 0) & (made < 255)).reshape(8, 2, 8, 2, 3).all((1, 3))
    assert inside.mean() > 0.5
    assert np.abs(shrunk - small)[inside].max() < 1


@pytest.mark.slow
def test_a_model_of_modalities_takes_the_image_as_its_condition(tmp_path):
    lmi = {"target": "ldm.networks.lmi.LMIUNet", "params": {"unet": {
        "target": "ldm.networks.unet.UNetModel", "params": {
            "image_size": 16, "in_channels": 3, "out_channels": 1, "model_channels": 32, "num_res_blocks": 1,
            "attention_resolutions": [], "channel_mult": [1], "num_heads": 2}}}}  # fmt: skip
    node = pixel_node(1, {"target": "ldm.conditioners.source_image.SourceImage", "params": {"size": 16}})
    node["params"]["unet_config"] = lmi
    write_model(tmp_path / "model", node, {})
    gray = np.random.default_rng(3).integers(0, 255, (2, 20, 18), dtype=np.uint8)
    (tmp_path / "t2").mkdir()
    for i, image in enumerate(gray):
        Image.fromarray(image).save(tmp_path / "t2" / f"{i}.png")
    common = ["--model", tmp_path / "model", "--images", tmp_path / "t2", "--steps", 2]
    run(*common, "--out", tmp_path / "out")
    run(*common, "--start", "noise", "--strength", 0.5, "--out", tmp_path / "near")
    one, other = (np.asarray(Image.open(tmp_path / "out" / f"{i}__translated.png")) for i in range(2))
    assert one.shape == (20, 18, 3)
    assert (one != other).any()
    assert (one != np.asarray(Image.open(tmp_path / "near" / "0__translated.png"))).any()
    colour = np.random.default_rng(4).integers(0, 255, (16, 16, 3), dtype=np.uint8)
    Image.fromarray(colour).save(tmp_path / "colour.png")
    message = refused("--model", tmp_path / "model", "--images", tmp_path / "colour.png", "--out", tmp_path / "x")
    assert "is in colour, the model works on gray images" in message


def test_tiles_of_a_store_bring_their_own_conditions(world, tmp_path):
    rng = np.random.default_rng(5)
    tiles = rng.integers(0, 255, (3, 16, 16, 3), dtype=np.uint8)
    store = write_store(
        tmp_path / "cohort", "slide-a", lambda i: tiles[i], 3, attrs={"tile_size": 16, "mpp": 0.5},
        coords=np.zeros((3, 2)),
    )  # fmt: skip
    with ArrayWriter(store.path, "features/tiny", (6,), "f4", {"encoder": "tiny"}) as writer:
        writer.append(rng.normal(size=(3, 6)))
    run("--model", world / "model", "--images", tmp_path / "cohort", "--target", "class=LUAD", "--count", 2,
        "--steps", 2, "--out", tmp_path / "out")  # fmt: skip
    rows = list(csv.DictReader((tmp_path / "out" / "translations.csv").open()))
    assert [row["file"] for row in rows] == ["slide-a_000000__LUAD.png", "slide-a_000002__LUAD.png"]
    assert rows[0]["source_condition"].startswith("ssl=sha256:")
    assert rows[0]["target_condition"] == rows[0]["source_condition"] + " class=LUAD"
    about = read_mark(tmp_path / "out" / rows[1]["file"])
    assert (about["source_image"], about["row"], about["mpp"]) == ("slide-a", 2, 0.5)


def test_tiles_of_a_store_without_conditions_are_what_the_source_says(tmp_path):
    classes = {"stain": ["he", "ki67"], "site": ["colon", "skin"]}
    node = {"target": "ldm.conditioners.compose.ConditionerSet", "params": {"conditioners": {
        key: {"target": "ldm.conditioners.class_token.ClassEmbedder",
              "params": {"classes": names, "dim": 128, "acts": "vector", "dropout": 0.1, "key": key}}
        for key, names in classes.items()}}}  # fmt: skip
    write_model(tmp_path / "model", pixel_node(3, node), {"conditions": {key: {"source": key} for key in classes}})
    tiles = np.random.default_rng(6).integers(0, 255, (2, 16, 16, 3), dtype=np.uint8)
    write_store(
        tmp_path / "cohort", "a", lambda i: tiles[i], 2, attrs={"tile_size": 16, "mpp": 1.0}, coords=np.zeros((2, 2))
    )
    common = ["--model", tmp_path / "model", "--images", tmp_path / "cohort", "--target", "stain=ki67", "--steps", 2]
    assert "the condition 'stain' is to come from 'stain'" in refused(*common, "--out", tmp_path / "x")
    output = run(*common, "--source", "stain=he", "--out", tmp_path / "out").output
    assert "has no site: unknown to the model" in output
    rows = list(csv.DictReader((tmp_path / "out" / "translations.csv").open()))
    assert [row["source_condition"] for row in rows] == ["stain=he"] * 2
    write_model(tmp_path / "bare", pixel_node(3, node), {})
    common[1] = tmp_path / "bare"
    assert "give them by name, --condition or --source" in refused(*common, "--out", tmp_path / "x")


@pytest.mark.slow
def test_a_classifier_guides_to_the_targets_class(world, tmp_path):
    node = {"target": "ldm.networks.encoder_unet.EncoderUNetModel", "params": {
        "image_size": 16, "in_channels": 3, "model_channels": 32, "out_channels": 3, "num_res_blocks": 1,
        "attention_resolutions": [], "channel_mult": [1, 2], "num_head_channels": 32, "pool": "adaptive"}}  # fmt: skip
    torch.manual_seed(1)
    network = instantiate_from_config(node)
    with torch.no_grad():
        for parameter in network.parameters():
            parameter.add_(torch.randn_like(parameter) * 0.1)
    write_model_folder(tmp_path / "classifier", node, network.state_dict(), {"classes": ["BRCA", "LUAD", "COAD"]})
    common = ["--model", world / "model", "--images", world / "images", "--target", "class=LUAD", "--steps", 3,
              "--strength", 0.7]  # fmt: skip
    run(*common, "--out", tmp_path / "plain")
    run(*common, "--classifier", tmp_path / "classifier", "--classifier-scale", 50, "--out", tmp_path / "guided")
    pairs = [
        [np.asarray(Image.open(tmp_path / way / f"{name}__LUAD.png")) for way in ("plain", "guided")]
        for name in ("COAD__a", "LUAD__large")
    ]
    assert all((plain != guided).any() for plain, guided in pairs)
    assert read_mark(tmp_path / "guided" / "COAD__a__LUAD.png")["classifier_scale"] == 50
    network.metadata = {"classes": ["BRCA", "KIRC", "COAD"]}
    write_model_folder(tmp_path / "other", node, network.state_dict(), network.metadata)
    message = refused(*common, "--classifier", tmp_path / "other", "--out", tmp_path / "x")
    assert "the classifier has no class 'LUAD'" in message


@pytest.mark.slow
def test_features_are_mapped_to_those_of_the_target(world, tmp_path):
    rng = torch.Generator().manual_seed(0)
    source = torch.randn(200, 5, generator=rng)
    target = torch.cat([source.sin(), source[:, :1] * 2 + 3], 1)
    np.save(tmp_path / "a.npy", source.numpy())
    np.save(tmp_path / "b.npy", target.numpy())
    train_feature_map(["--source", str(tmp_path / "a.npy"), "--target", str(tmp_path / "b.npy"), "--paired",
                       "--steps", "150", "--out", str(tmp_path / "map")])  # fmt: skip
    model = load_transport(tmp_path / "map")
    error = (model.map(source) - target).square().mean() / target.var(0).mean()
    assert error < 0.2
    assert model.metadata["held_out_error"] < 0.3
    np.save(tmp_path / "own.npy", source[:3].numpy())
    run("--model", world / "model", "--images", world / "images", "--features", tmp_path / "own.npy", "--map-features",
        tmp_path / "map", "--steps", 2, "--out", tmp_path / "out")  # fmt: skip
    assert "ssl=sha256:" in read_mark(tmp_path / "out" / "COAD__a__mapped.png")["condition"]
    with pytest.raises(UserError, match="of different spaces: that takes pairs"):
        fit_transport(source, target, paired=False)
    with pytest.raises(UserError, match="is no map of features"):
        load_transport(world / "model")


@pytest.mark.slow
def test_unpaired_features_are_moved_to_the_targets(tmp_path):
    rng = torch.Generator().manual_seed(1)
    source, target = torch.randn(300, 3, generator=rng), torch.randn(300, 3, generator=rng) * 0.5
    target = target + torch.where(torch.rand(300, 1, generator=rng) < 0.5, -2.0, 2.0)
    model = fit_transport(source, target, paired=False, steps=200, width=64, progress=False)
    mapped = model.map(source)
    assert (mapped.mean(0) - target.mean(0)).abs().max() < 0.5
    assert mapped.abs().mean() > 1.2  # two groups, not their middle
    save_transport(tmp_path / "map", model, {"a": 1})
    torch.testing.assert_close(load_transport(tmp_path / "map").map(source), mapped)
    assert Transport(3, 3).map(source).shape == (300, 3)


# --- specifications -------------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def conditioner():
    return ConditionerSet(CONDITIONERS)


def test_edits(conditioner):
    source = {"expression": {"MKI67": 0.4, "PTEN": 0.8}}
    made = edited(conditioner, source, parse_edits(conditioner, ["expression=MKI67:x2,PTEN:x2", "mutation=TP53:1"]))
    (one,) = made
    assert one.label == "MKI67-x2_PTEN-x2_TP53-1"
    np.testing.assert_allclose(one.values["expression"], [0.8, 1.0, np.nan])
    np.testing.assert_array_equal(one.values["mutation"], [1, np.nan])
    swept = edited(conditioner, source, parse_edits(conditioner, ["expression=MKI67:0:1:3,PTEN:unknown"]))
    assert [float(each.values["expression"][0]) for each in swept] == [0, 0.5, 1]
    plan = plan_of_flags(conditioner, {"class": "COAD"}, ["class=LUAD"], ["mutation=TP53:1"])
    assert [target.label for target in plan.targets] == ["LUAD", "TP53-1"]
    assert plan.targets[1].values["class"] == "COAD"
    assert np.isnan(plan.source["mutation"]).all()  # unknown, not absent


@pytest.mark.parametrize(
    ("edit", "message"),
    [
        ("expression=MKI68:1", "did you mean 'MKI67'"),
        ("expression=MKI67:0:1:1", r"start:stop:count as 0:1:5; got 'expression=MKI67:0:1:1'"),
        ("mutation=TP53:0.5", "a mutation is set to 0, 1 or unknown"),
        ("class=LUAD", "is not edited by numbers; give it with --target"),
        ("expression", "an edit is name=value"),
    ],
)
def test_mistakes_in_edits(conditioner, edit, message):
    with pytest.raises(UserError, match=message):
        parse_edits(conditioner, [edit])


def nothing(name: str) -> dict:
    return {}


def test_a_specification_of_a_batch(conditioner, tmp_path):
    (tmp_path / "s.yaml").write_text(
        "default: {source: {class: COAD}, targets: [{class: LUAD}]}\n"
        "files:\n  b.png: {targets: [{label: x, class: BRCA, expression: {MKI67: 0.3}}], edits: [mutation=EGFR:1]}\n"
    )
    plans = read_spec(tmp_path / "s.yaml", conditioner, ["a.png", "b.png"], nothing)
    assert [t.label for t in plans["a.png"].targets] == ["LUAD"]
    assert [t.label for t in plans["b.png"].targets] == ["x", "EGFR-1"]
    assert plans["b.png"].targets[0].values["expression"] == {"MKI67": 0.3}
    assert plans["b.png"].source["class"] == "COAD"
    with pytest.raises(UserError, match=r"names 1 files that are not among the images: b\.png"):
        read_spec(tmp_path / "s.yaml", conditioner, ["a.png"], nothing)


DOCUMENTED = {
    "COAD__a.png": {"contents": {"y": ["LUAD", None, 2]}, "labels": ["l", "same", "b"]},
    "COAD__b.png": {"contents": {"genomics_mutation": {"TP53": [0, 1, None]}, "genomics_multiplier": [1, 2.0, None]}},
}


def test_his_mmdm_specifications_in_both_layouts(conditioner, tmp_path):
    (tmp_path / "m.yaml").write_text(yaml.safe_dump(DOCUMENTED))
    names = ["COAD__a.png", "COAD__b.png", "LUAD__c.png"]
    known = {"mutation": np.array([1.0, 0.0], np.float32)}
    plans = read_spec(tmp_path / "m.yaml", conditioner, names, lambda name: known)
    assert list(plans) == names[:2]
    assert [target.label for target in plans[names[0]].targets] == ["sample_l", "sample_same", "sample_b"]
    assert [target.values["class"] for target in plans[names[0]].targets] == ["LUAD", "COAD", "BRCA"]
    second = plans[names[1]].targets
    assert [float(target.values["mutation"][0]) for target in second] == [0, 1, 1]
    assert [target.values.get("mutation_multiplier") for target in second] == [1.0, 2.0, None]
    assert second[0].label == "sample_0"
    working = {"modifications": {"default": {"contents": {"y": ["BRCA"], "genomics_mutation": {"NOGENE": [1]}}},
                                 "custom": {names[0]: DOCUMENTED[names[0]]}}}  # fmt: skip
    (tmp_path / "w.pkl").write_bytes(pickle.dumps(working))
    plans = read_spec(tmp_path / "w.pkl", conditioner, names, nothing)
    assert list(plans) == names
    assert plans[names[2]].targets[0].values["class"] == "BRCA"
    working["fn_list"] = names[:1]
    (tmp_path / "w.pkl").write_bytes(pickle.dumps(working))
    assert list(read_spec(tmp_path / "w.pkl", conditioner, names, nothing)) == names[:1]
    working["modifications"]["custom"][names[1]] = {"contents": {"genomics_mutation": {"NOGENE": [1]}}}
    (tmp_path / "w.yaml").write_text(yaml.safe_dump({**working, "fn_list": names[:2]}))
    with pytest.raises(UserError, match="no gene 'NOGENE'"):
        read_spec(tmp_path / "w.yaml", conditioner, names, nothing)


class Harm:
    def __reduce__(self):
        return (print, ("harm",))


def test_pickles_execute_nothing(tmp_path, capsys):
    (tmp_path / "bad.pkl").write_bytes(pickle.dumps({"a": Harm()}))
    with pytest.raises(UserError, match=r"it holds a builtins\.print"):
        load_spec(tmp_path / "bad.pkl")
    assert capsys.readouterr().out == ""


def test_a_table_of_pairs(conditioner, tmp_path):
    (tmp_path / "t.csv").write_text(
        "file,source.class,target.class,target.expression,label\n"
        'a.png,COAD,LUAD,"MKI67:0.9,PTEN:0.1",first\na.png,COAD,BRCA,,\n'
    )
    plan = read_pairs(tmp_path / "t.csv", conditioner, ["a.png"], nothing)["a.png"]
    assert [target.label for target in plan.targets] == ["first", "BRCA"]
    assert plan.targets[0].values["expression"] == {"MKI67": 0.9, "PTEN": 0.1}


@pytest.mark.parametrize(
    ("flags", "message"),
    [
        (["--source", "class=KIRC", "--target", "class=LUAD"], "the model has no class 'KIRC'"),
        (["--target", "class=LUADD"], "did you mean 'LUAD'"),
        (["--target", "clas=LUAD"], "did you mean 'class'"),
        (["--source", "class=COAD"], "say what the images shall become: --target"),
        (["--spec", "none.yaml"], "there is no specification at none.yaml"),
        (["--spec", "none.yaml", "--target", "class=LUAD"], "leave --target out, or the spec"),
        (["--target", "class=LUAD", "--target", "class=LUAD"], "two targets are called 'LUAD'"),
        (["--target", "class=LUAD", "--region", "0,0,16,16"], "--region is of one image"),
        (["--edit", "expression=MKI67:x2"], "the source's value is not known; give it with --source"),
        (["--source", "expression=MKI67:7", "--target", "class=LUAD"], "is a number in"),
        (["--target", "class=LUAD", "--start", "none"], "keeps nothing of the image"),
        (["--target", "class=LUAD", "--enlarge", 2, "--start", "invert"], "it starts from noise or none of it"),
        (["--target", "class=LUAD", "--solver", "ddpm"], "an inversion follows one of euler, heun"),
    ],
)
@pytest.mark.slow
def test_mistakes_are_one_message_before_work_starts(world, tmp_path, flags, message):
    out = tmp_path / "out"
    assert message in refused("--model", world / "model", "--images", world / "images", "--out", out, *flags)
    assert not list(out.glob("*.png"))


def test_images_that_do_not_fit(world, tmp_path):
    Image.fromarray(np.zeros((8, 16, 3), np.uint8)).save(tmp_path / "small.png")
    Image.fromarray(np.zeros((16, 16), np.uint8)).save(tmp_path / "gray.png")
    common = ["--model", world / "model", "--target", "class=LUAD", "--out", tmp_path / "out"]
    message = refused(*common, "--images", tmp_path / "small.png")
    assert "small.png: 16 x 8 px is smaller than the model's tile of 16 px" in message
    assert "the model works on RGB images, this is gray" in refused(*common, "--images", tmp_path / "gray.png")
    assert "there are no images at" in refused(*common, "--images", tmp_path / "none.png")


def test_genes_of_the_sources_come_from_tables(world, tmp_path):
    (tmp_path / "m.csv").write_text("gene,a,b,large\nTP53,1,0,1\nEGFR,0,1,0\n")
    run("--model", world / "model", "--images", world / "images", "--mutation-table", tmp_path / "m.csv",
        "--class-of-name", "--edit", "mutation=TP53:0", "--steps", 2, "--count", 2,
        "--out", tmp_path / "out")  # fmt: skip
    rows = list(csv.DictReader((tmp_path / "out" / "translations.csv").open()))
    assert [row["file"] for row in rows] == ["COAD__a__TP53-0.png", "COAD__b__TP53-0.png"]
    same = [row["source_condition"] == row["target_condition"] for row in rows]
    assert same == [False, True]  # b's TP53 is 0 already
