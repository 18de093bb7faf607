"""`python -m ngpu_bootstrap`: the command `ngpu-bootstrap` where the distribution is not installed."""

from ngpu_bootstrap.cli import app

app(prog_name="ngpu-bootstrap")
