from __future__ import annotations

import json
import math
from pathlib import Path

import numpy as np
import pandas as pd
import pytest
import torch
from published import guided_diffusion_unet, load, relative

from ldm.conditioners.compose import conditions_given, parse_conditions
from ldm.conditioners.omics import GeneSetEmbedder, OmicsEmbedder
from ldm.config import instantiate_from_config, load_config, validate
from ldm.errors import UserError
from ldm.training.run import CALLBACKS

MUTATION = ["TP53", "EGFR", "KRAS"]
EXPRESSION = ["MKI67", "PTEN", "CD8A", "VIM"]
SETS = {"CYCLE": ["MKI67", "TP53"], "IMMUNE": ["CD8A", "PTEN"], "DRIVERS": ["EGFR", "KRAS", "TP53"]}


def omics(seed: int = 0, **options) -> OmicsEmbedder:
    torch.manual_seed(seed)
    return OmicsEmbedder(**{"dim": 8, "mutation_genes": MUTATION, "expression_genes": EXPRESSION, **options})


def gene_sets(**options) -> GeneSetEmbedder:
    torch.manual_seed(0)
    sources = {"mutation_genes": MUTATION, "expression_genes": EXPRESSION}
    return GeneSetEmbedder(**{"gene_sets": SETS, "dim": 8, "width": 6, **sources, **options})


def random_batch(count: int = 4) -> dict[str, torch.Tensor]:
    torch.manual_seed(1)
    mutation = torch.randint(0, 2, (count, 3)).float()
    mutation[0] = torch.tensor([1.0, math.nan, 0.0])
    mutation[1] = 1
    expression = torch.rand(count, 4)
    expression[0, 2] = math.nan
    return {"mutation": mutation, "expression": expression}


def in_gene_order(values: torch.Tensor, genes: torch.Tensor) -> torch.Tensor:
    return torch.empty_like(values, dtype=torch.float32).scatter_(1, genes, values.float())


def check_published(golden: dict, state: dict, kwargs: dict, expected: torch.Tensor, net: torch.nn.Module) -> None:
    module = OmicsEmbedder(128, [f"m{i}" for i in range(6)], [f"e{i}" for i in range(9)]).eval()
    module.load_state_dict(state)
    batch = {
        "mutation": in_gene_order(kwargs["genomics_mutation"], kwargs["genomics_genes"]),
        "expression": in_gene_order(kwargs["transcriptomics_exp"], kwargs["transcriptomics_genes"]),
    }
    for ours, theirs in {"mutation": "genomics", "expression": "transcriptomics"}.items():
        if f"{theirs}_multiplier" in kwargs:
            batch[f"{ours}_multiplier"] = kwargs[f"{theirs}_multiplier"]
    with torch.no_grad():
        out = net(golden["x"], golden["t"], y=kwargs["y"], vector=module(batch)["vector"])
    assert relative(out, expected) < 1e-5
    batch["mutation"] = 1 - batch["mutation"].clamp(max=1)
    with torch.no_grad():
        assert relative(net(golden["x"], golden["t"], y=kwargs["y"], vector=module(batch)["vector"]), expected) > 1e-4


def test_omics_add_to_the_time_embedding_as_published(oracle):
    golden = load(oracle / "hismmdm_omics_unet.pt")
    net = guided_diffusion_unet(load(oracle / "hismmdm_unet.pt"))
    check_published(golden, golden["extra_state_dict"], golden, golden["out"], net)


@pytest.mark.parametrize("which", ["source", "target"])
def test_unknown_values_and_multipliers_act_as_published(oracle, which):
    golden = load(oracle / "more" / "hismmdm_omics_translate.pt")
    parts = ("genomics_emb", "transcriptomics_emb")
    own = {name: value for name, value in golden["state_dict"].items() if name.startswith(parts)}
    rest = {name: value for name, value in golden["state_dict"].items() if name not in own}
    net = guided_diffusion_unet({**golden, "state_dict": rest})
    check_published(golden, own, golden[which], golden[f"out_{which}"], net)


@pytest.mark.parametrize("training", [True, False])
@pytest.mark.parametrize("make", [omics, gene_sets])
def test_gradient_reaches_every_parameter(make, training):
    module = make().train(training)
    drop = torch.tensor([False, False, False, True])
    (part,) = module(random_batch(), drop).values()
    part.mul(torch.randn_like(part)).sum().backward()
    for name, parameter in module.named_parameters():
        assert parameter.grad is not None, name
        cancelled = training and name.endswith(("network.0.bias", "network.3.bias"))  # batch statistics take it away
        assert cancelled or parameter.grad.abs().sum() > 1e-7, name
        if name.endswith("emb.weight"):
            assert (parameter.grad.abs().sum(1) > 0).all(), name  # every gene's


