"""Guest memory: the ledger, the sources that it is taken from, and the agent's end of the processes that hold it."""
