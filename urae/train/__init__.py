"""One training loop; 2K and 4K, LoRA and minor components are recipes of it."""
