"""A load generator that kills, stalls and floods a server of this machine, and counts what comes of it.

client.py     one request as cheap as it gets: a raw socket, read fast, slowly or not to the end
server.py     the server under test: its processes, their memory, files and threads, its metrics
front.py      `nanovllm serve` whose engine is engine.py
engine.py     an engine without a model under the invariant checker, with steps that fail now and then
scenarios.py  hold, overload, soak, flood, kill: what is done, what must hold, what is measured
__main__.py   python -m tests.load --help

Everything is bounded in number and time, and nothing but the loopback address is spoken to.
"""
