"""A step: its parts, its precision, the average of its weights; and the batch that fits into memory."""

from __future__ import annotations

import io
import math

import pytest
import tiny
import torch
from rich.console import Console
from torch import Tensor, nn
from torch.nn import functional as F

from sparse_stgcn import compact
from sparse_stgcn.errors import UserError
from sparse_stgcn.training import auto_batch
from sparse_stgcn.training.batches import Batches
from sparse_stgcn.training.distributed import World
from sparse_stgcn.training.loop import Trainer
from sparse_stgcn.training.report import Report
from sparse_stgcn.training.step import Average

EPS = torch.finfo(torch.float64).eps


def trainer(**changed: object) -> Trainer:
    config = tiny.config(**changed)
    return Trainer(config, tiny.model(config.sparsity), *tiny.datasets(), None, Report(4, Console(file=io.StringIO())))


def frozen(model: nn.Module) -> nn.Module:
    """With norms that do not see the batch: only then is a step in parts the step as a whole."""
    for norm in model.modules():
        if isinstance(norm, nn.modules.batchnorm._BatchNorm):
            norm.eval()
    return model


@pytest.mark.parametrize("sparse", [False, True], ids=["warm-up", "live blocks"])
@pytest.mark.parametrize("parts", [2, 3, 8])
def test_accumulated_gradients_are_those_of_the_whole_step(sparse: bool, parts: int) -> None:
    job = trainer(accumulate=parts, lasso=2.0)
    model = job.model.double().train()
    if sparse:
        job.method.warmup_epochs = 0
        job.method.begin_epoch(0, job.optimizer)
        job.step.rewrap()
    frozen(model)
    keypoint, label, _ = job.train_set.batch(range(7))
    keypoint = keypoint.double()
    plan = Batches(job.train_set, 7, parts).plan(0, torch.arange(7).numpy())
    assert [len(part.indices) for part in plan] == {2: [4, 3], 3: [3, 2, 2], 8: [1] * 7}[parts]
    taken: list[Tensor] = []
    job.optimizer.register_step_pre_hook(lambda *_: taken.extend(p.grad.clone() for p in model.parameters()))
    expected_loss = F.cross_entropy(model(keypoint), label)
    penalty = 0.0 if sparse else 0.5 * job.method.penalty()
    expected = torch.autograd.grad(expected_loss + penalty, list(model.parameters()))
    loss, lasso, _ = job.step(((part, keypoint[part.indices], label[part.indices]) for part in plan), 0.5)
    assert loss == pytest.approx(7 * float(expected_loss), rel=1e-12)
    assert lasso == pytest.approx(float(penalty), rel=1e-12)
    for found, gradient in zip(taken, expected, strict=True):
        assert float((found - gradient).abs().max()) <= 1e5 * EPS * float(gradient.abs().max() + 1e-6)


def test_the_average_follows_its_formula_through_both_stages() -> None:
    decay = 0.75
    job = trainer(ema=decay)
    assert job.network is job.model  # nothing was averaged yet
    seen: list[dict[str, Tensor]] = []
    update = job.average.update

    def watched(model: nn.Module) -> None:
        update(model)
        seen.append({name: tensor.clone() for name, tensor in compact_state(model).items()})

    def compact_state(model: nn.Module) -> dict[str, Tensor]:
        """The state of the network as it is after the switch."""
        state = dict(model.state_dict())
        for name, (conv, pattern) in job.method._layers.items():
            if (weight := state.pop(f"{name}.weight", None)) is not None:
                state[f"{name}.values"] = pattern.gather(conv.as_oik(weight))
        return state

    job.average.update = watched  # type: ignore[method-assign]
    job.fit()
    assert len(seen) == 12
    expected = seen[0]
    for state in seen[1:]:
        expected = {k: v if not v.is_floating_point() else decay * expected[k] + (1 - decay) * v for k, v in state.items()}
    found = job.network.state_dict()
    assert job.network is job.average.module
    assert set(found) == set(expected)
    for name, tensor in expected.items():  # twelve roundings, of values that were larger before
        assert float((found[name] - tensor).abs().max()) <= 48 * 1.2e-7 * (float(tensor.abs().max()) + 1e-3), name
    counters = [v for k, v in found.items() if k.endswith("num_batches_tracked")]
    assert {int(counter) for counter in counters} == {12}


def test_an_average_is_tested() -> None:
    job = trainer(ema=0.5)
    job.fit(until=1)
    with torch.no_grad():
        for parameter in job.average.module.parameters():
            parameter.zero_()
    chance = job._evaluate()["test_accuracy"]
    assert chance == pytest.approx(1 / 3, abs=0.01)


