"""Configs, what they refuse and how they say it; the order of training data."""

from __future__ import annotations

import pickle
import sys
from collections import Counter

import pytest
import torch

from ldm import config
from ldm.data.sampler import ResumableBatchSampler, ResumableDataLoader, evaluation_batches
from ldm.errors import UserError


def write(path, text):
    path.write_text(text)
    return path


def test_files_merge_left_to_right_then_overrides(tmp_path):
    a = write(tmp_path / "a.yaml", "model: {target: a.B, params: {x: 1, deep: {y: [1, 2], z: keep}}}\nname: first")
    b = write(tmp_path / "b.yaml", "model: {params: {x: 2, deep: {y: [3]}}}\ndata: {same: '${model.params.x}'}")
    overrides = ["model.params.deep.w=1e-4", "model.params.off=null"]
    cfg = config.load_config([a, b], overrides, {"name": "default", "seed": 5})
    assert cfg == {
        "name": "first",
        "seed": 5,
        "model": {"target": "a.B", "params": {"x": 2, "deep": {"y": [3], "z": "keep", "w": 1e-4}, "off": None}},
        "data": {"same": 2},
    }
    assert type(cfg["model"]["params"]["deep"]["y"]) is list
    config.save_config(cfg, tmp_path / "c.yaml")
    assert config.load_config([tmp_path / "c.yaml"]) == cfg


@pytest.mark.parametrize(
    ("text", "overrides", "message"),
    [
        ("a: [1", [], "is not valid YAML"),
        ("a: 1\na: 2", [], "is not valid YAML"),
        ("- a\n- b", [], "`key: value` pairs"),
        ("a: ${nowhere}", [], "nowhere"),
        ("a: ???", [], "cannot merge"),
        ("a: 1", ["a"], "'a' is not an override"),
        ("a: 1", ["b=[1"], "cannot read the override 'b=[1'"),
        ("\x00", [], "config"),
    ],
)
def test_bad_yaml_is_one_message(tmp_path, text, overrides, message):
    with pytest.raises(UserError) as error:
        config.load_config([write(tmp_path / "a.yaml", text)], overrides)
    assert message in str(error.value)
    assert "\n" not in str(error.value)


SAMPLER = "ldm.data.sampler.ResumableBatchSampler"


def test_instantiate():
    sampler = config.instantiate_from_config({"target": SAMPLER, "params": {"length": 9}}, batch_size=2)
    assert isinstance(sampler, ResumableBatchSampler)
    assert (sampler.length, sampler.batch_size) == (9, 2)
    assert config.get_obj_from_str("torch.optim.AdamW") is torch.optim.AdamW


@pytest.mark.parametrize(
    ("node", "message"),
    [
        ({"target": SAMPLER, "params": {"lenght": 1}}, "'length'"),
        ({"target": SAMPLER, "params": {"length": 1}}, "needs 'batch_size'"),
        ({"target": SAMPLER, "parms": {}}, "did you mean 'params'"),
        ({"target": SAMPLER, "params": [1]}, "expected `key: value` pairs"),
        ({"params": {}}, "expected {target: module.Class"),
        ("ldm.X", "expected `key: value` pairs"),
        ({"target": "ldm.data.sampler.Resumable"}, "module 'ldm.data.sampler' has no 'Resumable'"),
        ({"target": "ldm.data.smapler.X"}, "package 'ldm.data' has no 'smapler'; did you mean 'sampler'"),
        ({"target": "ldm.dat.sampler.X"}, "package 'ldm' has no 'dat'"),
        ({"target": "ldm"}, "is not allowed"),
        ({"target": "subprocess.run"}, "is not allowed"),
        ({"target": "ldm.files.os.system"}, "is not a class or function of"),
        ({"target": "ldm.config.ALLOWED"}, "is not a class or function of"),
        ({"target": "ldm.config.load config"}, "is not a dotted name"),
        ({"target": "ldm.files.write_text", "params": {"path": "x"}}, "is a function; a target must be a class"),
    ],
)
def test_nodes_that_cannot_be_built(node, message):
    with pytest.raises(UserError) as error:
        config.instantiate_from_config(node)
    assert message in str(error.value)


