"""Dynamic batching: what has been asked while the model was busy is its next batch.

Nobody waits for company: an idle model begins with the first request at once, and under load batches grow by
themselves, up to a limit. One thread runs the model; the event loop stays free.
"""

from __future__ import annotations

import asyncio
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from typing import Any, NamedTuple

from m5.serving.retriever import Answer, Ask, Retriever


class Busy(Exception):
    """More requests wait than may."""


class _Waiting(NamedTuple):
    retriever: Retriever
    ask: Ask
    place: int
    finish: Callable[[int, Answer], Any]
    result: asyncio.Future[Any]


def _results(batch: Sequence[_Waiting]) -> list[Any]:
    answers = batch[0].retriever.recommend([one.ask for one in batch])
    return [one.finish(one.place, answer) for one, answer in zip(batch, answers, strict=True)]


class Batcher:
    """Collects asks and has them answered together.

    Args:
        largest: asks in a batch.
        queue: asks that may wait; further ones raise `Busy`.
        observe: told the size of every batch.
    """

    def __init__(self, *, largest: int, queue: int, observe: Callable[[int], None] = lambda size: None):
        self.largest, self.limit, self.observe = largest, queue, observe
        self.thread = ThreadPoolExecutor(1, thread_name_prefix="m5-model")
        self._waiting: list[_Waiting] = []
        self._others = 0  # what `run` was given and is not done
        self._worker: asyncio.Task[None] | None = None

    async def ask(
        self,
        retriever: Retriever,
        asks: Sequence[Ask],
        finish: Callable[[int, Answer], Any] = lambda place, answer: answer,
    ) -> list[Any]:
        """Answers of one retriever, in order; asks of one call may lie in different batches.

        A call that is cancelled in time costs the model nothing.

        Args:
            retriever: who answers.
            asks: what.
            finish: place among the asks and answer -> what is returned for it; called on the model's thread.

        Raises:
            Busy: the queue is full.
        """
        self._admit(len(asks))
        loop = asyncio.get_running_loop()
        mine = [_Waiting(retriever, ask, place, finish, loop.create_future()) for place, ask in enumerate(asks)]
        self._waiting += mine
        if self._worker is None or self._worker.done():
            self._worker = asyncio.create_task(self._work())
        return await asyncio.gather(*(one.result for one in mine))

    async def run(self, function: Callable, *arguments):
        """Something else on the model's thread; it counts as an ask that waits.

        Raises:
            Busy: the queue is full.
        """
        self._admit(1)
        self._others += 1
        try:
            return await self._on_thread(function, *arguments)
        finally:
            self._others -= 1

    def _admit(self, count: int) -> None:
        """Raises Busy; never where nothing waits, as a call of more asks than the queue holds would else never be."""
        if self.depth and self.depth + count > self.limit:
            raise Busy

    @property
    def depth(self) -> int:
        """Asks that wait."""
        return len(self._waiting) + self._others

    async def _work(self) -> None:
        while self._waiting:
            retriever = self._waiting[0].retriever  # around a reload two artifacts answer, each its own
            batch = [one for one in self._waiting if one.retriever is retriever][: self.largest]
            taken = set(map(id, batch))
            self._waiting = [one for one in self._waiting if id(one) not in taken]
            live = [one for one in batch if not one.result.done()]  # a caller that gave up has cancelled its own
            if live:
                await self._answer(live)

    async def _answer(self, batch: list[_Waiting]) -> None:
        self.observe(len(batch))
        try:
            results = await self._on_thread(_results, batch)
        except Exception as error:
            if len(batch) > 1:  # one of them is to blame, and the others are not to suffer for it
                for one in batch:
                    await self._answer([one])
            elif not batch[0].result.done():
                batch[0].result.set_exception(error)
            return
        for one, result in zip(batch, results, strict=True):
            if not one.result.done():
                one.result.set_result(result)

    async def _on_thread(self, function: Callable, *arguments):
        return await asyncio.get_running_loop().run_in_executor(self.thread, function, *arguments)

    def close(self) -> None:
        self.thread.shutdown(wait=True, cancel_futures=True)
