"""The bootstrap peer: clients call it over plain HTTP, nodes with GPUs run what they ask for.

`front` and `api` face clients, `registry` faces nodes, `scheduling` chooses, `dispatch` carries tasks through,
`tasks` decides what may happen to one, `store` keeps what was promised, `daemon` builds it all. Clients' credentials
stay in `credentials`; nothing below `front` ever sees one.
"""
