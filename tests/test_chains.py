"""Directions in which recording chains move profiles, and a score that leaves them out."""

import numpy as np
import pytest

from lib.audit.chains import directions
from lib.model.scaling import Typicality


def test_the_first_direction_is_that_of_the_largest_movement():
    shifts = np.array([[0.0, 3.0, 0.0], [0.0, -3.0, 0.0], [1.0, 0.0, 0.0]])
    found = directions(shifts, most=2)
    assert np.allclose(np.abs(found), [[0, 1, 0], [1, 0, 0]])
    assert np.allclose(found @ found.T, np.eye(2))


def test_what_is_left_out_does_not_count_and_the_rest_counts_as_before():
    model = Typicality(np.zeros(4), np.ones(4), np.eye(4))
    less = model.without(np.array([[0.0, 1.0, 0.0, 0.0]]))
    profiles = np.array([[0.0, 7.0, 0.0, 0.0], [2.0, 0.0, 0.0, 0.0], [2.0, 7.0, 0.0, 0.0]])
    assert np.allclose(less.two_sided(profiles), [0, 1, 1])  # sqrt(4 / 4)
    assert np.allclose(less.distance(profiles), [0, 1, 1])
    assert np.allclose(model.without(np.zeros((0, 4))).two_sided(profiles), model.two_sided(profiles))


def test_shifts_that_are_not_finite_or_none_are_refused():
    for shifts in (np.full((2, 3), np.nan), np.zeros((0, 3))):
        with pytest.raises(ValueError, match="expected finite shifts"):
            directions(shifts)
