"""Which node runs an attempt: pure. No clock, socket, randomness or event loop; `now` and chance are arguments.

    reasons    why a candidate is passed over, each with its word
    load       room: slots of nodes and deployments, ours and others'
    history    what a node did before: moving averages of time and failure, times set aside
    standing   what a node's receipts say about it
    pool       the index of one workspace's candidates, and the choice
    affinity   keys that stick to a node
    waiting    the line of calls that wait for a slot
    placement  a choice explained afterwards

`registry.nodes` is the shell around them. The theory is in docs/scheduling.md.
"""
