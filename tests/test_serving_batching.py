"""The batcher: who is answered together, who is refused, and whose fault is whose."""

from __future__ import annotations

import asyncio
import threading
from typing import Any

import numpy as np
import pytest

from m5.serving.batching import Batcher, Busy
from m5.serving.retriever import Answer, Ask
from m5.viewer import Viewer


class Slow:
    """Answers k with k, a batch at a time, when it is let."""

    def __init__(self) -> None:
        self.let, self.begun = threading.Event(), threading.Event()
        self.batches: list[list[int]] = []

    def recommend(self, asks: list[Ask]) -> list[Answer]:
        self.batches.append([ask.k for ask in asks])
        self.begun.set()
        assert self.let.wait(20)
        if any(ask.k == 13 for ask in asks):
            raise ValueError("unlucky")
        return [Answer(np.array([ask.k]), *[np.zeros(1)] * 3, ask.k) for ask in asks]


def ask_for(k: int) -> Ask:
    return Ask(Viewer(np.zeros(0, dtype=np.int64), np.zeros(0, dtype=np.int64), 0), k)


def test_what_waits_while_the_model_is_busy_is_its_next_batch() -> None:
    async def run() -> tuple[Slow, list[int]]:
        batcher, slow = Batcher(largest=3, queue=6), Slow()
        first = asyncio.create_task(batcher.ask(slow, [ask_for(1)]))
        await asyncio.to_thread(slow.begun.wait, 20)
        others = [asyncio.create_task(batcher.ask(slow, [ask_for(k)])) for k in range(2, 8)]
        await asyncio.sleep(0)
        assert batcher.depth == 6
        with pytest.raises(Busy):
            await batcher.ask(slow, [ask_for(99)])
        slow.let.set()
        answers = [(await task)[0].eligible for task in [first, *others]]
        batcher.close()
        return slow, answers

    slow, answers = asyncio.run(run())
    assert slow.batches == [[1], [2, 3, 4], [5, 6, 7]]
    assert answers == [1, 2, 3, 4, 5, 6, 7]


def test_what_fails_fails_alone() -> None:
    """Of a batch whose pass of the model raises, each is asked again by itself."""

    async def run() -> list[Any]:
        batcher, slow = Batcher(largest=3, queue=9), Slow()
        slow.let.set()
        tasks = [asyncio.create_task(batcher.ask(slow, [ask_for(k)])) for k in (2, 13, 3, 4)]
        return await asyncio.gather(*tasks, return_exceptions=True)

    first, second, third, fourth = asyncio.run(run())
    assert isinstance(second, ValueError)
    assert [answers[0].eligible for answers in (first, third, fourth)] == [2, 3, 4]


def test_a_call_larger_than_the_queue_is_let_in_where_nothing_waits() -> None:
    async def run() -> list[Any]:
        batcher, slow = Batcher(largest=4, queue=2), Slow()
        many = [ask_for(k) for k in range(1, 6)]
        first = asyncio.create_task(batcher.ask(slow, many))
        await asyncio.to_thread(slow.begun.wait, 20)
        with pytest.raises(Busy):  # one of them still waits
            await batcher.ask(slow, many)
        slow.let.set()
        answers = await first
        return answers + await batcher.ask(slow, many)

    assert [answer.eligible for answer in asyncio.run(run())] == [1, 2, 3, 4, 5] * 2


def test_other_work_of_the_models_thread_counts_as_asks_that_wait() -> None:
    async def run() -> list[int]:
        batcher, let = Batcher(largest=4, queue=2), threading.Event()
        others = [asyncio.create_task(batcher.run(let.wait, 20)) for _ in range(2)]
        await asyncio.sleep(0)
        depths = [batcher.depth]
        for refused in (batcher.run(int), batcher.ask(Slow(), [ask_for(1)])):
            with pytest.raises(Busy):
                await refused
        let.set()
        assert await asyncio.gather(*others) == [True, True]
        depths.append(batcher.depth)
        return depths

    assert asyncio.run(run()) == [2, 0]


def test_a_call_that_is_given_up_costs_the_model_nothing() -> None:
    async def run() -> Slow:
        batcher, slow = Batcher(largest=9, queue=9), Slow()
        first = asyncio.create_task(batcher.ask(slow, [ask_for(1)]))
        await asyncio.to_thread(slow.begun.wait, 20)
        left, stays = (asyncio.create_task(batcher.ask(slow, [ask_for(k)])) for k in (2, 3))
        await asyncio.sleep(0)
        left.cancel()
        slow.let.set()
        await asyncio.gather(first, stays)
        return slow

    assert asyncio.run(run()).batches == [[1], [3]]


def test_answers_are_finished_on_the_models_thread_each_in_its_place() -> None:
    async def run() -> list[Any]:
        batcher, slow = Batcher(largest=2, queue=9), Slow()
        slow.let.set()

        def finish(place: int, answer: Answer) -> tuple[int, int, str]:
            return place, answer.eligible, threading.current_thread().name.rpartition("_")[0]

        return await batcher.ask(slow, [ask_for(k) for k in (7, 8, 9)], finish)

    assert asyncio.run(run()) == [(0, 7, "m5-model"), (1, 8, "m5-model"), (2, 9, "m5-model")]
