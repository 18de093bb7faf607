"""A workspace that learns styles from pictures and paints in them, on NumPy and Pillow: small, and really trained."""