def test_average_starts_at_the_first_weights() -> None:
    model = tiny.model()
    average = Average(model, 0.9)
    with torch.no_grad():
        model.cls_head.fc_cls.bias += 1
    average.update(model)
    assert torch.equal(average.module.cls_head.fc_cls.bias, model.cls_head.fc_cls.bias)


@pytest.mark.parametrize("backbone", ["stgcn", "aagcn", "ctrgcn", "dgstgcn"])
def test_bf16_trains_close_to_float32(backbone: str) -> None:
    """The first losses differ by rounding to 8 bits, parameters stay float32, and both stages run."""
    def losses(precision: str) -> tuple[list[float], nn.Module]:
        from sparse_stgcn import create_model, sparsify
        from sparse_stgcn.training.run import fixed_persons

        torch.manual_seed(0)
        model = sparsify(create_model(backbone, 3, layout=tiny.SKELETON, base_channels=12, **fixed_persons(backbone, 1)), 0.7,
                         (4, 1))
        config = tiny.config(precision=precision, epochs=2, warmup_epochs=1, lr=0.001, batch_size=20)
        job = Trainer(config, model, *tiny.datasets(), None, Report(2, Console(file=io.StringIO())))
        return [record["loss"] for record in job.fit()], model

    exact, _ = losses("float32")
    rounded, model = losses("bf16")
    assert {p.dtype for p in model.parameters()} == {torch.float32}
    assert rounded != exact
    for a, b in zip(exact, rounded, strict=True):
        assert b == pytest.approx(a, rel=0.05)  # 2^-8 in each of some ten layers one behind the other


def test_powers_of_two() -> None:
    assert [auto_batch.largest_batch(n, 400) for n in (1, 2, 3, 127, 128, 5000)] == [1, 2, 2, 64, 128, 256]
    assert [auto_batch.smallest_parts(128, n) for n in (1, 100, 128, 500)] == [128, 2, 1, 1]


def test_memory_of_a_step_is_linear_and_not_smaller_in_the_warm_up() -> None:
    shape = (1, 16, 5, 3)
    dense, sparse = tiny.model(0.8), compact(tiny.model(0.8))
    before = {name: tensor.clone() for name, tensor in dense.state_dict().items()}
    memory = auto_batch.step_memory(dense, shape)
    assert memory == auto_batch.step_memory(dense, shape)
    assert all(torch.equal(before[name], tensor) for name, tensor in dense.state_dict().items())
    parameters = 4 * sum(p.numel() for p in dense.parameters())
    assert memory.fixed >= 3 * parameters
    # Each of the ten blocks keeps at least its input: 8, 16 and 32 channels over 16, 8 and 4 frames.
    assert memory.each > 4 * 5 * (4 * 8 * 16 + 3 * 16 * 8 + 3 * 32 * 4)
    assert memory.each >= auto_batch.step_memory(sparse, shape).each
    assert auto_batch.step_memory(dense, shape, averaged=True).fixed == pytest.approx(memory.fixed + parameters)
    assert auto_batch.step_memory(dense, (1, 32, 5, 3)).each == pytest.approx(2 * memory.each, rel=0.05)
    assert memory.fitting(memory.fixed + 10.5 * memory.each) == 10
    assert memory.fitting(0) == 0


@pytest.mark.parametrize(("room", "chosen", "batch", "parts"), [(9.5, None, 8, 1), (1000, None, 16, 1), (9.5, 16, 16, 2),
                                                                (2.5, 16, 16, 8), (40, 16, 16, 1)])
def test_the_batch_is_chosen_from_the_room(room: float, chosen: int | None, batch: int, parts: int,
                                           monkeypatch: pytest.MonkeyPatch) -> None:
    model, config = tiny.model(0.8), tiny.config(auto_batch=True, batch_size=chosen or 8)
    memory = auto_batch.step_memory(model, (1, 8, 5, 3))
    limit = (memory.fixed + room * memory.each) / auto_batch.SHARE["cpu"]
    monkeypatch.setattr(auto_batch, "memory_limit", lambda device: limit)
    auto_batch.choose(config, chosen, model, (1, 8, 5, 3), 20, World())
    assert (config.batch_size, config.accumulate) == (batch, parts)


def test_no_room_for_one_sequence(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(auto_batch, "memory_limit", lambda device: 1000)
    with pytest.raises(UserError, match=r"step of one sequence to fit into .* lower --clip-len or --base-channels"):
        auto_batch.choose(tiny.config(), None, tiny.model(), (1, 8, 5, 3), 20, World())


def test_memory_of_this_machine() -> None:
    limit = auto_batch.memory_limit(torch.device("cpu"))
    assert 2**28 < limit < 2**50
    assert math.isfinite(limit)
