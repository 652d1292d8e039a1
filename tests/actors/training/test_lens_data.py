"""From measured edits to what a net is trained on: whose worth, in which Working Context."""

from __future__ import annotations

import numpy as np
import torch

from actors.training.lens_data import batch_of, measured_sets, split_documents
from storage.focus.labels import LabelledContext
from tests.actors.training.lens_support import labelled_context


def gains(context: LabelledContext, shown: int, added: int, removed: int) -> list[np.ndarray]:
    sizes = (shown, added, removed)
    return [np.array(e.gains) for e in context.edits if (len(e.shown), len(e.added), len(e.removed)) == sizes]


def test_a_set_for_every_working_context() -> None:
    context = labelled_context(0)
    nothing, some = measured_sets([context])
    assert nothing.shows_nothing
    assert nothing.measured.tolist() == [True] * 9 + [False]
    np.testing.assert_allclose(nothing.worth[:9], gains(context, 0, 1, 0), atol=1e-6)
    ((signs, gain),) = nothing.edits
    assert signs.tolist() == [1, 1, *[0] * 8]
    np.testing.assert_allclose(gain, gains(context, 0, 2, 0)[0].mean(), atol=1e-6)

    assert some.candidates.column("is_shown").tolist() == [1, 1, *[0] * 8]
    assert np.flatnonzero(some.measured).tolist() == [1]
    np.testing.assert_allclose(some.worth[1], -gains(context, 2, 0, 1)[0], atol=1e-6)
    ((signs, gain),) = some.edits
    assert signs.tolist() == [-1, 0, 1, *[0] * 7]
    np.testing.assert_allclose(gain, gains(context, 2, 1, 1)[0].mean(), atol=1e-6)


def test_sets_of_different_sizes_make_a_batch() -> None:
    sets = measured_sets([labelled_context(0), labelled_context(1, num_blocks=7)])
    batch = batch_of(sets)
    assert batch.there.sum(dim=1).tolist() == [10, 10, 7, 7]
    assert batch.measured.sum(dim=1).tolist() == [9, 1, 6, 1]
    assert batch.edit_set.tolist() == [0, 1, 2, 3]
    assert not (batch.measured & ~batch.there).any()
    assert not batch.worth[~batch.measured].any()
    torch.testing.assert_close(batch.worth[2, :6], torch.from_numpy(sets[2].worth[:6].mean(axis=1)))


def test_documents_stay_together() -> None:
    sets = measured_sets([labelled_context(number) for number in range(20)])
    trained, held_back = split_documents(sets, 0.2, seed=1)
    assert {s.uri for s in trained}.isdisjoint({s.uri for s in held_back})
    assert len({s.uri for s in held_back}) == 2
    assert len(trained) + len(held_back) == len(sets)
    again = split_documents(sets, 0.2, seed=1)[1]
    assert {s.uri for s in again} == {s.uri for s in held_back}
