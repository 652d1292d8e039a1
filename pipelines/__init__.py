"""The jobs. Each file reads as the story of one of them."""
