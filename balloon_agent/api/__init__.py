"""What the agent publishes: snapshot, control socket, metrics. It lies below the agent, and never calls it by name."""
