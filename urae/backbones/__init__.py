"""FLUX and what it runs on: loading, one forward, the VAE in little memory, devices and ranks."""
