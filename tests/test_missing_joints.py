"""Joints that are lost: how they are found, and what each policy makes of them."""
from __future__ import annotations

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from sparse_stgcn.data import transforms as tf


def broken(seed: int = 6) -> np.ndarray:
    x = np.random.default_rng(seed).normal(size=(2, 12, 5, 3)) + 3
    x[1, :6] = 0             # person 1 comes late
    x[0, 3:5, 2] = 0         # a joint is lost
    x[0, 7, 1, 2] = np.nan   # one coordinate is broken
    x[0, 0, 4] = np.inf      # lost at the start
    x[1, :, 3] = 0           # never seen
    return x


def test_missing_joints_are_found() -> None:
    lost = np.zeros((2, 12, 5), bool)
    lost[0, 3:5, 2] = lost[0, 7, 1] = lost[0, 0, 4] = lost[1, 6:, 3] = True
    np.testing.assert_array_equal(tf.missing_joints(broken()), lost)


def test_keep_changes_nothing() -> None:
    x = broken()
    assert tf.fill_missing(x, "keep") is x


def test_zero_makes_all_finite() -> None:
    x, y = broken(), tf.fill_missing(broken(), "zero")
    assert np.isfinite(y).all() and not y[0, 7, 1].any() and not y[0, 0, 4].any()
    np.testing.assert_array_equal(y[0, 8], x[0, 8])


def test_interpolate_draws_straight_lines() -> None:
    x, y = broken(), tf.fill_missing(broken(), "interpolate")
    np.testing.assert_allclose(y[0, 3, 2], x[0, 2, 2] * 2 / 3 + x[0, 5, 2] / 3)
    np.testing.assert_allclose(y[0, 7, 1], (x[0, 6, 1] + x[0, 8, 1]) / 2)
    np.testing.assert_allclose(y[0, 0, 4], x[0, 1, 4])
    assert not y[1, :6].any(), "an absent person stays absent"
    assert not y[1, :, 3].any(), "a joint never seen stays 0"


def test_drop_keeps_only_complete_frames() -> None:
    x = broken()
    x[1, :, 3] = 1
    x[1, :6] = 0
    y = tf.fill_missing(x, "drop")
    assert y.shape[1] == 8 and not tf.missing_joints(y).any()


def test_drop_never_leaves_nothing() -> None:
    x = np.random.default_rng(7).normal(size=(1, 4, 5, 3))
    x[0, :, 0] = np.nan
    x[0, 1:, 1] = np.nan
    y = tf.fill_missing(x, "drop")
    assert y.shape[1] == 1 and np.isfinite(y).all()


@pytest.mark.parametrize("axes", [2, 3])
def test_drop_does_not_take_an_empty_frame_for_the_most_complete_one(axes: int) -> None:
    x = np.random.default_rng(8).normal(size=(2, 6, 5, 3)) + 3
    x[:, 4] = 0
    x[0, :4, 0] = np.nan
    x[1, 5, 1:3] = 0
    np.testing.assert_array_equal(tf.fill_missing(x, "drop", axes), np.nan_to_num(x[:, :4]))
    x[0, 0, 0] = 3  # a complete frame: those with a missing joint go, as does nobody
    np.testing.assert_array_equal(tf.fill_missing(x, "drop", axes), x[:, [0, 4]])
    x[:, 1:] = np.nan
    x[:, 0] = 0
    assert tf.fill_missing(x, "drop", axes).shape[1] == 1, "where nobody is seen, the empty frame stays"


@settings(max_examples=80, deadline=None)
@given(seed=st.integers(0, 10**6), share=st.floats(0, 1), policy=st.sampled_from(["interpolate", "zero", "drop"]))
def test_every_policy_gives_finite_sequences(seed: int, share: float, policy: str) -> None:
    rng = np.random.default_rng(seed)
    x = rng.normal(size=(2, 7, 6, 3)).astype(np.float32)
    x[rng.uniform(size=x.shape) < share * 0.5] = np.nan
    x[rng.uniform(size=x.shape[:3]) < share] = 0
    y = tf.fill_missing(x, policy)
    assert np.isfinite(y).all() and y.shape[1] >= 1 and y.dtype == x.dtype
    if policy == "interpolate":
        good = ~tf.missing_joints(x)
        np.testing.assert_array_equal(y[good], x[good])


def test_unknown_policy_is_refused() -> None:
    with pytest.raises(ValueError, match="missing='mean'"):
        tf.fill_missing(broken(), "mean")
