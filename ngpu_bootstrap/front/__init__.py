"""The HTTP face of a bootstrap peer for its clients.

`routes` decides what a request is and answers for what goes wrong; `proxy` is the transparent form, `tasks_api` the
documented one. `paths`, `bodies`, `answers` and `callers` are pure: what a request asks for, who sends it, how the
answer looks. What is not hot goes to the documented application in `ngpu_bootstrap.api`.
"""
