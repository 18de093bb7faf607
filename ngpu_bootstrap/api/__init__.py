"""The documented API under `/api/v1`, and what operators and monitors ask: FastAPI, for everything that is not hot.

`models` is what goes in and out, `app` the calls, `page` the documentation page.
"""