def test_batch_statistics_are_over_genes_not_over_samples():
    module, batch = omics().train(), random_batch()
    alone = torch.cat([module({key: value[[i]] for key, value in batch.items()})["vector"] for i in range(4)])
    torch.testing.assert_close(module(batch)["vector"], alone)


@pytest.mark.parametrize("make", [omics, gene_sets])
def test_dropped_samples_get_the_null_and_others_stay(make):
    module, batch = make().eval(), random_batch()
    drop = torch.tensor([True, False, True, False])
    (kept,), (mixed,), (null,) = module(batch).values(), module(batch, drop).values(), module.null().values()
    assert torch.equal(mixed[drop], null.expand(2, *null.shape[1:]))
    assert torch.equal(mixed[~drop], kept[~drop])
    assert (kept - null).abs().flatten(1).sum(1).min() > 1e-3
    if make is omics:
        assert not null.any()


def test_gene_side_work_is_done_once_without_training(monkeypatch):
    module, batch = omics().eval().requires_grad_(False), random_batch()
    runs = []
    for mlp in (module.genomics_emb_mlp, module.transcriptomics_emb_mlp):
        mlp.register_forward_hook(lambda *_: runs.append(1))
    with torch.inference_mode():
        first = module(batch)["vector"].clone()
    module(batch)
    assert len(runs) == 2
    fresh = omics().eval()
    fresh.load_state_dict(module.state_dict())
    torch.testing.assert_close(fresh(batch)["vector"].detach(), first, rtol=0, atol=0)  # it keeps nothing: grad is on
    with torch.no_grad():
        module.genomics_emb.weight.mul_(2)
    assert not torch.equal(module(batch)["vector"], first)
    assert len(runs) == 3
    module.load_state_dict({name: value.clone() for name, value in fresh.state_dict().items()}, assign=True)
    module.requires_grad_(False)
    torch.testing.assert_close(module(batch)["vector"], first, rtol=0, atol=0)
    module.train()(batch)
    after = module.eval()(batch)["vector"]
    assert not torch.equal(after, first)  # the running statistics moved
    torch.testing.assert_close(after, module.requires_grad_(True)(batch)["vector"].detach(), rtol=0, atol=0)


def test_values_are_given_by_name_and_what_is_not_given_adds_nothing():
    module = omics().eval()
    by_name = module(module.read({"mutation": {"TP53": 1, "EGFR": 0, "KRAS": "unknown"}}))["vector"]
    genes = module.gene_vectors("mutation")
    torch.testing.assert_close(by_name[0], genes[0] / (1 + 1e-6))
    torch.testing.assert_close(by_name, module(module.read({"mutation": np.array([1, 0, 2])}))["vector"])
    table = pd.DataFrame({"KRAS": [0.0], "TP53": [1.0]})  # its names count, not its order
    torch.testing.assert_close(by_name, module(module.read({"mutation": table}))["vector"])

    both = {"mutation": [{"TP53": 1}, {"EGFR": 1}], "expression": {"VIM": 1.0}, "mutation_multiplier": [1.0, 0.5]}
    vectors = module(module.read(both))["vector"]
    expression = module(module.read({"expression": {"VIM": 1.0}}))["vector"]
    torch.testing.assert_close(vectors, torch.stack([genes[0], 0.5 * genes[1]]) / (1 + 1e-6) + expression)
    weights = torch.tensor([0.5, 0.5, 0.5, 1.0]).div(0.1).softmax(0)
    torch.testing.assert_close(expression[0], weights @ module.gene_vectors("expression"))


def test_conditions_of_a_command_line():
    module = omics().eval()
    texts = ["mutation=TP53:1,EGFR:0", "expression=MKI67:0.9, PTEN:unknown", "expression_multiplier=2"]
    given = parse_conditions(module, texts)
    assert given["mutation"] == {"TP53": 1, "EGFR": 0}
    assert math.isnan(given["expression"]["PTEN"])
    once = conditions_given(module, {"expression": {"MKI67": 0.9}})["vector"]
    both = conditions_given(module, given)["vector"]
    torch.testing.assert_close(both, 2 * once + module.gene_vectors("mutation")[:1] / (1 + 1e-6))


