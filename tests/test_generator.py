"""The two-stage method: the penalty drains masked weights, the switch drops them and keeps the momentum."""

from __future__ import annotations

import copy

import pytest
import tiny
import torch
from torch.nn import functional as F

from sparse_stgcn.sparsity import block_of, compact_parameters, maskable_convs
from sparse_stgcn.training.generator import TwoStage, carry_state


def batch(seed: int = 1) -> tuple[torch.Tensor, torch.Tensor]:
    generator = torch.Generator().manual_seed(seed)
    return torch.randn(6, 1, 8, 5, 3, generator=generator), torch.arange(6) % tiny.CLASSES


def sgd(model: torch.nn.Module, lr: float = 0.05) -> torch.optim.SGD:
    return torch.optim.SGD(model.parameters(), lr=lr, momentum=0.9, nesterov=True, weight_decay=5e-4)


def step(model: torch.nn.Module, optimizer: torch.optim.Optimizer, seed: int,
         mask_gradient: bool = False) -> None:
    keypoint, label = batch(seed)
    optimizer.zero_grad(set_to_none=True)
    F.cross_entropy(model(keypoint), label).backward()
    if mask_gradient:
        for conv in maskable_convs(model).values():
            conv.as_oik(conv.weight.grad).mul_(conv.pattern.mask())
    optimizer.step()


@pytest.mark.parametrize("group", ["block", "tensor", "global"])
def test_penalty_gradient_is_that_of_the_formula(group: str) -> None:
    model = tiny.model(0.8).double()
    method = TwoStage(model, 1, group=group)
    method.penalty().backward()
    got = {name: conv.weight.grad.clone() for name, conv in maskable_convs(model).items()}
    model.zero_grad()
    squares: dict[object, torch.Tensor] = {}
    for name, conv in maskable_convs(model).items():
        key = {"block": block_of(name), "tensor": name, "global": 0}[group]
        dead = conv.weight_oik() * ~conv.pattern.mask()
        squares[key] = squares.get(key, torch.zeros((), dtype=torch.double)) + dead.square().sum()
    assert len(squares) == {"block": 10, "tensor": 22, "global": 1}[group]
    formula = sum(square.sqrt() for square in squares.values())
    formula.backward()
    assert float(method.penalty().detach()) == pytest.approx(float(formula.detach()), rel=1e-12)
    for name, conv in maskable_convs(model).items():
        torch.testing.assert_close(got[name], conv.weight.grad, rtol=1e-12, atol=0)
        assert conv.as_oik(got[name]).abs()[~conv.pattern.mask()].min() > 0
        assert conv.as_oik(got[name])[conv.pattern.mask()].abs().max() == 0


def test_coefficient() -> None:
    linear, constant = (TwoStage(tiny.model(0.8), 2, 3.0, schedule) for schedule in ("linear", "constant"))
    assert [linear.coefficient(p) for p in (0.0, 0.5, 1.0, 1.5)] == [0.0, 1.5, 3.0, 3.0]
    assert [constant.coefficient(p) for p in (0.0, 1.0)] == [3.0, 3.0]
    for method in (linear, constant):
        method.begin_epoch(2, sgd(method.model))
        assert method.coefficient(1.0) == 0.0
    assert TwoStage(tiny.model(), 2).coefficient(0.5) == 0.0


def test_masked_norms_fall_tenfold_under_the_penalty() -> None:
    model = tiny.model(0.8)
    method, optimizer = TwoStage(model, 1), sgd(model)
    before = method.masked_norms()
    assert len(before) == 10
    steps = 120
    for i in range(steps):
        keypoint, label = batch(i)
        optimizer.zero_grad()
        (F.cross_entropy(model(keypoint), label)
         + method.coefficient(i / steps) * method.penalty()).backward()
        for group in optimizer.param_groups:
            group["lr"] = 0.05 * (1 - i / steps)
        optimizer.step()
    assert all(now < then / 10 for now, then in zip(method.masked_norms(), before, strict=True))


@pytest.mark.parametrize("group", ["block", "tensor", "global"])
def test_shrink_is_the_proximal_step_of_the_penalty(group: str) -> None:
    """prox(W) minimises |X - W|^2 / 2 + amount * penalty(X): its gradient is 0 there, and 0 is reached."""
    model = tiny.model(0.8).double()
    method, amount = TwoStage(model, 1, group=group), 0.3
    before = {name: conv.weight.detach().clone() for name, conv in maskable_convs(model).items()}
    method.shrink(amount)
    (amount * method.penalty()).backward()
    for name, conv in maskable_convs(model).items():
        torch.testing.assert_close(conv.weight - before[name] + conv.weight.grad,
                                   torch.zeros_like(conv.weight),
                                   rtol=0, atol=1e-12)
        kept = conv.pattern.mask()
        assert torch.equal(conv.weight_oik()[kept], conv.as_oik(before[name])[kept])
    method.shrink(1e6)
    assert method.masked_norms() == [0.0] * 10
    method.shrink(1.0)
    assert method.masked_norms() == [0.0] * 10
    kept = sum(int((conv.weight != 0).sum()) for conv in maskable_convs(model).values())
    assert kept == sum(conv.pattern.num_live for conv in maskable_convs(model).values())


