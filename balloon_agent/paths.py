"""Paths of an agent in its guest. Imports nothing, for the quick ``balloonctl status``."""

DEFAULT_RUN_DIR = "/run/balloon-agent"
# The control socket, in the run directory.
SOCKET_NAME = "control"
