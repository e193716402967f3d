"""The daemon around the balloon: event loop, control socket, metrics, and what survives a restart."""
