"""The agent's publications: snapshot, control socket, metrics. This layer lies below the agent, and never calls it by name."""