@pytest.mark.parametrize(
    ("values", "message"),
    [
        ({"mutation": {"TP35": 1}}, "no gene 'TP35'.*did you mean 'TP53'"),
        ({"mutation": {"egfr": 1}}, "did you mean 'EGFR'"),
        ({"mutation": {"TP53": 0.5}}, "'mutation' of TP53 is 0, 1 or unknown; got 0.5"),
        ({"mutation": {"TP53": "yes"}}, "0, 1 or unknown; got 'yes'"),
        ({"mutation": [1, 0]}, r"array \(N, 3\).*got shape \(1, 2\)"),
        ({"mutation": "TP53"}, "got 'TP53'"),
        ({"expression": {"MKI67": 8.2}}, "'expression' of MKI67 .* got 8.2. Scale log2 values by"),
        ({"expression": {"MKI67": -0.1}}, "got -0.1"),
        ({"mutation_multiplier": 1.0}, "'mutation_multiplier' is given without 'mutation'"),
        ({"mutation": {"TP53": 1}, "mutation_multiplier": "a lot"}, "is a number; got 'a lot'"),
        ({"mutation": [{"TP53": 1}] * 2, "expression": [{"VIM": 1}] * 3}, "2 of mutation, 3 of expression"),
    ],
)
def test_bad_values(values, message):
    with pytest.raises(UserError, match=message):
        omics().read(values)


@pytest.mark.parametrize(
    ("text", "message"),
    [("mutation=TP53", "mutation=TP53:1,EGFR:0; got 'TP53'"), ("mutation=TP53:1,TP53:0", "names the gene TP53 twice")],
)
def test_bad_texts(text, message):
    with pytest.raises(UserError, match=message):
        parse_conditions(omics(), [text])


def test_bad_genes(tmp_path):
    with pytest.raises(UserError, match="needs mutation_genes, expression_genes or both"):
        OmicsEmbedder(8)
    with pytest.raises(UserError, match="two or more genes; got TP53"):
        OmicsEmbedder(8, mutation_genes=["TP53"])
    with pytest.raises(UserError, match="has TP53 twice"):
        OmicsEmbedder(8, mutation_genes=["TP53", "EGFR", "TP53"])
    with pytest.raises(UserError, match=r"cannot read `expression_genes` from .*none.txt"):
        OmicsEmbedder(8, expression_genes=str(tmp_path / "none.txt"))
    (tmp_path / "a.json").write_text("{}")
    with pytest.raises(UserError, match="no list `genes`"):
        OmicsEmbedder(8, expression_genes=str(tmp_path / "a.json"))


def test_data_of_other_genes_are_refused():
    module = omics()
    module.check_data({"conditions": {"mutation": {"genes": MUTATION}, "expression": {"genes": EXPRESSION}}})
    with pytest.raises(UserError, match=r"the data lack 1 \(KRAS\); the model lacks 1 \(BRAF\).*--gene-list"):
        module.check_data({"conditions": {"mutation": {"genes": ["TP53", "EGFR", "BRAF"]}}})
    with pytest.raises(UserError, match="the same in another order"):
        module.check_data({"conditions": {"expression": {"genes": EXPRESSION[::-1]}}})
    with pytest.raises(UserError, match="from stage, which has no genes"):
        module.check_data({"conditions": {"expression": {"source": "stage"}}})


def moved(module, tmp_path, node):
    """The module built again from its portable node, in a folder that has nothing else."""
    params, files = module.portable()
    for name, text in files.items():
        (tmp_path / name).write_text(text)
    params = {key: str(tmp_path / value[2:]) if str(value)[:2] == "./" else value for key, value in params.items()}
    again = instantiate_from_config({"target": node["target"], "params": node["params"] | params}).eval()
    again.load_state_dict(module.state_dict())
    return again


@pytest.mark.filterwarnings("error")
def test_gene_lists_travel_with_the_model(tmp_path):
    source = tmp_path / "mutation.json"
    source.write_text(json.dumps({"genes": MUTATION}))
    params = {"dim": 8, "mutation_genes": str(source), "expression_genes": EXPRESSION}
    node = {"target": "ldm.conditioners.omics.OmicsEmbedder", "params": params}
    module = instantiate_from_config(node).eval()
    source.unlink()
    again = moved(module, tmp_path, node)
    assert again.describe() == module.describe()
    assert list(again.describe()["mutation"].genes) == MUTATION
    torch.testing.assert_close(again(random_batch()), module(random_batch()))


def test_gene_sets_travel_with_the_model(tmp_path):
    gmt = tmp_path / "own.gmt"
    gmt.write_text("A\thttp://x\tMKI67\tNOSUCH\nB\t\tPTEN\tVIM\tOTHER\n")
    params = {"gene_sets": str(gmt), "dim": 8, "expression_genes": EXPRESSION, "width": 4}
    node = {"target": "ldm.conditioners.omics.GeneSetEmbedder", "params": params}
    with pytest.warns(UserWarning, match="2 genes of gene sets .*: NOSUCH, OTHER"):
        module = instantiate_from_config(node).eval()
    gmt.unlink()
    again = moved(module, tmp_path, node)
    torch.testing.assert_close(again(random_batch()), module(random_batch()))


