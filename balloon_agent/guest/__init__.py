"""The guest around the balloon: its headroom, its memory pressure, its sysctls, its statistics."""
