"""The engine, watched: what each step did to requests and blocks, as changes, for pages that draw it.

core:   Watch.planned, per step --a record--> Watch.take, ten times a second --frame--> View
front:  Viewers.show --frame--> whoever iterates over `Viewers.frames`

A frame is JSON: ``records``, one per step, and ``full``, the state before them, when somebody begins to watch. A record
is applied in this order: ``gone``, ``starts``, ``tables``, the batch, ``blocks``. Nothing is recorded while nobody
watches. There is no text, no token and no request's id in it: requests go by the number of their arrival. Tenants have
the names that the file of tenants gives them, as in the metrics.
"""

from __future__ import annotations

import asyncio
import json
import time
from collections import deque
from collections.abc import AsyncGenerator, Callable
from itertools import groupby
from typing import Any

from nanovllm.engine.block_pool import PADDING_BLOCK
from nanovllm.engine.plan import StepPlan
from nanovllm.engine.request import Request
from nanovllm.engine.scheduler import Scheduler

FRAME_INTERVAL = 0.1  # seconds between frames, at least
QUEUE_SHOWN = 16  # requests at the head of the queue
MOST_UNREAD = 32  # frames; who leaves more unread gets the whole state anew when he reads again
LOST = b'{"lost":true}'  # the frame that tells of the engine's death

Json = dict[str, Any]


class Watch:
    """Records the steps of a scheduler. A step that only decodes the same rows again costs microseconds.

    Args:
        scheduler: what is watched.
        budget: tokens that a step may compute.
    """

    def __init__(self, scheduler: Scheduler, budget: int) -> None:
        self._scheduler = scheduler
        self._budget = budget
        self._tables: dict[str, Request] = {}  # requests that hold blocks, by name
        self._in_row: dict[int, Request] = {}  # the last that entered it
        self._rows: list[int] = []  # of the last step, if all of them decoded
        self._records: list[Json] = []
        self._full: Json | None = self._state()
        self._last_frame = 0.0
        self._changed: set[int] = set()
        scheduler.kv.pool.changed = self._changed

    def renew(self) -> None:
        """Begin the next frame with the whole state: somebody new watches."""
        self._records.clear()
        self._changed.clear()
        self._full = self._state()

    def close(self) -> None:
        """Stop watching."""
        self._scheduler.kv.pool.changed = None

    def planned(self, plan: StepPlan) -> None:
        """A step was planned; the record shows the blocks as they are while it runs."""
        record = self._counts()
        record["step"] = plan.step
        record["sampled"] = len(plan.sampled)
        decoding = plan.num_tokens == len(plan.rows)
        if plan.starts or not decoding or plan.rows != self._rows:  # else the same rows decode once more
            self._batch(plan, record)
        if plan.starts:
            rows = {start.row for start in plan.starts}
            started = [each for each in zip(plan.requests, plan.num_computed, strict=True) if each[0].row in rows]
            record["starts"] = [{**_facts(request), "computed": computed} for request, computed in started]
            self._tables.update((_name(request), request) for request, _ in started)
            self._in_row.update((request.row, request) for request, _ in started)
        if plan.block_updates:
            record["tables"] = [
                (_name(request), first, blocks)
                for row, first, blocks in plan.block_updates
                if (request := self._in_row[row]).row == row  # else it was preempted while the step was planned
            ]
        if plan.copies:
            record["copies"] = plan.copies
        self._changes(record)
        self._records.append(record)

    def take(self, idle: bool) -> bytes | None:
        """The frame that is due; None: none is. ``idle``: there will be no further step for now."""
        now = time.monotonic()
        if self._full is None and not idle and now - self._last_frame < FRAME_INTERVAL:
            return None
        if idle and self._changed:  # what the last step's end has freed
            record = self._counts()
            self._changes(record)
            self._records.append(record)
            self._rows = []
        if self._full is None and not self._records:
            return None
        frame: Json = {"records": self._records}
        if self._full is not None:
            frame["full"] = self._full
        self._full, self._records, self._last_frame = None, [], now
        return json.dumps(frame, separators=(",", ":")).encode()

    def _batch(self, plan: StepPlan, record: Json) -> None:
        """Who is in the step: names of those that decode, and chunks (name, first position, tokens) of prompts."""
        decodes, chunks = [], []
        for request, start, count in zip(plan.requests, plan.num_computed, plan.num_new, strict=True):
            if count == 1 and start >= request.num_prompt_tokens:
                decodes.append(_name(request))
            else:
                chunks.append((_name(request), start, count))
        record["decodes"] = decodes
        if chunks:
            record["chunks"] = chunks
        self._rows = [] if chunks else list(plan.rows)

    def _counts(self) -> Json:
        scheduler = self._scheduler
        record: Json = {"time": round(time.monotonic(), 5), "running": len(scheduler.running)}
        if scheduler.num_waiting:
            record["waiting"] = scheduler.num_waiting
            record["queue"] = [(_name(each), each.num_tokens) for each in scheduler.waiting.first(QUEUE_SHOWN)]
        if tenants := scheduler.waiting.tenants():
            record["tenants"] = tenants  # name -> requests that run, and that wait
        return record

    def _changes(self, record: Json) -> None:
        """Tables that are gone, and blocks (id, references, whether the prefix cache finds it) that have changed."""
        if not self._changed:
            return
        pool = self._scheduler.kv.pool
        gone = [(name, request) for name, request in self._tables.items() if not request.blocks]
        if gone:
            record["gone"] = [(name, request.finish_reason or "preempted") for name, request in gone]
            for name, _ in gone:
                del self._tables[name]
        refs, hashes = pool.ref_count, pool.hash_of
        record["blocks"] = [(block, refs[block], int(hashes[block] is not None)) for block in sorted(self._changed)]
        self._changed.clear()

    def _state(self) -> Json:
        """Everything there is now. Equal neighbours among the blocks are one run: (count, references, cached)."""
        scheduler = self._scheduler
        pool = scheduler.kv.pool
        holders = (*scheduler.running, *scheduler.leaving.values(), *scheduler.held.values())
        self._tables = {_name(request): request for request in holders if request.blocks}
        self._in_row = {request.row: request for request in holders}
        self._rows = []
        cells = zip(pool.ref_count, (int(each is not None) for each in pool.hash_of), strict=True)
        return {
            **self._counts(),
            "num_blocks": pool.num_blocks,
            "padding_block": PADDING_BLOCK,
            "block_size": scheduler.kv.block_size,
            "budget": self._budget,
            "blocks": [(sum(1 for _ in run), *cell) for cell, run in groupby(cells)],
            "requests": [
                {**_facts(each), "computed": each.num_computed, "table": list(each.blocks)}
                for each in self._tables.values()
            ],
        }


