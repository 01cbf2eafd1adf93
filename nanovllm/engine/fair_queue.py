"""Who waits, in the order of being taken: by priority, within a priority fairly between tenants, then by arrival.

    FairQueue --priority--> Level --tenant--> Flow: a heap of requests, and a virtual time

A tenant's virtual time is the service its requests have had, in tokens, divided by its weight; whoever is furthest
behind goes next. Tenants that always have requests waiting so get service in proportion to their weights, whatever the
number and length of their requests, and none of them starves: the others' virtual times pass its own.

This is start-time fair queueing (Goyal, Vin and Cheng, SIGCOMM 1996) with service charged as it is given, since nobody
knows how long an output will be: the virtual token counter of Sheng et al. ("Fairness in Serving Large Language
Models", OSDI 2024, section 4). Two rules besides:

- Service is charged only while somebody waits. What is used while there is enough for all is held against nobody.
- A request that has begun keeps its place, the virtual time at its begin: it goes before all that have not, however
  often it is preempted, and it is preempted only for requests that have begun before it.

With one tenant nothing is charged and the order is that of arrival.
"""

from __future__ import annotations

import heapq
from bisect import bisect_left, insort
from collections import deque
from collections.abc import Iterable, Iterator

from nanovllm.engine.request import Request

GENERATED = 2.0  # service in a generated token; in a computed token of a prompt it is 1


class Flow:
    """The requests of one tenant at one level."""

    __slots__ = ("heap", "level", "num_running", "num_waiting", "tenant", "virtual", "weight")

    def __init__(self, tenant: str, level: Level) -> None:
        self.tenant = tenant
        self.level = level
        self.weight = 1.0  # of the request that came last
        self.virtual = 0.0
        self.heap: list[tuple[tuple[int, int, int], Request]] = []  # by key; finished entries are skipped when met
        self.num_waiting = 0
        self.num_running = 0

    @property
    def idle(self) -> bool:
        return not (self.num_waiting or self.num_running)

    def head(self) -> Request:
        """The first that waits; there must be one."""
        while self.heap[0][1].finished:
            heapq.heappop(self.heap)
        return self.heap[0][1]

    def first(self, count: int) -> list[Request]:
        """The first that wait, in order. O(count log count), however many there are."""
        heap = self.heap
        found: list[Request] = []
        frontier = [(heap[0][0], 0)] if heap else []
        while frontier and len(found) < count:
            _, index = heapq.heappop(frontier)
            if not heap[index][1].finished:
                found.append(heap[index][1])
            for child in (2 * index + 1, 2 * index + 2):
                if child < len(heap):
                    heapq.heappush(frontier, (heap[child][0], child))
        return found


class Level:
    """The tenants that have requests of one priority.

    Attributes:
        virtual: the latest place that was given; no flow with waiting requests is behind it.
    """

    __slots__ = ("flows", "num_running", "num_waiting", "priority", "virtual")

    def __init__(self, priority: int) -> None:
        self.priority = priority
        self.flows: dict[str, Flow] = {}
        self.virtual = 0.0
        self.num_waiting = 0
        self.num_running = 0

    @property
    def contended(self) -> bool:
        """Whether service is to be charged."""
        return len(self.flows) > 1 and self.num_waiting > 0

    def now(self) -> float:
        """Where a flow begins that had nothing waiting: level with the one furthest behind, for the past counts not."""
        return max(self.virtual, min((flow.virtual for flow in self.flows.values() if flow.num_waiting), default=0.0))


