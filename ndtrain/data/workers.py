"""Encode rows in several processes, in order."""

from __future__ import annotations

import multiprocessing
import os
import signal
from collections import deque
from collections.abc import Iterable, Iterator, Mapping, Sequence
from concurrent.futures import Future, ThreadPoolExecutor, wait
from contextlib import suppress
from multiprocessing.connection import Connection
from multiprocessing.process import BaseProcess
from queue import SimpleQueue
from types import TracebackType
from typing import Any, Self

import numpy as np

from ndtrain.data.row import Encoded, Encoder, RowError
from ndtrain.errors import NdtrainError, RecipeError

# What becomes of each row: its tokens, or why it has none.
Result = Encoded | RowError | RecipeError
Fields = Mapping[str, Any]


def encode_all(encoder: Encoder, rows: Sequence[Fields]) -> list[Result]:
    """Return the tokens of each row, or its error."""
    return [_encode(encoder, fields) for fields in rows]


def _encode(encoder: Encoder, fields: Fields) -> Result:
    try:
        return encoder.encode(fields)
    except (RowError, RecipeError) as error:
        return error


class Workers:
    """Processes that encode batches of rows; a context manager, at whose end they have ended.

    They are forked from a server without threads or locks held, which has imported what the encoder needs, and end by
    themselves if this process is killed. That import takes seconds, in which this process encodes.
    """

    def __init__(self, encoder: Encoder, count: int):
        self._encoder, self._count = encoder, count
        self._idle: SimpleQueue[Connection] = SimpleQueue()
        self._processes: list[BaseProcess] = []
        # One thread waits for each process; it holds no lock meanwhile.
        self._threads = ThreadPoolExecutor(count, thread_name_prefix="tokenizing")
        self._started = self._threads.submit(self._start)

    def _start(self) -> None:
        context = multiprocessing.get_context("forkserver")
        kinds = (type(self._encoder.tokenizer), type(self._encoder))
        context.set_forkserver_preload([kind.__module__ for kind in kinds])
        for _ in range(self._count):
            ours, theirs = context.Pipe()
            process = context.Process(target=_work, args=(self._encoder, theirs), daemon=True)
            process.start()
            theirs.close()
            self._processes.append(process)
            self._idle.put(ours)

    def map(self, batches: Iterable[Sequence[Fields]]) -> Iterator[list[Result]]:
        """Yield the results of each batch in order; few batches are in memory at a time."""
        waiting: deque[Future[list[Result]]] = deque()
        for batch in batches:
            if self._started.done():
                self._started.result()
            elif not self._processes:
                yield encode_all(self._encoder, batch)
                continue
            waiting.append(self._threads.submit(self._ask, batch))
            if len(waiting) > 2 * self._count:
                yield waiting.popleft().result()
        while waiting:
            yield waiting.popleft().result()

    def _ask(self, batch: Sequence[Fields]) -> list[Result]:
        worker = self._idle.get()
        try:
            worker.send(batch)
            answer = worker.recv()
        except (EOFError, OSError) as error:
            raise NdtrainError(
                "a process that tokenizes has ended by itself, perhaps for lack of memory; set data.workers to fewer"
            ) from error
        finally:
            self._idle.put(worker)
        if isinstance(answer, BaseException):
            raise answer
        return answer  # type: ignore[no-any-return]

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, traceback: TracebackType | None
    ) -> None:
        wait([self._started])
        for process in self._processes:
            process.terminate()
        self._threads.shutdown(cancel_futures=True)
        while not self._idle.empty():
            self._idle.get().close()
        for process in self._processes:
            process.join()


def _work(encoder: Encoder, parent: Connection) -> None:
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # Ctrl-C reaches the whole terminal; the parent decides
    signal.signal(signal.SIGTERM, signal.SIG_DFL)
    os.environ["TOKENIZERS_PARALLELISM"] = "false"
    with suppress(EOFError, OSError):  # the parent has ended
        while True:
            batch = parent.recv()
            try:
                answer: Any = [_small(result) for result in encode_all(encoder, batch)]
            except Exception as error:
                answer = error
            try:
                parent.send(answer)
            except (TypeError, AttributeError):  # an exception that cannot be pickled
                parent.send(RuntimeError(repr(answer)))


def _small(result: Result) -> Result:
    """Return the result with ids of 32 bits where they fit, to send fewer bytes."""
    if not isinstance(result, Encoded) or not result.ids.size or result.ids.min() < 0 or result.ids.max() >> 31:
        return result
    return result._replace(ids=result.ids.astype(np.int32))
