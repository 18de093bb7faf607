"""A workspace that answers GPU challenges: proves how fast and how large the GPU is that it was given.

What is computed, and why it proves anything, is told in `ngpu_protocol/challenge`. This is the prover's side: it needs
NumPy, and PyTorch or CuPy to use a GPU. It shares no code with the verifier.
"""
