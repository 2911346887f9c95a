"""Conditions by name: classes, scores, sets of conditions, their guidance, and their way into a model folder."""

from __future__ import annotations

import json
import shutil

import numpy as np
import pytest
import torch
from PIL import Image
from typer.testing import CliRunner

import ldm
from conftest import ROOT
from ldm.cli import app
from ldm.conditioners.class_token import ClassEmbedder
from ldm.conditioners.compose import ConditionerSet, conditions_given, guidance_terms, parse_conditions
from ldm.conditioners.score import ScoreEmbedder
from ldm.config import instantiate_from_config
from ldm.diffusion.guidance import cfg, compose
from ldm.errors import UserError
from ldm.model_folder import write_model_folder

CLASSES = ["LUAD", "LUSC", "HNSC"]
UNET = dict(in_channels=3, out_channels=3, model_channels=32, num_res_blocks=1, attention_resolutions=[2],
            channel_mult=[1, 2], num_heads=2, use_spatial_transformer=True, context_dim=24, image_size=16)  # fmt: skip


def module(name: str, **params) -> dict:
    return {"target": f"ldm.conditioners.{name}", "params": params}


def three() -> dict:
    members = {
        "class": module("class_token.ClassEmbedder", classes=CLASSES, dim=24, dropout=0.2),
        "score": module("score.ScoreEmbedder", dim=128, dropout=0.5),
        "ssl": module("ssl.PatchEmbedder", embed_dim=5, context_dim=24, dropout=0.0),
    }
    return module("compose.ConditionerSet", conditioners=members)


def model_node(conditioner: dict, **params) -> dict:
    return {
        "target": "ldm.latent_diffusion.LatentDiffusion",
        "params": {
            "unet_config": {"target": "ldm.networks.unet.UNetModel", "params": UNET | params.pop("unet", {})},
            "first_stage_config": {"target": "ldm.autoencoder.autoencoder.IdentityFirstStage"},
            "cond_stage_config": conditioner,
            "use_ema": False,
            **params,
        },
    }


def build(conditioner: dict, **params) -> ldm.latent_diffusion.LatentDiffusion:
    torch.manual_seed(0)
    model = instantiate_from_config(model_node(conditioner, **params)).eval()
    with torch.no_grad():
        for parameter in model.model.parameters():
            parameter.add_(torch.randn_like(parameter) * 0.05)
    return model


@pytest.fixture(scope="module")
def model():
    return build(three())


def test_class_names_and_indices_are_the_same_condition():
    embedder = ClassEmbedder(CLASSES, dim=8)
    by_name = embedder({"class": ["LUSC", "LUAD"]})["crossattn"]
    torch.testing.assert_close(by_name, embedder({"class": torch.tensor([1, 0])})["crossattn"])
    assert by_name.shape == (2, 1, 8)
    dropped = embedder({"class": ["LUSC", "LUAD"]}, torch.tensor([True, False]))["crossattn"]
    torch.testing.assert_close(dropped[:1], embedder.null()["crossattn"])
    torch.testing.assert_close(dropped[1:], by_name[1:])
    assert ClassEmbedder(CLASSES, 8, acts="vector")({"class": ["LUSC"]})["vector"].shape == (1, 8)


def test_the_class_embedder_is_the_published_one(oracle):
    io = torch.load(oracle / "more" / "pathldm_class_ckpt" / "io.pt", weights_only=True)
    weights = torch.load(oracle / "more" / "pathldm_class_ckpt" / "model.ckpt", weights_only=True)["state_dict"]
    embedder = ClassEmbedder(["a", "b", "c", "d"], dim=32, key="class_label")
    own = {n.removeprefix("cond_stage_model."): v for n, v in weights.items() if n.startswith("cond_stage_model.")}
    embedder.load_state_dict(own)
    torch.testing.assert_close(embedder(io["batch"])["crossattn"], io["c"])
    torch.testing.assert_close(embedder.null()["crossattn"].expand(2, 1, 32), io["uc"])


