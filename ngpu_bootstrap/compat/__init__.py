"""What clients written for the NGPU cloud call, on the same core as everything else; off unless an operator asks.

`cloud` is their workspaces (`/ngpu/api/v1/...`: accounts, images, products, groups), `user_calls` what they call under
`/user/` beyond the documents, `rows` how their accounts are stored, `passwords` and `forms` what the names say. Nothing
outside this package knows of it but the daemon that puts it in, and the front that asks it (`front.tasks_api`,
`front.routes`).
"""
