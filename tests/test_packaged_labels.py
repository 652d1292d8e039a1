"""The LensNet and the labels that come along are of the GistNet that comes along."""

from __future__ import annotations

from pathlib import Path

import pytest

from actors.training.lens_data import measured_sets
from actors.training.lens_metrics import usable
from cluster.environment import PROJECT_ROOT
from models.gistnet import GistNet
from models.lensnet import FEATURES, LensNet
from storage.focus.labels import label_settings, read_labels

FOLDER = PROJECT_ROOT / "models/packaged/lensnet-smollm2-135m"


@pytest.mark.parametrize(
    ("name", "num_places", "num_usable"),
    [("code-dev", 260, 260), ("prose-dev", 160, 160), ("tasks-code-dev", 150, 109)],
)
def test_labels_can_be_trained_on(name: str, num_places: int, num_usable: int) -> None:
    path: Path = FOLDER / f"{name}.parquet"
    contexts = read_labels(path, list(FEATURES))
    assert len(contexts) == num_places
    assert len(usable(measured_sets(contexts))) == num_usable
    packaged = GistNet.load(PROJECT_ROOT / "models/packaged/gistnet-smollm2-135m")
    assert label_settings(path)["gistnet"] == packaged.digest()
    assert contexts[0].keys.shape[1] == packaged.key_dim


def test_the_net_reads_them() -> None:
    net = LensNet.load(FOLDER)
    assert net.trained_with["gistnet"] == label_settings(FOLDER / "prose-dev.parquet")["gistnet"]
    contexts = read_labels(FOLDER / "prose-dev.parquet", list(FEATURES))
    found = measured_sets(contexts)[0]
    scores = net.scores(found.candidates)
    assert scores.shape == (len(found.candidates),)
    assert scores.std() > 0