def test_a_gene_set_is_a_token_of_its_own_genes():
    module, batch = gene_sets().eval(), random_batch()
    tokens = module(batch)["crossattn"]
    assert tokens.shape == (4, 3, 8)
    changed = {**batch, "expression": batch["expression"].clone()}
    changed["expression"][:, 0] = 1 - changed["expression"][:, 0]  # MKI67, of the set CYCLE
    differ = (module(changed)["crossattn"] - tokens).abs().sum(2)
    assert (differ[:, 0] > 1e-4).all()
    assert not differ[:, 1:].any()
    unused = {**batch, "expression": batch["expression"].clone()}
    unused["expression"][:, 3] = 0  # VIM, of no set
    assert torch.equal(module(unused)["crossattn"], tokens)

    expression = batch["expression"][2]
    emb, row = module.expression_emb.weight, {name: i for i, name in enumerate(["MKI67", "PTEN", "CD8A"])}
    value = {name: 2 * expression[EXPRESSION.index(name)] - 1 for name in row}
    mean = (value["PTEN"] * emb[row["PTEN"]] + value["CD8A"] * emb[row["CD8A"]]) / math.sqrt(2)
    expected = module.set_emb[1] + module.project(mean) + module.project.bias  # the mutations of no gene
    torch.testing.assert_close(tokens[2, 1], expected)


def test_unknown_genes_of_a_set_are_left_out_and_their_share_is_told():
    module = gene_sets(mutation_genes=None, gene_sets={"A": ["PTEN", "CD8A"], "B": ["VIM"]}).eval()
    batch = random_batch(2)
    batch["expression"][0] = torch.tensor([0.1, 0.8, math.nan, math.nan])
    tokens = module(batch)["crossattn"]
    mean = 0.6 * module.expression_emb.weight[0]
    unknown = module.unknown_emb["expression"]
    torch.testing.assert_close(tokens[0, 0], module.set_emb[0] + module.project(mean) + 0.5 * unknown)
    torch.testing.assert_close(tokens[0, 1], module.set_emb[1] + module.project.bias + unknown)
    given = conditions_given(module, {"expression": {"PTEN": 0.8}})["crossattn"]
    torch.testing.assert_close(given, tokens[:1])


def test_bad_gene_sets(tmp_path):
    with pytest.raises(UserError, match=r"no gene of the set 'X' \(NOSUCH.*1 of 2 sets"):
        gene_sets(gene_sets={"A": ["TP53"], "X": ["NOSUCH"]})
    with pytest.raises(UserError, match="no gene set has a gene of `expression_genes`"):
        gene_sets(gene_sets={"A": ["TP53"]})
    (tmp_path / "sets.gmt").write_text("A\tdescription\tTP53\nB TP53 EGFR\n")
    with pytest.raises(UserError, match=r"line 2 is no gene set.*got 'B TP53 EGFR'"):
        gene_sets(gene_sets=str(tmp_path / "sets.gmt"))
    (tmp_path / "sets.gmt").write_text("A\t\tTP53\nA\t\tEGFR\n")
    with pytest.raises(UserError, match="has A twice"):
        gene_sets(gene_sets=str(tmp_path / "sets.gmt"))
    with pytest.raises(UserError, match="VIM is in none of the model's gene sets"):
        gene_sets().read({"expression": {"VIM": 1.0}})
    with pytest.raises(UserError, match=r"both sources .* read 'omics'"):
        gene_sets(mutation_key="omics", expression_key="omics")


def test_the_configs_hold(tmp_path):
    callbacks = {name: {"target": target} for name, target in CALLBACKS.items()}
    for name in ("demo/omics.yaml", "latent-diffusion/tcga_omics.yaml"):
        path = Path(__file__).parents[1] / "configs" / name
        config = load_config([path], (), {"lightning": {"callbacks": callbacks}})
        validate(config)
    params = config["model"]["params"]
    members = params["cond_stage_config"]["params"]["conditioners"]
    for kind, genes in {"mutation": MUTATION, "expression": EXPRESSION}.items():
        (tmp_path / f"{kind}.json").write_text(json.dumps({"genes": genes}))
        members["omics"]["params"][f"{kind}_genes"] = str(tmp_path / f"{kind}.json")
    model = instantiate_from_config(params["cond_stage_config"])
    conditions = config["data"]["params"]["conditions"]
    assert set(conditions) == {key for key in model.keys if not key.endswith("_multiplier")}
    width = 4 * params["unet_config"]["params"]["model_channels"]
    assert {key: tuple(value.shape) for key, value in model.null().items()} == {
        "class/vector": (1, width),
        "omics/vector": (1, width),
    }
    with torch.device("meta"):
        net = instantiate_from_config(params["unet_config"])
    assert sum(p.numel() for p in net.parameters()) == 420_505_606
