"""The GPU owner's daemon: it dials the bootstraps its owner trusts, runs their workspaces and answers for the work.

Where to look (arrows point down; `daemon.py` alone knows everybody):

    daemon.py         builds the parts and opens the nursery
    cli.py config.py  what an owner types and writes
    links.py          one task per bootstrap: connected for ever, heartbeats out, wishes in
    courier.py        receipts that were not acknowledged yet are offered again
    execution/        admit an order, pass the request through, meter it, receipt it
    ledger.py         the receipts' chains and acknowledgements, durable before anything is promised
    deployments.py    which workspaces are wanted here, and which of them can be served now
    services.py       model servers that run beside the node; model_api.py is how they register
    engine/           containers
    upstreams.py      connections to what really serves a workspace; probes.py asks whether it does
    gpus/             the GPUs: which there are, whether they are well, how busy tasks kept them
    admin.py          what the owner's own commands ask; metrics.py what is counted
"""
