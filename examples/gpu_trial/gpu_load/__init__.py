"""A workspace that keeps a GPU busy for as long as it is asked to, and says for how long it was."""
