"""Tries a whole network on the GPUs of the machine it runs on."""
