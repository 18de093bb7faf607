"""Clients told of the end of their tasks.

`rules` is pure: which URLs and addresses may be called, what is sent, how it is signed, when it is tried again.
`caller` makes the calls. What is due is in the store (`store.webhook_rows`), made in the commit that accepts the task.
"""
