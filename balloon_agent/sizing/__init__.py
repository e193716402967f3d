"""How big the balloon should be, and the walk towards that size."""
