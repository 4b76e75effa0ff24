"""Skeleton: which joints there are and how they are connected; layouts are data (``layouts/*.yaml``)."""
from __future__ import annotations

import json
import re
from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import cache, cached_property
from pathlib import Path
from typing import Any

import numpy as np
import torch
import yaml
from torch import Tensor

__all__ = ["ADJACENCY_MODES", "Skeleton", "layouts"]

ADJACENCY_MODES = ("spatial", "stgcn_spatial", "binary_adj", "random")
_LAYOUT_DIR = Path(__file__).parent / "layouts"
_KEYS = ("name", "joints", "edges", "root", "pairs", "bones", "center", "spine", "shoulders")
_SIDE = re.compile(r"(?i)left|right")

Pair = tuple[int, int]


@cache
def layouts() -> tuple[str, ...]:
    """Names of the layouts that come with the package."""
    return tuple(sorted(path.stem for path in _LAYOUT_DIR.glob("*.yaml")))


@dataclass(frozen=True)
class Skeleton:
    """Joints and the tree that connects them.

    Indices are 0-based positions in ``joints``. Only name, joints, edges and root are needed; the rest has
    defaults, so that the skeleton of any archive works everywhere.

    Attributes:
        name: what the layout is called.
        joints: V different joint names.
        edges: V - 1 pairs (child, parent) that form a tree on which every joint reaches ``root``.
        root: the joint without a parent; the centre of the graph partition.
        pairs: (left, right) joints. Default: joints whose names differ only in left/right, else none.
        bones: V pairs (joint, from), one per joint: the bone of a joint is its position minus that of
            ``from``. Default: the edges, and (root, root).
        center: the joint that normalisation puts at the origin, or None where the layout does not define one.
        spine: (lower, upper) joints that normalisation turns to +z, or None.
        shoulders: (right, left) joints that normalisation turns to +x, or None.

    Example:
        >>> arm = Skeleton("arm", ("chest", "shoulder", "elbow", "wrist"), ((1, 0), (2, 1), (3, 2)), root=0)
        >>> len(arm), arm.bones
        (4, ((0, 0), (1, 0), (2, 1), (3, 2)))
        >>> arm.adjacency("stgcn_spatial").shape
        torch.Size([3, 4, 4])

    Raises:
        ValueError: names repeat, an index is out of range, or the edges are not a tree that ends in ``root``.
    """

    name: str
    joints: tuple[str, ...]
    edges: tuple[Pair, ...]
    root: int
    pairs: tuple[Pair, ...] = None  # type: ignore[assignment]  # always a tuple once built
    bones: tuple[Pair, ...] = None  # type: ignore[assignment]  # always a tuple once built
    center: int | None = None
    spine: Pair | None = None
    shoulders: Pair | None = None

    def __post_init__(self) -> None:
        joints = tuple(str(joint) for joint in _sequence(self.joints, "joints"))
        put = lambda field, value: object.__setattr__(self, field, value)
        put("joints", joints)
        if not joints:
            raise ValueError("Expected joints to name at least one joint. Got none.")
        twice = [joint for joint, count in Counter(joints).items() if count > 1]
        if twice:
            raise ValueError(
                f"Expected joints to have different names. Got {twice[0]!r} {joints.count(twice[0])} "
                "times; rename one of them."
            )
        put("root", self._index(self.root, "root"))
        put("edges", self._pairs(self.edges, "edges"))
        _check_tree(joints, self.edges, self.root)
        put("pairs", _guess_pairs(joints) if self.pairs is None else self._pairs(self.pairs, "pairs"))
        _check_sides(joints, self.pairs)
        put("bones", self._bones())
        if self.center is not None:
            put("center", self._index(self.center, "center"))
        for field in ("spine", "shoulders"):
            value = getattr(self, field)
            if value is not None:
                put(field, self._pairs([value], field)[0])

    @classmethod
    def stored(cls, content: Any, where: str) -> Skeleton:
        """The skeleton that a file holds: its keys, or a layout's name; never a path, which a stranger may have chosen.

        Raises:
            ValueError: anything else, or keys that are not a skeleton.
        """
        if not isinstance(content, Mapping) and content not in layouts():
            raise ValueError(f"Expected the layout in {where} to be a mapping or one of {', '.join(layouts())}. "
                             f"Got {content!r:.80}.")
        return cls.load(content)

    @classmethod
    def load(cls, source: Skeleton | str | Path | Mapping[str, Any]) -> Skeleton:
        """A skeleton from a layout's name, a YAML or JSON file, or a mapping with the attributes as keys.

        Joints may be given by index or by name.

        Raises:
            ValueError: the name is unknown, a file cannot be read, or the content is not a skeleton.
        """
        if isinstance(source, Skeleton):
            return source
        if isinstance(source, Mapping):
            return cls._from_mapping(source, "layout")
        text = str(source)
        path = _LAYOUT_DIR / f"{text}.yaml" if text in layouts() else Path(text)
        if not path.is_file():
            kind = "an existing file" if path.suffix else "a layout name"
            raise ValueError(
                f"Expected layout to be {kind}, one of {', '.join(layouts())} or a .yaml/.json file. "
                f"Got {text!r}."
            )
        try:
            content = (
                json.loads(path.read_text()) if path.suffix == ".json" else yaml.safe_load(path.read_text())
            )
        except (ValueError, OSError, yaml.YAMLError) as error:
            raise ValueError(
                f"Expected layout {text!r} to be a readable YAML or JSON file. Got: "
                f"{' '.join(str(error).split())}"
            ) from error
        if not isinstance(content, Mapping):
            raise ValueError(f"Expected layout file {text!r} to hold keys {', '.join(_KEYS[1:4])}. "
                             f"Got a {type(content).__name__}.")
        return cls._from_mapping({"name": path.stem, **content}, f"layout file {text!r}")

    @classmethod
    def _from_mapping(cls, content: Mapping[str, Any], where: str) -> Skeleton:
        unknown = [str(key) for key in content if key not in _KEYS]
        missing = [key for key in ("joints", "edges", "root") if key not in content]
        if unknown or missing:
            got = f"unknown key {unknown[0]!r}" if unknown else f"no key {missing[0]!r}"
            raise ValueError(f"Expected {where} to have the keys joints, edges, root and optionally "
                             f"name, pairs, bones, center, spine, shoulders. Got {got}.")
        return cls(**{"name": "custom", **content})

    def to_dict(self) -> dict[str, Any]:
        """Plain lists and numbers that ``load`` turns into an equal skeleton; fits JSON and YAML."""
        listed = lambda pairs: [list(pair) for pair in pairs]
        return {
            "name": self.name,
            "joints": list(self.joints),
            "edges": listed(self.edges),
            "root": self.root,
            "pairs": listed(self.pairs),
            "bones": listed(self.bones),
            "center": self.center,
            "spine": self.spine and list(self.spine),
            "shoulders": self.shoulders and list(self.shoulders),
        }

    def __len__(self) -> int:
        return len(self.joints)

    @property
    def num_joints(self) -> int:
        """V."""
        return len(self.joints)

    @cached_property
    def parents(self) -> tuple[int, ...]:
        """Parent of every joint by ``edges``; the root is its own."""
        parent = dict(self.edges)
        return tuple(parent.get(joint, joint) for joint in range(len(self)))

    @cached_property
    def bone_parents(self) -> tuple[int, ...]:
        """For every joint, the joint that its bone starts from (``bones`` as an index array)."""
        return tuple(start for _, start in sorted(self.bones))

    def adjacency(
        self, mode: str, num_subsets: int = 3, seed: int = 0, dtype: torch.dtype = torch.float32
    ) -> Tensor:
        """Adjacency subsets (K, V, V); entry [k, v, w] weighs what joint w receives from joint v.

        - ``spatial``, K = 3: identity; edges towards the root; edges away from it. Each is divided by its
          column sums (2s-AGCN, Shi et al. 2019).
        - ``stgcn_spatial``, K = 3: self links and neighbours in one matrix, divided by its column sums, then
          split into self links, neighbours v that are at least as far from the root as w, and nearer ones
          (ST-GCN, Yan et al. 2018, section 3.3). As in PYSKL (``utils/graph.py``), distances stop at one hop:
          joints further away count as equally far.
        - ``binary_adj``, K = 1: 1 for neighbours, no self links.
        - ``random``, K = ``num_subsets``: N(0.04, 0.02^2) drawn from ``seed`` (DG-STGCN, Duan et al. 2022).
        """
        size = len(self)
        if mode == "random":
            drawn = np.random.default_rng(seed).normal(0.04, 0.02, (num_subsets, size, size))
            return torch.from_numpy(drawn).to(dtype)
        inward = np.zeros((size, size))
        for child, parent in self.edges:
            inward[parent, child] = 1
        if mode == "spatial":
            subsets = np.stack([np.eye(size), _per_column(inward), _per_column(inward.T)])
        elif mode == "stgcn_spatial":
            subsets = self._distance_subsets(inward + inward.T)
        elif mode == "binary_adj":
            subsets = (inward + inward.T)[None]
        else:
            raise ValueError(f"Expected mode to be one of {', '.join(ADJACENCY_MODES)}. Got {mode!r}.")
        return torch.from_numpy(subsets).to(dtype)

    def _distance_subsets(self, neighbours: np.ndarray) -> np.ndarray:
        size = len(self)
        distance = np.full(size, np.inf)
        distance[neighbours[self.root] > 0] = 1
        distance[self.root] = 0
        normal = _per_column(neighbours + np.eye(size))
        further = (distance[:, None] >= distance[None, :]) & (neighbours > 0)
        nearer = ~further & (neighbours > 0)
        return np.stack([np.where(np.eye(size) > 0, normal, 0), np.where(further, normal, 0),
                         np.where(nearer, normal, 0)])

    def _bones(self) -> tuple[Pair, ...]:
        if self.bones is None:
            return tuple(sorted((*self.edges, (self.root, self.root))))
        bones = self._pairs(self.bones, "bones")
        if sorted(joint for joint, _ in bones) != list(range(len(self))):
            raise ValueError(f"Expected bones to give each of the {len(self)} joints once, as (joint, from). "
                             f"Got {len(bones)} pairs for {len({joint for joint, _ in bones})} joints.")
        return tuple(sorted(bones))

    def _index(self, joint: Any, field: str) -> int:
        if isinstance(joint, str):
            if joint not in self.joints:
                raise ValueError(f"Expected {field} to name one of the joints {', '.join(self.joints)}. "
                                 f"Got {joint!r}.")
            return self.joints.index(joint)
        if isinstance(joint, bool) or not isinstance(joint, (int, np.integer)) or not 0 <= joint < len(self):
            raise ValueError(
                f"Expected {field} to hold joint names or indices 0 to {len(self) - 1}. Got {joint!r}."
            )
        return int(joint)

    def _pairs(self, pairs: Any, field: str) -> tuple[Pair, ...]:
        result = []
        for pair in _sequence(pairs, field):
            two = _sequence(pair, field)
            if len(two) != 2:
                raise ValueError(f"Expected {field} to hold pairs of joints. Got {two!r}.")
            result.append((self._index(two[0], field), self._index(two[1], field)))
        return tuple(result)


