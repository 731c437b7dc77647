"""An embedded FLUX and its world: rendered scenes, their captions, and a check that reads them."""
