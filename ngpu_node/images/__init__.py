"""Images on a node: found, fetched and verified when a deployment wants one, removed when their room is needed.

`images.Images.ensure` is what the rest of the node calls; `problems` says what can go wrong. One module each: what a
registry says (`registry`, `manifests`), the engine's calls (`engine_images`), tars from URLs (`download`, `archive`),
how far a pull is (`progress`), when to try again (`retrying`), what is here and may go (`shelf`, `disk`).
"""
