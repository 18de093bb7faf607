"""The HTTP face of a bootstrap peer for its clients.

`routes` decides what a request is; `paths`, `bodies` and `answers` are pure and say what it asks for and how the
answer looks; `proxy` and `tasks_api` carry it out. What is not hot goes to the documented application in
`ngpu_bootstrap.api`.
"""
