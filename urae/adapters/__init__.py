"""Adapters as named peft adapters on a stock pipeline: files, minor components, conversion."""
