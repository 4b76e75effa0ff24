"""Skeleton: layouts, validation, bones, sides, adjacency."""
from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import yaml

from sparse_stgcn import Skeleton
from sparse_stgcn.skeleton import layouts

LAYOUTS = ("coco", "handmp", "nturgb+d", "openpose")
ARM = {"joints": ["hip", "spine", "left_hand", "right_hand"], "edges": [[1, 0], [2, 1], [3, 1]], "root": 0}


def test_layouts_that_come_with_the_package() -> None:
    assert layouts() == LAYOUTS


@pytest.mark.parametrize("name", LAYOUTS)
def test_layout_is_the_public_one(shared: Path, name: str) -> None:
    golden = json.loads((shared / "golden" / "graph_golden.json").read_text())[name]
    skeleton = Skeleton.load(name)
    assert (len(skeleton), skeleton.root) == (golden["num_node"], golden["center"])
    assert set(skeleton.edges) == {tuple(edge) for edge in golden["inward"]}


@pytest.mark.parametrize("mode", ["spatial", "stgcn_spatial", "binary_adj"])
@pytest.mark.parametrize("name", LAYOUTS)
def test_adjacency_equals_the_public_one(shared: Path, name: str, mode: str) -> None:
    golden = json.loads((shared / "golden" / "graph_golden.json").read_text())[f"{name}|{mode}"]
    want = torch.zeros(golden["shape"], dtype=torch.float64)
    for k, i, j, value in golden["nonzero"]:
        want[k, i, j] = value
    got = Skeleton.load(name).adjacency(mode, dtype=torch.float64)
    assert torch.equal(got, want)
    assert Skeleton.load(name).adjacency(mode).dtype == torch.float32


def test_random_adjacency_follows_the_seed() -> None:
    skeleton = Skeleton.load("nturgb+d")
    first, again, other = (skeleton.adjacency("random", 8, seed) for seed in (1, 1, 2))
    assert first.shape == (8, 25, 25)
    assert torch.equal(first, again)
    assert not torch.equal(first, other)
    assert abs(first.mean() - 0.04) < 0.002
    assert abs(first.std() - 0.02) < 0.002


def test_unknown_adjacency_mode() -> None:
    with pytest.raises(ValueError, match=r"Expected mode to be one of spatial.* Got 'distance'"):
        Skeleton.load("coco").adjacency("distance")


@pytest.mark.parametrize(("name", "odd"), [
    ("nturgb+d", {21: 22, 22: 7, 23: 24, 24: 11, 20: 20, 1: 20}),
    ("coco", {11: 0, 12: 0, 13: 11, 0: 0, 4: 2}),
    ("openpose", {1: 0, 0: 0, 8: 2, 11: 5}),
    ("handmp", {0: 0, 5: 0, 8: 7}),
])
def test_bones_follow_pyskl(name: str, odd: dict[int, int]) -> None:
    skeleton = Skeleton.load(name)
    assert [joint for joint, _ in skeleton.bones] == list(range(len(skeleton)))
    assert {joint: skeleton.bone_parents[joint] for joint in odd} == odd


def test_normalisation_joints() -> None:
    ntu = Skeleton.load("nturgb+d")
    assert (ntu.center, ntu.spine, ntu.shoulders) == (1, (0, 1), (8, 4))
    assert Skeleton.load("coco").center is None


@pytest.mark.parametrize("name", LAYOUTS)
def test_pairs_of_a_layout_have_the_same_names(name: str) -> None:
    skeleton = Skeleton.load(name)
    for left, right in skeleton.pairs:
        assert skeleton.joints[left].replace("left", "right") == skeleton.joints[right]
    named = sum("left" in joint for joint in skeleton.joints)
    assert len(skeleton.pairs) == named


def test_defaults_of_a_minimal_skeleton() -> None:
    skeleton = Skeleton.load(ARM)
    assert skeleton.pairs == ((2, 3),)
    assert skeleton.bones == ((0, 0), (1, 0), (2, 1), (3, 1))
    assert skeleton.parents == (0, 0, 1, 1)
    assert (skeleton.center, skeleton.spine, skeleton.shoulders) == (None, None, None)
    assert skeleton.adjacency("stgcn_spatial").sum() == 4


