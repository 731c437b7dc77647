"""Cached latents and prompt embeddings."""
