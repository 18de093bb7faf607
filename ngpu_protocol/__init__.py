"""What peers say to each other and can prove.

The modules at this level are pure: they take values, bytes and the time, and return values. No clock, no socket, no
randomness. `identity` and `networks` say who and where; `orders`, `receipts` and `acknowledgements` are what is
signed, over the one encoder in `typed_data`; `verification` judges a receipt and `receipt_file` carries it to a third
party; `control` and `workspaces` are what a node and a bootstrap tell each other; `wire_errors` and `task_ids` are
small tables both need.

`p2p` is the only code that touches py-libp2p, and `http1` speaks HTTP/1.1 on any stream.
"""