def test_nothing_outside_the_allowances_is_imported(tmp_path, monkeypatch):
    write(tmp_path / "trap.py", "raise SystemExit('imported')")
    monkeypatch.syspath_prepend(tmp_path)
    with pytest.raises(UserError, match="is not allowed"):
        config.instantiate_from_config({"target": "trap.Class"})
    assert "trap" not in sys.modules
    with pytest.raises(SystemExit):
        config.instantiate_from_config({"target": "trap.Class"}, allow=["trap."])


def test_a_package_that_is_not_installed_is_named(tmp_path, monkeypatch):
    write(tmp_path / "needy.py", "import a_package_that_nobody_has")
    monkeypatch.syspath_prepend(tmp_path)
    with pytest.raises(UserError, match="needs the package 'a_package_that_nobody_has'"):
        config.get_obj_from_str("needy.Class", allow=["needy."])


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"modell": {}}, "unknown key 'modell'; did you mean 'model'"),
        ({"model": {"target": SAMPLER, "params": {}, "base_lr": 1}}, "unknown key 'model.base_lr'"),
        ({"model": {"target": SAMPLER, "params": {"seeds": 1}}}, "'model.params.seeds' of ResumableBatchSampler; did"),
        ({"data": {"target": "ldm.nowhere.X"}}, "data.target: 'ldm.nowhere.X' does not exist"),
        ({"data": None}, "data: expected `key: value` pairs"),
        ({"lightning": {"trainr": {}}}, "'lightning.trainr'; did you mean 'trainer'"),
        ({"lightning": {"callbacks": {"x": {"params": {}}}}}, "lightning.callbacks.x: it has `params` but no `target`"),
        (
            {"model": {"target": SAMPLER, "params": {"length": [{"target": SAMPLER, "params": {"sed": 1}}]}}},
            "'model.params.length.0.params.sed' of ResumableBatchSampler; did you mean 'seed'",
        ),
    ],
)
def test_validation_names_the_whole_path(change, message):
    good = {"model": {"target": SAMPLER}, "data": {"target": SAMPLER, "params": {"length": 3}}, "lightning": None}
    config.validate(good)
    with pytest.raises(UserError) as error:
        config.validate({**good, **change})
    assert message in str(error.value)


def test_every_pass_sees_every_item_once_and_ranks_share_the_batches():
    length, world = 23, 3
    ranks = [ResumableBatchSampler(length, 2, seed=5, rank=rank, world_size=world) for rank in range(world)]
    one = ResumableBatchSampler(length, 6, seed=5)
    keys = []
    for step in range(2 * length):
        batch = [key for sampler in ranks for key in sampler.batch(step)]
        assert batch == one.batch(step)
        keys += batch
    passes = [keys[first : first + length] for first in range(0, len(keys) - length + 1, length)]
    assert all(sorted(index for index, _ in keys) == list(range(length)) for keys in passes)
    assert passes[0] != passes[1]
    assert max(Counter(draw for _, draw in keys).values()) == 1
    assert one.batch(0) != ResumableBatchSampler(length, 6, seed=6).batch(0)
    assert len(one) == 3
    assert len(ResumableBatchSampler(2, 6)) == 1
    assert pickle.loads(pickle.dumps(one)).batch(7) == one.batch(7)


@pytest.mark.parametrize("workers", [0, 2])
@pytest.mark.slow
def test_the_loader_goes_on_where_it_was(workers):
    def loader():
        keys = type("Keys", (torch.utils.data.Dataset,), {"__getitem__": lambda self, key: key[0]})()
        sampler = ResumableBatchSampler(7, 2, seed=1)
        context = "fork" if workers else None  # the class is local
        return ResumableDataLoader(keys, sampler, num_workers=workers, multiprocessing_context=context)

    straight = loader()
    seen = [batch.tolist() for _ in range(3) for batch in straight]
    assert len(seen) == 9
    first = loader()
    batches = iter(first)
    assert [next(batches).tolist() for _ in range(2)] == seen[:2]
    second = loader()
    second.load_state_dict(first.state_dict())
    assert [batch.tolist() for _ in range(2) for batch in second] == seen[2:8]


def test_evaluation_sees_every_item_once():
    batches = [evaluation_batches(7, 2, rank=rank, world_size=2) for rank in (0, 1)]
    assert [[index for index, _ in batch] for batch in batches[0]] == [[0, 2], [4, 6]]
    assert [[index for index, _ in batch] for batch in batches[1]] == [[1, 3], [5]]
    assert evaluation_batches(7, 2) == evaluation_batches(7, 2)
