"""Who is there and what runs where: `nodes` is the live view, `workspaces` what clients own, `control` the protocol
nodes speak with us, `assignment` the pure decision which node should run which workspace."""