def _sequence(value: Any, field: str) -> Sequence[Any]:
    if isinstance(value, np.ndarray):
        return value.tolist()
    if isinstance(value, (str, bytes)) or not isinstance(value, Sequence):
        raise ValueError(f"Expected {field} to be a list. Got {value!r}.")
    return value


def _check_tree(joints: tuple[str, ...], edges: tuple[Pair, ...], root: int) -> None:
    parent: dict[int, int] = {}
    for child, above in edges:
        if child == root:
            raise ValueError(
                f"Expected root {joints[root]!r} to have no parent in edges. Got the edge "
                f"({joints[root]}, {joints[above]}); choose another root or turn the edge round."
            )
        if child in parent:
            raise ValueError(f"Expected edges to give joint {joints[child]!r} one parent. Got "
                             f"{joints[parent[child]]!r} and {joints[above]!r}.")
        parent[child] = above
    for joint in range(len(joints)):
        at, steps = joint, 0
        while at != root:
            if at not in parent or steps == len(joints):
                got = "a circle" if at in parent else f"no edge from {joints[at]!r} to a parent"
                raise ValueError(
                    f"Expected edges to form a tree on which joint {joints[joint]!r} reaches the root "
                    f"{joints[root]!r}. Got {got}."
                )
            at, steps = parent[at], steps + 1


def _check_sides(joints: tuple[str, ...], pairs: tuple[Pair, ...]) -> None:
    for joint, count in Counter(joint for pair in pairs for joint in pair).items():
        if count > 1:
            raise ValueError(
                f"Expected pairs to hold joint {joints[joint]!r} at most once, as (left, right). "
                f"Got it {count} times."
            )


def _guess_pairs(joints: tuple[str, ...]) -> tuple[Pair, ...]:
    """(left, right) joints whose names are equal but for left and right, whatever the case."""
    position = {joint.lower(): index for index, joint in enumerate(joints)}
    pairs = []
    for index, joint in enumerate(joints):
        found = _SIDE.search(joint)
        if found and found.group().lower() == "left":
            other = position.get(f"{joint[:found.start()]}right{joint[found.end():]}".lower())
            if other is not None:
                pairs.append((index, other))
    return tuple(pairs)


def _per_column(matrix: np.ndarray) -> np.ndarray:
    """Each column divided by its sum; columns of zeros stay zero."""
    total = matrix.sum(0)
    return matrix / np.where(total > 0, total, 1)
