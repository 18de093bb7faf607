"""A small true workspace: an n-gram language model behind an OpenAI-style HTTP interface.

Standard library only, so that it runs with nothing but an interpreter in the image. ``model`` learns and samples,
``http_server`` speaks HTTP/1.1 on asyncio, ``websocket`` speaks RFC 6455, ``app`` says what each path answers and
``__main__`` runs it: ``python -m ngram_chat --port 8000``.
"""
