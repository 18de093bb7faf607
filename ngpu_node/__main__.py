"""`python -m ngpu_node`: the command `ngpu-node` where the distribution is not installed."""

from ngpu_node.cli import app

app(prog_name="ngpu-node")
