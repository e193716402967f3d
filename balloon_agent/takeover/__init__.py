"""Things taken from the machine and given back: device, locks, state on record, restore."""