def test_scores_lie_in_0_1_and_have_a_learned_null():
    embedder = ScoreEmbedder(dim=6)
    vectors = embedder({"score": torch.tensor([0.0, 0.5, 1.0])})["vector"]
    torch.testing.assert_close(vectors[1], (vectors[0] + vectors[2]) / 2)  # linear, as published
    dropped = embedder({"score": torch.tensor([0.0, 0.5])}, torch.tensor([True, False]))["vector"]
    torch.testing.assert_close(dropped[0], embedder.null()["vector"][0])
    for wrong in (1.2, -0.1, float("nan"), [0.5, 2.0]):
        with pytest.raises(UserError, match=r"lies in \[0, 1\]"):
            embedder.read({"score": wrong})
    with pytest.raises(UserError, match="is a number"):
        embedder.parse("score", "high")
    assert ScoreEmbedder(6, acts="crossattn", hidden=4)({"score": torch.rand(2)})["crossattn"].shape == (2, 1, 6)


@pytest.mark.parametrize("conditioner", [three(), three()["params"]["conditioners"]["class"]])
def test_training_reaches_every_parameter_of_a_conditioner(conditioner):
    model = build(conditioner)
    batch = {
        "image": torch.randn(6, 3, 16, 16).clamp(-1, 1),
        "class": ["LUAD", "LUSC", "HNSC"] * 2,
        "score": torch.rand(6),
        "ssl": torch.randn(6, 5),
    }
    model.loss(batch, torch.Generator().manual_seed(1)).mean().backward()
    for name, parameter in model.cond_stage_model.named_parameters():
        assert parameter.grad is not None, name
        assert parameter.grad.abs().sum() > 0, name


def test_each_condition_is_dropped_by_itself():
    conditions = instantiate_from_config(three())
    drops = conditions.draw(2000, torch.Generator().manual_seed(0))
    assert drops.shape == (2000, 3)
    assert [round(float(rate), 1) for rate in drops.float().mean(0)] == [0.2, 0.5, 0.0]
    assert abs(float((drops[:, 0] & drops[:, 1]).float().mean()) - 0.1) < 0.03  # independently
    batch = {"class": ["LUAD"] * 2, "score": torch.tensor([0.3, 0.3]), "ssl": torch.randn(2, 5)}
    cond = conditions(batch, torch.tensor([[True, False, False], [False, True, False]]))
    null = conditions.null()
    assert list(cond) == list(null) == ["class/crossattn", "score/vector", "ssl/crossattn"]
    torch.testing.assert_close(cond["class/crossattn"][0], null["class/crossattn"][0])
    torch.testing.assert_close(cond["score/vector"][1], null["score/vector"][0])
    assert not torch.equal(cond["score/vector"][0], cond["score/vector"][1])


def test_conditions_not_given_are_null_and_one_goes_with_many(model):
    cond, null = model.condition(score=[0.1, 0.9], class_="LUSC"), model.null_condition()
    assert {len(value) for value in cond.values()} == {2}
    torch.testing.assert_close(cond["ssl/crossattn"], null["ssl/crossattn"].expand(2, 1, 24))
    assert not torch.equal(cond["score/vector"][0], cond["score/vector"][1])
    features = torch.randn(2, 5)
    torch.testing.assert_close(
        model.condition(features)["ssl/crossattn"], model.condition(ssl=features.numpy())["ssl/crossattn"]
    )


def test_a_set_tells_the_network_what_its_parts_are(model):
    seen = {}

    def network(x, time, **inputs):
        seen.update(inputs)
        return x

    cond = model.condition(score=0.3, class_="LUSC", ssl=torch.ones(5))
    model.make_denoiser(network)(torch.randn(1, 3, 16, 16), torch.ones(1), cond)
    torch.testing.assert_close(seen["context"], torch.cat([cond["class/crossattn"], cond["ssl/crossattn"]], 1))
    torch.testing.assert_close(seen["vector"], cond["score/vector"])


def test_three_scales_are_three_network_calls_combined_by_hand(model):
    x, sigma = 3 * torch.randn(2, 3, 16, 16), torch.full((2,), 3.0)
    cond = model.condition(score=[0.1, 0.9], class_=["LUSC", "LUAD"], ssl=torch.randn(2, 5))
    null = {key: value.expand(2, *value.shape[1:]) for key, value in model.null_condition().items()}
    scales, calls = {"class": 3.0, "score": 1.5, "ssl": 0.5}, []
    plain = model.denoiser()

    def counted(x, sigma, cond):
        calls.append(len(x))
        return plain(x, sigma, cond)

    terms = guidance_terms(model.null_condition(), cond, scales)
    together = compose(counted, model.null_condition(), terms)(x, sigma, cond)
    assert calls == [8]  # one call; the null once
    base = plain(x, sigma, null)
    by_hand = base.clone()
    for name, scale in scales.items():
        alone = null | {key: value for key, value in cond.items() if key.startswith(f"{name}/")}
        by_hand += scale * (plain(x, sigma, alone) - base)
    near = {"rtol": 0.0, "atol": 1e-5 * float(by_hand.detach().abs().max())}
    torch.testing.assert_close(together, by_hand, **near)
    jointly = compose(plain, null, guidance_terms(null, cond, {"class+score+ssl": 2.0}))(x, sigma, cond)
    torch.testing.assert_close(jointly, cfg(plain, null, 2.0)(x, sigma, cond), **near)
    image = ldm.Sampler(guidance_scale=scales).settled(model, "sample").guided(model, cond).denoiser(x, sigma, cond)
    torch.testing.assert_close(image, by_hand.clamp(-1, 1), **near)  # pixels are clipped


