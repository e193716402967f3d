"""What ``balloon-agent doctor`` looks at, a small function each; by what it is about."""
