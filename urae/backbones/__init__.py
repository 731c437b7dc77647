"""FLUX: loading a stock pipeline and one forward signature for its transformer."""