def test_a_condition_that_is_not_given_costs_no_network_call(model):
    cond = model.condition(score=0.5)
    terms = guidance_terms(model.null_condition(), cond, {"score": 3.0, "class": 2.0})
    assert [scale for _, scale in terms] == [3.0]


@pytest.mark.parametrize(
    ("given", "message"),
    [
        ({"clas": "LUAD"}, "no condition 'clas'; did you mean 'class'"),
        ({"class": "LUAT"}, "no class 'LUAT'; did you mean 'LUAD'"),
        ({"score": 1.5}, r"lies in \[0, 1\]; got 1.5"),
        ({"score": [0.1, 0.2], "class": ["LUAD"] * 3}, "got 2, 3"),
        ({"ssl": np.zeros((1, 7))}, "dimension 5"),
        ({}, "takes class, score, ssl"),
    ],
)
def test_a_wrong_condition_is_one_message(model, given, message):
    with pytest.raises(UserError, match=message):
        conditions_given(model.cond_stage_model, given)


@pytest.mark.parametrize(
    ("texts", "message"),
    [(["score"], "name=value"), (["score=0.1", "score=0.2"], "given twice"), (["ssl=1"], "no text stands for")],
)
def test_a_wrong_command_line_condition_is_one_message(model, texts, message):
    with pytest.raises(UserError, match=message):
        parse_conditions(model.cond_stage_model, texts)


@pytest.mark.parametrize(
    ("scales", "message"),
    [({"clas": 2.0}, "did you mean 'class'"), ({"class": 2.0, "class+ssl": 1.0}, "two guidance scales")],
)
def test_a_wrong_guidance_scale_is_one_message(model, scales, message):
    with pytest.raises(UserError, match=message):
        guidance_terms(model.null_condition(), model.condition(score=0.2), scales)


def test_two_conditioners_of_one_key_are_refused():
    members = three()["params"]["conditioners"]
    with pytest.raises(UserError, match="both read 'score'"):
        ConditionerSet({"a": members["score"], "b": members["score"]})


def test_data_with_a_class_that_the_model_lacks_are_refused():
    embedder = ClassEmbedder(CLASSES, 4)
    embedder.check_data({"conditions": {"class": {"names": ["LUAD"]}}})
    with pytest.raises(UserError, match="'BRCA'"):
        embedder.check_data({"conditions": {"class": {"names": ["LUAD", "BRCA"]}}})


@pytest.mark.slow
def test_a_moved_model_folder_samples_by_names_as_before(model, tmp_path):
    node = model_node(three())
    write_model_folder(tmp_path / "a", node, model.state_dict(), {})
    shutil.move(tmp_path / "a", tmp_path / "b")
    loaded = ldm.load_model(tmp_path / "b")
    assert loaded.cond_stage_model.describe()["class"].names == tuple(CLASSES)
    given = {"class": "LUSC", "score": 0.7}
    sampler = ldm.Sampler(steps=3, progress=False, guidance_scale={"class": 2.0, "score": 3.0})
    expected = ldm.sample(model, model.condition(**given), 2, sampler)
    torch.testing.assert_close(ldm.sample(loaded, loaded.condition(**given), 2, sampler), expected)

    def run(*args) -> None:
        call = ["sample", "--model", tmp_path / "b", "--steps", 3, "--device", "cpu", *args]
        CliRunner().invoke(app, [str(arg) for arg in call], catch_exceptions=False)

    scales = ["--guidance-scale", "class=2", "--guidance-scale", "score=3"]
    words = ["--condition", "class=LUSC", "--condition", "score=0.7", "--count", 2]
    run(*words, *scales, "--out", tmp_path / "out")
    made = np.asarray(Image.open(tmp_path / "out" / "00000.png"))
    alone = ldm.to_uint8(ldm.sample(loaded, loaded.condition(**given), 2, sampler))[0]
    assert np.abs(made.astype(int) - alone).max() <= 1
    about = json.loads(Image.open(tmp_path / "out" / "00001.png").text["SYNTHETIC"])
    assert about["condition"] == "class=LUSC score=0.7"
    (tmp_path / "table.csv").write_text("class,score\nLUSC,0.7\nLUAD,0.1\n")
    run("--table", tmp_path / "table.csv", *scales, "--out", tmp_path / "table")
    by_table = np.asarray(Image.open(tmp_path / "table" / "00000.png"))
    assert np.abs(made.astype(int) - by_table).max() <= 1  # the same seed and condition
    said = CliRunner().invoke(app, ["describe", str(tmp_path / "b")], catch_exceptions=False).output
    assert "class        class: LUAD, LUSC, HNSC" in said
    assert "score        score (range (0, 1))" in said
    with pytest.raises(UserError, match="did you mean 'LUAD'"):
        run("--condition", "class=LUAT", "--out", tmp_path / "none")


