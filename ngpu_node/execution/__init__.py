"""One attempt at a task: admitted or refused, passed through, metered, receipted.

executor.py      what other peers may ask over HTTP; an order among it
admission.py     admit or refuse (pure)
attempts.py      the attempts that run: slots, clocks, one receipt for each, the drain
attached.py      an attempt that lives and dies with the stream that ordered it
detached.py      one that outlives it, and its answer in spool.py
passthrough.py   to the workspace and back, field by field and byte by byte; upgrade.py after a 101
attempt.py       what has gone through so far, and the receipt that follows (pure)
meter.py         GPU time (pure)
"""
