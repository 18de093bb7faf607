"""What both daemons need to be daemons: configuration, keystore, data directory, logs, signals, systemd, metrics.

Nothing here knows what a node or a bootstrap does; `ngpu_node` and `ngpu_bootstrap` import it, never the other way
round. One subject a module:

- `settings`: TOML, environment and flags to one frozen, validated object; the documented sample file.
- `keystore`: the account key at rest, and the passphrase that opens it.
- `datadir`: the directory a daemon owns alone.
- `init_command`: the `init` command of both daemons.
- `logs`: structured events, secrets taken out.
- `drain`: what SIGTERM and SIGINT mean.
- `notify`: what systemd is told.
- `metrics`: the Prometheus exposition.
- `entry`: from a command to a running daemon and back to an exit code.
- `errors`: the mistakes an operator can mend.
"""
