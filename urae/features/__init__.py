"""Cached latents and prompt embeddings: images, buckets, store, dataset."""
