"""The pool of blocks for large results: they are used again, never twice at once, and never much more than was alive."""
from __future__ import annotations

import gc
import threading

import pytest
import torch
from torch import Tensor

from sparse_stgcn import create_model, sparsity
from sparse_stgcn.kernels import _memory, use_pool
from sparse_stgcn.kernels._memory import Pool, empty

MB = 1 << 20


def test_a_block_is_used_again_when_its_tensor_is_dead() -> None:
    pool = Pool()
    x = pool.empty((3, MB // 4), torch.float32)
    assert x.shape == (3, MB // 4) and x.is_contiguous() and x.data_ptr() % 64 == 0
    part, total = x[1, 100:].fill_(7), pool.total
    del x  # a view keeps the memory
    y = pool.empty((3, MB // 4), torch.float32).fill_(1)
    assert (part == 7).all() and pool.total == 2 * total
    del part, y
    assert pool.empty((3, MB // 8), torch.float64).dtype == torch.float64 and pool.total == 2 * total


def test_smaller_tensors_take_blocks_that_are_not_too_large() -> None:
    pool = Pool()
    x = pool.empty((4 * MB,), torch.uint8)
    del x
    total = pool.total
    half = pool.empty((2 * MB,), torch.uint8)
    assert pool.total == total
    tiny = pool.empty((MB,), torch.uint8)  # the block is taken
    assert pool.total == total + MB and half.numel() > tiny.numel()


def test_another_size_does_not_double_the_memory() -> None:
    pool = Pool()
    held = [pool.empty((size * MB,), torch.uint8) for size in (8, 9, 10)]
    held.clear()
    held = [pool.empty((size * MB,), torch.uint8) for size in (3, 3, 3, 3, 3, 3, 3, 3, 3)]
    assert pool.most == pool.live == 27 * MB and pool.total <= 1.1 * pool.most
    held.clear()
    pool.empty((1,), torch.uint8)
    assert pool.live <= 4 * MB


def test_threads_do_not_get_one_block_at_once() -> None:
    pool, wrong = Pool(), []

    def work(number: int) -> None:
        for turn in range(150):
            x = pool.empty((MB + 4096 * (turn % 3),), torch.uint8).fill_(number)
            y = pool.empty((MB,), torch.uint8).fill_(number + 8)
            wrong.extend([turn] if (x != number).any() or (y != number + 8).any() else [])

    threads = [threading.Thread(target=work, args=(number,)) for number in range(3)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert not wrong and pool.total <= 10 * MB


def test_only_large_tensors_on_the_cpu_come_from_it(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(_memory, "_pool", Pool())
    made = lambda: _memory._pool.total  # type: ignore[union-attr]
    assert empty(torch.zeros(1), (10,)).shape == (10,) and empty(torch.zeros(1, device="meta"), (MB,)).is_meta and not made()
    with torch._subclasses.FakeTensorMode():
        assert type(empty(torch.zeros(1), (MB,))) is not Tensor and not made()
    x = empty(torch.zeros(1, dtype=torch.float64), (MB, 1))
    assert x.dtype == torch.float64 and made() == 8 * MB
    use_pool(False)
    assert _memory._pool is None


def test_training_with_it_gives_the_same_numbers_and_leaves_nothing(monkeypatch: pytest.MonkeyPatch) -> None:
    def steps() -> list[Tensor]:
        torch.manual_seed(0)
        model = create_model("dgstgcn", 4, base_channels=24)
        sparsity.sparsify(model, 0.5, (4, 1))
        sparsity.compact(model)
        x = torch.randn(2, 2, 16, 25, 3)
        optimizer = torch.optim.SGD(model.train().parameters(), lr=1e-3)
        for _ in range(3):
            optimizer.zero_grad()
            model(x).square().sum().backward()
            optimizer.step()
        return [p.grad for p in model.parameters() if p.grad is not None]

    want = steps()
    pool = Pool()
    monkeypatch.setattr(_memory, "_pool", pool)
    monkeypatch.setattr(_memory, "_LARGE", 1024)
    assert all(torch.equal(a, b) for a, b in zip(steps(), want, strict=True))
    gc.collect()
    pool.empty((1,), torch.uint8)
    assert pool.most > MB and pool.live <= 4096 * 3 and pool.total <= 1.2 * pool.most
