"""Dynamic batching: what has been asked while the model was busy is its next batch.

Nobody waits for company: an idle model begins with the first request at once, and under load batches grow by
themselves, up to a limit. One thread runs the model; the event loop stays free.
"""

from __future__ import annotations

import asyncio
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from typing import NamedTuple

from m5.serving.retriever import Answer, Ask, Retriever


class Busy(Exception):
    """More requests wait than may."""


class _Waiting(NamedTuple):
    retriever: Retriever
    ask: Ask
    answer: asyncio.Future[Answer]


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
        self._worker: asyncio.Task[None] | None = None

    async def ask(self, retriever: Retriever, asks: Sequence[Ask]) -> list[Answer]:
        """Answers of one retriever, in order; asks of one call may lie in different batches.

        Raises:
            Busy: the queue is full.
        """
        if len(self._waiting) + len(asks) > self.limit:
            raise Busy
        loop = asyncio.get_running_loop()
        mine = [_Waiting(retriever, ask, loop.create_future()) for ask in asks]
        self._waiting += mine
        if self._worker is None or self._worker.done():
            self._worker = asyncio.create_task(self._work())
        return await asyncio.gather(*(one.answer for one in mine))

    @property
    def depth(self) -> int:
        """Asks that wait."""
        return len(self._waiting)

    async def _work(self) -> None:
        while self._waiting:
            retriever = self._waiting[0].retriever  # around a reload two artifacts answer, each its own
            batch = [one for one in self._waiting if one.retriever is retriever][: self.largest]
            taken = set(map(id, batch))
            self._waiting = [one for one in self._waiting if id(one) not in taken]
            live = [one for one in batch if not one.answer.done()]  # whoever has hung up is left out
            if not live:
                continue
            self.observe(len(live))
            try:
                answers = await self.run(retriever.recommend, [one.ask for one in live])
            except Exception as error:
                for one in live:
                    if not one.answer.done():
                        one.answer.set_exception(error)
                continue
            for one, answer in zip(live, answers, strict=True):
                if not one.answer.done():
                    one.answer.set_result(answer)

    async def run(self, function: Callable, *arguments):
        """Something else on the model's thread."""
        return await asyncio.get_running_loop().run_in_executor(self.thread, function, *arguments)

    def close(self) -> None:
        self.thread.shutdown(wait=True, cancel_futures=True)
