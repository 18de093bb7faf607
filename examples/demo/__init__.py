"""The demonstration (``scripts/demo``): a whole network on this machine, three kinds of task, their receipts."""