@pytest.mark.slow
def test_a_training_becomes_a_model_folder_that_needs_nothing_else(tmp_path):
    """Genes, gene sets, class names and the text tower travel; the files they came from may be gone."""
    sources = tmp_path / "sources"
    sources.mkdir()
    (sources / "genes.txt").write_text("TP53\nKRAS\nEGFR\n")
    (sources / "sets.gmt").write_text("growth\tx\tKRAS\tEGFR\nguard\tx\tTP53\n")
    shutil.copy(ROOT / "tests" / "configs" / "tiny_clip.json", sources / "tower.json")
    members = {
        "class": module("class_token.ClassEmbedder", classes=CLASSES, dim=24),
        "omics": module("omics.OmicsEmbedder", mutation_genes=str(sources / "genes.txt"), dim=128),
        "sets": module(
            "omics.GeneSetEmbedder",
            gene_sets=str(sources / "sets.gmt"),
            dim=24,
            expression_genes=str(sources / "genes.txt"),
        ),
        "text": module("text.TextEmbedder", model=str(sources / "tower.json"), trainable=True, context_dim=24),
    }
    node = model_node(module("compose.ConditionerSet", conditioners=members))
    torch.manual_seed(0)
    model = instantiate_from_config(node).eval()
    checkpoint = {"state_dict": model.state_dict(), "histoldm_config": {"model": node}}
    model.on_save_checkpoint(checkpoint)
    torch.save(checkpoint, tmp_path / "last.ckpt")
    given = {
        "class": "LUSC",
        "mutation": {"TP53": 1},
        "expression": {"KRAS": 0.9},
        "text": "a section of lung",
    }
    expected = model.condition(**given)
    ldm.export(tmp_path / "last.ckpt", tmp_path / "made")
    shutil.rmtree(sources)
    for path in (shutil.move(tmp_path / "made", tmp_path / "elsewhere"), tmp_path / "last.ckpt"):
        cond = ldm.load_model(path).condition(**given)
        assert list(cond) == list(expected)
        for key, value in expected.items():
            torch.testing.assert_close(cond[key], value, rtol=1e-5, atol=1e-5)
    with pytest.raises(UserError, match="did you mean 'KRAS'"):
        model.condition(mutation={"KRASS": 1})
    (tmp_path / "elsewhere" / "omics_mutation_genes.txt").unlink()
    with pytest.raises(UserError, match="which is no file of the folder"):
        ldm.load_model(tmp_path / "elsewhere")


@pytest.mark.slow
@pytest.mark.parametrize("network", ["unet", "transformer"])
def test_the_overfitting_benchmark_runs_on_the_sample_data(network, shared, capsys):
    from benchmarks import overfit_conditions

    data = str(shared("data/mitosis").parent)
    overfit_conditions.main(["--data", data, "--network", network, "--steps", "2", "--only", "score", "text"])
    lines = capsys.readouterr().out.splitlines()
    assert [line.split()[:2] for line in lines[1:]] == [["score", "6"], ["text", "7"]]
    with pytest.raises(UserError, match="missed by score"):
        overfit_conditions.main(["--data", data, "--network", network, "--steps", "1", "--only", "score", "--check"])


