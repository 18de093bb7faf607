"""Tasks run again on other nodes, where a workspace says that the same request gets the same answer.

Which tasks, only this bootstrap can know; who disagrees with the majority gets no more of that workspace's tasks for a
while and a dispute. `docs/trust.md` has what it costs a cheat.

    sampling.py   how often, and which: pure
    deciding.py   who may look again, and what different answers mean: pure
    waiting.py    what waits, and how it is kept over a restart
    desk.py       the queue, the runs, and what follows
"""
