"""The daemon around the balloon: its start, its turn, a device that fails, systemd."""
