"""The second program: a holder owns balloon memory and outlives the agent. It imports linux, frames and errors only."""