def test_masked_norms_stay_without_the_penalty() -> None:
    model = tiny.model(0.8)
    method, optimizer = TwoStage(model, 1, strength=0.0), sgd(model, 0.02)
    before = sum(method.masked_norms())
    for i in range(20):
        step(model, optimizer, i)
    assert sum(method.masked_norms()) > before / 2


def test_switch_happens_once_at_its_epoch_and_keeps_the_function() -> None:
    model = tiny.model(0.8)
    method, optimizer = TwoStage(model, 2), sgd(model)
    for i in range(3):
        step(model, optimizer, i)
    assert [method.begin_epoch(e, optimizer) for e in (0, 1)] == [False, False]
    assert method.stage == "warm-up"
    for conv in maskable_convs(model).values():
        with torch.no_grad():
            conv.as_oik(conv.weight).mul_(conv.pattern.mask())
    model.eval()
    keypoint, _ = batch()
    with torch.no_grad():
        expected = model(keypoint)
        assert method.begin_epoch(2, optimizer)
        torch.testing.assert_close(model(keypoint), expected, rtol=1e-5, atol=1e-5)
    assert (method.stage, method.masked_norms()) == ("fine-tune", [])
    assert not method.begin_epoch(3, optimizer)


def test_switch_frees_dead_weights_and_their_momentum() -> None:
    model = tiny.model(0.8)
    method, optimizer = TwoStage(model, 0), sgd(model)
    step(model, optimizer, 0)
    method.begin_epoch(0, optimizer)
    own = list(model.parameters())
    assert {id(p) for p in optimizer.param_groups[0]["params"]} == {id(p) for p in own}
    assert {id(p) for p in optimizer.state} == {id(p) for p in own}
    held = sum(state["momentum_buffer"].numel() for state in optimizer.state.values())
    assert held == sum(p.numel() for p in own)
    live = sum(conv.pattern.num_live for conv in maskable_convs(model).values())
    assert sum(conv.values.numel() for conv in maskable_convs(model).values()) == live


def test_switch_carries_the_momentum_of_live_weights() -> None:
    model = tiny.model(0.8)
    method, optimizer = TwoStage(model, 0), sgd(model)
    for i in range(3):
        step(model, optimizer, i)
    old = {name: optimizer.state[conv.weight]["momentum_buffer"].clone() for name,
           conv in maskable_convs(model).items()}
    bias = {name: optimizer.state[conv.bias]["momentum_buffer"].clone() for name,
            conv in maskable_convs(model).items()}
    method.begin_epoch(0, optimizer)
    for name, conv in maskable_convs(model).items():
        carried = conv.pattern.scatter(optimizer.state[conv.values]["momentum_buffer"])
        assert old[name].abs().max() > 0
        assert torch.equal(carried, conv.as_oik(old[name]) * conv.pattern.mask())
        assert torch.equal(optimizer.state[conv.bias]["momentum_buffer"], bias[name])


def test_a_step_after_the_switch_equals_the_masked_dense_step() -> None:
    """Same weights, same momentum: the compact network and the dense one with zeros and masked gradients."""
    sparse = tiny.model(0.8)
    optimizer = sgd(sparse)
    for i in range(3):
        step(sparse, optimizer, i)
    dense = copy.deepcopy(sparse)
    reference = sgd(dense)
    reference.load_state_dict(copy.deepcopy(optimizer.state_dict()))
    for conv in maskable_convs(dense).values():
        kept = conv.pattern.mask()
        with torch.no_grad():
            conv.as_oik(conv.weight).mul_(kept)
            conv.as_oik(reference.state[conv.weight]["momentum_buffer"]).mul_(kept)
    TwoStage(sparse, 0).begin_epoch(0, optimizer)
    before = {name: conv.weight_oik().detach().clone() for name, conv in maskable_convs(dense).items()}
    for i in range(2):
        step(sparse, optimizer, 10 + i)
        step(dense, reference, 10 + i, mask_gradient=True)
    for name, conv in maskable_convs(dense).items():
        moved = conv.weight_oik().detach() - before[name]
        error = (maskable_convs(sparse)[name].weight_oik().detach() - conv.weight_oik().detach()).norm()
        assert moved.norm() > 0
        assert error <= 1e-4 * moved.norm(), name


def test_carry_state_keeps_counts_and_gathers_every_moment() -> None:
    model = tiny.model(0.8)
    optimizer = torch.optim.Adam(model.parameters())
    step(model, optimizer, 0)
    moments = {name: optimizer.state[conv.weight]["exp_avg_sq"].clone() for name,
               conv in maskable_convs(model).items()}
    carry_state(optimizer, compact_parameters(model))
    for name, conv in maskable_convs(model).items():
        state = optimizer.state[conv.values]
        assert float(state["step"]) == 1
        assert torch.equal(state["exp_avg_sq"], conv.pattern.gather(conv.as_oik(moments[name])))
    step(model, optimizer, 1)


def test_a_dense_network_has_one_stage() -> None:
    model = tiny.model()
    method = TwoStage(model, 0)
    assert (method.stage, method.masked_norms(), method.begin_epoch(5, sgd(model))) == ("dense", [], False)