class FairQueue:
    """Waiting requests. It is told, too, which run, since their service counts.

    A request's ``key`` (priority, arrival, index among forks) orders those of one tenant. ``place`` (priority, virtual
    time at its begin, arrival, index) is set when it begins, and orders those that run.
    """

    def __init__(self) -> None:
        self._levels: dict[int, Level] = {}
        self._backlog: list[int] = []  # priorities at which somebody waits, ascending

    def __len__(self) -> int:
        return sum(self._levels[priority].num_waiting for priority in self._backlog)

    def __iter__(self) -> Iterator[Request]:
        """Everyone who waits, in no order."""
        for flow in self.flows():
            yield from (request for _, request in flow.heap if not request.finished)

    def flows(self) -> Iterator[Flow]:
        """All there are."""
        for level in self._levels.values():
            yield from level.flows.values()

    # -- waiting -------------------------------------------------------------------------------------------------

    def push(self, request: Request) -> None:
        """A request waits, for the first time or again. Forks have the place of the request they fork from."""
        flow = request.flow = self._flow(request)
        level = flow.level
        if flow.num_waiting == 0:
            flow.virtual = max(flow.virtual, level.now())
        parent = request.fork_of
        if request.place is None and parent is not None and parent.place is not None:
            request.place = (*parent.place[:2], *request.key[1:])
        flow.weight = request.weight
        heapq.heappush(flow.heap, (request.key, request))
        flow.num_waiting += 1
        level.num_waiting += 1
        if level.num_waiting == 1:
            insort(self._backlog, level.priority)

    def peek(self) -> Request | None:
        """Who goes next."""
        if not self._backlog:
            return None
        flows = self._levels[self._backlog[0]].flows.values()
        return min((flow for flow in flows if flow.num_waiting), key=_order).head()

    def take(self, request: Request) -> None:
        """Whom `peek` has named waits no more; `started` must follow."""
        flow = request.flow
        assert flow is not None
        flow.head()  # is this request, whatever has finished before it
        heapq.heappop(flow.heap)
        self._leave(flow)

    def drop(self, request: Request) -> None:
        """A request that waits here has finished."""
        flow = request.flow
        assert flow is not None and request.finished
        self._leave(flow)
        if len(flow.heap) > 2 * flow.num_waiting + 64:  # mostly such
            flow.heap = [entry for entry in flow.heap if not entry[1].finished]
            heapq.heapify(flow.heap)
        self._forget(flow)

    def first(self, count: int) -> list[Request]:
        """Who will be taken if nobody else comes, in order, as far as lengths of prompts tell."""
        found: list[Request] = []
        for priority in self._backlog:
            flows = [flow for flow in self._levels[priority].flows.values() if flow.num_waiting]
            lanes = {flow: deque(flow.first(count - len(found))) for flow in flows}
            ahead = dict.fromkeys(flows, 0.0)
            while lanes and len(found) < count:
                flow = min(lanes, key=lambda flow: _rank(lanes[flow][0], flow.virtual + ahead[flow]))
                request = lanes[flow].popleft()
                found.append(request)
                if request.place is None:
                    ahead[flow] += request.num_tokens / flow.weight
                if not lanes[flow]:
                    del lanes[flow]
        return found

    # -- service -------------------------------------------------------------------------------------------------

    def started(self, request: Request) -> None:
        """A request runs, with its first blocks. If it has just begun, its prompt is charged."""
        flow = request.flow = self._flow(request)
        level = flow.level
        flow.num_running += 1
        level.num_running += 1
        if request.place is None:
            request.place = (level.priority, flow.virtual, *request.key[1:])
            level.virtual = max(level.virtual, flow.virtual)
            if level.contended:
                flow.virtual += (request.num_prompt_tokens - request.num_cached_tokens) / flow.weight

    def stopped(self, request: Request) -> None:
        """A request does not run any more: it has finished, or waits again."""
        flow = request.flow
        assert flow is not None
        flow.num_running -= 1
        flow.level.num_running -= 1
        self._forget(flow)

    @property
    def contended(self) -> bool:
        """Whether anybody's service is to be charged; with one tenant it never is."""
        return any(self._levels[priority].contended for priority in self._backlog)

    def charge(self, requests: Iterable[Request]) -> None:
        """Each of these requests gets a token."""
        for request in requests:
            flow = request.flow
            if flow is not None and flow.level.contended:
                flow.virtual += GENERATED / flow.weight

    def tenants(self) -> dict[str, tuple[int, int]]:
        """Of tenants that have a name: how many requests run, and how many wait."""
        found: dict[str, tuple[int, int]] = {}
        for flow in self.flows():
            if flow.tenant:
                running, waiting = found.get(flow.tenant, (0, 0))
                found[flow.tenant] = (running + flow.num_running, waiting + flow.num_waiting)
        return found

    # -- bookkeeping ---------------------------------------------------------------------------------------------

    def _flow(self, request: Request) -> Flow:
        priority, tenant = request.key[0], request.tenant
        level = self._levels.get(priority)
        if level is None:
            level = self._levels[priority] = Level(priority)
        flow = level.flows.get(tenant)
        if flow is None:
            for other in [other for other in level.flows.values() if other.idle and other.virtual <= level.virtual]:
                del level.flows[other.tenant]
            flow = level.flows[tenant] = Flow(tenant, level)
        return flow

    def _leave(self, flow: Flow) -> None:
        level = flow.level
        flow.num_waiting -= 1
        level.num_waiting -= 1
        if flow.num_waiting == 0:
            flow.heap.clear()
        if level.num_waiting == 0:
            del self._backlog[bisect_left(self._backlog, level.priority)]

    def _forget(self, flow: Flow) -> None:
        """Drop what has no effect any more: a level without requests; an idle flow that would begin at `now` anyway."""
        level = flow.level
        if level.num_waiting == level.num_running == 0:
            self._levels.pop(level.priority, None)
        elif flow.idle and flow.virtual <= level.virtual:
            level.flows.pop(flow.tenant, None)


def _order(flow: Flow) -> tuple[float, tuple[int, int, int]]:
    return _rank(flow.head(), flow.virtual)


def _rank(request: Request, virtual: float) -> tuple[float, tuple[int, int, int]]:
    """Smaller goes first: by place if it has begun, else by its tenant's virtual time; then by arrival."""
    return (virtual if request.place is None else request.place[1], request.key)