class Viewers:
    """Those who watch, at the front.

    Args:
        switch: called with whether anybody watches; called again when the whole state is wanted anew.
    """

    def __init__(self, switch: Callable[[bool], None]) -> None:
        self._switch = switch
        self._unread: dict[int, deque[bytes]] = {}
        self._news: dict[int, asyncio.Event] = {}
        self._lost: set[int] = set()  # have left too much unread
        self._number = 0
        self._closed = False

    def __len__(self) -> int:
        return len(self._unread)

    def show(self, frame: bytes) -> None:
        """A frame has come."""
        for number, unread in self._unread.items():
            if number in self._lost:
                continue
            unread.append(frame)
            if len(unread) > MOST_UNREAD:
                unread.clear()
                self._lost.add(number)
            self._news[number].set()

    def renew(self) -> None:
        """The engine is a new one."""
        if self._unread:
            self._switch(True)

    def close(self) -> None:
        """End all `frames`."""
        self._closed = True
        for news in self._news.values():
            news.set()

    async def frames(self) -> AsyncGenerator[bytes, None]:
        """Watch from now on; leaving the iteration ends it."""
        self._number += 1
        number = self._number
        unread = self._unread[number] = deque()
        news = self._news[number] = asyncio.Event()
        try:
            self._switch(True)
            while not self._closed:
                if number in self._lost:
                    self._lost.discard(number)
                    self._switch(True)
                while unread:
                    yield unread.popleft()
                if number not in self._lost and not self._closed:  # both may have changed while a frame was out
                    news.clear()
                    await news.wait()
        finally:
            del self._unread[number], self._news[number]
            self._lost.discard(number)
            if not self._unread:
                self._switch(False)


def _name(request: Request) -> str:
    """The number of its arrival; of the second and later outputs of a prompt also theirs."""
    _, arrival, index = request.key
    return f"{arrival}.{index}" if index else str(arrival)


def _facts(request: Request) -> Json:
    """What does not change while a request is in the batch; lengths in tokens."""
    return {
        "name": _name(request),
        "prompt": request.num_prompt_tokens,
        "known": request.num_tokens,  # prompt, and output generated before a preemption
        "cached": request.num_cached_tokens,
        "limit": request.max_total,
        "priority": request.key[0],
        "preemptions": request.num_preemptions,
    }
