"""From prompts to PNG files at 2K and 4K."""
