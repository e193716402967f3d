"""The two commands: balloon-agent, which runs as a daemon, and balloonctl, which talks to it."""
