"""Pages: each is free, found again or held; who is found least recently goes first."""

from __future__ import annotations

import pytest

from dsserve.kv.block_pool import UNUSED, BlockPool


@pytest.fixture
def pool() -> BlockPool:
    return BlockPool(3)


def take_all(pool: BlockPool) -> list[int]:
    return [page for _ in range(pool.size) if (page := pool.take()) is not None]


def test_all_pages_but_the_paddings_can_be_had_once(pool: BlockPool) -> None:
    assert sorted(take_all(pool)) == [1, 2, 3] and UNUSED == 0
    assert pool.take() is None and pool.free == 0


def test_what_was_freed_last_is_taken_first(pool: BlockPool) -> None:
    first, second, _ = take_all(pool)
    pool.drop(first)
    pool.drop(second)
    assert (pool.take(), pool.take()) == (second, first)


def test_a_page_of_several_texts_is_free_when_the_last_one_drops_it(pool: BlockPool) -> None:
    page = pool.take()
    assert page is not None
    pool.name(page, b"a")
    pool.share(page)
    pool.drop(page)
    assert pool.is_held(page) and pool.free == 2
    pool.drop(page)
    assert not pool.is_held(page) and pool.free == 3 and pool.find(b"a") == page
    pool.share(page)
    assert pool.is_held(page) and pool.free == 2


def test_named_pages_go_last_and_the_least_recently_used_first(pool: BlockPool) -> None:
    first, second, third = take_all(pool)
    for page, digest in ((first, b"a"), (second, b"b")):
        pool.name(page, digest)
        pool.drop(page)
    pool.drop(third)
    pool.share(first)  # found: the other one is the oldest now
    pool.drop(first)
    assert [pool.take() for _ in range(4)] == [third, second, first, None]
    assert pool.find(b"a") is pool.find(b"b") is None


def test_a_hash_has_one_page(pool: BlockPool) -> None:
    first, second, _ = take_all(pool)
    pool.name(first, b"a")
    pool.name(second, b"a")
    assert pool.find(b"a") == first
    pool.drop(second)
    assert pool.take() == second, "it is blank: nobody can find it"
    pool.forget(second)
    assert pool.find(b"a") == first
    pool.forget(first)
    assert pool.find(b"a") is None
