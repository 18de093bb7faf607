"""Small true workspaces, and the demonstration that runs one through the whole network."""
