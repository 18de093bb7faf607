"""A workspace that paints: procedural image synthesis and image-to-image, on NumPy and Pillow, without a model."""