def test_a_canvas_keeps_a_condition_whose_first_window_is_null():
    """What is given is told by name, not by the value in the corner of the canvas."""
    model = build(three())
    grid = torch.randn(2, 2, 5)
    grid[0, 0] = 0  # the null of the features
    settings = {"steps": 2, "progress": False, "guidance_scale": {"class": 2.0, "ssl": 2.0}, "guidance_interval": None}
    one = ldm.large_image(model, grid, conditions={"class": "LUAD"}, sampler=ldm.Sampler(**settings))
    grid[1, 1] = -grid[1, 1]
    other = ldm.large_image(model, grid, conditions={"class": "LUAD"}, sampler=ldm.Sampler(**settings))
    assert not torch.equal(one, other)


def test_sampling_from_another_cohort_checks_its_genes_and_encoder(tmp_path):
    import pandas as pd

    from ldm.data.cohort import merge_index, write_store
    from ldm.requests.tiles import AskedTiles, requested_tiles

    node = module("omics.OmicsEmbedder", dim=128, mutation_genes=["TP53", "KRAS", "EGFR"])
    model = build(node, unet={"use_spatial_transformer": False, "context_dim": None})
    model.metadata = {"conditions": {"mutation": {"source": "omics/mutation"}}}
    write_store(tmp_path, "a", lambda i: np.zeros((16, 16, 3), np.uint8), 2, attrs={"tile_size": 16})
    merge_index(tmp_path, pd.DataFrame({"slide": "a", "row": [0, 1], "sample": "S"}))
    (tmp_path / "omics").mkdir()
    table = pd.DataFrame([[1, 0, 0]], index=["S"], columns=["TP53", "KRAS", "EGFR"])
    table.to_parquet(tmp_path / "omics" / "mutation.parquet")
    asked = requested_tiles(model, AskedTiles(tmp_path))
    by_store = model.condition(**asked.given(range(2)))["vector"][:1]
    torch.testing.assert_close(by_store, model.condition(mutation={"TP53": 1, "KRAS": 0})["vector"])
    table[["KRAS", "EGFR", "TP53"]].to_parquet(tmp_path / "omics" / "mutation.parquet")
    with pytest.raises(UserError, match="genes"):
        requested_tiles(model, AskedTiles(tmp_path))


def test_a_table_is_read_field_by_field(model, tmp_path):
    from ldm.requests.tiles import AskedTiles, requested_tiles

    path = tmp_path / "t.csv"
    path.write_text("class, score\nLUAD,0.5\nLUSC,1\n")
    assert requested_tiles(model, AskedTiles(table=path)).values == {"class": ["LUAD", "LUSC"], "score": [0.5, 1.0]}
    for text, message in (
        ("class,score\nLUAD,0.5,x\n", "line 2 has 3 cells"),
        ("class,score\nLUAD,\n", "row 2 has no score"),
        ("", "has no rows"),
        ("class,class\nLUAD,LUAD\n", "2 columns called 'class'"),
    ):
        path.write_text(text)
        with pytest.raises(UserError, match=message):
            requested_tiles(model, AskedTiles(table=path))
    path.write_text("class\nLUAD\n")
    with pytest.raises(UserError, match="given twice"):
        requested_tiles(model, AskedTiles(table=path, conditions=["class=LUSC"]))


def test_grades_are_class_names():
    embedder = ClassEmbedder(["1", "2", "3"], 4)
    assert embedder.labels(torch.tensor([2.0, 1.0])).tolist() == [1, 0]


def test_fine_tuning_takes_a_conditioner_of_the_same_names_alone(tmp_path):
    def of(classes, **params):
        return build(module("class_token.ClassEmbedder", classes=classes, dim=24), **params)

    source = of(["A", "B"])
    source.cond_stage_model.embedding.weight.data += 1
    node = model_node(module("class_token.ClassEmbedder", classes=["A", "B"], dim=24))
    folder = str(write_model_folder(tmp_path / "model", node, source.state_dict(), {}))
    checkpoint = {"state_dict": source.state_dict(), "histoldm_config": {"model": node}}
    source.on_save_checkpoint(checkpoint)
    torch.save(checkpoint, tmp_path / "last.ckpt")
    weight = source.cond_stage_model.embedding.weight
    for start in (folder, str(tmp_path / "last.ckpt")):
        assert torch.equal(of(["A", "B"], ckpt_path=start).cond_stage_model.embedding.weight, weight)
        assert not torch.equal(of(["B", "A"], ckpt_path=start).cond_stage_model.embedding.weight, weight)