def test_sides_are_guessed_from_names_only() -> None:
    joints = ["root", "LeftFoot", "RightFoot", "a_left", "a_right", "left_alone", "l_hand", "r_hand"]
    edges = [(joint, 0) for joint in range(1, 8)]
    assert Skeleton("x", joints, edges, 0).pairs == ((1, 2), (3, 4))


def test_arrays_of_an_archive_are_accepted() -> None:
    skeleton = Skeleton("x", np.array(["a", "b"]), np.array([[1, 0]]), np.int64(0))
    assert skeleton == Skeleton.load({"name": "x", "joints": ["a", "b"], "edges": [["b", "a"]], "root": "a"})


@pytest.mark.parametrize("name", LAYOUTS)
def test_dict_round_trip(name: str) -> None:
    skeleton = Skeleton.load(name)
    assert Skeleton.load(json.loads(json.dumps(skeleton.to_dict()))) == skeleton


@pytest.mark.parametrize("suffix", [".yaml", ".json"])
def test_layout_file(tmp_path: Path, suffix: str) -> None:
    path = tmp_path / f"arm{suffix}"
    path.write_text(json.dumps(ARM) if suffix == ".json" else yaml.safe_dump(ARM))
    assert Skeleton.load(path) == Skeleton.load({**ARM, "name": "arm"})


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"joints": ["a", "a", "b", "c"]}, "joints to have different names. Got 'a' 2 times"),
        ({"joints": []}, "joints to name at least one joint"),
        ({"joints": "hip"}, "joints to be a list. Got 'hip'"),
        ({"root": 4}, "root to hold joint names or indices 0 to 3. Got 4"),
        ({"root": -1}, "root to hold joint names or indices 0 to 3. Got -1"),
        ({"root": True}, "root to hold joint names or indices 0 to 3. Got True"),
        ({"root": "head"}, "root to name one of the joints hip, spine, left_hand, right_hand. Got 'head'"),
        (
            {"edges": [[1, 0], [2, 1]]},
            "joint 'right_hand' reaches the root 'hip'. Got no edge from 'right_hand'",
        ),
        ({"edges": [[1, 2], [2, 1], [3, 1]]}, "joint 'spine' reaches the root 'hip'. Got a circle"),
        (
            {"edges": [[1, 0], [2, 1], [3, 1], [3, 2]]},
            "joint 'right_hand' one parent. Got 'spine' and 'left_hand'",
        ),
        ({"edges": [[1, 0], [2, 1], [3, 1], [0, 1]]}, "root 'hip' to have no parent in edges"),
        ({"edges": [[1, 0], [2, 1], [3, 9]]}, "edges to hold joint names or indices 0 to 3. Got 9"),
        ({"edges": [[1, 0, 2], [2, 1], [3, 1]]}, "edges to hold pairs of joints"),
        ({"edges": 5}, "edges to be a list. Got 5"),
        ({"pairs": [[2, 3], [3, 1]]}, "pairs to hold joint 'right_hand' at most once"),
        ({"bones": [[1, 0], [2, 1], [3, 1]]}, "bones to give each of the 4 joints once"),
        ({"spine": [0, 7]}, "spine to hold joint names or indices 0 to 3. Got 7"),
        ({"center": 9}, "center to hold joint names"),
        ({"colour": 1}, "unknown key 'colour'"),
    ],
)
def test_bad_skeletons_are_refused(change: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError) as error:
        Skeleton.load({**ARM, **change})
    assert message in str(error.value)


@pytest.mark.parametrize(("name", "text", "message"), [
    ("a.json", "{", "to be a readable YAML or JSON file"),
    ("a.yaml", "[1, 2]", "to hold keys joints, edges, root. Got a list"),
    ("a.yaml", "joints: [a]\nedges: []", "Got no key 'root'"),
    ("a.yaml", "a: : b", "to be a readable YAML or JSON file"),
])
def test_bad_layout_files_are_refused(tmp_path: Path, name: str, text: str, message: str) -> None:
    (tmp_path / name).write_text(text)
    with pytest.raises(ValueError) as error:
        Skeleton.load(tmp_path / name)
    assert message in str(error.value)


def test_unknown_layout() -> None:
    with pytest.raises(
        ValueError, match=r"one of coco, handmp, nturgb\+d, openpose or a .yaml/.json file. Got 'ntu'"
    ):
        Skeleton.load("ntu")
